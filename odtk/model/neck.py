"""The feature pyramid network: https://arxiv.org/abs/1612.03144, with P6 and P7 of RetinaNet, 1708.02002 §4."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .backbones.feature_extractor import FeatureExtractor

LEVEL_CHANNELS = 256  # of every level; the heads expect this many


class FPN(nn.Module):
    """images [N, 3, H, W] → P3…P7, each [N, 256, ⌈H/s⌉, ⌈W/s⌉] for s in `strides`; H and W are multiples of 32.

    Args:
        features: gives the maps C3, C4 and C5, with strides 8, 16 and 32.

    Attributes:
        channels, strides: of each level.
        stride: the input's height and width must be multiples of it.
    """

    channels = (LEVEL_CHANNELS,) * 5
    strides = (8, 16, 32, 64, 128)

    def __init__(self, features: FeatureExtractor) -> None:
        super().__init__()
        assert features.strides == (8, 16, 32), features.strides
        c3, c4, c5 = features.channels
        self.stride = features.stride
        self.features = features
        self.lateral3 = nn.Conv2d(c3, LEVEL_CHANNELS, 1)
        self.lateral4 = nn.Conv2d(c4, LEVEL_CHANNELS, 1)
        self.lateral5 = nn.Conv2d(c5, LEVEL_CHANNELS, 1)
        self.pyramid6 = nn.Conv2d(c5, LEVEL_CHANNELS, 3, stride=2, padding=1)
        self.pyramid7 = nn.Conv2d(LEVEL_CHANNELS, LEVEL_CHANNELS, 3, stride=2, padding=1)
        self.smooth3 = nn.Conv2d(LEVEL_CHANNELS, LEVEL_CHANNELS, 3, padding=1)
        self.smooth4 = nn.Conv2d(LEVEL_CHANNELS, LEVEL_CHANNELS, 3, padding=1)
        self.smooth5 = nn.Conv2d(LEVEL_CHANNELS, LEVEL_CHANNELS, 3, padding=1)

    def initialize(self) -> None:
        """Xavier uniform for the pyramid's convolutions, their biases zero; then the feature extractor's own rule."""
        for module in self.children():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        self.features.initialize()

    def forward(self, images: Tensor) -> list[Tensor]:
        c3, c4, c5 = self.features(images)
        p5 = self.lateral5(c5)
        p4 = self.lateral4(c4) + F.interpolate(p5, scale_factor=2.0)  # nearest; the sizes fit, as 32 divides H and W
        p3 = self.lateral3(c3) + F.interpolate(p4, scale_factor=2.0)
        p6 = downsample(self.pyramid6, c5)
        p7 = downsample(self.pyramid7, F.relu(p6))
        return [self.smooth3(p3), self.smooth4(p4), self.smooth5(p5), p6, p7]


def downsample(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A 3×3 convolution of stride 2 and padding 1: [N, C, h, w] → [N, O, ⌈h/2⌉, ⌈w/2⌉].

    On a 1×1 map only the kernel's center meets the input, and only the center is used: torch 2.13 on CPUs (oneDNN)
    leaves the kernel's gradient uninitialized in bfloat16 there.
    """
    if x.shape[-2:] == (1, 1):
        return F.conv2d(x, conv.weight[:, :, 1:2, 1:2], conv.bias)
    return conv(x)
