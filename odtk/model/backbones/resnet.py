"""ResNet and ResNeXt: https://arxiv.org/abs/1512.03385, https://arxiv.org/abs/1611.05431.

Each stage is a row of a table, and its blocks are built from that row. All that the members of the family and the
options change (strides, widths, groups, pooled shortcuts, deformable convolutions, norm) is data in the table.
Parameter names are torchvision's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from ...config import ModelConfig
from ..layers import ConvNorm, DeformConv2d, apply_conv_norm, create_norm
from .feature_extractor import FeatureExtractor


@dataclass(frozen=True)
class ResNetDesign:
    """One member of the family: blocks in stages 2 to 5, kind of block, and ResNeXt's groups and width per group."""

    depths: tuple[int, int, int, int]
    bottleneck: bool = True
    groups: int = 1
    width_per_group: int = 64


RESNET_DESIGNS = {
    "ResNet18": ResNetDesign((2, 2, 2, 2), bottleneck=False),
    "ResNet34": ResNetDesign((3, 4, 6, 3), bottleneck=False),
    "ResNet50": ResNetDesign((3, 4, 6, 3)),
    "ResNet101": ResNetDesign((3, 4, 23, 3)),
    "ResNet152": ResNetDesign((3, 8, 36, 3)),
    "ResNeXt50_32x4d": ResNetDesign((3, 4, 6, 3), groups=32, width_per_group=4),
    "ResNeXt101_32x8d": ResNetDesign((3, 4, 23, 3), groups=32, width_per_group=8),
}


@dataclass(frozen=True)
class Stage:
    """A row of the stage table.

    Attributes:
        blocks: number of residual blocks.
        width: channels inside a block.
        channels: channels of a block's output.
        strides: of the first and the second convolution in the stage's first block.
        groups: of the second convolution.
        pool: the shortcut averages 2×2 pixels instead of being strided (ResNet-D, https://arxiv.org/abs/1812.01187).
        deformable: None: the second convolution is a plain one; otherwise it is a DeformConv2d, and this says whether
            with masks (``modulated``).
        norm: kind of normalization, as create_norm takes it.
    """

    blocks: int
    width: int
    channels: int
    strides: tuple[int, int]
    groups: int
    pool: bool
    deformable: bool | None
    norm: str

    @property
    def stride(self) -> int:
        return self.strides[0] * self.strides[1]


def scaled(channels: int, config: ModelConfig) -> int:
    """So many channels times the width of the network, as a multiple of 8, which INT8 and FP16 kernels like."""
    return channels if config.resnet_width == 1 else max(8, round(channels * config.resnet_width / 8) * 8)


def stage_table(design: ResNetDesign, config: ModelConfig) -> list[Stage]:
    """Stages 2 to 5, whose maps C2…C5 have strides 4, 8, 16 and 32."""
    table = []
    for number, blocks in enumerate(design.depths, start=2):
        planes = scaled(64 * 2 ** (number - 2), config)
        stride = 1 if number == 2 else 2
        first = config.caffe_stride or not design.bottleneck  # the first convolution is the strided one, not the second
        table.append(
            Stage(
                blocks=blocks,
                width=planes * design.width_per_group // 64 * design.groups,
                channels=planes * (4 if design.bottleneck else 1),
                strides=(stride, 1) if first else (1, stride),
                groups=design.groups,
                pool=config.avg_down,
                deformable=config.dcn_modulated if number in config.dcn else None,
                norm=config.norm,
            )
        )
    return table


class Block(nn.Module):
    """relu(residual(x) + shortcut(x)). A basic block has two 3×3 convolutions, a bottleneck 1×1, 3×3, 1×1."""

    def __init__(self, in_channels: int, stage: Stage, strides: tuple[int, int], bottleneck: bool) -> None:
        super().__init__()
        self.conv1 = conv2d(in_channels, stage.width, 1 if bottleneck else 3, strides[0])
        self.bn1 = create_norm(stage.norm, stage.width)
        if stage.deformable is None:
            self.conv2 = conv2d(stage.width, stage.width, 3, strides[1], stage.groups)
        else:
            self.conv2 = DeformConv2d(stage.width, stage.width, strides[1], stage.groups, stage.deformable)
        self.bn2 = create_norm(stage.norm, stage.width)
        if bottleneck:
            self.conv3 = conv2d(stage.width, stage.channels, 1)
            self.bn3 = create_norm(stage.norm, stage.channels)
        stride = strides[0] * strides[1]
        self.pool = nn.AvgPool2d(2) if stage.pool and stride == 2 else nn.Identity()
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or in_channels != stage.channels:
            conv = conv2d(in_channels, stage.channels, 1, 1 if stage.pool else stride)
            self.downsample = ConvNorm(conv, create_norm(stage.norm, stage.channels))
        self.bottleneck = bottleneck

    @property
    def last_norm(self) -> nn.Module:
        return self.bn3 if self.bottleneck else self.bn2

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu_(apply_conv_norm(self.conv1, self.bn1, x))
        out = apply_conv_norm(self.conv2, self.bn2, out)
        if self.bottleneck:
            out = apply_conv_norm(self.conv3, self.bn3, F.relu_(out))
        return F.relu_(out + self.downsample(self.pool(x)))


def conv2d(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A convolution without bias, padded so that stride 1 keeps the map's height and width."""
    padding = kernel_size // 2
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=padding, groups=groups, bias=False)


def create_deep_stem(norm: str, half: int, channels: int) -> ConvNorm:
    """ResNet-D's stem: three 3×3 convolutions (32, 32, 64 channels) in place of the 7×7; bn1 follows the last."""
    return ConvNorm(
        conv2d(3, half, 3, stride=2),
        create_norm(norm, half),
        nn.ReLU(inplace=True),
        conv2d(half, half, 3),
        create_norm(norm, half),
        nn.ReLU(inplace=True),
        conv2d(half, channels, 3),
    )


class ResNet(FeatureExtractor):
    """images [N, 3, H, W] → the maps of the stages in ``outputs`` (C3, C4, C5); later stages are not built."""

    def __init__(self, design: ResNetDesign, config: ModelConfig, outputs: tuple[int, ...] = (3, 4, 5)) -> None:
        super().__init__()
        self.outputs, self.grad_checkpoint, self.zero_init = outputs, config.grad_checkpoint, config.zero_init
        channels = scaled(64, config)
        if config.deep_stem:
            self.conv1: nn.Module = create_deep_stem(config.norm, scaled(32, config), channels)
        else:
            self.conv1 = conv2d(3, channels, 7, stride=2)
        self.bn1 = create_norm(config.norm, channels)
        table = stage_table(design, config)[: max(outputs) - 1]
        for index, stage in enumerate(table, start=1):
            strides = [stage.strides] + [(1, 1)] * (stage.blocks - 1)
            inputs = [channels] + [stage.channels] * (stage.blocks - 1)
            blocks = [Block(c, stage, s, design.bottleneck) for c, s in zip(inputs, strides, strict=True)]
            setattr(self, f"layer{index}", nn.Sequential(*blocks))
            channels = stage.channels
        self.channels = tuple(table[number - 2].channels for number in outputs)
        self.freeze(config.freeze_at)

    def stages(self) -> list[list[nn.Module]]:
        layers = [getattr(self, f"layer{index}") for index in range(1, max(self.outputs))]
        return [[self.conv1, self.bn1], *map(list, layers)]

    def initialize(self) -> None:
        """As every feature extractor; with ``zero_init`` each block starts as its shortcut."""
        super().initialize()
        if not self.zero_init:
            return
        for block in self.modules():
            if isinstance(block, Block) and isinstance(
                block.last_norm.weight, nn.Parameter
            ):  # a frozen norm would stay 0
                nn.init.zeros_(block.last_norm.weight)

    def stem(self, images: Tensor) -> Tensor:
        """[N, 3, H, W] → [N, 64, H/4, W/4], or of another width as many channels as that makes of 64"""
        if isinstance(self.conv1, nn.Conv2d):
            x = apply_conv_norm(self.conv1, self.bn1, images)
        else:
            x = self.bn1(self.conv1(images))
        return F.max_pool2d(F.relu_(x), 3, stride=2, padding=1)
