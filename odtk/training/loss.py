"""Which anchor is to find which box (target assignment), and the losses. Vectorised over batch and levels.

Nothing here waits for the device: sizes come from shapes, choices are made by masks. The exception is rotated boxes
where the compiled kernel is absent (ops.rotated_iou).

Everything about anchors is in the order (y, x, a) of each level, levels one after the other: P places in all. Seen in
that order a head's channels-last output is contiguous, and any other is read through its strides, never copied.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import boxes as geometry
from .. import ops
from ..config import LossConfig, ModelConfig

BACKGROUND = -1  # labels of places; a foreground place has its class index, 0 or more
IGNORED = -2
CHUNK = 1 << 21  # (image, box, place) triples looked at in one step of the assignment: bounds its memory
CENTRE_RADIUS = 1.5  # strides; FCOS with centre sampling, https://arxiv.org/abs/1904.01355 and its code
SMALLEST = 1e-6  # keeps the logarithm and the quotients of the IoU loss finite


def detection_loss(
    logits: Sequence[Tensor],
    boxes: Sequence[Tensor],
    target_boxes: Tensor,
    target_labels: Tensor,
    *,
    anchors: Sequence[Tensor],
    strides: Sequence[int],
    model: ModelConfig,
    loss: LossConfig,
) -> dict[str, tuple[Tensor, Tensor]]:
    """The losses of a batch as sums, with what each is to be divided by.

    Args:
        logits, boxes: raw levels [N, A·C, h, w] and [N, A·V, h, w] of a Detector, any float type and memory format.
        target_boxes: [N, M, 4], or [N, M, 5] rotated, px of the network's input, inclusive corners.
        target_labels: [N, M] int64 class indices; −1 marks padding.
        anchors: per level [A, 4 or 5] of Detector.anchors().
        strides: px per cell, per level.

    Returns:
        {"cls": (sum, normalizer), "box": …}, and "centerness" for FCOS; float32 scalars. Over several processes the
        loss is the sum of sums / (sum of normalizers).clamp(min=1).
    """
    compute = _fcos_loss if model.head == "fcos" else _retinanet_loss
    shapes = [tuple(level.shape[-2:]) for level in logits]
    places = place_anchors(anchors, strides, shapes, target_boxes.device)
    return compute(logits, boxes, target_boxes.float(), target_labels, places, strides, model, loss)


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


def _retinanet_loss(
    logits: Sequence[Tensor],
    boxes: Sequence[Tensor],
    target_boxes: Tensor,
    target_labels: Tensor,
    anchors: Tensor,
    strides: Sequence[int],
    model: ModelConfig,
    loss: LossConfig,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Focal loss over all anchors that are not ignored, smooth L1 over the foreground; by the foreground's number."""
    labels, index = assign(
        anchors,
        target_boxes,
        target_labels,
        background_iou=loss.background_iou,
        foreground_iou=loss.foreground_iou,
    )
    matched = _take(target_boxes, index)  # [N, P, 4 or 5]
    if model.rotated:
        if not loss.absolute_angle:  # a box at ±45° would else be regressed in two forms, and their mean is neither
            matched = geometry.normalize_angle(matched, around=anchors[:, 4:])
        targets = geometry.encode_rotated(matched, anchors)
    else:
        targets = geometry.encode(matched, anchors)
    targets = torch.where((labels >= 0)[..., None], targets, 0)  # elsewhere the logarithm may be infinite

    class_sum = box_sum = torch.zeros((), device=labels.device)
    levels = zip(logits, boxes, _per_level(labels, logits, model), _per_level(targets, logits, model), strict=True)
    for level_logits, level_boxes, level_labels, level_targets in levels:
        class_sum = class_sum + focal_loss(_by_place(level_logits, model), level_labels, loss.alpha, loss.gamma)
        predicted = _by_place(level_boxes, model).float()
        distance = F.smooth_l1_loss(predicted, level_targets, beta=loss.beta, reduction="none")  # [N, h, w, A, V]
        box_sum = box_sum + torch.where((level_labels >= 0)[..., None], distance, 0).sum()
    foreground = (labels >= 0).sum().float()
    return {"cls": (class_sum, foreground), "box": (box_sum, foreground)}


def _by_place(level: Tensor, model: ModelConfig) -> Tensor:
    """A raw level [N, A·X, h, w] seen as [N, h, w, A, X], whatever its memory format; never a copy."""
    return level.unflatten(1, (model.num_anchors, -1)).permute(0, 3, 4, 1, 2)  # [N, A, X, h, w] → [N, h, w, A, X]


def _per_level(values: Tensor, logits: Sequence[Tensor], model: ModelConfig) -> list[Tensor]:
    """Values of all places [N, P, …] as one view [N, h, w, A, …] per level."""
    shapes = [(*level.shape[-2:], model.num_anchors) for level in logits]
    parts = values.split([math.prod(shape) for shape in shapes], 1)
    return [part.unflatten(1, shape) for part, shape in zip(parts, shapes, strict=True)]


def _take(boxes: Tensor, index: Tensor) -> Tensor:
    """The boxes [N, P, V] at the indices [N, P] of boxes [N, M, V]."""
    return boxes.gather(1, index[..., None].expand(-1, -1, boxes.shape[-1]))


class _FocalLoss(torch.autograd.Function):
    """Sum of the focal loss; keeps only the logits, and works its gradient out again from them.

    The classes of a place are all background but at most one, so everything is computed as background, and the one
    class put right: no one-hot target. With p = sigmoid(x) and softplus(x) = log(1 + e^x), stable for every x:
        background: (1 − α)·p^γ·softplus(x)      its derivative: (1 − α)·p^γ·(γ·(1 − p)·softplus(x) + p)
    and the foreground is the same function of −x with α in place of 1 − α.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, alpha: float, gamma: float) -> Tensor:
        ctx.save_for_backward(logits, labels)
        ctx.alpha, ctx.gamma = alpha, gamma
        values = logits.float()
        label = labels.clamp(min=0)[..., None]
        labelled = values.gather(-1, label)[..., 0]
        as_background = _focal(values, 1 - alpha, gamma)
        correction = _focal(-labelled, alpha, gamma) - as_background.gather(-1, label)[..., 0]
        loss = as_background.sum(-1) + torch.where(labels >= 0, correction, 0)
        return torch.where(labels == IGNORED, 0, loss).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        logits, labels = ctx.saved_tensors
        values = logits.float()
        label = labels.clamp(min=0)[..., None]
        slope = _focal_slope(values, 1 - ctx.alpha, ctx.gamma)
        foreground = -_focal_slope(-values.gather(-1, label), ctx.alpha, ctx.gamma)
        slope.scatter_(-1, label, torch.where((labels >= 0)[..., None], foreground, slope.gather(-1, label)))
        slope.mul_(torch.where(labels == IGNORED, 0, grad)[..., None])
        return slope.to(logits.dtype), None, None, None


def _focal(x: Tensor, weight: float, gamma: float) -> Tensor:
    """weight·p^γ·softplus(x), p = sigmoid(x)."""
    return x.sigmoid().pow_(gamma).mul_(F.softplus(x)).mul_(weight)


def _focal_slope(x: Tensor, weight: float, gamma: float) -> Tensor:
    """The derivative of _focal by x: weight·p^γ·(γ·(1 − p)·softplus(x) + p)."""
    p = x.sigmoid()
    return F.softplus(x).mul_(1 - p).mul_(gamma).add_(p).mul_(p.pow_(gamma)).mul_(weight)


def focal_loss(logits: Tensor, labels: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Sum of the focal loss, https://arxiv.org/abs/1708.02002 eq. 5, in float32 whatever the logits are.

    Args:
        logits: [..., C], any float type and strides.
        labels: [...] int64: the class index of each place, BACKGROUND, or IGNORED (which counts nothing).
    """
    return _FocalLoss.apply(logits, labels, alpha, gamma)


def assign_points(
    points: Tensor, strides: Tensor, limits: Tensor, boxes: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Each point's box by FCOS (https://arxiv.org/abs/1904.01355 §3.1, §3.2, and centre sampling of its later version).

    A box is a point's candidate if the point lies inside it, at most 1.5 strides from its centre on both axes, and the
    greatest of the four distances is within the limits of the point's level. Of several the smallest box wins, of
    equals the first.

    Args:
        points: [P, 2] px. strides: [P] px. limits: [P, 2] px, both inclusive.
        boxes: [N, M, 4] px. labels: [N, M] class indices, −1 padding.

    Returns:
        labels [N, P] int64: a class index or BACKGROUND; and the index [N, P] of each point's box.
    """
    centre, size = geometry.centre_and_size(boxes)
    area = geometry.area(boxes)[..., None]  # [N, M, 1]
    best = []
    for some, stride, limit in zip(
        *(part.split(max(1, CHUNK // max(1, labels.numel()))) for part in (points, strides, limits)), strict=True
    ):
        offset = (some - centre[:, :, None]).abs()  # [N, M, p, 2]
        half = 0.5 * size[:, :, None]
        inside = (offset < torch.minimum(half, CENTRE_RADIUS * stride[:, None])).all(-1)
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


def _fcos_loss(
    logits: Sequence[Tensor],
    boxes: Sequence[Tensor],
    target_boxes: Tensor,
    target_labels: Tensor,
    anchors: Tensor,
    strides: Sequence[int],
    model: ModelConfig,
    loss: LossConfig,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Focal loss over all points, IoU loss weighted by the centre-ness target, centre-ness by cross entropy."""
    device = target_boxes.device
    counts = [level.shape[-2] * level.shape[-1] for level in logits]
    stride = torch.cat([torch.full((n,), float(s), device=device) for n, s in zip(counts, strides, strict=True)])
    limits = torch.cat(
        [
            torch.stack([torch.full((n,), bound, device=device) for bound in bounds], -1)
            for n, bounds in zip(counts, level_limits(strides), strict=True)
        ]
    )
    points = geometry.centre_and_size(anchors)[0]
    labels, index = assign_points(points, stride, limits, target_boxes, target_labels)
    foreground = labels >= 0
    matched = _take(target_boxes, index)  # [N, P, 4]
    distances = torch.cat([points - matched[..., :2], matched[..., 2:] + 1 - points], -1)  # l, t, r, b px
    distances = torch.where(foreground[..., None], distances, 1)
    centerness = torch.where(foreground, centerness_targets(distances), 0)

    class_sum = box_sum = centerness_sum = torch.zeros((), device=device)
    parts = (_per_level(value, logits, model) for value in (labels, distances, centerness))
    for level_logits, level_boxes, s, level_labels, level_distances, weight in zip(
        logits, boxes, strides, *parts, strict=True
    ):
        raw = _by_place(level_boxes, model).float()  # [N, h, w, 1, 5]
        class_sum = class_sum + focal_loss(_by_place(level_logits, model), level_labels, loss.alpha, loss.gamma)
        overlap = iou_loss(raw[..., :4].relu() * s, level_distances, kind=loss.fcos_box_loss)
        box_sum = box_sum + torch.where(level_labels >= 0, overlap * weight, 0).sum()
        entropy = F.binary_cross_entropy_with_logits(raw[..., 4], weight, reduction="none")
        centerness_sum = centerness_sum + torch.where(level_labels >= 0, entropy, 0).sum()
    number = foreground.sum().float()
    return {"cls": (class_sum, number), "box": (box_sum, centerness.sum()), "centerness": (centerness_sum, number)}


def centerness_targets(distances: Tensor) -> Tensor:
    """Centre-ness [...] in (0, 1] of positive distances (l, t, r, b) [..., 4]: FCOS, eq. 3."""
    start, end = distances[..., :2], distances[..., 2:]
    return (torch.minimum(start, end) / torch.maximum(start, end)).prod(-1).sqrt()


def iou_loss(predicted: Tensor, target: Tensor, *, kind: str) -> Tensor:
    """Loss [...] of two boxes about the same point, as distances (l, t, r, b) [..., 4] ≥ 0.

    Args:
        kind: ``iou``: −log IoU (UnitBox, https://arxiv.org/abs/1608.01471 eq. 1); ``giou``: 1 − GIoU
            (https://arxiv.org/abs/1902.09630 alg. 1).
    """
    shared = torch.minimum(predicted, target)
    intersection = (shared[..., 0] + shared[..., 2]) * (shared[..., 1] + shared[..., 3])
    areas = [(box[..., 0] + box[..., 2]) * (box[..., 1] + box[..., 3]) for box in (predicted, target)]
    union = (areas[0] + areas[1] - intersection).clamp(min=SMALLEST)
    iou = intersection / union
    if kind == "iou":
        return -iou.clamp(min=SMALLEST).log()
    around = torch.maximum(predicted, target)
    hull = ((around[..., 0] + around[..., 2]) * (around[..., 1] + around[..., 3])).clamp(min=SMALLEST)
    return 1 - iou + (hull - union) / hull
