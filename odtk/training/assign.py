"""Target assignment: which ground-truth box each anchor (RetinaNet) or point (FCOS, dense) has to find.

Nothing here waits for the device: sizes are taken from shapes, and choices are made by masks. The only exception is
rotated boxes without the compiled kernel (see ops.rotated_iou).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import boxes as geometry
from .. import ops

BACKGROUND = -1  # label of an anchor or point without a box; the label of a foreground one is its class index
IGNORED = -2  # label of an anchor that counts neither as foreground nor as background
CHUNK_SIZE = 1 << 21  # (image, box, anchor) triples compared in one step, which limits the memory
CENTER_RADIUS = 1.5  # in strides: center sampling of FCOS, https://arxiv.org/abs/1904.01355 and its code
ATSS_TOP = 9  # candidates of a box on each level, k of https://arxiv.org/abs/1912.02424 §3.3
ATSS_SCALE = 8.0  # side of a point's square anchor in strides, ibid. §4
# Levels that the threshold of ATSS is taken over. Those that a pyramid lacks count as candidates with an IoU of 0:
# over P3 to P5 alone the mean rises so far that a quarter of the boxes of BCCD got no point at all.
ATSS_LEVELS = 5


def assign(
    anchors: Tensor, boxes: Tensor, labels: Tensor, *, background_iou: float, foreground_iou: float
) -> tuple[Tensor, Tensor]:
    """Assigns to each anchor the box with the highest IoU, the first of equals.

    An anchor whose highest IoU is below background_iou is background; at or above foreground_iou it is foreground; in
    between it is ignored (RetinaNet, https://arxiv.org/abs/1708.02002 §4). A box that reaches foreground_iou with no
    anchor stays unmatched, as in ODTK 0.2.

    Args:
        anchors: [P, 4 or 5] of all levels, pixels of the network's input, inclusive corners.
        boxes: [N, M, 4 or 5] of N images, in the same format.
        labels: [N, M] class indices; −1 marks padding.

    Returns:
        labels: [N, P] int64: a class index, BACKGROUND or IGNORED.
        index: [N, P] int64 in 0…M − 1: each anchor's box; without meaning where the label is not a class.
    """
    empty = boxes.new_zeros(boxes.shape[-1])
    empty[2:4] = -1  # width and height 0: its IoU with any box is 0
    boxes = torch.where((labels >= 0)[..., None], boxes, empty)
    best = []
    for chunk in anchors.split(max(1, CHUNK_SIZE // max(1, labels.numel()))):
        if boxes.shape[-1] == 5:
            overlap = ops.rotated_iou(boxes, chunk, minimum=background_iou)
        else:
            overlap = geometry.iou(boxes, chunk)
        best.append(overlap.max(1))  # [N, M, p] → [N, p]
    iou, index = (torch.cat(part, 1) for part in zip(*best, strict=True))
    assigned = torch.where(iou >= foreground_iou, labels.gather(1, index), IGNORED)
    return torch.where(iou < background_iou, BACKGROUND, assigned), index


def assign_points(
    points: Tensor, strides: Tensor, limits: Tensor, boxes: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Assigns boxes to points as FCOS does (https://arxiv.org/abs/1904.01355 §3.1 and §3.2, with center sampling).

    A box is a candidate for a point that lies inside it and less than CENTER_RADIUS strides from its center on both
    axes, if the largest of the point's distances to its four sides is within the limits of the point's level. Of
    several candidates the point gets the smallest box, and of equals the first.

    Args:
        points: [P, 2] of all levels, (x, y) in pixels of the network's input.
        strides: [P] pixels, of each point's level.
        limits: [P, 2] pixels: the smallest and the largest distance that each point's level regresses, both inclusive.
        boxes: [N, M, 4] of N images, pixels of the network's input, inclusive corners.
        labels: [N, M] class indices; −1 marks padding.

    Returns:
        labels: [N, P] int64: a class index or BACKGROUND.
        index: [N, P] int64 in 0…M − 1: each point's box; without meaning where the label is BACKGROUND.
    """
    center, size = geometry.center_and_size(boxes)
    area = geometry.area(boxes)[..., None]  # [N, M, 1]
    best = []
    for chunk, stride, limit in zip(
        *(part.split(max(1, CHUNK_SIZE // max(1, labels.numel()))) for part in (points, strides, limits)), strict=True
    ):
        offset = (chunk - center[:, :, None]).abs()  # [N, M, p, 2]
        half = 0.5 * size[:, :, None]
        inside = (offset < torch.minimum(half, CENTER_RADIUS * stride[:, None])).all(-1)
        largest = (offset + half).amax(-1)  # of the distances to the left, top, right and bottom side
        candidate = inside & (largest >= limit[:, 0]) & (largest <= limit[:, 1]) & (labels >= 0)[..., None]
        best.append(torch.where(candidate, area, math.inf).min(1))  # [N, M, p] → [N, p]
    smallest, index = (torch.cat(part, 1) for part in zip(*best, strict=True))
    return torch.where(smallest < math.inf, labels.gather(1, index), BACKGROUND), index


def level_limits(strides: Sequence[int]) -> list[tuple[float, float]]:
    """(smallest, largest) distance in pixels that each level regresses, from its stride in pixels.

    It is 4 to 8 strides, but from 0 at the finest and without limit at the coarsest level. For strides 8, 16, 32, 64
    and 128 these are the limits of FCOS (https://arxiv.org/abs/1904.01355 §3.2): 64, 128, 256 and 512.
    """
    return [(0.0 if s == min(strides) else 4.0 * s, math.inf if s == max(strides) else 8.0 * s) for s in strides]


def assign_atss(
    points: Tensor, strides: Sequence[int], counts: Sequence[int], boxes: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Assigns boxes to points by ATSS (https://arxiv.org/abs/1912.02424, algorithm 1), one square anchor per point.

    A box's candidates are, on each level, the ATSS_TOP points nearest to its center. It takes those inside it whose
    anchor overlaps it at least by a threshold of its own: the mean plus the standard deviation of its candidates' IoU.
    A point that several boxes take goes to the one of the highest IoU, and of equals to the first.
    Of rotated boxes it is the IoU of the polygons, and the inside of the polygon.

    Args:
        points: [P, 2] of all levels, (x, y) in pixels of the network's input.
        strides, counts: pixels and number of points of each level; the counts add up to P.
        boxes: [N, M, 4 or 5] of N images, pixels of the network's input, inclusive corners.
        labels: [N, M] class indices; −1 marks padding.

    Returns:
        labels: [N, P] int64: a class index or BACKGROUND.
        index: [N, P] int64 in 0…M − 1: each point's box; without meaning where the label is BACKGROUND.
    """
    images = max(1, CHUNK_SIZE // max(1, labels.shape[1] * len(points)))
    parts = [
        _assign_atss(points, strides, counts, *chunk)
        for chunk in zip(boxes.split(images), labels.split(images), strict=True)
    ]
    assigned, index = (torch.cat(part) for part in zip(*parts, strict=True))
    return assigned, index


def _assign_atss(
    points: Tensor, strides: Sequence[int], counts: Sequence[int], boxes: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    center = geometry.center_and_size(boxes)[0][:, :, None]  # [N, M, 1, 2]
    candidates, overlaps = [], []
    first = 0
    for stride, level in zip(strides, points.split(list(counts)), strict=True):
        distance = (level - center).square().sum(-1)  # [N, M, p]
        nearest = distance.topk(min(ATSS_TOP, len(level)), largest=False).indices  # [N, M, k]
        half = 0.5 * ATSS_SCALE * stride
        anchors = torch.cat([level[nearest] - half, level[nearest] + half - 1], -1)  # [N, M, k, 4]
        overlaps.append(_paired_iou(boxes[:, :, None], anchors))  # [N, M, k]
        candidates.append(nearest + first)
        first += len(level)
    index, iou = torch.cat(candidates, -1), torch.cat(overlaps, -1)  # [N, M, K]
    every = F.pad(iou, (0, max(0, ATSS_LEVELS * ATSS_TOP - iou.shape[-1])))
    threshold = every.mean(-1, keepdim=True) + every.std(-1, keepdim=True)
    taken = _is_inside(points[index], boxes[:, :, None]) & (iou >= threshold) & (labels >= 0)[..., None]
    claims = iou.new_full((*labels.shape, len(points)), -1.0)
    claims.scatter_(2, index, torch.where(taken, iou, -1.0))
    best, owner = claims.max(1)  # [N, M, P] → [N, P]
    return torch.where(best >= 0, labels.gather(1, owner), BACKGROUND), owner


def _paired_iou(boxes: Tensor, anchors: Tensor) -> Tensor:
    """IoU [N, M, k] of boxes [N, M, 1, 4 or 5] and unrotated anchors [N, M, k, 4]."""
    if boxes.shape[-1] == 5:
        return geometry.paired_rotated_iou(boxes, F.pad(anchors, (0, 1)))
    return geometry.iou(boxes, anchors)[:, :, 0]  # [N, M, 1, k] → [N, M, k]


def _is_inside(points: Tensor, boxes: Tensor) -> Tensor:
    """Whether points [N, M, K, 2] lie within boxes [N, M, 1, 4 or 5], none of them on the border: [N, M, K]."""
    if boxes.shape[-1] == 4:
        return ((points > boxes[..., :2]) & (points < boxes[..., 2:] + 1)).all(-1)
    center, size = geometry.center_and_size(boxes)
    x, y = (points - center).unbind(-1)
    sin, cos = geometry.rotation(boxes)
    turned = torch.stack([cos * x - sin * y, sin * x + cos * y], -1)  # back by the angle: the box is axis-aligned
    return (turned.abs() < 0.5 * size).all(-1)
