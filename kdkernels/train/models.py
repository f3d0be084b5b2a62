"""Small ResNets, MobileNets and ShuffleNets, models of timm and Transformers, and their weights."""

from __future__ import annotations

import importlib
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdkernels.train.errors import SetupError, nearest, require

Body = tuple[int, list[nn.Module], int]  # channels of the stem, stages, channels after them


def _conv_bn(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, relu: bool = True
) -> nn.Sequential:
    # No bias: batch norm subtracts it again.
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), *[nn.ReLU()] * relu)


class _Residual(nn.Module):
    """Two 3x3 convolutions and the shortcut around them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        second = _conv_bn(outputs, outputs, 3, relu=False)
        self.body = nn.Sequential(_conv_bn(inputs, outputs, 3, stride), second)
        projection = _conv_bn(inputs, outputs, 1, stride, relu=False)
        self.shortcut = nn.Identity() if inputs == outputs and stride == 1 else projection

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


class _Separable(nn.Sequential):
    """A 3x3 convolution per channel, then a 1x1 across them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        depthwise = _conv_bn(inputs, inputs, 3, stride, groups=inputs)
        super().__init__(depthwise, _conv_bn(inputs, outputs, 1))


class _Shuffled(nn.Module):
    """Half of the channels pass, or a second branch halves the image; then they are interleaved."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        half, taken = outputs // 2, inputs if stride > 1 else inputs // 2
        depthwise = partial(_conv_bn, kernel=3, stride=stride, relu=False)
        middle = depthwise(half, half, groups=half)
        self.body = nn.Sequential(_conv_bn(taken, half, 1), middle, _conv_bn(half, half, 1))
        side = (depthwise(inputs, inputs, groups=inputs), _conv_bn(inputs, half, 1))
        self.side = nn.Sequential(*side) if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        passed, taken = (self.side(x), x) if self.side is not None else x.chunk(2, 1)
        return torch.stack([passed, self.body(taken)], 2).flatten(1, 2)


def _stages(
    block: type[nn.Module], inputs: int, table: tuple[tuple[int, int, int], ...]
) -> list[nn.Module]:
    """A stage for each (channels, blocks, stride of the first block)."""
    stages: list[nn.Module] = []
    for outputs, blocks, stride in table:
        rest = [block(outputs, outputs, 1) for _ in range(blocks - 1)]
        stages.append(nn.Sequential(block(inputs, outputs, stride), *rest))
        inputs = outputs
    return stages


def resnet(depth: int = 8, width: int = 16) -> Body:
    """ResNet for small images, of 6 n + 2 layers (He et al. 2016, arXiv:1512.03385)."""
    n, rest = divmod(depth - 2, 6)
    if n < 1 or rest:
        raise ValueError(f"depth must be 8, 14, 20, ..., got {depth}")
    table = ((width, n, 1), (2 * width, n, 2), (4 * width, n, 2))
    return width, _stages(_Residual, width, table), 4 * width


def mobilenet(depth: int = 1, width: int = 32) -> Body:
    """MobileNet in three stages of ``depth`` blocks (Howard et al. 2017, arXiv:1704.04861)."""
    table = ((width, depth, 1), (2 * width, depth, 2), (4 * width, depth, 2))
    return width, _stages(_Separable, width, table), 4 * width


def shufflenet(first: int = 48) -> Body:
    """ShuffleNetV2 without its first pooling (Ma et al. 2018, arXiv:1807.11164)."""
    table = ((first, 4, 2), (2 * first, 8, 2), (4 * first, 4, 2))
    return 24, [*_stages(_Shuffled, 24, table), _conv_bn(4 * first, 1024, 1)], 1024


MODELS: dict[str, Callable[..., Body]] = {
    **{f"resnet{depth}": partial(resnet, depth) for depth in (8, 14, 20, 32, 44, 56, 110)},
    **{f"resnet{depth}x4": partial(resnet, depth, 64) for depth in (8, 14, 20, 32)},
    **{f"mobilenet{depth}": partial(mobilenet, depth) for depth in (1, 2, 3)},
    "shufflenet_x0.5": partial(shufflenet, 48),
    "shufflenet_x1.0": partial(shufflenet, 116),
    "shufflenet_x1.5": partial(shufflenet, 176),
}


def small(
    name: str, classes: int, channels: int, stem_stride: int = 1, dropout: float = 0.0,
    **options: Any,
) -> nn.Module:  # fmt: skip
    """A model of ``MODELS``: (N, channels, H, W) images of any size to (N, classes) logits.

    ``stem_stride=2`` makes 28x28 pixels a quarter of the work. ``dropout``: before the last layer.
    """
    stem, stages, features = MODELS[name](**options)
    if min(stem, stem_stride) < 1:
        raise ValueError("width and stem_stride must be at least 1")
    parts = {
        "stem": _conv_bn(channels, stem, 3, stem_stride),
        "stages": nn.Sequential(*stages),
        "pool": nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout)),
        "head": nn.Linear(features, classes),
    }
    return nn.Sequential(OrderedDict(parts))


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
    if not rest and name not in MODELS:
        raise SetupError(
            f"no model {name!r}{nearest(name, MODELS)} (built in: {', '.join(MODELS)})"
        )
    try:
        if kind == "timm":
            options = {"num_classes": classes, "in_chans": channels, **options}
            return require("timm", "timm", "timm").create_model(rest, **options)  # type: ignore[no-any-return]
        if kind == "hf":
            return _transformers(rest, {"num_labels": classes, "num_channels": channels, **options})
        if rest:
            found = getattr(importlib.import_module(kind), rest)(classes, channels, **options)
            if not isinstance(found, nn.Module):
                raise TypeError(f"{found!r} is no module of PyTorch")
            return found
        return small(name, classes, channels, **options)
    except SetupError:
        raise
    except Exception as error:  # whatever a foreign library makes of options that it does not take
        raise SetupError(f"model {name} with {options} cannot be made: {error}") from error


def _transformers(name: str, options: dict[str, Any]) -> nn.Module:
    transformers = require("transformers", "transformers", "hf")
    auto = transformers.AutoModelForImageClassification
    if Path(name).is_dir():
        how = {"local_files_only": True, "use_safetensors": True, "output_loading_info": True}
        anew = options.pop("ignore_mismatched_sizes", False)
        model, found = auto.from_pretrained(name, **how, ignore_mismatched_sizes=True, **options)
        wrong = [
            f"{key} is {tuple(there)} and {tuple(here)} in the model"
            for key, there, here in sorted(found["mismatched_keys"])
        ] + [f"{key} is missing" for key in sorted(found["missing_keys"])]
        if wrong and not anew:
            wrong.append("the option ignore_mismatched_sizes = true makes these anew")
            raise SetupError(f"{name} does not fit the model: {'; '.join(wrong)}")
        return _Logits(model)
    if name not in (known := transformers.CONFIG_MAPPING):
        near = nearest(name, known)
        raise SetupError(f"no folder and no model of Transformers is called {name}{near}")
    usual = known[name]()
    for key in options:  # a configuration takes whatever is given
        if key != "num_channels" and not hasattr(usual, key):
            raise SetupError(f"model hf:{name} takes no {key}{nearest(key, vars(usual))}")
    return _Logits(auto.from_config(known[name](**options)))


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load weights from a safetensors file, or a torch file that holds nothing but tensors.

    Raises:
        SetupError: the file cannot be read, or holds the weights of another model: the tensors
            that are missing, left over or of another shape (another number of classes) are named.
    """
    safetensors = require("safetensors.torch", "safetensors", "train")
    try:
        if Path(path).suffix == ".safetensors":
            weights = safetensors.load_file(path)
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # whose text is advice to execute what is in there
        raise SetupError(f"{path} is broken, or holds more than tensors") from error
    except Exception as error:  # OSError, or what the two formats make of a broken file
        reason = str(error) or repr(error)
        raise SetupError(f"{path} cannot be read: {reason.splitlines()[0]}") from error
    if isinstance(weights, dict):
        weights = weights.get("state_dict", weights)
    if not isinstance(weights, dict) or not all(map(torch.is_tensor, weights.values())):
        raise SetupError(f"{path} holds something else than tensors by their names")
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
