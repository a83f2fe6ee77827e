"""Decode and NMS against restatements in plain Python: one image, one candidate at a time."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from odtk import boxes as geometry
from odtk import ops
from odtk.box_coder import BOX_CODERS

INF, NAN = math.inf, math.nan
THRESHOLD = 0.05


def base_anchors(count: int, stride: int, *, rotated: bool = False, points: bool = False) -> Tensor:
    """Random anchors [count, 4 or 5] at the cell (0, 0); or the cell itself, whose center is the point."""
    if points:
        return torch.tensor([[0.0, 0.0, stride - 1.0, stride - 1.0]])
    half = torch.rand(count, 2) * 2 * stride + stride / 2
    anchors = torch.cat([0.5 * stride - half, 0.5 * stride + half - 1], -1)
    return torch.cat([anchors, torch.randn(count, 1)], -1) if rotated else anchors


def random_head(
    n: int,
    classes: int,
    sizes: list[tuple[int, int]],
    *,
    anchors: int = 2,
    coder: str = "anchor_deltas",
    level: float = -3.0,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[int]]:
    """Logits, boxes, anchors and strides of levels with these sizes (h, w)."""
    points, rotated = coder.startswith(("distances", "center")), coder == "rotated_deltas"
    anchors = 1 if points else anchors
    strides = [8 * 2**i for i in range(len(sizes))]
    return (
        [torch.randn(n, anchors * classes, h, w) + level for h, w in sizes],
        [torch.randn(n, anchors * BOX_CODERS[coder].head_values, h, w) * 0.3 for h, w in sizes],
        [base_anchors(anchors, s, rotated=rotated, points=points) for s in strides],
        strides,
    )


def sigmoid(x: float) -> float:
    """Of a float32, as float32."""
    return torch.tensor(x).sigmoid().item()


def plain_box(
    coder: str, numbers: list[float], anchor: list[float], x: int, y: int, stride: int, w: int, h: int
) -> list[float]:
    """The formulas of boxes.py for one candidate, of the cell (x, y) of a level of w×h cells."""
    x1, y1, x2, y2 = (v + (x, y)[i % 2] * stride for i, v in enumerate(anchor[:4]))
    aw, ah = x2 - x1 + 1, y2 - y1 + 1
    cx, cy = x1 + 0.5 * aw, y1 + 0.5 * ah
    if coder == "center_size_angle":
        cx = min(max(cx + numbers[0] * stride, 0), w * stride)
        cy = min(max(cy + numbers[1] * stride, 0), h * stride)
        bw, bh = (min(max(v, 0) * stride, (w + h) * stride) for v in numbers[2:4])
        twice = math.atan2(numbers[4], numbers[5])
        theta = twice / 2 if abs(twice) <= math.pi / 2 else twice / 2 % math.pi  # in [−π/4, 3π/4]
        length = math.hypot(numbers[4], numbers[5]) * 2 * max(abs(math.sin(theta)), abs(math.cos(theta)))
        corners = [cx - bw / 2, cy - bh / 2, cx + bw / 2 - 1, cy + bh / 2 - 1]
        return [*corners, length * math.sin(theta), length * math.cos(theta)]
    if coder in ("distances", "distances_centerness"):
        left, top, right, bottom = (max(v, 0) * stride for v in numbers[:4])
        box = [cx - left, cy - top, cx + right - 1, cy + bottom - 1]
    else:
        cx, cy = numbers[0] * aw + cx, numbers[1] * ah + cy
        bw, bh = math.exp(numbers[2]) * aw, math.exp(numbers[3]) * ah
        box = [cx - bw / 2, cy - bh / 2, cx + bw / 2 - 1, cy + bh / 2 - 1]
    limits = (w * stride - 1, h * stride - 1)
    return [min(max(v, 0), limits[i % 2]) for i, v in enumerate(box)] + (numbers[4:6] if len(numbers) == 6 else [])


def plain_decode(head, *, image: int, top_n: int, coder: str) -> list[list[tuple[float, list[float], int]]]:
    """(score, box, class) of one image's candidates, per level, ordered."""
    found = []
    values = BOX_CODERS[coder].head_values
    for logits, boxes, anchors, stride in zip(*head, strict=True):
        _, channels, h, w = logits.shape
        classes = channels // len(anchors)
        candidates = []
        for channel, y, x in np.ndindex(channels, h, w):  # in the order of the index
            logit = logits[image, channel, y, x].item()
            if not logit > np.float32(math.log(THRESHOLD / (1 - THRESHOLD))):
                continue
            a, c = divmod(channel, classes)
            numbers = boxes[image, a * values : (a + 1) * values, y, x].tolist()
            score = sigmoid(logit)
            if coder == "distances_centerness":
                score = math.sqrt(score * sigmoid(numbers[4]))
            candidates.append((score, plain_box(coder, numbers, anchors[a].tolist(), x, y, stride, w, h), c))
        found.append(sorted(candidates, key=lambda candidate: -candidate[0])[:top_n])
    return found


def check_decode(head, *, top_n: int = 50, coder: str = "anchor_deltas") -> tuple[Tensor, Tensor, Tensor]:
    """decode_reference against plain_decode, unused rows included; returns its result."""
    result = ops.decode_reference(*head, score_threshold=THRESHOLD, top_n=top_n, coder=coder)
    scores, boxes, classes = result
    columns = [min(top_n, logits[0].numel()) for logits in head[0]]
    images = len(head[0][0])
    assert scores.shape == classes.shape == (images, sum(columns))
    assert boxes.shape == (images, sum(columns), BOX_CODERS[coder].box_values)
    assert (scores.dtype, boxes.dtype, classes.dtype) == (torch.float32, torch.float32, torch.int64)
    for image in range(images):
        start = 0
        for level, width in zip(plain_decode(head, image=image, top_n=top_n, coder=coder), columns, strict=True):
            rows = slice(start, start + len(level))
            unused = slice(start + len(level), start + width)
            assert scores[image, rows].tolist() == pytest.approx([score for score, _, _ in level], abs=1e-6)
            assert classes[image, rows].tolist() == [label for _, _, label in level]
            expected = torch.tensor([box for _, box, _ in level], dtype=torch.float32).view(len(level), boxes.shape[-1])
            assert torch.allclose(boxes[image, rows], expected, atol=1e-3)
            assert not any(part[image, unused].any() for part in result)
            start += width
    return result


@pytest.mark.parametrize("coder", BOX_CODERS)
@pytest.mark.parametrize("classes", [1, 3, 90])
@pytest.mark.parametrize("images", [1, 3])
def test_decode_of_random_heads(coder: str, classes: int, images: int) -> None:
    scores, _, _ = check_decode(random_head(images, classes, [(5, 7), (3, 4), (1, 1)], coder=coder), coder=coder)
    assert (scores > 0).any()


def test_decode_keeps_the_best_of_each_level() -> None:
    head = random_head(2, 3, [(5, 7), (3, 4)])
    scores, _, _ = check_decode(head, top_n=5)
    assert scores.shape == (2, 10) and (scores > 0).all()


def test_decode_with_every_score_above_the_threshold() -> None:
    scores, _, _ = check_decode(random_head(2, 3, [(4, 5), (2, 2)], level=5.0), top_n=1000)
    assert (scores > 0).all()


def test_decode_of_empty_images_gives_zeros() -> None:
    head = random_head(3, 3, [(4, 5), (2, 2)], level=-20.0)
    head[0][1][1] = 2.0  # one image of three has something
    scores, boxes, classes = check_decode(head)
    assert not scores[[0, 2]].any() and not boxes[[0, 2]].any() and not classes[[0, 2]].any()
    assert scores[1].any()


def test_decode_orders_ties_by_index() -> None:
    head = random_head(1, 2, [(3, 4)])
    head[0][0][:] = torch.randint(-2, 3, head[0][0].shape).float()
    scores, boxes, classes = check_decode(head, top_n=17)
    assert scores[0].unique().numel() < 6
    once_more = ops.decode_reference(*head, score_threshold=THRESHOLD, top_n=17)
    assert all(torch.equal(a, b) for a, b in zip((scores, boxes, classes), once_more, strict=True))


@pytest.mark.parametrize("coder", ["anchor_deltas", "distances_centerness", "distances", "center_size_angle"])
def test_equal_logits_are_ties_wherever_they_lie(coder: str) -> None:
    """torch's float32 sigmoid on the CPU differs in the last bit between a vector's body and its tail."""
    for logit in torch.randn(200).tolist():
        head = random_head(1, 1, [(1, 37)], anchors=1, coder=coder)
        head[0][0][:], head[1][0][:] = logit, logit
        scores, _, _ = ops.decode_reference(*head, score_threshold=THRESHOLD, top_n=37, coder=coder)
        assert (scores == scores[0, 0]).all()


def test_a_score_at_the_threshold_does_not_survive() -> None:
    """Strictly above, compared as logits: of the threshold and its two neighbors in float32, one survives."""
    at = np.float32(math.log(THRESHOLD / (1 - THRESHOLD)))
    head = random_head(1, 1, [(1, 3)], anchors=1)
    head[0][0][:] = torch.tensor([np.nextafter(at, np.float32(-INF)), at, np.nextafter(at, np.float32(INF))])
    scores, _, _ = check_decode(head)
    assert scores.count_nonzero() == 1


@pytest.mark.parametrize("threshold, survivors", [(0.0, 3), (0.5, 2), (1.0, 0)])
def test_thresholds_at_the_ends(threshold: float, survivors: int) -> None:
    head = random_head(1, 1, [(1, 3)], anchors=1)
    head[0][0][:] = torch.tensor([-9.0, 1.0, INF])
    scores, _, _ = ops.decode_reference(*head, score_threshold=threshold, top_n=9)
    assert scores.count_nonzero() == survivors


@pytest.mark.parametrize("coder", BOX_CODERS)
def test_what_is_not_a_number_does_not_survive(coder: str) -> None:
    head = random_head(2, 2, [(3, 4)], coder=coder, level=2.0)
    head[0][0][0, :, 1] = NAN
    scores, boxes, _ = ops.decode_reference(*head, score_threshold=THRESHOLD, top_n=1000, coder=coder)
    assert not scores.isnan().any()
    assert (scores[0] > 0).sum() == head[0][0][0].numel() - head[0][0][0].isnan().sum()
    assert (scores[1] > 0).all()
    head[1][0][1] = NAN  # numbers of the boxes
    scores, boxes, _ = ops.decode_reference(*head, score_threshold=THRESHOLD, top_n=1000, coder=coder)
    assert torch.isfinite(boxes).all() and not boxes[1, :, :2].any()
    assert boxes.shape[-1] == 4 or not boxes[1, :, 4:].any()
    assert (scores[1] > 0).any() != BOX_CODERS[coder].has_centerness  # if the center-ness is NaN, so is the score


def test_decode_does_not_depend_on_memory_format_or_float_type() -> None:
    logits, boxes, anchors, strides = random_head(2, 3, [(5, 7), (3, 4)])
    logits, boxes = ([level.half() for level in levels] for levels in (logits, boxes))
    expected = check_decode(([t.float() for t in logits], [t.float() for t in boxes], anchors, strides))
    for change in (Tensor.half, lambda t: t.contiguous(memory_format=torch.channels_last)):
        head = [change(level) for level in logits], [change(level) for level in boxes], anchors, strides
        found = ops.decode_reference(*head, score_threshold=THRESHOLD, top_n=50)
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


# --- NMS


def plain_nms(
    scores: list[float], classes: list[int], overlap: list[list[float]], *, threshold: float, detections: int
) -> list[int]:
    """Indices kept of one image, best first."""
    order = sorted((i for i in range(len(scores)) if scores[i] > 0), key=lambda i: -scores[i])
    kept: list[int] = []
    for i in order:
        if all(classes[i] != classes[k] or not overlap[k][i] > threshold for k in kept):
            kept.append(i)
    return kept[:detections]


def overlaps(boxes: Tensor) -> list[list[float]]:
    """The IoU of every two boxes; that of rotated boxes is tested against shapely in test_boxes.py."""
    return (geometry.iou if boxes.shape[-1] == 4 else geometry.rotated_iou)(boxes, boxes).tolist()


def check_nms(
    scores: Tensor, boxes: Tensor, classes: Tensor, *, threshold: float = 0.5, detections: int = 100
) -> Tensor:
    """nms_reference against plain_nms, unused rows included; returns the number kept per image [N]."""
    found = ops.nms_reference(scores, boxes, classes, threshold=threshold, detections=detections)
    assert found[0].shape == found[2].shape == (len(scores), detections)
    assert found[1].shape == (len(scores), detections, boxes.shape[-1])
    assert (found[0].dtype, found[1].dtype, found[2].dtype) == (torch.float32, torch.float32, torch.int64)
    counts = []
    for image in range(len(scores)):
        plain = scores[image].tolist(), classes[image].tolist(), overlaps(boxes[image])
        kept = plain_nms(*plain, threshold=threshold, detections=detections)
        for result, source in zip(found, (scores, boxes, classes), strict=True):
            assert torch.equal(result[image, : len(kept)], source[image, kept])
            assert not result[image, len(kept) :].any()
        counts.append(len(kept))
    return torch.tensor(counts)


def random_candidates(n: int, count: int, classes: int, *, rotated: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    start = torch.rand(n, count, 2) * 60
    boxes = torch.cat([start, start + torch.rand(n, count, 2) * 40 + 5], -1)
    if rotated:
        boxes = torch.cat([boxes, torch.randn(n, count, 2)], -1)
    scores = torch.rand(n, count)
    scores[:, ::5] = 0  # unused rows, as decode leaves them
    return scores, boxes, torch.randint(0, classes, (n, count))


@pytest.mark.parametrize("count, classes", [(1, 1), (40, 1), (300, 3), (290, 90)])
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 1.0])
def test_nms_of_random_candidates(count: int, classes: int, threshold: float) -> None:
    check_nms(*random_candidates(2, count, classes), threshold=threshold, detections=60)


@pytest.mark.parametrize("classes", [1, 3])
def test_nms_of_random_rotated_candidates(classes: int) -> None:
    check_nms(*random_candidates(2, 150, classes, rotated=True), threshold=0.3, detections=60)


def test_nms_goes_on_beyond_a_chunk_until_the_detections_are_found() -> None:
    """One image is full after a few candidates, the second only with the last, the third never."""
    count = 3 * ops.NMS_CHUNK
    scores = torch.linspace(1, 0.5, count).repeat(3, 1)
    boxes = torch.tensor([0.0, 0.0, 9.0, 9.0]).repeat(3, count, 1)
    boxes[0, :, 0::2] += 20 * torch.arange(count)[:, None]
    boxes[1, -9:, 0::2] += 20 * torch.arange(1, 10)[:, None]
    assert check_nms(scores, boxes, torch.zeros(3, count, dtype=torch.int64), detections=10).tolist() == [10, 10, 1]


def test_nms_orders_ties_by_index() -> None:
    scores, boxes, classes = random_candidates(2, 200, 2)
    check_nms((scores * 4).ceil() / 4, boxes, classes)


def test_an_iou_at_the_threshold_does_not_suppress() -> None:
    """A 10×10 box and its 10×5 half have an IoU of exactly 0.5; with one row more the second is suppressed."""
    boxes = torch.tensor([[[0.0, 0.0, 9.0, 9.0], [0.0, 0.0, 9.0, 4.0]], [[0.0, 0.0, 9.0, 9.0], [0.0, 0.0, 9.0, 5.0]]])
    scores = torch.tensor([[0.9, 0.8], [0.9, 0.8]])
    assert check_nms(scores, boxes, torch.zeros(2, 2, dtype=torch.int64)).tolist() == [2, 1]


def test_a_suppressed_box_suppresses_nothing() -> None:
    """A row of boxes, each overlapping the next: every second one survives."""
    boxes = torch.tensor([[[4.0 * i, 0.0, 4.0 * i + 15, 9.0] for i in range(9)]])
    assert check_nms(torch.linspace(0.9, 0.1, 9)[None], boxes, torch.zeros(1, 9, dtype=torch.int64)).item() == 5


def test_nms_keeps_classes_apart() -> None:
    boxes = torch.tensor([[[0.0, 0.0, 9.0, 9.0]] * 4])
    assert check_nms(torch.tensor([[0.9, 0.8, 0.7, 0.6]]), boxes, torch.tensor([[0, 1, 0, 1]])).item() == 2


def test_unused_rows_do_not_suppress_a_box_at_the_origin() -> None:
    """The box of an unused row is zero, which is one pixel at the origin, and its class is 0."""
    boxes = torch.zeros(1, 3, 4)
    assert check_nms(torch.tensor([[0.0, 0.5, NAN]]), boxes, torch.zeros(1, 3, dtype=torch.int64)).item() == 1


def test_nms_of_nothing() -> None:
    assert check_nms(torch.zeros(2, 7), torch.zeros(2, 7, 4), torch.zeros(2, 7, dtype=torch.int64)).tolist() == [0, 0]
    assert check_nms(torch.zeros(2, 0), torch.zeros(2, 0, 6), torch.zeros(2, 0, dtype=torch.int64)).tolist() == [0, 0]


def test_boxes_without_area_do_not_suppress() -> None:
    boxes = torch.tensor([[[5.0, 5.0, 4.0, 4.0]] * 3])
    assert check_nms(torch.tensor([[0.9, 0.8, 0.7]]), boxes, torch.zeros(1, 3, dtype=torch.int64)).item() == 3


# --- rotated IoU


@pytest.mark.parametrize("minimum", [0.0, 0.4, 0.7])
def test_rotated_iou_skips_only_pairs_below_the_minimum(minimum: float) -> None:
    start = torch.rand(80, 2) * 60
    a = torch.cat([start, start + torch.rand(80, 2) * 50, torch.randn(80, 1)], -1)
    b = torch.cat([a[:40] + torch.randn(40, 5) * 0.5, a[40:]])
    exact, found = geometry.rotated_iou(a, b), ops.rotated_iou_reference(a, b, minimum=minimum)
    wanted = exact > minimum
    assert torch.allclose(found[wanted], exact[wanted], atol=1e-6) and wanted.sum() > 40
    assert ((found - exact).abs() < 1e-6).logical_or(found == 0).all()
    batched = ops.rotated_iou_reference(a.view(4, 20, 5), b, minimum=minimum)
    assert torch.equal(batched, found.view(4, 20, 80))


def test_rotated_iou_at_the_minimum_is_given() -> None:
    """For an un-rotated box and its half the upper bound is the IoU itself."""
    a, b = torch.tensor([[0.0, 0.0, 9.0, 9.0, 0.0]]), torch.tensor([[0.0, 0.0, 9.0, 4.0, 0.0]])
    assert ops.rotated_iou_reference(a, b, minimum=0.5).item() == 0.5
