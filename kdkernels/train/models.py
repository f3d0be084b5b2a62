"""Small ResNets, MobileNets and ShuffleNets, models of timm and Transformers, and their weights.

All built in take (N, channels, H, W) images of any size to (N, classes) logits. ``stem_stride=2``
makes 28x28 pixels a quarter of the work; ``dropout`` is before the last layer.
"""

from __future__ import annotations

import importlib
import re
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdkernels.train.errors import SetupError, nearest, require


def _conv_bn(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, relu: bool = True
) -> nn.Sequential:
    # No bias: batch norm subtracts it again.
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), *[nn.ReLU()] * relu)


def _classifier(
    classes: int, channels: int, stem: tuple[int, int], stages: list[nn.Module], width: int,
    dropout: float,
) -> nn.Module:  # fmt: skip
    parts = {
        "stem": _conv_bn(channels, stem[0], 3, stem[1]),
        "stages": nn.Sequential(*stages),
        "pool": nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout)),
        "head": nn.Linear(width, classes),
    }
    return nn.Sequential(OrderedDict(parts))


class _Residual(nn.Module):
    """Two 3x3 convolutions and the shortcut around them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        second = _conv_bn(outputs, outputs, 3, relu=False)
        self.body = nn.Sequential(_conv_bn(inputs, outputs, 3, stride), second)
        projection = _conv_bn(inputs, outputs, 1, stride, relu=False)
        self.shortcut = nn.Identity() if inputs == outputs and stride == 1 else projection
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.relu(self.body(x) + self.shortcut(x))
        return out


def resnet(
    classes: int, channels: int, depth: int = 8, width: int = 16, stem_stride: int = 1,
    dropout: float = 0.0,
) -> nn.Module:  # fmt: skip
    """ResNet for small images, of 6 n + 2 layers (He et al. 2016, arXiv:1512.03385)."""
    n, rest = divmod(depth - 2, 6)
    if n < 1 or rest:
        raise ValueError(f"depth must be 8, 14, 20, ..., got {depth}")
    stages: list[nn.Module] = []
    inputs = width
    for outputs, stride in ((width, 1), (2 * width, 2), (4 * width, 2)):
        blocks = [_Residual(inputs, outputs, stride)]
        stages.append(
            nn.Sequential(*blocks, *(_Residual(outputs, outputs, 1) for _ in range(n - 1)))
        )
        inputs = outputs
    return _classifier(classes, channels, (width, stem_stride), stages, inputs, dropout)


def mobilenet(
    classes: int, channels: int, width: int = 32, depth: int = 1, stem_stride: int = 1,
    dropout: float = 0.0,
) -> nn.Module:  # fmt: skip
    """MobileNet: 3x3 convolutions per channel, then 1x1 (Howard et al. 2017, arXiv:1704.04861)."""
    stages: list[nn.Module] = []
    inputs = width
    for outputs, stride in ((width, 1), (2 * width, 2), (4 * width, 2)):
        blocks = []
        for s in (stride, *[1] * (depth - 1)):
            blocks += [_conv_bn(inputs, inputs, 3, s, groups=inputs), _conv_bn(inputs, outputs, 1)]
            inputs = outputs
        stages.append(nn.Sequential(*blocks))
    return _classifier(classes, channels, (width, stem_stride), stages, inputs, dropout)


class _Inverted(nn.Module):
    """Widen, convolve per channel, narrow; a shortcut where the shapes agree."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = inputs * expansion
        widen = [_conv_bn(inputs, inner, 1)] if expansion > 1 else []
        depthwise = _conv_bn(inner, inner, 3, stride, groups=inner)
        self.body = nn.Sequential(*widen, depthwise, _conv_bn(inner, outputs, 1, relu=False))
        self.has_shortcut = inputs == outputs and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return x + out if self.has_shortcut else out


def mobilenetv2(
    classes: int, channels: int, width: float = 0.5, expansion: int = 6, stem_stride: int = 1,
    dropout: float = 0.0,
) -> nn.Module:  # fmt: skip
    """MobileNetV2 with a stem for small images (Sandler et al. 2018, arXiv:1801.04381)."""
    stages: list[nn.Module] = []
    inputs = stem = max(8, int(32 * width))
    # Width, blocks and stride of the first of them, as in the paper's table 2.
    table = ((16, 1, 1), (24, 2, 1), (32, 3, 2), (64, 4, 2), (96, 3, 1), (160, 3, 2), (320, 1, 1))
    for i, (outputs, n, stride) in enumerate(table):
        outputs = max(8, int(outputs * width))
        blocks = []
        for s in (stride, *[1] * (n - 1)):
            blocks.append(_Inverted(inputs, outputs, s, expansion if i else 1))
            inputs = outputs
        stages.append(nn.Sequential(*blocks))
    last = int(1280 * max(1.0, width))
    stages.append(_conv_bn(inputs, last, 1))
    return _classifier(classes, channels, (stem, stem_stride), stages, last, dropout)


class _Shuffled(nn.Module):
    """Half of the channels pass, or a second branch halves the image; then they are interleaved."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        half = outputs // 2
        taken = inputs if stride > 1 else inputs // 2
        depthwise = partial(_conv_bn, kernel=3, stride=stride, relu=False)
        self.body = nn.Sequential(
            _conv_bn(taken, half, 1), depthwise(half, half, groups=half), _conv_bn(half, half, 1)
        )
        side = (depthwise(inputs, inputs, groups=inputs), _conv_bn(inputs, half, 1))
        self.side = nn.Sequential(*side) if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        passed, taken = (self.side(x), x) if self.side is not None else x.chunk(2, 1)
        both = torch.stack([passed, self.body(taken)], 2)
        return both.flatten(1, 2)


def shufflenetv2(
    classes: int, channels: int, width: float = 0.5, stem_stride: int = 1, dropout: float = 0.0
) -> nn.Module:
    """ShuffleNetV2 with a stem for small images (Ma et al. 2018, arXiv:1807.11164)."""
    stages: list[nn.Module] = []
    inputs = 24
    for outputs, n in ((116, 4), (232, 8), (464, 4)):
        outputs = 2 * max(4, int(outputs * width / 2))
        rest = [_Shuffled(outputs, outputs, 1) for _ in range(n - 1)]
        stages.append(nn.Sequential(_Shuffled(inputs, outputs, 2), *rest))
        inputs = outputs
    stages.append(_conv_bn(inputs, 1024, 1))
    return _classifier(classes, channels, (24, stem_stride), stages, 1024, dropout)


MODELS: dict[str, Callable[..., nn.Module]] = {
    **{f"resnet{depth}": partial(resnet, depth=depth) for depth in (8, 14, 20, 32, 44, 56, 110)},
    **{f"resnet{depth}x4": partial(resnet, depth=depth, width=64) for depth in (8, 14, 20, 32)},
    "mobilenet": mobilenet,
    "mobilenetv2": mobilenetv2,
    "shufflenetv2": shufflenetv2,
}


class _Logits(nn.Module):
    """A classifier of Transformers as a module from images to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(pixel_values=images).logits
        return logits


def build(name: str, classes: int, channels: int, options: dict[str, Any]) -> nn.Module:
    """The model called ``name``.

    Args:
        name: one of ``MODELS``; ``timm:NAME``; ``hf:TYPE``, as Transformers calls it, from its
            configuration, or ``hf:./FOLDER``, a local checkpoint in safetensors;
            ``package.module:function``, called as ``function(classes, channels, **options)``.
        options: keyword arguments of the model or its configuration.

    Raises:
        SetupError: no such model, options it does not take, or its library is not installed.
    """
    kind, _, rest = name.partition(":")
    try:
        if kind == "timm" and rest:
            timm = require("timm", "timm", "timm")
            options = {"num_classes": classes, "in_chans": channels, **options}
            return timm.create_model(rest, **options)  # type: ignore[no-any-return]
        if kind == "hf" and rest:
            return _transformers(rest, classes, channels, options)
        if rest:
            function = getattr(importlib.import_module(kind), rest)
            return function(classes, channels, **options)  # type: ignore[no-any-return]
        if name not in MODELS:
            raise SetupError(
                f"no model {name!r}{nearest(name, MODELS)} There are {', '.join(MODELS)}"
            )
        return MODELS[name](classes, channels, **options)
    except SetupError:
        raise
    except Exception as error:  # whatever a foreign library makes of options that it does not take
        raise SetupError(f"model {name} with {options} cannot be made: {error}") from error


def _transformers(name: str, classes: int, channels: int, options: dict[str, Any]) -> nn.Module:
    transformers = require("transformers", "transformers", "hf")
    auto = transformers.AutoModelForImageClassification
    options = {"num_labels": classes, "num_channels": channels, **options}
    if Path(name).is_dir():
        model = auto.from_pretrained(name, local_files_only=True, use_safetensors=True, **options)
    else:
        model = auto.from_config(transformers.AutoConfig.for_model(name, **options))
    return _Logits(model)


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load weights from a safetensors file, or a torch file that holds nothing but tensors.

    Raises:
        SetupError: the file cannot be read, or holds the weights of another model: the tensors
            that are missing, left over or of another shape (another number of classes) are named.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            weights = require("safetensors.torch", "safetensors", "train").load_file(path)
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except SetupError:
        raise
    except Exception as error:  # OSError, or what the two formats make of a broken file
        raise SetupError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    weights = weights.get("state_dict", weights) if isinstance(weights, dict) else {}
    own = model.state_dict()
    wrong = [f"{name} is missing" for name in own.keys() - weights.keys()]
    wrong += [f"{name} is not in the model" for name in weights.keys() - own.keys()]
    wrong += [
        f"{name} is {tuple(weights[name].shape)} and {tuple(value.shape)} in the model"
        for name, value in own.items()
        if name in weights and weights[name].shape != value.shape
    ]
    if wrong:
        shown = "; ".join(sorted(wrong)[:5]) + (f"; and {len(wrong) - 5} more" if wrong[5:] else "")
        raise SetupError(f"{path} does not fit the model: {shown}")
    model.load_state_dict(weights)


def matching(model: nn.Module, patterns: list[str]) -> list[str]:
    """The paths of the modules that any of the patterns matches; ``*`` stands for one name.

    Raises:
        SetupError: a pattern matches nothing.
    """
    paths = [path for path, _ in model.named_modules() if path]
    found = []
    for pattern in patterns:
        regex = re.compile(re.escape(pattern).replace(r"\*", r"[^.]*"))
        matched = [path for path in paths if regex.fullmatch(path)]
        if not matched:
            raise SetupError(f"no module {pattern!r} in the model{nearest(pattern, paths)}")
        found += matched
    return found
