"""Decoding and NMS of whole batches: the readable torch reference, and the way to the compiled kernels.

Raw levels are what a Detector gives, per level of stride s with h×w cells:
    logits [N, A·C, h, w], channel a·C + c; boxes [N, A·V, h, w], channel a·V + v.
V says what is regressed: 4 deltas; 6 with (sin, cos) for rotated boxes; 5 for FCOS, (l, t, r, b) in strides before
ReLU and the center-ness logit.

A candidate is one (anchor, class, cell); its index in its level is ((a·C + c)·h + y)·w + x. Ties of score go to the
lower level first, then to the lower index.

Where odtk._C was built and can run, its kernels do the work on CUDA tensors, as operators that torch.compile and
torch.export see (torch.ops.odtk.decode, .nms, .rotated_iou), and rotated_iou on CPU tensors too. Elsewhere the
reference does.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from . import boxes as geometry

NMS_CHUNK = 128  # candidates looked at in one step of the NMS


def _load_kernels() -> ModuleType | None:
    try:
        return importlib.import_module("odtk._C")
    except ImportError:  # not built, or not for this Python
        return None


kernels = _load_kernels()  # odtk._C, or None; `odtk info` tells which, and how to get it


@torch.compiler.assume_constant_result
def _run_on_cuda() -> bool:
    """Whether the kernels can; a driver may do for torch's CUDA and be too old for the one they were built with."""
    return kernels is not None and kernels.device_error() is None


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
    limited = kernels is not None and len(logits) <= kernels.MAX_LEVELS and 0 < top_n <= kernels.MAX_TOP_N
    if limited and logits[0].is_cuda and len(logits[0]) and _run_on_cuda():
        return torch.ops.odtk.decode(logits, boxes, anchors, strides, score_threshold, top_n, values)
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
    if scores.is_cuda and scores.numel() and detections > 0 and _run_on_cuda():
        return torch.ops.odtk.nms(scores, boxes, classes, threshold, detections)
    return nms_reference(scores, boxes, classes, threshold=threshold, detections=detections)


def rotated_iou(a: Tensor, b: Tensor, *, minimum: float = 0.0) -> Tensor:
    """Exact polygon IoU [..., N, M] of rotated boxes a [..., N, 5 or 6] and b [..., M, 5 or 6].

    Args:
        minimum: pairs whose IoU is surely below may be given as 0, which saves most of the work.
    """
    here = _run_on_cuda() if a.is_cuda else kernels is not None
    if not here or not a.dtype == b.dtype == torch.float32:
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
        points = geometry.center_and_size(anchors)[0]
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
    Listing the pairs is a host synchronization on a GPU; the kernel has none.
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


# ---- the compiled kernels ----


@torch.library.custom_op(
    "odtk::decode",
    mutates_args=(),
    device_types="cuda",
    schema="(Tensor[] logits, Tensor[] boxes, Tensor[] anchors, int[] strides, float score_threshold, int top_n, "
    "int values) -> (Tensor, Tensor, Tensor)",
)
def decode_kernel(
    logits: Sequence[Tensor],
    boxes: Sequence[Tensor],
    anchors: Sequence[Tensor],
    strides: Sequence[int],
    score_threshold: float,
    top_n: int,
    values: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """decode by csrc/cuda/decode.cu: two launches, no host synchronization. Anchors should be on the device already."""
    assert kernels is not None
    logits, logits_half = _as_kernel_type(logits)
    boxes, boxes_half = _as_kernel_type(boxes)
    device = logits[0].device
    base = [a.to(device=device, dtype=torch.float32).contiguous() for a in anchors]
    levels = [
        kernels.DecodeLevel(
            logits=level.data_ptr(),
            boxes=box.data_ptr(),
            anchors=anchor.data_ptr(),
            height=level.shape[2],
            width=level.shape[3],
            stride=stride,
            logits_pitch=_channels_last_pitch(level),
            boxes_pitch=_channels_last_pitch(box),
        )
        for level, box, anchor, stride in zip(logits, boxes, base, strides, strict=True)
    ]
    params = kernels.DecodeParams(
        levels=levels,
        batch=logits[0].shape[0],
        anchors=base[0].shape[0],
        classes=logits[0].shape[1] // base[0].shape[0],
        top_n=top_n,
        anchor_values=base[0].shape[1],
        score_threshold=score_threshold,
        kind={4: kernels.BoxKind.ANCHOR, 6: kernels.BoxKind.ROTATED, 5: kernels.BoxKind.FCOS}[values],
        logits_half=logits_half,
        boxes_half=boxes_half,
    )
    scores, found, classes = _empty_detections(logits[0], params.columns, 6 if values == 6 else 4)
    with _on_device(device):
        bytes_ = kernels.decode_workspace(params)
        workspace = torch.empty(bytes_, dtype=torch.uint8, device=device)
        outputs = (scores.data_ptr(), found.data_ptr(), classes.data_ptr())
        kernels.decode(params, *outputs, workspace.data_ptr(), bytes_, _stream(device))
    return scores, found, classes.long()


@decode_kernel.register_fake
def _(
    logits: Sequence[Tensor],
    boxes: Sequence[Tensor],
    anchors: Sequence[Tensor],
    strides: Sequence[int],
    score_threshold: float,
    top_n: int,
    values: int,
) -> tuple[Tensor, Tensor, Tensor]:
    columns = sum(min(top_n, level[0].numel()) for level in logits)
    scores, found, classes = _empty_detections(logits[0], columns, 6 if values == 6 else 4)
    return scores, found, classes.long()


@torch.library.custom_op(
    "odtk::nms",
    mutates_args=(),
    device_types="cuda",
    schema="(Tensor scores, Tensor boxes, Tensor classes, float threshold, int detections) -> (Tensor, Tensor, Tensor)",
)
def nms_kernel(
    scores: Tensor, boxes: Tensor, classes: Tensor, threshold: float, detections: int
) -> tuple[Tensor, Tensor, Tensor]:
    """nms by csrc/cuda/nms.cu: one launch, no host synchronization."""
    assert kernels is not None
    scores, boxes, classes = scores.float().contiguous(), boxes.float().contiguous(), classes.int().contiguous()
    batch, count, values = boxes.shape
    params = kernels.NmsParams(batch=batch, count=count, detections=detections, values=values, threshold=threshold)
    out = _empty_detections(scores, detections, values)
    with _on_device(scores.device):
        bytes_ = kernels.nms_workspace(params)
        workspace = torch.empty(bytes_, dtype=torch.uint8, device=scores.device)
        pointers = [tensor.data_ptr() for tensor in (scores, boxes, classes, *out, workspace)]
        kernels.nms(params, *pointers, bytes_, _stream(scores.device))
    return out[0], out[1], out[2].long()


@nms_kernel.register_fake
def _(
    scores: Tensor, boxes: Tensor, classes: Tensor, threshold: float, detections: int
) -> tuple[Tensor, Tensor, Tensor]:
    out = _empty_detections(scores, detections, boxes.shape[-1])
    return out[0], out[1], out[2].long()


@torch.library.custom_op(
    "odtk::rotated_iou",
    mutates_args=(),
    device_types=("cpu", "cuda"),
    schema="(Tensor a, Tensor b, float minimum) -> Tensor",
)
def rotated_iou_kernel(a: Tensor, b: Tensor, minimum: float) -> Tensor:
    """IoU [P, N, M] of a [P or 1, N, 5 or 6] and b [P or 1, M, 5 or 6], float32, by csrc/cuda/rotated_iou.cu."""
    assert kernels is not None
    a, b = a.contiguous(), b.contiguous()
    batch = max(len(a), len(b))
    params = kernels.RotatedIouParams(
        batch=batch,
        a_count=a.shape[1],
        b_count=b.shape[1],
        a_values=a.shape[2],
        b_values=b.shape[2],
        a_shared=len(a) < batch,
        b_shared=len(b) < batch,
        minimum=minimum,
    )
    iou = a.new_empty(batch, a.shape[1], b.shape[1])
    pointers = (a.data_ptr(), b.data_ptr(), iou.data_ptr())
    if a.is_cuda:
        with _on_device(a.device):
            kernels.rotated_iou(params, *pointers, _stream(a.device))
    else:
        kernels.rotated_iou_host(params, *pointers)
    return iou


@rotated_iou_kernel.register_fake
def _(a: Tensor, b: Tensor, minimum: float) -> Tensor:
    return a.new_empty(max(a.shape[0], b.shape[0]), a.shape[1], b.shape[1])


def _as_kernel_type(tensors: Sequence[Tensor]) -> tuple[list[Tensor], bool]:
    """All in float16, or all in float32, dense in one of the two memory formats; and whether float16."""
    half = all(t.dtype == torch.float16 for t in tensors)
    same = [t if half else t.float() for t in tensors]
    return [t if t.is_contiguous(memory_format=torch.channels_last) else t.contiguous() for t in same], half


def _channels_last_pitch(tensor: Tensor) -> int:
    """Elements from one cell to the next if channels-last, else 0: how csrc/cuda/decode.h tells the formats apart."""
    return 0 if tensor.is_contiguous() else tensor.shape[1]


def _empty_detections(like: Tensor, rows: int, values: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scores [N, rows], boxes [N, rows, values], classes [N, rows] (int32, as the kernels write them)."""
    return (
        like.new_empty(len(like), rows, dtype=torch.float32),
        like.new_empty(len(like), rows, values, dtype=torch.float32),
        like.new_empty(len(like), rows, dtype=torch.int32),
    )


def _flatten_leading(boxes: Tensor, leading: Sequence[int]) -> Tensor:
    """Boxes [..., N, V] as [P, N, V] with P the product of the leading dimensions, or [1, N, V] if they have none."""
    if boxes.shape[:-2].numel() == 1:
        return boxes.reshape(1, *boxes.shape[-2:])  # [1…, N, V] → [1, N, V]
    return boxes.expand(*leading, *boxes.shape[-2:]).flatten(0, -3)  # [..., N, V] → [P, N, V]


def _on_device(device: torch.device) -> torch.cuda.device:
    """The kernels run on the current device: makes it this one. Does nothing for the CPU (the tests' emulation)."""
    return torch.cuda.device(device if device.type == "cuda" else -1)


def _stream(device: torch.device) -> int:
    """torch's current stream, as the kernels take it."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
