"""The teacher, a small ResNet, and the student, a tiny MobileNet. Both take any image size."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn


def _conv_bn(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    # No bias: batch norm subtracts it again.
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs)]


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and the shortcut around them (He et al. 2016, arXiv:1512.03385)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_conv_bn(inputs, outputs, 3, stride), nn.ReLU(), *_conv_bn(outputs, outputs, 3)
        )
        same_shape = inputs == outputs and stride == 1
        self.shortcut = (
            nn.Identity() if same_shape else nn.Sequential(*_conv_bn(inputs, outputs, 1, stride))
        )
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.relu(self.body(x) + self.shortcut(x))
        return out


def _separable(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """A 3x3 convolution per channel, then a 1x1 across them (Howard et al. 2017, 1704.04861)."""
    depthwise = _conv_bn(inputs, inputs, 3, stride, groups=inputs)
    return nn.Sequential(*depthwise, nn.ReLU(), *_conv_bn(inputs, outputs, 1), nn.ReLU())


def _classifier(
    classes: int, channels: int, width: int, stem_stride: int, stages: list[nn.Module]
) -> nn.Module:
    stem = nn.Sequential(*_conv_bn(channels, width, 3, stem_stride), nn.ReLU())
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    parts = {"stem": stem, "stages": nn.Sequential(*stages), "pool": pool}
    return nn.Sequential(OrderedDict(**parts, head=nn.Linear(4 * width, classes)))


def resnet(classes: int, channels: int = 1, width: int = 16, stem_stride: int = 1) -> nn.Module:
    """The teacher: three residual blocks; (N, channels, H, W) images to (N, classes) logits."""
    stages: list[nn.Module] = [
        ResidualBlock(width, width, 1),
        ResidualBlock(width, 2 * width, 2),
        ResidualBlock(2 * width, 4 * width, 2),
    ]
    return _classifier(classes, channels, width, stem_stride, stages)


def mobilenet(classes: int, channels: int = 1, width: int = 32, stem_stride: int = 1) -> nn.Module:
    """The student: three depthwise-separable convolutions; (N, channels, H, W) to (N, classes)."""
    stages: list[nn.Module] = [
        _separable(width, width, 1),
        _separable(width, 2 * width, 2),
        _separable(2 * width, 4 * width, 2),
    ]
    return _classifier(classes, channels, width, stem_stride, stages)


MODELS = {"resnet": resnet, "mobilenet": mobilenet}


def parameters(model: nn.Module) -> int:
    """How many numbers training may change."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
