"""Every backbone by name: a function that builds it, untrained, from a ModelConfig.

A backbone maps images [N, 3, H, W] to a list of levels [N, C, ⌈H/s⌉, ⌈W/s⌉]. It has `channels` and `strides` (one
number per level), `stride` (its input's height and width must be multiples of it) and `initialize()`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from ...config import IMAGENET_MEAN, IMAGENET_STD, ModelConfig
from ..neck import FPN
from .efficientnet_lite import EFFICIENTNET_LITE_DESIGNS, MEAN, STD, EfficientNetLite
from .feature_extractor import FeatureExtractor
from .ghost import GhostNet
from .mobilenet import MobileNetV2
from .repvgg import REPVGG_DESIGNS, RepVGG
from .resnet import RESNET_DESIGNS, ResNet, ResNetDesign


def create_fpn(feature_extractor: Callable[[ModelConfig], FeatureExtractor], config: ModelConfig) -> FPN:
    """The feature pyramid over the maps of a feature extractor."""
    return FPN(feature_extractor(config), config.last_level, config.pyramid_channels)


def create_c4(design: ResNetDesign, config: ModelConfig) -> ResNet:
    """C4 alone, of stride 16. It has 256 channels, as many as the default pyramid, only in ResNets of basic blocks."""
    return ResNet(design, config, outputs=(4,))


FEATURE_EXTRACTORS: dict[str, Callable[[ModelConfig], FeatureExtractor]] = {
    **{name: partial(ResNet, design) for name, design in RESNET_DESIGNS.items()},
    **{name: partial(RepVGG, design) for name, design in REPVGG_DESIGNS.items()},
    **{name: partial(EfficientNetLite, design) for name, design in EFFICIENTNET_LITE_DESIGNS.items()},
    "MobileNetV2": MobileNetV2,
    "GhostNet": GhostNet,
}
BACKBONES: dict[str, Callable[[ModelConfig], FPN | FeatureExtractor]] = {
    f"{name}FPN": partial(create_fpn, create) for name, create in FEATURE_EXTRACTORS.items()
} | {f"{name}C4": partial(create_c4, RESNET_DESIGNS[name]) for name in ("ResNet18", "ResNet34")}


def normalization(backbone: str) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """ModelConfig's mean and std that the published weights of a backbone expect."""
    if backbone.removesuffix("FPN") in EFFICIENTNET_LITE_DESIGNS:
        return MEAN, STD
    return IMAGENET_MEAN, IMAGENET_STD
