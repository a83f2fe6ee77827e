"""GhostNet 1.0×: https://arxiv.org/abs/1911.11907, table 1. Parameter names are the authors' and timm's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...config import ModelConfig
from ..depthwise import DepthwiseConv2d
from ..layers import ConvNorm, apply_conv_norm, create_norm
from .feature_extractor import FeatureExtractor, linear_parameters

STEM_CHANNELS = 16  # of conv_stem
# Row N makes blocks.N. A block: depthwise kernel size, inner and output channels, squeeze-excitation, stride.
BLOCK_TABLE = (
    ((3, 16, 16, False, 1),),
    ((3, 48, 24, False, 2),),
    ((3, 72, 24, False, 1),),
    ((5, 72, 40, True, 2),),
    ((5, 120, 40, True, 1),),
    ((3, 240, 80, False, 2),),
    (
        (3, 200, 80, False, 1),
        (3, 184, 80, False, 1),
        (3, 184, 80, False, 1),
        (3, 480, 112, True, 1),
        (3, 672, 112, True, 1),
    ),
    ((5, 672, 160, True, 2),),
    ((5, 960, 160, False, 1), (5, 960, 160, True, 1), (5, 960, 160, False, 1), (5, 960, 160, True, 1)),
)
STAGE_ENDS = (1, 3, 5, 7, 9)  # in blocks: a stage ends before that index; strides 2, 4, 8, 16, 32


class GhostModule(nn.Module):
    """A 1×1 convolution makes half of the channels, a depthwise 3×3 of these makes the other half (§3.1, s = 2)."""

    def __init__(self, in_channels: int, out_channels: int, relu: bool, norm: str) -> None:
        super().__init__()
        half = out_channels // 2
        pointwise = nn.Conv2d(in_channels, half, 1, bias=False)
        self.primary_conv = ConvNorm(pointwise, create_norm(norm, half), activation(relu))
        self.cheap_operation = ConvNorm(DepthwiseConv2d(half, 3), create_norm(norm, half), activation(relu))

    def forward(self, x: Tensor) -> Tensor:
        primary = self.primary_conv(x)
        return torch.cat([primary, self.cheap_operation(primary)], dim=1)


def activation(relu: bool) -> nn.Module:
    return nn.ReLU(inplace=True) if relu else nn.Identity()


class SqueezeExcite(nn.Module):
    """https://arxiv.org/abs/1709.01507: scales each channel by a number in [0, 1] computed from all channels' means.

    The hidden layer has a quarter of the channels; a hard sigmoid makes the number.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        reduced = max(4, (channels // 4 + 2) // 4 * 4)  # rounded to a multiple of 4
        self.conv_reduce = nn.Conv2d(channels, reduced, 1)
        self.conv_expand = nn.Conv2d(reduced, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.conv_reduce(x.mean((2, 3), keepdim=True))  # [N, reduced, 1, 1]
        return x * F.hardsigmoid(self.conv_expand(F.relu_(gate)))


class GhostBottleneck(nn.Module):
    """Two ghost modules and a shortcut (§3.2), the first module with ReLU.

    Between them are a depthwise convolution if the block is strided, and squeeze-excitation if its row says so.

    Args:
        row: an entry of BLOCK_TABLE.
    """

    def __init__(self, in_channels: int, row: tuple[int, int, int, bool, int], norm: str) -> None:
        super().__init__()
        kernel_size, width, out_channels, squeeze, stride = row
        self.ghost1 = GhostModule(in_channels, width, True, norm)
        self.conv_dw = DepthwiseConv2d(width, kernel_size, stride) if stride > 1 else nn.Identity()
        self.bn_dw = create_norm(norm, width) if stride > 1 else nn.Identity()
        self.se = SqueezeExcite(width) if squeeze else nn.Identity()
        self.ghost2 = GhostModule(width, out_channels, False, norm)
        self.shortcut = ConvNorm()
        if stride > 1 or in_channels != out_channels:
            self.shortcut = ConvNorm(
                DepthwiseConv2d(in_channels, kernel_size, stride),
                create_norm(norm, in_channels),
                nn.Conv2d(in_channels, out_channels, 1, bias=False),
                create_norm(norm, out_channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.ghost1(x)
        if isinstance(self.conv_dw, nn.Conv2d):
            out = apply_conv_norm(self.conv_dw, self.bn_dw, out)
        return self.ghost2(self.se(out)) + self.shortcut(x)


class GhostNet(FeatureExtractor):
    """images [N, 3, H, W] → 40, 112 and 160 channels at strides 8, 16 and 32 (blocks 4, 6 and 8)."""

    channels = (40, 112, 160)

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.grad_checkpoint = config.grad_checkpoint
        self.conv_stem = nn.Conv2d(3, STEM_CHANNELS, 3, 2, padding=1, bias=False)
        self.bn1 = create_norm(config.norm, STEM_CHANNELS)
        self.blocks = nn.Sequential()
        in_channels = STEM_CHANNELS
        for rows in BLOCK_TABLE:
            blocks = []
            for row in rows:
                blocks.append(GhostBottleneck(in_channels, row, config.norm))
                in_channels = row[2]
            self.blocks.append(nn.Sequential(*blocks))
        self.freeze(config.freeze_at)

    @property
    def classifier_parameters(self) -> int:
        """Parameters of blocks.9 (1×1 to 960 channels, batch norm), conv_head (1×1 to 1280) and the linear layer."""
        return linear_parameters(160, 960) + 960 + linear_parameters(960, 1280) + linear_parameters(1280, 1000)

    def stem(self, images: Tensor) -> Tensor:
        """[N, 3, H, W] → [N, 16, H/2, W/2]"""
        return self.blocks[0](F.relu_(apply_conv_norm(self.conv_stem, self.bn1, images)))

    def stages(self) -> list[list[nn.Module]]:
        rows = list(self.blocks)
        stages = [rows[start:end] for start, end in zip(STAGE_ENDS, STAGE_ENDS[1:], strict=False)]
        return [[self.conv_stem, self.bn1, rows[0]], *stages]
