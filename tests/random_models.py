"""Detectors with random weights, and their checkpoints, for tests of everything that comes after training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from odtk.categories import Category
from odtk.config import ModelConfig
from odtk.model import checkpoint
from odtk.model.detector import Detector


def detector_of(config: ModelConfig, bias: float = -1.0) -> Detector:
    """Random weights that give many different scores above the threshold; a greater bias gives more of them."""
    torch.manual_seed(0)
    detector = Detector(config)
    detector.initialize()
    for parameter in detector.head.parameters():
        parameter.data = 0.0224 * torch.randn_like(parameter)
    last = list(detector.head.cls_head.children())[-1]
    assert isinstance(last, nn.Conv2d) and last.bias is not None
    last.bias.data.fill_(bias)
    return detector


def pixels_of(batch: int, size: tuple[int, int], seed: int = 1) -> Tensor:
    """Images of noise, uint8 [batch, 3, H, W]."""
    return torch.randint(0, 256, (batch, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def save(detector: Detector, folder: Path, categories: Sequence[Category] = ()) -> str:
    """Writes folder/model.pth and returns its path; without categories they are 0 "thing 0", 10 "thing 1" …"""
    path = str(folder / "model.pth")
    named = tuple(categories) or tuple(Category(10 * c, f"thing {c}") for c in range(detector.config.classes))
    checkpoint.save(path, checkpoint.Checkpoint(detector.config, named, detector.state_dict()))
    return path
