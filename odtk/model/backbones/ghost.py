"""GhostNet 1.0×: https://arxiv.org/abs/1911.11907, table 1. Parameter names equal the authors' and timm's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...config import ModelConfig
from ..layers import ConvNorm, Trunk, convolve, create_norm, linear_parameters

STEM = 16  # channels of conv_stem
# depthwise kernel, channels inside, channels out, squeeze-excitation, stride; a row of blocks per blocks.N
TABLE = (
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
STAGE_ENDS = (1, 3, 5, 7, 9)  # stage i is blocks[ends[i − 2] : ends[i − 1]]: strides 2, 4, 8, 16, 32


def depthwise(channels: int, size: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, size, stride, padding=size // 2, groups=channels, bias=False)


class GhostModule(nn.Module):
    """Half of the channels from a 1×1 convolution, the other half from a depthwise 3×3 of those (§3.1, s = 2)."""

    def __init__(self, channels_in: int, channels: int, relu: bool, norm: str) -> None:
        super().__init__()
        half = channels // 2
        pointwise = nn.Conv2d(channels_in, half, 1, bias=False)
        self.primary_conv = ConvNorm(pointwise, create_norm(norm, half), activation(relu))
        self.cheap_operation = ConvNorm(depthwise(half, 3, 1), create_norm(norm, half), activation(relu))

    def forward(self, x: Tensor) -> Tensor:
        primary = self.primary_conv(x)
        return torch.cat([primary, self.cheap_operation(primary)], dim=1)


def activation(relu: bool) -> nn.Module:
    return nn.ReLU(inplace=True) if relu else nn.Identity()


class SqueezeExcite(nn.Module):
    """Channels scaled by a hard sigmoid of their means (https://arxiv.org/abs/1709.01507), a quarter wide inside."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        reduced = max(4, (channels // 4 + 2) // 4 * 4)  # to a multiple of 4
        self.conv_reduce = nn.Conv2d(channels, reduced, 1)
        self.conv_expand = nn.Conv2d(reduced, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.conv_reduce(x.mean((2, 3), keepdim=True))  # [N, C/4, 1, 1]
        return x * F.hardsigmoid(self.conv_expand(F.relu_(gate)))


class GhostBottleneck(nn.Module):
    """Ghost module, depthwise convolution where strided, squeeze-excitation where asked, linear ghost module (§3.2)."""

    def __init__(self, channels_in: int, row: tuple[int, int, int, bool, int], norm: str) -> None:
        super().__init__()
        size, width, channels, squeeze, stride = row
        self.ghost1 = GhostModule(channels_in, width, True, norm)
        self.conv_dw = depthwise(width, size, stride) if stride > 1 else nn.Identity()
        self.bn_dw = create_norm(norm, width) if stride > 1 else nn.Identity()
        self.se = SqueezeExcite(width) if squeeze else nn.Identity()
        self.ghost2 = GhostModule(width, channels, False, norm)
        self.shortcut = ConvNorm()
        if stride > 1 or channels_in != channels:
            self.shortcut = ConvNorm(
                depthwise(channels_in, size, stride),
                create_norm(norm, channels_in),
                nn.Conv2d(channels_in, channels, 1, bias=False),
                create_norm(norm, channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.ghost1(x)
        if isinstance(self.conv_dw, nn.Conv2d):
            out = convolve(self.conv_dw, self.bn_dw, out)
        return self.ghost2(self.se(out)) + self.shortcut(x)


class GhostNet(Trunk):
    """images [N, 3, H, W] → 40, 112 and 160 channels at strides 8, 16 and 32 (blocks 4, 6 and 8)."""

    channels = (40, 112, 160)

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.grad_checkpoint = config.grad_checkpoint
        self.conv_stem = nn.Conv2d(3, STEM, 3, 2, padding=1, bias=False)
        self.bn1 = create_norm(config.norm, STEM)
        self.blocks = nn.Sequential()
        channels_in = STEM
        for rows in TABLE:
            blocks = []
            for row in rows:
                blocks.append(GhostBottleneck(channels_in, row, config.norm))
                channels_in = row[2]
            self.blocks.append(nn.Sequential(*blocks))
        self.freeze(config.freeze_at)

    @property
    def classifier_parameters(self) -> int:
        """blocks.9 (1×1 to 960 channels, batch norm), conv_head to 1280, then the linear layer."""
        return linear_parameters(160, 960) + 960 + linear_parameters(960, 1280) + linear_parameters(1280, 1000)

    def stem(self, images: Tensor) -> Tensor:
        """[N, 3, H, W] → [N, 16, H/2, W/2]"""
        return self.blocks[0](F.relu_(convolve(self.conv_stem, self.bn1, images)))

    def stages(self) -> list[list[nn.Module]]:
        rows = list(self.blocks)
        stages = [rows[start:end] for start, end in zip(STAGE_ENDS, STAGE_ENDS[1:], strict=False)]
        return [[self.conv_stem, self.bn1, rows[0]], *stages]
