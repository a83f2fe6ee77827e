"""Anchors: the shapes at one cell, and all of them placed on the maps."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..config import ModelConfig


def base_anchors(stride: int, config: ModelConfig) -> Tensor:
    """Anchors of the cell (0, 0) of a level; those of the cell (x, y) lie x·stride and y·stride further (spec §2).

    For scale k and ratio h/w = r: w = √(stride²/r), h = w·r, corners 0.5·(stride ∓ (w, h)·k); rotated anchors
    repeat these for each angle. Order: angle outermost, then scale, then ratio.

    ODTK 0.2 drew its rotated anchors (only those) otherwise: w and h rounded, the right and bottom corners one
    pixel further in. ``config.rounded_anchors`` does the same, for its checkpoints.

    Returns:
        [A, 4] x1, y1, x2, y2 in pixels of the input, [A, 5] with theta when rotated, float32, on the CPU.
        FCOS: the cell itself as an inclusive box, whose center is the point.
    """
    if config.head == "fcos":
        return torch.tensor([[0.0, 0.0, stride - 1.0, stride - 1.0]], device="cpu")
    anchors = []
    for angle in config.angles or (None,):
        for scale in config.scales:
            for ratio in config.ratios:
                w = math.sqrt(stride * stride / ratio)
                h = w * ratio
                if config.rounded_anchors:
                    w, h = round(w), round(round(w) * ratio)
                inset = 1 if config.rounded_anchors else 0
                first = [0.5 * (stride - side * scale) for side in (w, h)]
                last = [0.5 * (stride + side * scale) - inset for side in (w, h)]
                anchors.append([*first, *last] if angle is None else [*first, *last, angle])
    return torch.tensor(anchors, dtype=torch.float32, device="cpu")


def place_anchors(
    anchors: Sequence[Tensor], strides: Sequence[int], shapes: Sequence[tuple[int, ...]], device: torch.device
) -> Tensor:
    """The anchors of every cell of every level: [P, 4 or 5] px, order (y, x, a) within a level of shape (h, w)."""
    placed = []
    for base, stride, (height, width) in zip(anchors, strides, shapes, strict=True):
        y, x = torch.meshgrid(
            torch.arange(height, device=device) * stride, torch.arange(width, device=device) * stride, indexing="ij"
        )
        base = base.to(device=device, dtype=torch.float32)
        shift = torch.stack([x, y, x, y, *[torch.zeros_like(x)] * (base.shape[-1] - 4)], -1)  # [h, w, 4 or 5]
        placed.append((shift[:, :, None] + base).flatten(0, 2))  # [h, w, A, 4 or 5] → [h·w·A, 4 or 5]
    return torch.cat(placed)
