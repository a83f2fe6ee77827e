"""How large the models are: parameters and operations of every backbone's detector, the table of docs/models.md."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..config import ModelConfig
from .backbones.catalog import BACKBONES, FEATURE_EXTRACTORS
from .detector import Detector


@dataclass(frozen=True)
class ModelSize:
    """A row of the table: the RetinaNet of 80 classes with this backbone, folded for inference.

    Attributes:
        backbone: its name.
        parameters: of the detector.
        gflops: 10⁹ operations for one image; a multiply-add counts as two operations.
        classification_parameters: of the published classification network that the backbone is made from.
    """

    backbone: str
    parameters: int
    gflops: float
    classification_parameters: int


def model_sizes() -> list[ModelSize]:
    """The size of every backbone's detector for an image of 800×1280 pixels, counted without computing a value."""
    rows = []
    for name in BACKBONES:
        with torch.device("meta"):
            detector = Detector(ModelConfig(backbones=(name,))).fold()
            images = torch.empty(1, 3, 800, 1280)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            detector(images)
        classification = classification_parameters(name.removesuffix("FPN").removesuffix("C4"))
        rows.append(ModelSize(name, count_parameters(detector), counter.get_total_flops() / 1e9, classification))
    return rows


@lru_cache
def gflops_per_megapixel(model: ModelConfig) -> float:
    """10⁹ operations of the forward pass for a million pixels, counted on one image of 512×512."""
    with torch.device("meta"):
        detector, images = Detector(model), torch.empty(1, 3, 512, 512)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        detector(images)
    return counter.get_total_flops() / 1e9 / (images.numel() / 3e6)


def classification_parameters(name: str) -> int:
    """Parameters of the published network of 1000 classes around a feature extractor of the catalog."""
    with torch.device("meta"):
        features = FEATURE_EXTRACTORS[name](ModelConfig())
    return count_parameters(features) + features.classifier_parameters


def count_parameters(module: nn.Module) -> int:
    """How many numbers the parameters of a module hold; buffers are not counted."""
    return sum(parameter.numel() for parameter in module.parameters())


def print_table() -> None:
    """Prints the sizes as a Markdown table."""
    print("| backbone | parameters (M) | GFLOPs at 800×1280 | parameters of its classification network |")
    print("|---|---:|---:|---:|")
    for row in model_sizes():
        numbers = f"{row.parameters / 1e6:.2f} | {row.gflops:.1f} | {row.classification_parameters:,}"
        print(f"| {row.backbone} | {numbers} |")


if __name__ == "__main__":  # python -m odtk.model.sizes
    print_table()
