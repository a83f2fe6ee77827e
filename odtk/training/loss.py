"""Which anchor is to find which box (target assignment), and the losses. Vectorized over batch and levels.

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
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import boxes as geometry
from ..config import LossConfig, ModelConfig
from ..model.anchors import place_anchors
from .assign import IGNORED, assign, assign_points, level_limits

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
    """Focal loss over all points, IoU loss weighted by the center-ness target, center-ness by cross entropy."""
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
    """Center-ness [...] in (0, 1] of positive distances (l, t, r, b) [..., 4]: FCOS, eq. 3."""
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


def normalize(terms: dict[str, tuple[Tensor, Tensor]], world: int) -> tuple[Tensor, Tensor]:
    """The loss to differentiate, and the value of each term over all ranks.

    A term is the sum over all ranks by the normalizers of all ranks. DistributedDataParallel averages gradients over
    the ranks, hence the factor ``world``: several processes give the gradients of one with the whole batch.

    Returns:
        loss: scalar of this rank; values: [terms], detached, equal on all ranks.
    """
    sums = torch.stack([total for total, _ in terms.values()])  # [terms]
    normalizers = torch.stack([normalizer for _, normalizer in terms.values()])  # [terms]
    everywhere = torch.cat([sums.detach(), normalizers])
    if world > 1:
        dist.all_reduce(everywhere)
    totals, normalizers = everywhere.chunk(2)
    normalizers = normalizers.clamp(min=1)
    return (sums / normalizers).sum() * world, totals / normalizers
