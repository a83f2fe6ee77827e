"""MobileNetV2: https://arxiv.org/abs/1801.04381, table 2. Parameter names equal torchvision's (features.N…)."""

from __future__ import annotations

from torch import Tensor, nn

from ...config import ModelConfig
from ..layers import ConvNorm, Trunk, create_norm, linear_parameters

STEM = 32  # channels of features.0
# expansion t, channels c, blocks n, stride s of the first block
TABLE = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
STAGE_ENDS = (2, 4, 7, 14, 18)  # stage i is features[ends[i − 2] : ends[i − 1]]: strides 2, 4, 8, 16, 32


def conv_norm_relu(channels_in: int, channels: int, size: int, stride: int, groups: int, norm: str) -> ConvNorm:
    """Convolution, norm, ReLU6."""
    conv = nn.Conv2d(channels_in, channels, size, stride, padding=size // 2, groups=groups, bias=False)
    return ConvNorm(conv, create_norm(norm, channels), nn.ReLU6(inplace=True))


class InvertedResidual(nn.Module):
    """1×1 expansion, 3×3 depthwise, linear 1×1 projection; the input is added where the shapes allow."""

    def __init__(self, channels_in: int, channels: int, stride: int, expansion: int, norm: str) -> None:
        super().__init__()
        width = channels_in * expansion
        expand = [conv_norm_relu(channels_in, width, 1, 1, 1, norm)] if expansion > 1 else []
        self.conv = ConvNorm(
            *expand,
            conv_norm_relu(width, width, 3, stride, width, norm),
            nn.Conv2d(width, channels, 1, bias=False),
            create_norm(norm, channels),
        )
        self.residual = stride == 1 and channels_in == channels

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2(Trunk):
    """images [N, 3, H, W] → 32, 96 and 320 channels at strides 8, 16 and 32 (features 6, 13 and 17)."""

    channels = (32, 96, 320)

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.grad_checkpoint = config.grad_checkpoint
        blocks: list[nn.Module] = [conv_norm_relu(3, STEM, 3, 2, 1, config.norm)]
        channels_in = STEM
        for expansion, channels, count, stride in TABLE:
            for index in range(count):
                first = stride if index == 0 else 1
                blocks.append(InvertedResidual(channels_in, channels, first, expansion, config.norm))
                channels_in = channels
        self.features = nn.Sequential(*blocks)
        self.freeze(config.freeze_at)

    @property
    def classifier_parameters(self) -> int:
        """features.18 (1×1 to 1280 channels, batch norm), then the linear layer."""
        return linear_parameters(320, 1280) + 1280 + linear_parameters(1280, 1000)

    def stem(self, images: Tensor) -> Tensor:
        """[N, 3, H, W] → [N, 16, H/2, W/2]"""
        return self.features[1](self.features[0](images))

    def stages(self) -> list[list[nn.Module]]:
        blocks = list(self.features)
        return [blocks[start:end] for start, end in zip((0, *STAGE_ENDS), STAGE_ENDS, strict=False)]
