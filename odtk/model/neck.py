"""Feature pyramid: https://arxiv.org/abs/1612.03144, with RetinaNet's P6 and P7, 1708.02002 §4."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Trunk

CHANNELS = 256  # of every level, which is what the heads take


class FPN(nn.Module):
    """images [N, 3, H, W] → P3…P7, each [N, 256, ⌈H/s⌉, ⌈W/s⌉] for s in `strides`; H and W are multiples of 32.

    Args:
        features: a trunk whose three maps have strides 8, 16 and 32.
    """

    channels = (CHANNELS,) * 5
    strides = (8, 16, 32, 64, 128)

    def __init__(self, features: Trunk) -> None:
        super().__init__()
        assert features.strides == (8, 16, 32), features.strides
        c3, c4, c5 = features.channels
        self.stride = features.stride
        self.features = features
        self.lateral3 = nn.Conv2d(c3, CHANNELS, 1)
        self.lateral4 = nn.Conv2d(c4, CHANNELS, 1)
        self.lateral5 = nn.Conv2d(c5, CHANNELS, 1)
        self.pyramid6 = nn.Conv2d(c5, CHANNELS, 3, stride=2, padding=1)
        self.pyramid7 = nn.Conv2d(CHANNELS, CHANNELS, 3, stride=2, padding=1)
        self.smooth3 = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.smooth4 = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.smooth5 = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)

    def initialize(self) -> None:
        """Xavier uniform for the pyramid, the trunk's own rule for the trunk."""
        for module in self.children():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        self.features.initialize()

    def forward(self, images: Tensor) -> list[Tensor]:
        c3, c4, c5 = self.features(images)
        p5 = self.lateral5(c5)
        p4 = self.lateral4(c4) + F.interpolate(p5, scale_factor=2.0)  # nearest; exact, as sizes are multiples of 32
        p3 = self.lateral3(c3) + F.interpolate(p4, scale_factor=2.0)
        p6 = halve(self.pyramid6, c5)
        p7 = halve(self.pyramid7, F.relu(p6))
        return [self.smooth3(p3), self.smooth4(p4), self.smooth5(p5), p6, p7]


def halve(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A 3×3 convolution of stride 2. Of a 1×1 map only its center counts.

    Said so, because torch 2.13 on CPUs leaves that case's weight gradient uninitialized in bfloat16 (oneDNN).
    """
    if x.shape[-2:] == (1, 1):
        return F.conv2d(x, conv.weight[:, :, 1:2, 1:2], conv.bias)
    return conv(x)
