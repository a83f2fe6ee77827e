"""MobileNetV2: https://arxiv.org/abs/1801.04381, table 2. Parameter names are torchvision's (features.N…)."""

from __future__ import annotations

from torch import Tensor, nn

from ...config import ModelConfig
from ..depthwise import DepthwiseConv2d
from ..layers import ConvNorm, create_norm
from .feature_extractor import FeatureExtractor, linear_parameters

STEM_CHANNELS = 32  # of features.0
# expansion t, output channels c, number of blocks n, stride s of the first block
BLOCK_TABLE = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
STAGE_ENDS = (2, 4, 7, 14, 18)  # in features: a stage ends before that index; strides 2, 4, 8, 16, 32


def conv_norm_relu6(
    in_channels: int, out_channels: int, kernel_size: int, stride: int, groups: int, norm: str
) -> ConvNorm:
    """[N, in, h, w] → [N, out, ⌈h/stride⌉, ⌈w/stride⌉] by convolution, norm and ReLU6."""
    if groups > 1:
        conv: nn.Conv2d = DepthwiseConv2d(out_channels, kernel_size, stride)
    else:
        conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False)
    return ConvNorm(conv, create_norm(norm, out_channels), nn.ReLU6(inplace=True))


class InvertedResidual(nn.Module):
    """1×1 expansion, 3×3 depthwise convolution, linear 1×1 projection; the input is added if its shape is the same."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int, norm: str) -> None:
        super().__init__()
        width = in_channels * expansion
        expand = [conv_norm_relu6(in_channels, width, 1, 1, 1, norm)] if expansion > 1 else []
        self.conv = ConvNorm(
            *expand,
            conv_norm_relu6(width, width, 3, stride, width, norm),
            nn.Conv2d(width, out_channels, 1, bias=False),
            create_norm(norm, out_channels),
        )
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2(FeatureExtractor):
    """images [N, 3, H, W] → 32, 96 and 320 channels at strides 8, 16 and 32 (features 6, 13 and 17)."""

    channels = (32, 96, 320)

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.grad_checkpoint = config.grad_checkpoint
        blocks: list[nn.Module] = [conv_norm_relu6(3, STEM_CHANNELS, 3, 2, 1, config.norm)]
        in_channels = STEM_CHANNELS
        for expansion, out_channels, count, stride in BLOCK_TABLE:
            for index in range(count):
                first = stride if index == 0 else 1
                blocks.append(InvertedResidual(in_channels, out_channels, first, expansion, config.norm))
                in_channels = out_channels
        self.features = nn.Sequential(*blocks)
        self.freeze(config.freeze_at)

    @property
    def classifier_parameters(self) -> int:
        """Parameters of features.18 (1×1 convolution to 1280 channels, batch norm) and of the linear layer."""
        return linear_parameters(320, 1280) + 1280 + linear_parameters(1280, 1000)

    def stem(self, images: Tensor) -> Tensor:
        """[N, 3, H, W] → [N, 16, H/2, W/2]"""
        return self.features[1](self.features[0](images))

    def stages(self) -> list[list[nn.Module]]:
        blocks = list(self.features)
        return [blocks[start:end] for start, end in zip((0, *STAGE_ENDS), STAGE_ENDS, strict=False)]
