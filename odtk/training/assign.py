"""Target assignment: which anchors and points learn which boxes.

Nothing here waits for the device: sizes come from shapes, choices are made by masks. The exception is rotated boxes
where the compiled kernel is absent (ops.rotated_iou).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import boxes as geometry
from .. import ops

BACKGROUND = -1  # labels of places; a foreground place has its class index, 0 or more
IGNORED = -2
CHUNK = 1 << 21  # (image, box, place) triples looked at in one step: bounds the memory
CENTER_RADIUS = 1.5  # strides; FCOS with center sampling, https://arxiv.org/abs/1904.01355 and its code


def assign(
    anchors: Tensor, boxes: Tensor, labels: Tensor, *, background_iou: float, foreground_iou: float
) -> tuple[Tensor, Tensor]:
    """Each anchor's box: that of the greatest IoU, the first of equals.

    Below background_iou the anchor is background, at or above foreground_iou it is foreground, between it is ignored
    (https://arxiv.org/abs/1708.02002 §4). A box that no anchor reaches stays unmatched, as in ODTK 0.2.

    Args:
        anchors: [P, 4 or 5] px. boxes: [N, M, 4 or 5] px. labels: [N, M] class indices, −1 padding.

    Returns:
        labels [N, P] int64: a class index, BACKGROUND or IGNORED; and the index [N, P] of each anchor's box, in
        0…M − 1, which means something where the label is a class.
    """
    nothing = boxes.new_zeros(boxes.shape[-1])
    nothing[2:4] = -1  # width and height 0: overlaps no box
    boxes = torch.where((labels >= 0)[..., None], boxes, nothing)
    best = []
    for some in anchors.split(max(1, CHUNK // max(1, labels.numel()))):
        if boxes.shape[-1] == 5:
            overlap = ops.rotated_iou(boxes, some, minimum=background_iou)
        else:
            overlap = geometry.iou(boxes, some)
        best.append(overlap.max(1))  # [N, M, p] → [N, p]
    iou, index = (torch.cat(part, 1) for part in zip(*best, strict=True))
    assigned = torch.where(iou >= foreground_iou, labels.gather(1, index), IGNORED)
    return torch.where(iou < background_iou, BACKGROUND, assigned), index


def assign_points(
    points: Tensor, strides: Tensor, limits: Tensor, boxes: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Each point's box by FCOS (https://arxiv.org/abs/1904.01355 §3.1, §3.2, and center sampling of its later version).

    A box is a point's candidate if the point lies inside it, at most 1.5 strides from its center on both axes, and the
    greatest of the four distances is within the limits of the point's level. Of several the smallest box wins, of
    equals the first.

    Args:
        points: [P, 2] px. strides: [P] px. limits: [P, 2] px, both inclusive.
        boxes: [N, M, 4] px. labels: [N, M] class indices, −1 padding.

    Returns:
        labels [N, P] int64: a class index or BACKGROUND; and the index [N, P] of each point's box.
    """
    center, size = geometry.center_and_size(boxes)
    area = geometry.area(boxes)[..., None]  # [N, M, 1]
    best = []
    for some, stride, limit in zip(
        *(part.split(max(1, CHUNK // max(1, labels.numel()))) for part in (points, strides, limits)), strict=True
    ):
        offset = (some - center[:, :, None]).abs()  # [N, M, p, 2]
        half = 0.5 * size[:, :, None]
        inside = (offset < torch.minimum(half, CENTER_RADIUS * stride[:, None])).all(-1)
        furthest = (offset + half).amax(-1)  # of left, top, right, bottom
        candidate = inside & (furthest >= limit[:, 0]) & (furthest <= limit[:, 1]) & (labels >= 0)[..., None]
        best.append(torch.where(candidate, area, math.inf).min(1))  # [N, M, p] → [N, p]
    smallest, index = (torch.cat(part, 1) for part in zip(*best, strict=True))
    return torch.where(smallest < math.inf, labels.gather(1, index), BACKGROUND), index


def level_limits(strides: Sequence[int]) -> list[tuple[float, float]]:
    """(least, greatest) distance in px that each level regresses: 64, 128, 256, 512 between strides 8 … 128.

    In general from 4 to 8 strides, and open at the finest and at the coarsest level.
    """
    return [(0.0 if s == min(strides) else 4.0 * s, math.inf if s == max(strides) else 8.0 * s) for s in strides]
