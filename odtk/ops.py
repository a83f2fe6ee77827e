"""Decoding and NMS of whole batches: the readable torch reference, and the way to the compiled kernels.

Raw levels are what a Detector gives, per level of stride s with h×w cells:
    logits [N, A·C, h, w], channel a·C + c; boxes [N, A·V, h, w], channel a·V + v.
V says what is regressed: 4 deltas; 6 with (sin, cos) for rotated boxes; 5 for FCOS, (l, t, r, b) in strides before
ReLU and the centre-ness logit.

A candidate is one (anchor, class, cell); its index in its level is ((a·C + c)·h + y)·w + x. Ties of score go to the
lower level first, then to the lower index.
"""
from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import boxes as geometry

NMS_CHUNK = 128  # candidates looked at in one step of the NMS


def decode(
    logits: Sequence[Tensor],
    boxes: Sequence[Tensor],
    anchors: Sequence[Tensor],
    strides: Sequence[int],
    *,
    score_threshold: float,
    top_n: int,
    values: int = 4,
) -> tuple[Tensor, Tensor, Tensor]:
    """The best candidates of each level, as boxes.

    Args:
        logits, boxes: raw levels (see the module's text), any float type and memory format.
        anchors: per level [A, 4], or [A, 5] rotated: corners in px about the first cell.
        strides: px per cell, per level.
        score_threshold: a candidate survives if its class probability is strictly above.
        top_n: candidates kept per image and level.
        values: V.

    Returns:
        scores [N, T] float32, boxes [N, T, 4 or 6] float32, classes [N, T] int64, where T is the sum over the levels
        of K = min(top_n, A·C·h·w). Within a level they are ordered by score. Unused rows are zero.
    """
    return decode_reference(
        logits, boxes, anchors, strides, score_threshold=score_threshold, top_n=top_n, values=values
    )


def nms(
    scores: Tensor, boxes: Tensor, classes: Tensor, *, threshold: float, detections: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Greedy non-maximum suppression per image and class.

    Args:
        scores [N, T], boxes [N, T, 4], or [N, T, 6] rotated, classes [N, T]: of decode. Rows whose score is not
            above zero are unused.
        threshold: a box is suppressed by a better one of its class at an IoU strictly above.
        detections: D, rows kept per image.

    Returns:
        scores [N, D] float32, boxes [N, D, 4 or 6] float32, classes [N, D] int64, ordered by score, ties by lower
        index. Unused rows are zero.
    """
    return nms_reference(scores, boxes, classes, threshold=threshold, detections=detections)


def rotated_iou(a: Tensor, b: Tensor, *, minimum: float = 0.0) -> Tensor:
    """Exact polygon IoU [..., N, M] of rotated boxes a [..., N, 5 or 6] and b [..., M, 5 or 6].

    Args:
        minimum: pairs whose IoU is surely below may be given as 0, which saves most of the work.
    """
    return rotated_iou_reference(a, b, minimum=minimum)


def decode_reference(
    logits: Sequence[Tensor],
    boxes: Sequence[Tensor],
    anchors: Sequence[Tensor],
    strides: Sequence[int],
    *,
    score_threshold: float,
    top_n: int,
    values: int = 4,
) -> tuple[Tensor, Tensor, Tensor]:
    """decode in plain torch. Its cost is one comparison per logit; the rest is done on survivors only."""
    levels = [
        _decode_level(*level, score_threshold=score_threshold, top_n=top_n, values=values)
        for level in zip(logits, boxes, anchors, strides, strict=True)
    ]
    scores, decoded, classes = zip(*levels, strict=True)
    return torch.cat(scores, 1), torch.cat(decoded, 1), torch.cat(classes, 1)


def _decode_level(
    logits: Tensor, boxes: Tensor, anchors: Tensor, stride: int, *, score_threshold: float, top_n: int, values: int
) -> tuple[Tensor, Tensor, Tensor]:
    """One level: scores [N, K], boxes [N, K, 4 or 6], classes [N, K]."""
    images, channels, height, width = logits.shape
    num_classes = channels // len(anchors)
    flat = logits.float().flatten(1)  # [N, A·C·h·w]; a comparison with NaN is false
    image, index = (flat > to_logit(score_threshold)).nonzero(as_tuple=True)  # [S] survivors, by image, then index
    # in float64: the CPU's float32 sigmoid may differ in the last bit between equal logits, and ties would be none
    scores = flat[image, index].double().sigmoid()
    if values == 5:
        anchor, _, y, x = _split_index(index, num_classes, height, width)
        scores = (scores * boxes.unflatten(1, (-1, values))[image, anchor, 4, y, x].double().sigmoid()).sqrt()
    scores = scores.float()

    kept, rank = _best_per_image(scores, image, images, top_n)
    image, index, scores = image[kept], index[kept], scores[kept]
    anchor, label, y, x = _split_index(index, num_classes, height, width)
    numbers = boxes.unflatten(1, (-1, values))[image, anchor, :, y, x].float()  # [N, A, V, h, w] → [S, V]
    shift = torch.stack([x, y, x, y], -1) * stride  # [S, 4]
    base = anchors.to(device=logits.device, dtype=torch.float32)[anchor]
    placed = torch.cat([base[:, :4] + shift, base[:, 4:]], -1)
    found = decode_boxes(numbers, placed, stride, (width * stride, height * stride))

    columns = min(top_n, flat.shape[1])
    out_scores = flat.new_zeros(images, columns)
    out_boxes = flat.new_zeros(images, columns, found.shape[-1])
    out_classes = torch.zeros(images, columns, dtype=torch.int64, device=flat.device)
    out_scores[image, rank], out_boxes[image, rank], out_classes[image, rank] = scores, found, label
    return out_scores, out_boxes, out_classes


def to_logit(score: float) -> float:
    """The logit whose sigmoid is ``score``, so that scores are compared before any sigmoid; infinite at 0 and 1."""
    if score <= 0:
        return -math.inf
    return math.inf if score >= 1 else math.log(score / (1 - score))


def _split_index(index: Tensor, num_classes: int, height: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(anchor, class, y, x) of candidates with index ((a·C + c)·h + y)·w + x."""
    channel, cell = index // (height * width), index % (height * width)
    return channel // num_classes, channel % num_classes, cell // width, cell % width


def _best_per_image(scores: Tensor, image: Tensor, images: int, top_n: int) -> tuple[Tensor, Tensor]:
    """Positions of the top_n best of each image among survivors [S], ordered by image and score; and their ranks."""
    order = scores.sort(descending=True, stable=True).indices
    order = order[scores[order] > 0]  # a score that is not a number, or 0 in float32, is none
    order = order[image[order].sort(stable=True).indices]
    counts = torch.bincount(image[order], minlength=images)  # [N]
    first = counts.cumsum(0) - counts
    rank = torch.arange(len(order), device=order.device) - first[image[order]]
    return order[rank < top_n], rank[rank < top_n]


def decode_boxes(numbers: Tensor, anchors: Tensor, stride: int, size: tuple[int, int]) -> Tensor:
    """Boxes [..., 4 or 6] from regressed numbers [..., V] and their placed anchors [..., 4 or 5]; size (w, h) px."""
    if numbers.shape[-1] == 6:
        return geometry.decode_rotated(numbers, anchors, size)
    if numbers.shape[-1] == 5:
        points = geometry.centre_and_size(anchors)[0]
        return geometry.decode_distances(numbers[..., :4].relu() * stride, points, size)
    return geometry.decode(numbers, anchors, size)


def nms_reference(
    scores: Tensor, boxes: Tensor, classes: Tensor, *, threshold: float, detections: int
) -> tuple[Tensor, Tensor, Tensor]:
    """nms in plain torch: the sorted candidates in chunks, each against the boxes kept so far and within itself.

    It ends when every image has its D detections, so the cost follows what is kept and not T².
    """
    scores = torch.where(scores > 0, scores.float(), 0)  # not a number: unused
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    used = int((scores > 0).sum(1).max()) if scores.numel() else 0
    scores, order = scores[:, :used], order[:, :used]
    boxes = boxes.float().gather(1, order[..., None].expand(-1, -1, boxes.shape[-1]))
    classes = classes.long().gather(1, order)

    out_scores = scores.new_zeros(len(scores), detections)
    out_boxes = boxes.new_zeros(len(scores), detections, boxes.shape[-1])
    out_classes = classes.new_zeros(len(scores), detections)
    count = torch.zeros(len(scores), 1, dtype=torch.int64, device=scores.device)  # kept so far, per image
    for start in range(0, used, NMS_CHUNK):
        part = slice(start, start + NMS_CHUNK)
        chunk = boxes[:, part], classes[:, part]
        by_kept = _suppresses(out_boxes, out_classes, *chunk, threshold) & (out_scores > 0)[..., None]  # [N, D, chunk]
        alive = (scores[:, part] > 0) & ~by_kept.any(1)
        keep = _greedy(alive, _suppresses(*chunk, *chunk, threshold))
        row = count + keep.cumsum(1) - 1
        image, column = (keep & (row < detections)).nonzero(as_tuple=True)
        row = row[image, column]
        out_scores[image, row] = scores[image, start + column]
        out_boxes[image, row] = boxes[image, start + column]
        out_classes[image, row] = classes[image, start + column]
        count += keep.sum(1, keepdim=True)
        if bool((count >= detections).all()):
            break
    return out_scores, out_boxes, out_classes


def _suppresses(a: Tensor, a_classes: Tensor, b: Tensor, b_classes: Tensor, threshold: float) -> Tensor:
    """Whether each of a [N, P, 4 or 6] rules out each of b [N, Q, 4 or 6], were it better: [N, P, Q]."""
    overlap = geometry.iou(a, b) if a.shape[-1] == 4 else rotated_iou(a, b, minimum=threshold)
    return (overlap > threshold) & (a_classes[:, :, None] == b_classes[:, None, :])


def _greedy(alive: Tensor, suppresses: Tensor) -> Tensor:
    """Which candidates [N, P], best first, a greedy pass keeps, given suppresses [N, P, P].

    Kept is what is alive and not suppressed by a better kept one. The first t are right after t rounds, and the only
    assignment that a round leaves as it is is the greedy one; a few rounds reach it.
    """
    suppresses = suppresses.triu(1)  # only a better one suppresses
    keep = alive
    while True:
        update = alive & ~(suppresses & keep[..., None]).any(1)
        if torch.equal(update, keep):
            return keep
        keep = update


def rotated_iou_reference(a: Tensor, b: Tensor, *, minimum: float = 0.0) -> Tensor:
    """rotated_iou in plain torch: polygons only where an upper bound of the IoU allows more than the minimum.

    The intersection is at most the smaller area, and at most that of the circumscribed axis-aligned boxes.
    Listing the pairs is a host synchronisation on a GPU; the kernel has none.
    """
    area_a, area_b = geometry.area(a)[..., :, None], geometry.area(b)[..., None, :]  # [..., N, 1], [..., 1, M]
    most = geometry.intersection(geometry.circumscribe(a), geometry.circumscribe(b))  # [..., N, M]
    most = torch.minimum(most, torch.minimum(area_a, area_b))
    union = (area_a + area_b).sub_(most).clamp_(min=geometry.SMALLEST)
    possible = (most > 0) & (most > union.mul_(minimum - 1e-4))  # leaves room for the rounding of the bound
    pairs = possible.nonzero(as_tuple=True)
    result = torch.zeros_like(most)
    shape = (*most.shape, a.shape[-1])
    first, second = a[..., :, None, :].expand(shape), b[..., None, :, :].expand(shape)
    result[pairs] = geometry.paired_rotated_iou(first[pairs], second[pairs])
    return result
