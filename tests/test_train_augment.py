"""Random changes to images: what they change, what they keep, and that they can be repeated."""

import random
from functools import partial

import numpy as np
import pytest
import torch

from kdkernels.train.augment import mix, pipeline, shift
from kdkernels.train.config import Augment

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = [
    {"crop": 2},
    {"flip": 1.0},
    {"flip": 0.5},
    {"rotation": 20},
    {"rotation": 180},
    {"color": 0.5},
    {"color": 1.0},
    {"randaugment": 1},
    {"randaugment": 15},
    {"randaugment": 29},
    {"crop": 1, "flip": 0.5, "rotation": 10, "color": 0.2, "randaugment": 9},
]


def config(**options):
    return Augment(**{"crop": 0, **options})


def batch(channels=1, n=8, height=10, width=12):
    """Smooth and not symmetric, so that whatever is done to it can be seen; never black."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    plane = 0.2 + 0.5 * rows / height + 0.2 * columns / width
    scale = torch.linspace(0.6, 1.0, n * channels).reshape(n, channels, 1, 1)
    return plane * scale


def seeded(function, seed=0):
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    return function()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_each_option_changes_images_and_leaves_them_images(options, channels):
    images = batch(channels)
    before = images.clone()
    augmented = pipeline(config(**options), channels)
    unchanged = 0
    for seed in range(5):
        changed = seeded(lambda: augmented(images), seed)
        assert torch.equal(images, before)
        assert changed.shape == images.shape
        assert changed.dtype == images.dtype
        assert changed.isfinite().all()
        assert changed.min() >= 0
        assert changed.max() <= 1
        unchanged += torch.equal(changed, images)
    assert unchanged < 2  # RandAugment may draw what changes nothing


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_each_option_is_the_same_again_from_the_same_seed(options, channels):
    images = batch(channels)
    made = [pipeline(config(**options), channels) for _ in range(2)]
    first, again = (seeded(partial(augmented, images)) for augmented in made)
    other = seeded(lambda: made[0](images), 1)
    assert torch.equal(first, again)
    assert options == {"flip": 1.0} or not torch.equal(first, other)


@pytest.mark.parametrize("channels", [1, 3])
def test_all_off_is_the_identity_and_draws_nothing(channels):
    images, labels = batch(channels), torch.arange(8)
    before = torch.get_rng_state()
    assert pipeline(config(), channels)(images) is images
    assert mix(images, labels, config()) == (images, None)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_flip_is_a_mirror_image_as_often_as_asked():
    images = batch(3, n=200)
    assert torch.equal(pipeline(config(flip=1.0), 3)(images), images.flip(3))
    changed = seeded(lambda: pipeline(config(flip=0.3), 3)(images))
    flipped = (changed == images.flip(3)).flatten(1).all(1)
    assert (flipped | (changed == images).flatten(1).all(1)).all()
    assert 40 <= flipped.sum() <= 80


@pytest.mark.parametrize("pixels", [1, 2, 15])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_shift_moves_each_image_as_a_whole_and_zeros_come_in(pixels, channels):
    images = batch(channels, n=300, height=5, width=4)
    moved = seeded(lambda: shift(images, pixels))
    assert moved.shape == images.shape
    assert moved.is_contiguous()
    padded = torch.nn.functional.pad(images, [pixels] * 4)
    found = torch.zeros(len(images), dtype=torch.int64)
    offsets = [(y, x) for y in range(2 * pixels + 1) for x in range(2 * pixels + 1)]
    for y, x in offsets:
        expected = padded[:, :, y : y + 5, x : x + 4]
        found += (moved == expected).flatten(1).all(1) & moved.flatten(1).any(1)
    empty = ~moved.flatten(1).any(1)
    assert ((found == 1) | empty).all()
    assert empty.any() == (pixels > 4)  # moved out of sight


def test_every_shift_occurs_and_about_as_often():
    image = torch.zeros(2000, 1, 5, 5)
    image[:, :, 2, 2] = 1
    counts = seeded(lambda: shift(image, 2)).sum((0, 1))
    assert counts.sum() == 2000  # 25 places, 80 each
    assert counts.min() > 40
    assert counts.max() < 120


def test_a_shift_by_nothing_is_nothing():
    assert torch.equal(shift(batch(3), 0), batch(3))


def mixed(seed=0, n=8, channels=3, **options):
    images = batch(channels, n)
    got, (others, share) = seeded(lambda: mix(images, torch.arange(n), config(**options)), seed)
    assert torch.equal(images, batch(channels, n))
    assert got.shape == images.shape
    assert got.dtype == images.dtype
    assert sorted(others.tolist()) == list(range(n))  # a permutation
    return images, got, others, share


@pytest.mark.parametrize("alpha", [0.1, 0.2, 1.0, 8.0])
@pytest.mark.parametrize("seed", range(5))
def test_mixup_is_the_linear_combination_with_the_share_that_is_returned(alpha, seed):
    images, got, others, share = mixed(seed, mixup=alpha)
    assert 0 <= share <= 1
    torch.testing.assert_close(got, share * images + (1 - share) * images[others])


@pytest.mark.parametrize(("height", "width"), [(10, 12), (1, 1), (3, 40)])
@pytest.mark.parametrize("seed", range(8))
def test_cutmix_has_pixels_of_two_images_and_the_share_of_its_own(height, width, seed):
    n = 9
    images = torch.arange(n * 3 * height * width).float().reshape(n, 3, height, width)
    got, (others, share) = seeded(lambda: mix(images, torch.arange(n), config(cutmix=1.0)), seed)
    own, other = got == images, got == images[others]
    assert (own | other).all()
    moved = others != torch.arange(n)
    shares = own[moved].float().mean((1, 2, 3))
    torch.testing.assert_close(shares, torch.full_like(shares, share))
    place = ~own[moved][0, 0]
    rows, columns = place.any(1), place.any(0)
    assert place.sum() == rows.sum() * columns.sum()  # one box
    assert torch.equal(own[moved], (~place).expand_as(own[moved]))  # the same in all


def test_the_shares_of_mixup_and_cutmix_are_those_of_the_beta_distribution():
    for options in ({"mixup": 0.2}, {"cutmix": 0.2}):
        shares = torch.tensor([mixed(seed, 2, 1, **options)[3] for seed in range(150)])
        assert 0.42 < shares.mean() < 0.58
        assert ((shares < 0.1) | (shares > 0.9)).float().mean() > 0.5  # 0.68 of Beta(0.2, 0.2)
        flat = torch.tensor([mixed(seed, 2, 1, **dict.fromkeys(options, 50.0))[3]
                             for seed in range(40)])  # fmt: skip
        assert (flat - 0.5).abs().max() < 0.25


def test_boxes_of_cutmix_occur_everywhere():
    cut = torch.zeros(10, 12)
    for seed in range(100):
        images, got, _, _ = mixed(seed, cutmix=1.0)
        cut += (got != images).flatten(0, 1).any(0)
    assert cut.min() > 0


def test_of_mixup_and_cutmix_both_occur():
    kinds = []
    for seed in range(40):
        images, got, others, share = mixed(seed, mixup=1.0, cutmix=1.0)
        linear = torch.allclose(got, share * images + (1 - share) * images[others], atol=1e-6)
        boxes = ((got == images) | (got == images[others])).all()
        assert linear or boxes
        kinds.append(bool(boxes))
    assert 8 <= sum(kinds) <= 32


@pytest.mark.parametrize("options", [{"mixup": 0.3}, {"cutmix": 0.3}, {"mixup": 1, "cutmix": 1}])
def test_a_mixture_is_the_same_again_from_the_same_seed(options):
    first, again, other = (mixed(seed, **options) for seed in (0, 0, 1))
    assert torch.equal(first[1], again[1])
    assert first[3] == again[3]
    assert not torch.equal(first[1], other[1])


@pytest.mark.parametrize("options", [{"mixup": 1.0}, {"cutmix": 1.0}], ids=str)
def test_a_single_image_is_mixed_with_itself(options):
    images, got, others, _ = mixed(n=1, **options)
    assert others.tolist() == [0]
    torch.testing.assert_close(got, images)


@pytest.mark.parametrize("alpha", [1e-300, 1e-30, 1e-3, 1e3, 1e30])
@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_every_alpha_that_is_allowed_gives_a_share(kind, alpha):
    _, got, _, share = mixed(**{kind: alpha})
    assert 0 <= share <= 1
    assert got.isfinite().all()
