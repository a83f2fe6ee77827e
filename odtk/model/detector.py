"""The detector: images → raw levels, and nothing else. Loss and postprocessing are functions outside it."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..config import ModelConfig, OdtkError, scale_and_shift
from ..settings import RESNET_OPTIONS
from .anchors import base_anchors
from .backbones.catalog import BACKBONES
from .backbones.feature_extractor import FeatureExtractor
from .backbones.repvgg import RepVGGBlock
from .heads import SharedTower, create_head
from .layers import fold_batch_norms
from .neck import FPN

RESNETS_ONLY = {"dcn": "--dcn"} | {  # fields of ModelConfig that only ResNets have, and their flags
    field: f"--resnet {name}" for name, field in RESNET_OPTIONS.items() if field != "norm_eval"
}


class Detector(nn.Module):
    """One or more backbones, whose levels are concatenated, and one head over all levels.

    Attributes:
        config: what it was built from.
        strides: of each level, in pixels.
        stride: the input's height and width must be multiples of it.

    Raises:
        OdtkError: for an unknown name, or settings that do not go together.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        check_model_config(config)
        self.config = config
        backbones = {name: BACKBONES[name](config) for name in config.backbones}
        self.backbones = nn.ModuleDict(backbones)
        for name, backbone in backbones.items():
            if set(backbone.channels) != {config.pyramid_channels}:
                raise OdtkError(
                    f"{name} has levels of {backbone.channels[0]} channels, and the head expects "
                    f"{config.pyramid_channels}: pass --pyramid-channels {backbone.channels[0]}."
                )
        self.strides = tuple(stride for backbone in backbones.values() for stride in backbone.strides)
        self.stride = max(backbone.stride for backbone in backbones.values())
        self.head = create_head(config, len(self.strides))

    def forward(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Normalized images [N, 3, H, W] → logits [N, A·C, h, w] and boxes [N, A·V, h, w] of each level (heads.py)."""
        return self.head(self.features(images))

    def features(self, images: Tensor) -> list[Tensor]:
        """Normalized images [N, 3, H, W] → what the head takes: [N, pyramid_channels, h, w] of each level."""
        return [feature for backbone in self.backbones.values() for feature in backbone(images)]

    def initialize(self) -> None:
        """Random weights, as training from scratch needs them: each part by its own rule."""
        for backbone in self.backbones.values():
            backbone.initialize()  # type: ignore[operator]
        self.head.initialize()

    def anchors(self) -> list[Tensor]:
        """Base anchors [A, 4 or 5] of each level, float32, on the CPU (anchors.base_anchors)."""
        return [base_anchors(stride, self.config) for stride in self.strides]

    def feature_extractors(self) -> dict[str, FeatureExtractor]:
        """The feature extractor of each backbone, by the backbone's name: pretrained weights are loaded into these."""
        return {name: _feature_extractor(backbone) for name, backbone in self.backbones.items()}

    def train(self, mode: bool = True) -> Detector:
        """As nn.Module.train(), but batch norms in frozen stages, and all with ``norm_eval``, stay in eval mode."""
        super().train(mode)
        for module in self.backbones.modules():
            if isinstance(module, _BatchNorm) and (self.config.norm_eval or not module.weight.requires_grad):
                module.eval()
        return self

    def fold(self) -> Detector:
        """A copy for inference and export, in eval mode; its outputs are the same but for rounding.

        Batch norms are folded into their convolutions, of which a dense head then has some per level, and RepVGG's
        branches into one 3×3 convolution. The copy's state_dict has other names than this detector's: never save it in
        a checkpoint.
        """
        folded = copy.deepcopy(self).eval()
        for block in list(folded.modules()):
            if isinstance(block, (RepVGGBlock, SharedTower)):
                block.fold()
        fold_batch_norms(folded)
        return folded


def normalize(pixels: Tensor, mean: tuple[float, float, float], std: tuple[float, float, float]) -> Tensor:
    """RGB pixels [N, 3, H, W] from 0 to 255, of any type → what a detector takes, float32 on the same device."""
    scale, shift = (
        torch.tensor(values, device=pixels.device)[:, None, None]  # [3] → [3, 1, 1]
        for values in scale_and_shift(mean, std)
    )
    return pixels.float().mul(scale).add_(shift)


class Renormalize(nn.Module):
    """Images [N, 3, H, W] as one model takes them → as another does."""

    factor: Tensor
    offset: Tensor

    def __init__(self, given: ModelConfig, wanted: ModelConfig) -> None:
        super().__init__()
        (scale, shift), (new_scale, new_shift) = (
            [torch.tensor(values)[:, None, None] for values in scale_and_shift(model.mean, model.std)]
            for model in (given, wanted)
        )
        self.register_buffer("factor", new_scale / scale)  # [3, 1, 1]
        self.register_buffer("offset", new_shift - new_scale / scale * shift)
        self.same = (given.mean, given.std) == (wanted.mean, wanted.std)

    def forward(self, images: Tensor) -> Tensor:
        return images if self.same else images * self.factor + self.offset


def _feature_extractor(backbone: nn.Module) -> FeatureExtractor:
    features = backbone.features if isinstance(backbone, FPN) else backbone
    assert isinstance(features, FeatureExtractor)
    return features


def check_model_config(config: ModelConfig) -> None:
    """Refuse what cannot be built, naming the flag where there is one.

    Raises:
        OdtkError: for the first setting, or combination of settings, that is impossible.
    """
    for name in config.backbones:
        if name not in BACKBONES:
            raise OdtkError(f"The backbone {name!r} does not exist: use one of {', '.join(BACKBONES)}.")
    if not config.backbones or len(set(config.backbones)) < len(config.backbones):
        raise OdtkError("A detector needs one or more backbones, each of them only once.")
    options = [flag for name, flag in RESNETS_ONLY.items() if getattr(config, name)]
    if options and not any(name.startswith("ResNe") for name in config.backbones):
        raise OdtkError(f"{', '.join(options)}: only for ResNet backbones, and {config.backbones[0]} is not one.")
    if not 0.25 <= config.resnet_width <= 4:
        raise OdtkError(f"--resnet-width takes a factor from 0.25 to 4, not {config.resnet_width:g}.")
    if config.resnet_width != 1 and not any(name.startswith("ResNe") for name in config.backbones):
        raise OdtkError(f"--resnet-width: only for ResNet backbones, and {config.backbones[0]} is not one.")
    if config.classes < 1:
        raise OdtkError(f"A detector needs at least one class, not {config.classes}.")
    if config.padding not in ("mean", "black"):
        raise OdtkError(f"The padding {config.padding!r} does not exist: use mean or black.")
    if not all(std > 0 for std in config.std):
        raise OdtkError(f"The std of a detector's pixels must be positive, not {config.std}.")
    if not set(config.dcn) <= {2, 3, 4, 5}:
        raise OdtkError(f"--dcn takes stages 2 to 5, not {', '.join(map(str, config.dcn))}.")
    if not 0 <= config.freeze_at <= 5:
        raise OdtkError(f"--freeze-at takes a number of stages from 0 (none) to 5, not {config.freeze_at}.")
