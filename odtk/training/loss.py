"""The losses of RetinaNet, FCOS and the dense head, vectorized over the batch.

Nothing here waits for the device: sizes are taken from shapes, and choices are made by masks. The only exception is
rotated boxes without the compiled kernel (see ops.rotated_iou).

P is the number of anchors of all levels; FCOS and the dense head have one per cell, whose center is its point. They are
ordered by level, and within a level by (y, x, a). In that order the channels-last output of a head is contiguous;
outputs of another memory format are read through their strides, never copied.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import boxes as geometry
from ..config import LossConfig, ModelConfig
from ..model.anchors import place_anchors
from .assign import ATSS_TOP, IGNORED, assign, assign_atss, assign_points, level_limits

EPSILON = 1e-6  # keeps the logarithm and the quotients of the IoU loss finite
BOX_WEIGHT = 2.0  # of the dense head's box loss, as https://arxiv.org/abs/2006.04388 §4 has it
ANGLE_WEIGHT = 0.5  # of the dense head's angle loss
ANGLE_BETA = 0.11  # of its smooth L1, where it turns from a square into a line


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
    """Computes each loss of a batch as a sum, with the normalizer by which it is to be divided (see normalize).

    Args:
        logits, boxes: raw levels [N, A·C, h, w] and [N, A·V, h, w] of a Detector, in any float type and memory format.
        target_boxes: [N, M, 4], or [N, M, 5] if rotated; pixels of the network's input, inclusive corners.
        target_labels: [N, M] int64 class indices; −1 marks padding.
        anchors: per level [A, 4 or 5], from Detector.anchors().
        strides: pixels per cell, per level.

    Returns:
        {"cls": (sum, normalizer), "box": (sum, normalizer)}, and "centerness" for FCOS, "angle" for rotated boxes of
        the dense head; float32 scalars.
    """
    dense = _rotated_dense_loss if model.rotated else _dense_loss
    compute = {"retinanet": _retinanet_loss, "fcos": _fcos_loss, "dense": dense}[model.head]
    shapes = [tuple(level.shape[-2:]) for level in logits]
    placed = place_anchors(anchors, strides, shapes, target_boxes.device)  # [P, 4 or 5]
    return compute(logits, boxes, target_boxes.float(), target_labels, placed, strides, model, loss)


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
    """Focal loss of all anchors that are not ignored, smooth L1 of the foreground; both normalized by its count.

    https://arxiv.org/abs/1708.02002 §4; ``anchors`` are placed, [P, 4 or 5].
    """
    labels, index = assign(
        anchors,
        target_boxes,
        target_labels,
        background_iou=loss.background_iou,
        foreground_iou=loss.foreground_iou,
    )
    matched = _gather_boxes(target_boxes, index)  # [N, P, 4 or 5]
    if model.rotated:
        if not loss.absolute_angle:  # else a box at ±45° would have two forms, and the head would learn their mean
            matched = geometry.normalize_angle(matched, around=anchors[:, 4:])
        targets = geometry.encode_rotated(matched, anchors)
    else:
        targets = geometry.encode(matched, anchors)
    targets = torch.where((labels >= 0)[..., None], targets, 0)  # the logarithm of a background target may be infinite

    class_sum = box_sum = torch.zeros((), device=labels.device)
    levels = zip(
        logits, boxes, _split_levels(labels, logits, model), _split_levels(targets, logits, model), strict=True
    )
    for level_logits, level_boxes, level_labels, level_targets in levels:
        class_sum = class_sum + focal_loss(_view_by_anchor(level_logits, model), level_labels, loss.alpha, loss.gamma)
        predicted = _view_by_anchor(level_boxes, model).float()
        distance = F.smooth_l1_loss(predicted, level_targets, beta=loss.beta, reduction="none")  # [N, h, w, A, V]
        box_sum = box_sum + torch.where((level_labels >= 0)[..., None], distance, 0).sum()
    foreground = (labels >= 0).sum().float()
    return {"cls": (class_sum, foreground), "box": (box_sum, foreground)}


def _view_by_anchor(level: Tensor, model: ModelConfig) -> Tensor:
    """Views a raw level [N, A·X, h, w] as [N, h, w, A, X], whatever its memory format; never a copy."""
    return level.unflatten(1, (model.num_anchors, -1)).permute(0, 3, 4, 1, 2)  # [N, A, X, h, w] → [N, h, w, A, X]


def _split_levels(values: Tensor, logits: Sequence[Tensor], model: ModelConfig) -> list[Tensor]:
    """Splits values of all anchors [N, P, …] into one view [N, h, w, A, …] per level."""
    shapes = [(*level.shape[-2:], model.num_anchors) for level in logits]
    parts = values.split([math.prod(shape) for shape in shapes], 1)
    return [part.unflatten(1, shape) for part, shape in zip(parts, shapes, strict=True)]


def _gather_boxes(boxes: Tensor, index: Tensor) -> Tensor:
    """Boxes [N, M, V] and indices [N, P] → the box of each anchor [N, P, V]."""
    return boxes.gather(1, index[..., None].expand(-1, -1, boxes.shape[-1]))


class _FocalLoss(torch.autograd.Function):
    """Sum of the focal loss. To save memory it keeps only the logits, and computes the gradient from them again.

    At most one class of an anchor is foreground. So all are computed as background, and then that one is corrected,
    which needs no one-hot target. With p = sigmoid(x) and softplus(x) = log(1 + e^x), which are stable for every x:
        background: (1 − α)·p^γ·softplus(x)      its derivative: (1 − α)·p^γ·(γ·(1 − p)·softplus(x) + p)
    The foreground is the same function of −x with α in place of 1 − α.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, alpha: float, gamma: float) -> Tensor:
        ctx.save_for_backward(logits, labels)
        ctx.alpha, ctx.gamma = alpha, gamma
        values = logits.float()
        label = labels.clamp(min=0)[..., None]
        labeled = values.gather(-1, label)[..., 0]
        as_background = _focal(values, 1 - alpha, gamma)
        correction = _focal(-labeled, alpha, gamma) - as_background.gather(-1, label)[..., 0]
        loss = as_background.sum(-1) + torch.where(labels >= 0, correction, 0)
        return torch.where(labels == IGNORED, 0, loss).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        logits, labels = ctx.saved_tensors
        values = logits.float()
        label = labels.clamp(min=0)[..., None]
        gradient = _focal_gradient(values, 1 - ctx.alpha, ctx.gamma)
        foreground = -_focal_gradient(-values.gather(-1, label), ctx.alpha, ctx.gamma)
        gradient.scatter_(-1, label, torch.where((labels >= 0)[..., None], foreground, gradient.gather(-1, label)))
        gradient.mul_(torch.where(labels == IGNORED, 0, grad)[..., None])
        return gradient.to(logits.dtype), None, None, None


def _focal(x: Tensor, weight: float, gamma: float) -> Tensor:
    """weight·p^γ·softplus(x) with p = sigmoid(x)."""
    return x.sigmoid().pow_(gamma).mul_(F.softplus(x)).mul_(weight)


def _focal_gradient(x: Tensor, weight: float, gamma: float) -> Tensor:
    """The derivative of _focal with respect to x: weight·p^γ·(γ·(1 − p)·softplus(x) + p)."""
    p = x.sigmoid()
    return F.softplus(x).mul_(1 - p).mul_(gamma).add_(p).mul_(p.pow_(gamma)).mul_(weight)


def focal_loss(logits: Tensor, labels: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Sum of the focal loss (https://arxiv.org/abs/1708.02002 eq. 5), computed in float32 from logits of any type.

    Args:
        logits: [..., C] of any float type and any strides.
        labels: [...] int64: a class index, BACKGROUND, or IGNORED, which adds nothing to the sum.
    """
    return _FocalLoss.apply(logits, labels, alpha, gamma)


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
    """Focal loss of all points; of the foreground, IoU loss weighted by center-ness, and center-ness by cross entropy.

    https://arxiv.org/abs/1904.01355 §3; ``anchors`` are placed, [P, 4], with the points at their centers.
    """
    device = target_boxes.device
    counts = [level.shape[-2] * level.shape[-1] for level in logits]
    stride = torch.cat([torch.full((n,), float(s), device=device) for n, s in zip(counts, strides, strict=True)])
    limits = torch.cat(
        [
            torch.stack([torch.full((n,), bound, device=device) for bound in bounds], -1)
            for n, bounds in zip(counts, level_limits(strides), strict=True)
        ]
    )
    points = geometry.center_and_size(anchors)[0]
    labels, index = assign_points(points, stride, limits, target_boxes, target_labels)
    foreground = labels >= 0
    distances = _distance_targets(points, _gather_boxes(target_boxes, index), foreground)
    centerness = torch.where(foreground, centerness_targets(distances), 0)

    class_sum = box_sum = centerness_sum = torch.zeros((), device=device)
    parts = (_split_levels(value, logits, model) for value in (labels, distances, centerness))
    for level_logits, level_boxes, s, level_labels, level_distances, weight in zip(
        logits, boxes, strides, *parts, strict=True
    ):
        raw = _view_by_anchor(level_boxes, model).float()  # [N, h, w, 1, 5]
        class_sum = class_sum + focal_loss(_view_by_anchor(level_logits, model), level_labels, loss.alpha, loss.gamma)
        overlap = giou_loss(raw[..., :4].relu() * s, level_distances)
        box_sum = box_sum + torch.where(level_labels >= 0, overlap * weight, 0).sum()
        entropy = F.binary_cross_entropy_with_logits(raw[..., 4], weight, reduction="none")
        centerness_sum = centerness_sum + torch.where(level_labels >= 0, entropy, 0).sum()
    count = foreground.sum().float()
    return {"cls": (class_sum, count), "box": (box_sum, centerness.sum()), "centerness": (centerness_sum, count)}


def _distance_targets(points: Tensor, boxes: Tensor, foreground: Tensor) -> Tensor:
    """Distances (l, t, r, b) [N, P, 4] in px of points [P, 2] to the sides of their boxes [N, P, 4]; 1 of others."""
    distances = torch.cat([points - boxes[..., :2], boxes[..., 2:] + 1 - points], -1)
    return torch.where(foreground[..., None], distances, 1)


def _dense_loss(
    logits: Sequence[Tensor],
    boxes: Sequence[Tensor],
    target_boxes: Tensor,
    target_labels: Tensor,
    anchors: Tensor,
    strides: Sequence[int],
    model: ModelConfig,
    loss: LossConfig,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Quality focal loss of all points, whose target is the IoU; GIoU loss of the foreground, weighted by the score.

    https://arxiv.org/abs/2006.04388 §3 with the points of ATSS, and without its distributions of distances;
    ``anchors`` are placed, [P, 4], with the points at their centers.
    """
    counts = [level.shape[-2] * level.shape[-1] for level in logits]
    points = geometry.center_and_size(anchors)[0]
    labels, index = assign_atss(points, strides, counts, target_boxes, target_labels)
    distances = _distance_targets(points, _gather_boxes(target_boxes, index), labels >= 0)

    class_sum = box_sum = weight_sum = torch.zeros((), device=target_boxes.device)
    parts = (_split_levels(value, logits, model) for value in (labels, distances))
    for level_logits, level_boxes, s, level_labels, level_distances in zip(logits, boxes, strides, *parts, strict=True):
        values = _view_by_anchor(level_logits, model)  # [N, h, w, 1, C]
        predicted = _view_by_anchor(level_boxes, model).float().relu() * s  # [N, h, w, 1, 4]
        foreground = level_labels >= 0
        quality = torch.where(foreground, iou_of_distances(predicted.detach(), level_distances)[0], 0)
        class_sum = class_sum + quality_focal_loss(values, level_labels, quality)
        weight = torch.where(foreground, values.detach().float().sigmoid().amax(-1), 0)
        box_sum = box_sum + (giou_loss(predicted, level_distances) * weight).sum()
        weight_sum = weight_sum + weight.sum()
    count = (labels >= 0).sum().float()
    return {"cls": (class_sum, count), "box": (BOX_WEIGHT * box_sum, weight_sum)}


def _rotated_dense_loss(
    logits: Sequence[Tensor],
    boxes: Sequence[Tensor],
    target_boxes: Tensor,
    target_labels: Tensor,
    anchors: Tensor,
    strides: Sequence[int],
    model: ModelConfig,
    loss: LossConfig,
) -> dict[str, tuple[Tensor, Tensor]]:
    """As _dense_loss, with the IoU of polygons, its loss by rotated_box_loss, and a loss of the angle by angle_loss.

    The loss of the exact rotated IoU is that of RTMDet-R, https://arxiv.org/abs/2212.07784 §3.5. Only foreground points
    are decoded: a box has at most ATSS_TOP of them per level, so their number is bounded by the shapes.
    """
    device = target_boxes.device
    counts = [level.shape[-2] * level.shape[-1] for level in logits]
    stride = torch.cat([torch.full((n,), float(s), device=device) for n, s in zip(counts, strides, strict=True)])
    points = geometry.center_and_size(anchors)[0]
    labels, index = assign_atss(points, strides, counts, target_boxes, target_labels)
    most = min(len(points), target_labels.shape[1] * ATSS_TOP * len(counts))
    foreground, chosen = (labels >= 0).int().topk(most, 1)  # [N, K]
    valid = foreground > 0

    raw = torch.cat([_view_by_anchor(level, model).flatten(1, 3) for level in boxes], 1).float()  # [N, P, 6]
    raw = _gather_boxes(raw, chosen)  # [N, K, 6]
    raw = torch.where(valid[..., None], raw, raw.new_tensor([0.0, 0.0, 1.0, 1.0, 0.0, 1.0]))  # others: any finite box
    target = _gather_boxes(target_boxes, index.gather(1, chosen))  # [N, K, 5]
    predicted = _boxes_of_numbers(raw, points[chosen], stride[chosen][..., None])
    overlap, box = rotated_box_loss(predicted, target)
    scores = torch.cat([_view_by_anchor(level, model).detach().flatten(1, 3).amax(-1) for level in logits], 1)  # [N, P]
    weight = torch.where(valid, scores.gather(1, chosen).float().sigmoid(), 0)
    quality = torch.zeros(labels.shape, device=device).scatter(1, chosen, torch.where(valid, overlap.detach(), 0))

    class_sum = torch.zeros((), device=device)
    parts = (_split_levels(value, logits, model) for value in (labels, quality))
    for level_logits, level_labels, level_quality in zip(logits, *parts, strict=True):
        class_sum = class_sum + quality_focal_loss(_view_by_anchor(level_logits, model), level_labels, level_quality)
    weight_sum = weight.sum()
    return {
        "cls": (class_sum, (labels >= 0).sum().float()),
        "box": (BOX_WEIGHT * (box * weight).sum(), weight_sum),
        "angle": (ANGLE_WEIGHT * (angle_loss(raw[..., 4:], target) * weight).sum(), weight_sum),
    }


def _boxes_of_numbers(numbers: Tensor, points: Tensor, stride: Tensor) -> Tensor:
    """Boxes [..., 5] of the head's numbers [..., 6] at points [..., 2]: the coder's, with theta, and not clamped."""
    center = points + numbers[..., :2] * stride
    half = 0.5 * numbers[..., 2:4].relu() * stride
    theta = 0.5 * torch.atan2(numbers[..., 4:5], numbers[..., 5:6])
    return torch.cat([center - half, center + half - 1, theta], -1)


def rotated_box_loss(predicted: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """IoU [...] and loss [...] of rotated boxes [..., 5] pair by pair: 1 − IoU + (distance of the centers / diagonal)².

    DIoU, https://arxiv.org/abs/1911.08287 eq. 7; the diagonal is that of the axis-aligned box around both. The second
    term has a gradient where the boxes do not overlap.
    """
    overlap = geometry.paired_rotated_iou(predicted, target)
    shift = geometry.center_and_size(predicted)[0] - geometry.center_and_size(target)[0]
    a, b = geometry.circumscribe(predicted), geometry.circumscribe(target)
    around = torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2]) + 1
    distance = shift.square().sum(-1) / around.square().sum(-1).clamp(min=EPSILON)
    return overlap, 1 - overlap + distance


def angle_loss(doubled: Tensor, target: Tensor) -> Tensor:
    """Smooth L1 [...] between (sin 2θ, cos 2θ) [..., 2] and those of the target boxes [..., 5], θ of their longer side.

    It makes all points agree on one of the two forms of a box, as a mean of both is neither. A square has no longer
    side: the loss is weighted by 1 − shorter/longer, so that only the IoU decides there.
    """
    size = geometry.center_and_size(target)[1].clamp(min=EPSILON)
    weight = 1 - size.amin(-1) / size.amax(-1)
    sign = torch.where(size[..., 0] >= size[..., 1], 1.0, -1.0)[..., None]  # a quarter turn turns 2θ by π
    twice = 2 * target[..., 4]
    wanted = sign * torch.stack([torch.sin(twice), torch.cos(twice)], -1)
    return weight * F.smooth_l1_loss(doubled, wanted, beta=ANGLE_BETA, reduction="none").sum(-1)


def quality_focal_loss(logits: Tensor, labels: Tensor, quality: Tensor) -> Tensor:
    """Sum of |y − p|²·cross entropy of p = sigmoid(logits) and y: https://arxiv.org/abs/2006.04388 eq. 2 with β = 2.

    Args:
        logits: [..., C] of any float type and any strides; computed in float32.
        labels: [...] int64: a class index or BACKGROUND.
        quality: [...] in [0, 1]: y of that class; y of all others is 0.
    """
    x = logits.float()
    label = labels.clamp(min=0)[..., None]
    as_background = x.sigmoid().square() * F.softplus(x)
    labeled = x.gather(-1, label)[..., 0]
    entropy = F.softplus(labeled) - quality * labeled
    correction = (quality - labeled.sigmoid()).square() * entropy - as_background.gather(-1, label)[..., 0]
    return as_background.sum() + torch.where(labels >= 0, correction, 0).sum()


def centerness_targets(distances: Tensor) -> Tensor:
    """Positive distances (l, t, r, b) [..., 4] → center-ness [...] in (0, 1]: https://arxiv.org/abs/1904.01355 eq. 3"""
    start, end = distances[..., :2], distances[..., 2:]
    return (torch.minimum(start, end) / torch.maximum(start, end)).prod(-1).sqrt()


def giou_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """1 − GIoU of boxes that contain the same point: https://arxiv.org/abs/1902.09630 alg. 1.

    Args:
        predicted, target: distances (l, t, r, b) [..., 4] of the point to the box's sides, ≥ 0, in pixels.

    Returns:
        [...], one loss per pair of boxes.
    """
    iou, union = iou_of_distances(predicted, target)
    outer = torch.maximum(predicted, target)
    hull = ((outer[..., 0] + outer[..., 2]) * (outer[..., 1] + outer[..., 3])).clamp(min=EPSILON)
    return 1 - iou + (hull - union) / hull


def iou_of_distances(predicted: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and union in px², both [...], of boxes given as in giou_loss."""
    inner = torch.minimum(predicted, target)
    intersection = (inner[..., 0] + inner[..., 2]) * (inner[..., 1] + inner[..., 3])
    areas = [(box[..., 0] + box[..., 2]) * (box[..., 1] + box[..., 3]) for box in (predicted, target)]
    union = (areas[0] + areas[1] - intersection).clamp(min=EPSILON)
    return intersection / union, union


def normalize(terms: dict[str, tuple[Tensor, Tensor]], world: int) -> tuple[Tensor, Tensor]:
    """Divides the sums of detection_loss by their normalizers, over all ranks.

    The value of a term is its sum over all ranks / max(1, its normalizer over all ranks). DistributedDataParallel
    averages the gradients of the ranks, so each rank's loss is multiplied by ``world``: then several processes compute
    the same gradients as one process with the whole batch.

    Args:
        terms: as returned by detection_loss.
        world: number of ranks; all of them must call this.

    Returns:
        loss: scalar, this rank's share, to call backward on.
        values: [terms], detached, equal on all ranks.
    """
    sums = torch.stack([total for total, _ in terms.values()])  # [terms]
    normalizers = torch.stack([normalizer for _, normalizer in terms.values()])  # [terms]
    global_values = torch.cat([sums.detach(), normalizers])
    if world > 1:
        dist.all_reduce(global_values)
    totals, normalizers = global_values.chunk(2)
    normalizers = normalizers.clamp(min=1)
    return (sums / normalizers).sum() * world, totals / normalizers
