"""Decoding, NMS and rotated IoU: the readable torch references, and the choice between them and the compiled kernels.

Raw levels are what a Detector returns. A level of stride s with h×w cells has
    logits [N, A·C, h, w], channel a·C + c;
    boxes  [N, A·V, h, w], channel a·V + v, where V is the head_values of the box coder (box_coder.py).

A candidate is one (anchor, class, cell). Its index in its level is ((a·C + c)·h + y)·w + x. Among candidates of equal
score the lower level comes first, then the lower index.

Where odtk._C was built and can run, its kernels (kernels.py) do the work on CUDA tensors, and rotated_iou uses them on
CPU tensors too. Everywhere else the references do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import boxes as geometry
from . import kernels
from .box_coder import BOX_CODERS, BoxCoder

NMS_CHUNK = 128  # candidates that one step of the NMS looks at


def decode(
    logits: Sequence[Tensor],
    boxes: Sequence[Tensor],
    anchors: Sequence[Tensor],
    strides: Sequence[int],
    *,
    score_threshold: float,
    top_n: int,
    coder: str = "anchor_deltas",
) -> tuple[Tensor, Tensor, Tensor]:
    """The best candidates of each level, with their boxes decoded.

    Args:
        logits, boxes: raw levels (see the top of this file), of any float type and memory format.
        anchors: per level [A, 4], or [A, 5] where anchors are turned: inclusive corners in px at the cell (0, 0).
        strides: px per cell, per level.
        score_threshold: a candidate survives if its class probability, in [0, 1], is strictly above this.
        top_n: the number of candidates kept per image and level.
        coder: the name of the box coder, a key of BOX_CODERS.

    Returns:
        scores [N, T] float32 in (0, 1]: the class probability, or √(probability · center-ness) if the head has a
        center-ness (FCOS, https://arxiv.org/abs/1904.01355, with the root that torchvision takes).
        boxes [N, T, box_values] float32, px of the network's input, inclusive corners.
        classes [N, T] int64, 0-based.
        T is the sum of min(top_n, A·C·h·w) over the levels. Within a level the rows are ordered by score, descending.
        Unused rows are zero.
    """
    limits = kernels.extension
    fits = limits is not None and len(logits) <= limits.MAX_LEVELS and 0 < top_n <= limits.MAX_TOP_N
    if fits and logits[0].is_cuda and len(logits[0]) and kernels.can_run_on_cuda():
        return torch.ops.odtk.decode(logits, boxes, anchors, strides, score_threshold, top_n, coder)
    return decode_reference(logits, boxes, anchors, strides, score_threshold=score_threshold, top_n=top_n, coder=coder)


def nms(
    scores: Tensor, boxes: Tensor, classes: Tensor, *, threshold: float, detections: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Greedy non-maximum suppression per image and class.

    Args:
        scores, boxes, classes: what decode returns, [N, T], [N, T, 4] (or [N, T, 6] if rotated) and [N, T]. Rows
            whose score is not above zero are unused.
        threshold: a box is suppressed if its IoU, in [0, 1], with a better box of its class is strictly above this.
        detections: D, the number of rows per image in the result.

    Returns:
        scores [N, D] float32, boxes [N, D, 4 or 6] float32, classes [N, D] int64, ordered by score, descending; equal
        scores stay in the order of the candidates. Unused rows are zero.
    """
    if scores.is_cuda and scores.numel() and detections > 0 and kernels.can_run_on_cuda():
        return torch.ops.odtk.nms(scores, boxes, classes, threshold, detections)
    return nms_reference(scores, boxes, classes, threshold=threshold, detections=detections)


def rotated_iou(a: Tensor, b: Tensor, *, minimum: float = 0.0) -> Tensor:
    """Exact IoU [..., N, M], in [0, 1], of the polygons of rotated boxes a [..., N, 5 or 6] and b [..., M, 5 or 6].

    Args:
        a, b: boxes in px as boxes.py defines them; the leading dimensions broadcast.
        minimum: a pair whose IoU is certain to be below this may get 0 instead, which saves most of the work.
    """
    available = kernels.can_run_on_cuda() if a.is_cuda else kernels.extension is not None
    if not available or not a.dtype == b.dtype == torch.float32:
        return rotated_iou_reference(a, b, minimum=minimum)
    leading = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    flat = [_flatten_leading(part, leading) for part in (a, b)]
    iou = torch.ops.odtk.rotated_iou(*flat, minimum)  # [P, N, M]
    return iou.reshape(*leading, a.shape[-2], b.shape[-2])  # [P, N, M] → [..., N, M]


def decode_reference(
    logits: Sequence[Tensor],
    boxes: Sequence[Tensor],
    anchors: Sequence[Tensor],
    strides: Sequence[int],
    *,
    score_threshold: float,
    top_n: int,
    coder: str = "anchor_deltas",
) -> tuple[Tensor, Tensor, Tensor]:
    """decode in plain torch. It compares every logit once; everything else is done for the survivors only."""
    levels = [
        _decode_level(*level, score_threshold=score_threshold, top_n=top_n, coder=BOX_CODERS[coder])
        for level in zip(logits, boxes, anchors, strides, strict=True)
    ]
    scores, decoded, classes = zip(*levels, strict=True)
    return torch.cat(scores, 1), torch.cat(decoded, 1), torch.cat(classes, 1)


def _decode_level(
    logits: Tensor, boxes: Tensor, anchors: Tensor, stride: int, *, score_threshold: float, top_n: int, coder: BoxCoder
) -> tuple[Tensor, Tensor, Tensor]:
    """One level: scores [N, K], boxes [N, K, box_values], classes [N, K]."""
    images, channels, height, width = logits.shape
    num_classes = channels // len(anchors)
    flat = logits.float().flatten(1)  # [N, A·C·h·w]; a comparison with NaN is false
    image, index = (flat > to_logit(score_threshold)).nonzero(as_tuple=True)  # [S] survivors, by image, then index
    # in float64, because the CPU's float32 sigmoid may differ in the last bit between equal logits, which breaks ties
    scores = flat[image, index].double().sigmoid()
    by_anchor = boxes.unflatten(1, (-1, coder.head_values))  # [N, A·V, h, w] → [N, A, V, h, w]
    if coder.has_centerness:
        anchor, _, y, x = _split_index(index, num_classes, height, width)
        scores = (scores * by_anchor[image, anchor, coder.box_values, y, x].double().sigmoid()).sqrt()
    scores = scores.float()

    kept, rank = _best_per_image(scores, image, images, top_n)
    image, index, scores = image[kept], index[kept], scores[kept]
    anchor, label, y, x = _split_index(index, num_classes, height, width)
    numbers = by_anchor[image, anchor, :, y, x].float()  # [N, A, V, h, w] → [S, V]
    shift = torch.stack([x, y, x, y], -1) * stride  # [S, 4]
    base = anchors.to(device=logits.device, dtype=torch.float32)[anchor]
    placed = torch.cat([base[:, :4] + shift, base[:, 4:]], -1)
    decoded = coder.decode(numbers, placed, stride, (width * stride, height * stride))  # [S, box_values]

    columns = min(top_n, flat.shape[1])
    out_scores = flat.new_zeros(images, columns)
    out_boxes = flat.new_zeros(images, columns, coder.box_values)
    out_classes = torch.zeros(images, columns, dtype=torch.int64, device=flat.device)
    out_scores[image, rank], out_boxes[image, rank], out_classes[image, rank] = scores, decoded, label
    return out_scores, out_boxes, out_classes


def to_logit(score: float) -> float:
    """The logit whose sigmoid is ``score``, so that scores can be compared without a sigmoid; infinite at 0 and 1."""
    if score <= 0:
        return -math.inf
    return math.inf if score >= 1 else math.log(score / (1 - score))


def _split_index(index: Tensor, num_classes: int, height: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(anchor, class, y, x) of the candidates whose index is ((a·C + c)·h + y)·w + x."""
    channel, cell = index // (height * width), index % (height * width)
    return channel // num_classes, channel % num_classes, cell // width, cell % width


def _best_per_image(scores: Tensor, image: Tensor, images: int, top_n: int) -> tuple[Tensor, Tensor]:
    """The positions among the survivors [S] of each image's top_n best, by image, then score; and their ranks."""
    order = scores.sort(descending=True, stable=True).indices
    order = order[scores[order] > 0]  # drops NaN and what is 0 in float32
    order = order[image[order].sort(stable=True).indices]
    counts = torch.bincount(image[order], minlength=images)  # [N]
    first = counts.cumsum(0) - counts
    rank = torch.arange(len(order), device=order.device) - first[image[order]]
    return order[rank < top_n], rank[rank < top_n]


def nms_reference(
    scores: Tensor, boxes: Tensor, classes: Tensor, *, threshold: float, detections: int
) -> tuple[Tensor, Tensor, Tensor]:
    """nms in plain torch: takes the sorted candidates in chunks, compares each with the boxes kept so far and itself.

    It stops when every image has its D detections, so the cost depends on what is kept and not on T².
    """
    scores = torch.where(scores > 0, scores.float(), 0)  # NaN is unused
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
    """Whether each box of a [N, P, 4 or 6] would suppress each of b [N, Q, 4 or 6] if it scored higher: [N, P, Q]."""
    overlap = geometry.iou(a, b) if a.shape[-1] == 4 else rotated_iou(a, b, minimum=threshold)
    return (overlap > threshold) & (a_classes[:, :, None] == b_classes[:, None, :])


def _greedy(alive: Tensor, suppresses: Tensor) -> Tensor:
    """Which of the candidates [N, P], best first, a greedy pass keeps, given suppresses [N, P, P].

    A candidate is kept if it is alive and no better kept one suppresses it. After t rounds the first t candidates are
    right. Only the greedy result is left unchanged by a round, and a few rounds reach it.
    """
    suppresses = suppresses.triu(1)  # only a better candidate suppresses
    keep = alive
    while True:
        update = alive & ~(suppresses & keep[..., None]).any(1)
        if torch.equal(update, keep):
            return keep
        keep = update


def rotated_iou_reference(a: Tensor, b: Tensor, *, minimum: float = 0.0) -> Tensor:
    """rotated_iou in plain torch: intersects polygons only where an upper bound of the IoU exceeds the minimum.

    The intersection is at most the smaller area, and at most the intersection of the circumscribed axis-aligned boxes.
    On a GPU, listing the pairs synchronizes with the host; the kernel does not.
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


def _flatten_leading(boxes: Tensor, leading: Sequence[int]) -> Tensor:
    """Boxes [..., N, 5 or 6] as [P, N, 5 or 6], P being the product of ``leading``; P = 1 if they are one list."""
    if boxes.shape[:-2].numel() == 1:
        return boxes.reshape(1, *boxes.shape[-2:])  # [1…, N, 5 or 6] → [1, N, 5 or 6]
    return boxes.expand(*leading, *boxes.shape[-2:]).flatten(0, -3)  # [..., N, 5 or 6] → [P, N, 5 or 6]
