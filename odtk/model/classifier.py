"""The classifier: a feature extractor with the linear layer that `odtk pretrain` trains it by."""

from __future__ import annotations

import re

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..config import ModelConfig, OdtkError
from .backbones.catalog import BACKBONES, FEATURE_EXTRACTORS
from .detector import check_model_config

FEATURES = "features."  # the prefix of the feature extractor's names in a classifier's state_dict


class Classifier(nn.Module):
    """Images [N, 3, H, W] → logits [N, classes]: the last feature map, averaged over its cells, through one layer.

    So it is built as torchvision's ResNets are. Of MobileNet and EfficientNet it lacks the convolution between the last
    feature map and the classifier, which no detector has.

    Attributes:
        config: what it was built from: ``backbones`` is one name; what belongs to pyramid and head counts nothing.
        stride: the input's height and width must be multiples of it.

    Raises:
        OdtkError: for an unknown name, or settings that do not go together.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        check_model_config(config)
        if len(config.backbones) != 1:
            raise OdtkError(f"A classifier has one backbone, not {len(config.backbones)}: name one as --backbone.")
        self.config = config
        self.features = FEATURE_EXTRACTORS[extractor_name(config.backbones[0])](config)
        self.stride = self.features.stride
        self.fc = nn.Linear(self.features.channels[-1], config.classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.features(images)[-1].mean((2, 3)))  # [N, C, h, w] → [N, C] → [N, classes]

    def initialize(self) -> None:
        """Random weights; the layer's are small, so that the first loss is that of equal probabilities."""
        self.features.initialize()
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)

    def train(self, mode: bool = True) -> Classifier:
        """As nn.Module.train(), but with ``norm_eval`` batch norms stay in eval mode."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, _BatchNorm) and self.config.norm_eval:
                module.eval()
        return self


def extractor_name(backbone: str) -> str:
    """ResNet18FPN, ResNet18C4 → ResNet18: the feature extractor of a backbone, a key of catalog.FEATURE_EXTRACTORS.

    Raises:
        OdtkError: there is no such backbone.
    """
    if backbone not in BACKBONES:
        raise OdtkError(f"The backbone {backbone!r} does not exist: use one of {', '.join(BACKBONES)}.")
    return re.sub("(FPN|C4)$", "", backbone)
