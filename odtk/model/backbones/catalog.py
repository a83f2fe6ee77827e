"""Every backbone by name: a function of the ModelConfig that builds it, untrained.

A backbone has `channels` and `strides` (one per level), `stride` (its input's height and width must be multiples
of it), `initialize()`, and maps images [N, 3, H, W] to a list of levels [N, 256, ⌈H/s⌉, ⌈W/s⌉].
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from ...config import ModelConfig
from ..layers import Trunk
from ..neck import FPN
from .ghost import GhostNet
from .mobilenet import MobileNetV2
from .repvgg import DESIGNS as REPVGGS
from .repvgg import RepVGG
from .resnet import DESIGNS as RESNETS
from .resnet import Design, ResNet


def pyramid(trunk: Callable[[ModelConfig], Trunk], config: ModelConfig) -> FPN:
    """P3…P7 over a trunk."""
    return FPN(trunk(config))


def single(design: Design, config: ModelConfig) -> ResNet:
    """C4 alone, stride 16; of the designs with basic blocks it has the 256 channels that the heads take."""
    return ResNet(design, config, outputs=(4,))


TRUNKS: dict[str, Callable[[ModelConfig], Trunk]] = {
    **{name: partial(ResNet, design) for name, design in RESNETS.items()},
    **{name: partial(RepVGG, design) for name, design in REPVGGS.items()},
    "MobileNetV2": MobileNetV2,
    "GhostNet": GhostNet,
}
BACKBONES: dict[str, Callable[[ModelConfig], FPN | Trunk]] = {
    f"{name}FPN": partial(pyramid, trunk) for name, trunk in TRUNKS.items()
} | {f"{name}C4": partial(single, RESNETS[name]) for name in ("ResNet18", "ResNet34")}
