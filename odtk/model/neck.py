"""The feature pyramid network: https://arxiv.org/abs/1612.03144, with P6 and P7 of RetinaNet, 1708.02002 §4."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .backbones.feature_extractor import FeatureExtractor


class FPN(nn.Module):
    """images [N, 3, H, W] → P3…P7, each [N, C, ⌈H/s⌉, ⌈W/s⌉] for s in `strides`; H and W are multiples of 32.

    Args:
        features: gives the maps C3, C4 and C5, with strides 8, 16 and 32.
        last_level: number of the coarsest level: 5, 6 or 7.
        channels: C, of every level.

    Attributes:
        channels, strides: of each level.
        stride: the input's height and width must be multiples of it.
    """

    def __init__(self, features: FeatureExtractor, last_level: int = 7, channels: int = 256) -> None:
        super().__init__()
        assert features.strides == (8, 16, 32), features.strides
        c3, c4, c5 = features.channels
        self.strides = tuple(2**level for level in range(3, last_level + 1))
        self.channels = (channels,) * len(self.strides)
        self.stride = features.stride
        self.features = features
        self.lateral3 = nn.Conv2d(c3, channels, 1)
        self.lateral4 = nn.Conv2d(c4, channels, 1)
        self.lateral5 = nn.Conv2d(c5, channels, 1)
        self.pyramid6 = nn.Conv2d(c5, channels, 3, stride=2, padding=1) if last_level >= 6 else None
        self.pyramid7 = nn.Conv2d(channels, channels, 3, stride=2, padding=1) if last_level >= 7 else None
        self.smooth3 = nn.Conv2d(channels, channels, 3, padding=1)
        self.smooth4 = nn.Conv2d(channels, channels, 3, padding=1)
        self.smooth5 = nn.Conv2d(channels, channels, 3, padding=1)

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
        levels = [self.smooth3(p3), self.smooth4(p4), self.smooth5(p5)]
        if self.pyramid6 is not None:
            levels.append(downsample(self.pyramid6, c5))
        if self.pyramid7 is not None:
            levels.append(downsample(self.pyramid7, F.relu(levels[-1])))
        return levels


def downsample(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A 3×3 convolution of stride 2 and padding 1: [N, C, h, w] → [N, O, ⌈h/2⌉, ⌈w/2⌉].

    On a 1×1 map only the kernel's center meets the input, and only the center is used: torch 2.13 on CPUs (oneDNN)
    leaves the kernel's gradient uninitialized in bfloat16 there.
    """
    if x.shape[-2:] == (1, 1):
        return F.conv2d(x, conv.weight[:, :, 1:2, 1:2], conv.bias)
    return conv(x)
