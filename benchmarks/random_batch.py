"""What the benchmarks of single training steps share: a batch without files, and torch's own gradients to compare."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from odtk.model import depthwise
from odtk.model.backbones import efficientnet_lite

CLASSES = 3


def random_batch(batch: int, size: Sequence[int], boxes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images [N, 3, H, W] of ``size`` (H, W) in channels-last, as many boxes [N, M, 4] in each, and labels [N, M]."""
    height, width = size
    images = torch.randn(batch, 3, height, width).contiguous(memory_format=torch.channels_last)
    corner = torch.rand(batch, boxes, 2) * torch.tensor([width / 2, height / 2])
    corners = torch.cat([corner, corner + 20 + torch.rand(batch, boxes, 2) * height / 3], dim=-1)
    return images, corners, torch.randint(CLASSES, (batch, boxes))


def use_torch_gradients() -> None:
    """Gives depthwise convolutions torch's own gradients for the rest of the process."""
    for module in (depthwise, efficientnet_lite):
        module.has_slow_gradients = lambda conv, x: False  # type: ignore[attr-defined]
