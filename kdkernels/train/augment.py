"""Random changes to a batch of images in [0, 1], before teacher and student see the same of it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels.train.config import Augment
from kdkernels.train.errors import require


def pipeline(config: Augment, channels: int) -> Callable[[Tensor], Tensor]:
    """What is asked of ``crop``, ``flip``, ``rotation``, ``color``, ``randaugment``, in a row."""
    steps: list[Callable[[Tensor], Tensor]] = []
    if config.crop:
        steps.append(lambda images: shift(images, config.crop))
    if config.flip or config.rotation or config.color or config.randaugment:
        kornia = require("kornia.augmentation", "kornia", "train")
        if config.flip:
            steps.append(kornia.RandomHorizontalFlip(p=config.flip))
        if config.rotation:
            steps.append(kornia.RandomRotation(config.rotation, p=1.0))
        if config.color:
            more = (config.color, config.color / 2) if channels == 3 else (0.0, 0.0)
            steps.append(kornia.ColorJiggle(config.color, config.color, *more))
        if config.randaugment:
            random = kornia.auto.RandAugment(n=2, m=config.randaugment)
            # Some of its operations are of colours: grey images pass as RGB.
            grey = lambda images: random(images.expand(-1, 3, -1, -1)).mean(1, keepdim=True)  # noqa: E731
            steps.append(random if channels == 3 else grey)

    def augmented(images: Tensor) -> Tensor:
        for step in steps:
            images = step(images)
        return images

    return augmented


def shift(images: Tensor, pixels: int) -> Tensor:
    """Each image moved by up to ``pixels`` in both directions, zeros coming in.

    In one gather: kornia's RandomCrop, one slice after the other, took 30 times as long, which on
    small images is longer than the step.
    """
    n, _, height, width = images.shape
    padded = F.pad(images, [pixels] * 4)
    top, left = torch.randint(2 * pixels + 1, (2, n, 1, 1))
    rows = top + torch.arange(height)[:, None]  # [n, H, 1]
    columns = left + torch.arange(width)  # [n, 1, W]
    moved = padded[torch.arange(n)[:, None, None], :, rows, columns]  # [n, H, W, channels]
    return moved.permute(0, 3, 1, 2).contiguous()


def mix(
    images: Tensor, labels: Tensor, config: Augment
) -> tuple[Tensor, tuple[Tensor, float] | None]:
    """Mix each image with another of the batch, all in one proportion, by mixup or by cutmix.

    If both are asked for, a coin decides for each batch. Kornia's mixup draws the proportion
    uniformly; the papers have a Beta distribution.

    Returns:
        The images, and the labels of the others with the share that the own ones have, or None.
    """
    alphas = [a for a in (config.mixup, config.cutmix) if a]
    if not alphas:
        return images, None
    by_cutmix = not config.mixup or (len(alphas) == 2 and bool(torch.rand(()) < 0.5))
    alpha = max(config.cutmix if by_cutmix else config.mixup, 1e-30)  # 0 in float32 raises
    share = torch.distributions.Beta(alpha, alpha).sample().item()
    others = torch.randperm(len(images))
    if not by_cutmix:
        return share * images + (1 - share) * images[others], (labels[others], share)
    height, width = images.shape[2:]
    cut_height, cut_width = (round(side * (1 - share) ** 0.5) for side in (height, width))
    top = int(torch.randint(height - cut_height + 1, ()))
    left = int(torch.randint(width - cut_width + 1, ()))
    box = (..., slice(top, top + cut_height), slice(left, left + cut_width))
    images = images.clone()
    images[box] = images[others][box]
    return images, (labels[others], 1 - cut_height * cut_width / (height * width))
