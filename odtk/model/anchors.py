"""Anchors: those of one cell, and their copies on every cell of the feature maps."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..config import ModelConfig


def base_anchors(stride: int, config: ModelConfig) -> Tensor:
    """Anchors of the cell (0, 0) of a level; those of the cell (x, y) lie x·stride and y·stride pixels further.

    They are the anchors of NVIDIA's ODTK 0.2, so that its checkpoints keep their meaning. For scale k and ratio
    h/w = r: w = √(stride²/r), h = w·r, corners 0.5·(stride ∓ (w, h)·k). Rotated anchors repeat these for each angle.
    Order: angle outermost, then scale, then ratio.

    Rotated anchors, and only those, ODTK 0.2 computed differently: w and h rounded to whole pixels, the right and
    bottom corners one pixel less. ``config.rounded_anchors`` does the same, for its checkpoints.

    Returns:
        [A, 4] x1, y1, x2, y2 in pixels of the input; [A, 5] with theta in radians when rotated; float32, on the CPU.
        Without anchors [1, 4]: the cell itself as a box with inclusive corners, whose center is the point.
    """
    if config.anchor_free:
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
    """The anchors of every cell of every level.

    Args:
        anchors: base_anchors, [A, 4 or 5], of each level.
        strides: of each level, in pixels.
        shapes: (h, w) of each level's feature map.

    Returns:
        [P, 4 or 5] in pixels of the input, float32 on ``device``: level after level, in the order (y, x, a) within one.
    """
    placed = []
    for base, stride, (height, width) in zip(anchors, strides, shapes, strict=True):
        y, x = torch.meshgrid(
            torch.arange(height, device=device) * stride, torch.arange(width, device=device) * stride, indexing="ij"
        )
        base = base.to(device=device, dtype=torch.float32)
        shift = torch.stack([x, y, x, y, *[torch.zeros_like(x)] * (base.shape[-1] - 4)], -1)  # [h, w, 4 or 5]
        placed.append((shift[:, :, None] + base).flatten(0, 2))  # [h, w, A, 4 or 5] → [h·w·A, 4 or 5]
    return torch.cat(placed)
