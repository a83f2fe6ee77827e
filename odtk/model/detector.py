"""The composition: images → raw levels, nothing else. Loss and postprocessing are functions outside it."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from ..config import ModelConfig, OdtkError
from .anchors import base_anchors
from .backbones.catalog import BACKBONES, TRUNKS
from .backbones.repvgg import RepVGGBlock
from .heads import create_head
from .layers import Trunk, fold_norms
from .neck import FPN

RESNET_OPTIONS = ("dcn", "caffe_stride", "deep_stem", "avg_down", "zero_init")


class Detector(nn.Module):
    """Backbones, whose levels are concatenated, and one head over all of them.

    Attributes:
        config: what it was built from.
        strides: of every level, in order.
        stride: the input's height and width must be multiples of it.

    Raises:
        OdtkError: for names and combinations that do not exist.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        check(config)
        self.config = config
        backbones = {name: BACKBONES[name](config) for name in config.backbones}
        self.backbones = nn.ModuleDict(backbones)
        self.strides = tuple(stride for backbone in backbones.values() for stride in backbone.strides)
        self.stride = max(backbone.stride for backbone in backbones.values())
        self.head = create_head(config, len(self.strides))

    def forward(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """images [N, 3, H, W] normalized → logits [N, A·C, h, w] and boxes [N, A·V, h, w] of each level (heads.py)."""
        return self.head([feature for backbone in self.backbones.values() for feature in backbone(images)])

    def initialize(self) -> None:
        """Random weights to train from scratch: Kaiming trunks, Xavier pyramids, the head's own rule."""
        for backbone in self.backbones.values():
            backbone.initialize()  # type: ignore[operator]
        self.head.initialize()

    def anchors(self) -> list[Tensor]:
        """Base anchors [A, 4 or 5] of every level, on the CPU (heads.base_anchors)."""
        return [base_anchors(stride, self.config) for stride in self.strides]

    def trunks(self) -> dict[str, Trunk]:
        """The classification networks inside, by backbone name: what pretrained weights are loaded into."""
        return {name: _trunk(backbone) for name, backbone in self.backbones.items()}

    def train(self, mode: bool = True) -> Detector:
        """Batch norms stay in eval mode with ``norm_eval``, and in frozen stages (``freeze_at``)."""
        super().train(mode)
        for module in self.backbones.modules():
            if isinstance(module, _BatchNorm) and (self.config.norm_eval or not module.weight.requires_grad):
                module.eval()
        return self

    def fold(self) -> Detector:
        """A copy for inference and export, in eval mode, with the same outputs to rounding; this one is untouched.

        Batch norms are written into their convolutions, RepVGG's branches into one 3×3. Its state_dict no longer
        has this one's names: never save it.
        """
        folded = copy.deepcopy(self).eval()
        for block in list(folded.modules()):
            if isinstance(block, RepVGGBlock):
                block.fold()
        fold_norms(folded)
        return folded


def _trunk(backbone: nn.Module) -> Trunk:
    trunk = backbone.features if isinstance(backbone, FPN) else backbone
    assert isinstance(trunk, Trunk)
    return trunk


def check(config: ModelConfig) -> None:
    """Refuse what cannot be built, in the user's words."""
    for name in config.backbones:
        if name not in BACKBONES:
            raise OdtkError(f"The backbone {name!r} does not exist: use one of {', '.join(BACKBONES)}.")
    if not config.backbones or len(set(config.backbones)) < len(config.backbones):
        raise OdtkError("The backbones of a detector must be one or several different names.")
    options = [name for name in RESNET_OPTIONS if getattr(config, name)]
    if options and not any(name.startswith("ResNe") for name in config.backbones):
        raise OdtkError(f"{', '.join(options)}: an option of ResNet backbones, which {config.backbones[0]} is not.")
    if config.classes < 1:
        raise OdtkError(f"A detector needs at least one class, not {config.classes}.")
    if not set(config.dcn) <= {2, 3, 4, 5}:
        raise OdtkError(f"Deformable stages are 2 to 5, not {', '.join(map(str, config.dcn))}.")
    if not 0 <= config.freeze_at <= 5:
        raise OdtkError(f"--freeze-at is a stage from 0 (none) to 5, not {config.freeze_at}.")


def classification_parameters(name: str) -> int:
    """Trainable numbers of the published 1000-class network around a trunk of backbones.TRUNKS."""
    with torch.device("meta"):
        trunk = TRUNKS[name](ModelConfig())
    return count(trunk) + trunk.classifier_parameters


def count(module: nn.Module) -> int:
    """How many trainable numbers a module has."""
    return sum(parameter.numel() for parameter in module.parameters())


@dataclass(frozen=True)
class Size:
    """A row of the table of backbones: a RetinaNet of 80 classes with this backbone, folded for inference."""

    backbone: str
    parameters: int
    gflops: float  # 10⁹ operations of one image, a multiply-add counted as two
    trunk: int  # classification_parameters of its trunk


def summary(height: int = 800, width: int = 1280) -> list[Size]:
    """The size of every backbone's detector at height×width, without computing a single value (meta device)."""
    rows = []
    for name in BACKBONES:
        with torch.device("meta"):
            detector = Detector(ModelConfig(backbones=(name,))).fold()
            images = torch.empty(1, 3, height, width)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            detector(images)
        trunk = classification_parameters(name.removesuffix("FPN").removesuffix("C4"))
        rows.append(Size(name, count(detector), counter.get_total_flops() / 1e9, trunk))
    return rows


if __name__ == "__main__":  # python -m odtk.model.detector
    print("| backbone | parameters (M) | GFLOPs at 800×1280 | parameters of its classification network |")
    print("|---|---:|---:|---:|")
    for row in summary():
        print(f"| {row.backbone} | {row.parameters / 1e6:.2f} | {row.gflops:.1f} | {row.trunk:,} |")
