"""Target assignment and losses against plain Python loops, and their gradients against autograd."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import shapely
import shapely.affinity
import torch
import torch.nn.functional as F
from torch import Tensor

from odtk import boxes as geometry
from odtk.box_coder import BOX_CODERS
from odtk.config import LossConfig, ModelConfig
from odtk.model.anchors import place_anchors
from odtk.training import assign
from odtk.training import loss as losses
from odtk.training.assign import BACKGROUND, IGNORED

STRIDES = (8, 16)
SHAPES = ((4, 5), (2, 3))  # (h, w) of an input of 40 × 32 pixels, which is no multiple of 16
BOUNDS = {"background_iou": 0.4, "foreground_iou": 0.5}
ROTATED = (-math.pi / 6, 0.0, math.pi / 6)


def model_config(kind: str, classes: int = 3) -> ModelConfig:
    """``retinanet``, ``rotated``, ``fcos``, ``dense`` or ``rotated dense``, with few anchors."""
    few = ModelConfig(classes=classes, ratios=(1.0, 0.5), scales=(2.0,))
    _, rotated, head = kind.rpartition("rotated ")
    if head in ("fcos", "dense"):
        return dataclasses.replace(few, head=head, angles=(0.0,) if rotated else ())
    return dataclasses.replace(few, angles=ROTATED if kind == "rotated" else ())


def base_anchors(model: ModelConfig, stride: int) -> Tensor:
    """The anchors of a cell, written out: angle outermost, then scale, then ratio."""
    if model.head in ("fcos", "dense"):
        return torch.tensor([[0.0, 0.0, stride - 1.0, stride - 1.0]])
    rows = []
    for angle in model.angles or (None,):
        for scale in model.scales:
            for ratio in model.ratios:
                w = math.sqrt(stride * stride / ratio)
                h = w * ratio
                x, y = w * scale / 2, h * scale / 2
                box = [stride / 2 - x, stride / 2 - y, stride / 2 + x, stride / 2 + y]
                rows.append(box if angle is None else [*box, angle])
    return torch.tensor(rows)


def random_heads(model: ModelConfig, n: int, *, shapes=SHAPES) -> tuple[list[Tensor], list[Tensor]]:
    channels = model.num_anchors * model.classes, model.num_anchors * BOX_CODERS[model.box_coder].head_values
    logits, boxes = ([torch.randn(n, c, *shape, requires_grad=True) for shape in shapes] for c in channels)
    return logits, boxes


def random_targets(model: ModelConfig, n: int, count: int) -> tuple[Tensor, Tensor]:
    """Boxes of 8 to 40 pixels; the last box of each image is padding, and so are all of the last image."""
    start = torch.rand(n, count, 2) * 30
    boxes = torch.cat([start, start + 7 + torch.rand(n, count, 2) * 32], -1)
    if model.rotated:
        boxes = torch.cat([boxes, torch.rand(n, count, 1) * 6 - 3], -1)
    labels = torch.randint(0, model.classes, (n, count))
    labels[:, -1] = labels[-1] = -1
    boxes[labels < 0] = 0
    return boxes, labels


def compute(model: ModelConfig, logits, boxes, targets, **settings) -> dict[str, tuple[Tensor, Tensor]]:
    return losses.detection_loss(
        logits,
        boxes,
        *targets,
        anchors=[base_anchors(model, s) for s in STRIDES],
        strides=STRIDES,
        model=model,
        loss=LossConfig(**settings),
    )


def gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def total_loss(terms: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
    """The sum of all losses, not normalized."""
    return torch.stack([total for total, _ in terms.values()]).sum()


# --- focal loss


def naive_focal(logits: Tensor, labels: Tensor, alpha: float, gamma: float) -> Tensor:
    """Equation 5 with a one-hot target, by autograd."""
    one_hot = F.one_hot(labels.clamp(min=0), logits.shape[-1]) * (labels >= 0)[..., None]
    entropy = F.binary_cross_entropy_with_logits(logits, one_hot.to(logits.dtype), reduction="none")
    p = logits.sigmoid()
    pt, weight = torch.where(one_hot == 1, p, 1 - p), torch.where(one_hot == 1, alpha, 1 - alpha)
    return (weight * (1 - pt) ** gamma * entropy)[labels != IGNORED].sum()


@pytest.mark.parametrize("classes", [1, 3, 90])
@pytest.mark.parametrize("alpha, gamma", [(0.25, 2.0), (0.5, 0.0), (0.4, 1.5)])
def test_focal_loss_and_its_gradient(classes: int, alpha: float, gamma: float) -> None:
    labels = torch.randint(-2, classes, (4, 50))
    logits = (torch.randn(4, 50, classes) * 4).requires_grad_()
    exact = logits.detach().double().requires_grad_()
    found, expected = losses.focal_loss(logits, labels, alpha, gamma), naive_focal(exact, labels, alpha, gamma)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    (found * 3).backward()
    (expected * 3).backward()
    assert torch.allclose(gradient(logits), gradient(exact).float(), atol=1e-5)
    assert not gradient(logits)[labels == IGNORED].any()


def test_focal_loss_is_finite_at_large_logits() -> None:
    logits = torch.tensor([[-1e4, -100.0, 0.0, 100.0, 1e4]]).mT.requires_grad_()
    for label in (0, BACKGROUND):
        logits.grad = None
        value = losses.focal_loss(logits, torch.full((5,), label))
        value.backward()
        assert torch.isfinite(value) and torch.isfinite(gradient(logits)).all()
        assert value.item() == pytest.approx((0.25 if label == 0 else 0.75) * (10100 + 0.25 * math.log(2)), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_focal_loss_of_half_precision_logits_is_computed_in_float32(dtype: torch.dtype) -> None:
    """The gradient is multiplied by the loss scale before it is rounded to the type of the logits."""
    logits = (torch.randn(2, 9, 3) - 6).to(dtype).requires_grad_()
    labels = torch.randint(-2, 3, (2, 9))
    exact = logits.detach().float().requires_grad_()
    for values in (logits, exact):
        value = losses.focal_loss(values, labels)
        assert value.dtype == torch.float32
        (value * 4096).backward()
    assert gradient(logits).dtype == dtype
    assert torch.allclose(
        gradient(logits).float(), gradient(exact), rtol=1e-2, atol=1e-7
    )  # the smallest step of float16 is 6e-8
    assert gradient(logits)[labels == BACKGROUND].all()  # nothing underflowed to 0


# --- assignment by IoU


def plain_iou(a: list[float], b: list[float]) -> float:
    w = max(min(a[2], b[2]) - max(a[0], b[0]) + 1, 0)
    h = max(min(a[3], b[3]) - max(a[1], b[1]) + 1, 0)
    area = [(box[2] - box[0] + 1) * (box[3] - box[1] + 1) for box in (a, b)]
    return w * h / (sum(area) - w * h)


def plain_assign(anchors: list[list[float]], boxes: list[list[float]], labels: list[int]) -> list[tuple[int, int]]:
    """(label, index of the box) of each anchor of one image."""
    if len(boxes[0]) == 5:
        overlap = geometry.rotated_iou(torch.tensor(anchors), torch.tensor(boxes)).tolist()  # has its own test
    else:
        overlap = [[plain_iou(anchor, box) for box in boxes] for anchor in anchors]
    found = []
    for row in overlap:
        best, index = -1.0, -1
        for i, (iou, label) in enumerate(zip(row, labels, strict=True)):
            if label >= 0 and iou > best:
                best, index = iou, i
        found.append((BACKGROUND if best < 0.4 else labels[index] if best >= 0.5 else IGNORED, index))
    return found


@pytest.mark.parametrize("kind", ["retinanet", "rotated"])
@pytest.mark.parametrize("chunk", [assign.CHUNK_SIZE, 1000])
def test_assign_equals_plain_loops(kind: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assign, "CHUNK_SIZE", chunk)
    model = model_config(kind)
    bases = [base_anchors(model, s) for s in STRIDES]
    anchors = place_anchors(bases, STRIDES, SHAPES, torch.device("cpu"))
    boxes, labels = random_targets(model, 5, 6)
    boxes[0, 1] = boxes[0, 0]  # a tie: the first wins
    found, index = assign.assign(anchors, boxes, labels, **BOUNDS)
    kinds = set()
    for image in range(5):
        expected = plain_assign(anchors.tolist(), boxes[image].tolist(), labels[image].tolist())
        assert found[image].tolist() == [label for label, _ in expected]
        matched = [(i, j) for i, (label, j) in zip(index[image].tolist(), expected, strict=True) if label >= 0]
        assert all(i == j for i, j in matched)
        kinds |= {min(label, 0) for label, _ in expected}
    assert kinds == {0, BACKGROUND, IGNORED}
    assert (found[-1] == BACKGROUND).all()


def test_anchors_are_placed_by_row_then_column_then_anchor() -> None:
    model = model_config("rotated")
    bases = [base_anchors(model, s) for s in STRIDES]
    placed = place_anchors(bases, STRIDES, SHAPES, torch.device("cpu"))
    expected = []
    for base, s, (h, w) in zip(bases, STRIDES, SHAPES, strict=True):
        for y, x, a in np.ndindex(h, w, len(base)):
            x1, y1, x2, y2, angle = base[a].tolist()
            expected.append([x1 + x * s, y1 + y * s, x2 + x * s, y2 + y * s, angle])
    assert torch.allclose(placed, torch.tensor(expected))


@pytest.mark.parametrize("rotated", [False, True])
def test_an_iou_at_a_bound(rotated: bool) -> None:
    """Parts of 10 × 5 and 10 × 4 pixels of a 10 × 10 box, and a little less: 0.5 is foreground, 0.4 is ignored."""
    anchors = torch.tensor([[0.0, 0, 9, 4], [0, 0, 9, 3.999], [0, 0, 9, 3], [0, 0, 9, 2.999]])
    box = torch.tensor([[[0.0, 0, 9, 9]]])
    if rotated:
        anchors, box = F.pad(anchors, (0, 1)), F.pad(box, (0, 1))
    labels, _ = assign.assign(anchors, box, torch.tensor([[2]]), **BOUNDS)
    assert labels.tolist() == [[2, IGNORED, IGNORED, BACKGROUND]]


def test_a_box_that_no_anchor_reaches_stays_unmatched() -> None:
    anchor, box = torch.tensor([[0.0, 0, 99, 99]]), torch.tensor([[[0.0, 0, 9, 9]]])
    labels, _ = assign.assign(anchor, box, torch.tensor([[0]]), **BOUNDS)
    assert labels.tolist() == [[BACKGROUND]]


# --- the whole loss of a RetinaNet


def naive_retinanet(model: ModelConfig, logits, boxes, targets, absolute: bool) -> dict[str, tuple[Tensor, int]]:
    """Anchor by anchor, channel by channel."""
    cls, box, foreground = torch.zeros(()), torch.zeros(()), 0
    v = BOX_CODERS[model.box_coder].head_values
    for image in range(len(logits[0])):
        image_boxes, image_labels = targets[0][image].tolist(), targets[1][image].tolist()
        for level, (s, (h, w)) in enumerate(zip(STRIDES, SHAPES, strict=True)):
            bases = base_anchors(model, s).tolist()
            for y, x, a in np.ndindex(h, w, len(bases)):
                placed = [v + offset for v, offset in zip(bases[a], (x * s, y * s, x * s, y * s, 0), strict=False)]
                [(label, index)] = plain_assign([placed], image_boxes, image_labels)
                channels = slice(a * model.classes, (a + 1) * model.classes)
                cls = cls + naive_focal(logits[level][image, channels, y, x], torch.tensor(label), 0.25, 2.0)
                if label < 0:
                    continue
                foreground += 1
                aw, ah = placed[2] - placed[0] + 1, placed[3] - placed[1] + 1
                tx1, ty1, tx2, ty2 = image_boxes[index][:4]
                tw, th = tx2 - tx1 + 1, ty2 - ty1 + 1
                wanted = [
                    (tx1 + tw / 2 - placed[0] - aw / 2) / aw,
                    (ty1 + th / 2 - placed[1] - ah / 2) / ah,
                    math.log(tw / aw),
                    math.log(th / ah),
                ]
                if model.rotated:
                    theta = image_boxes[index][4]
                    if not absolute:  # of the forms of this box, the one nearest to the anchor's angle
                        quarters = min(range(-9, 10), key=lambda q: abs(theta + q * math.pi / 2 - placed[4]))
                        theta += quarters * math.pi / 2
                        if quarters % 2:
                            wanted[2:] = [math.log(th / aw), math.log(tw / ah)]
                    wanted += [math.sin(theta), math.cos(theta)]
                for channel, value in enumerate(wanted):
                    d = (boxes[level][image, a * v + channel, y, x] - value).abs()
                    box = box + (0.5 * d**2 / 0.11 if d < 0.11 else d - 0.5 * 0.11)
    return {"cls": (cls, foreground), "box": (box, foreground)}


def assert_same(found: dict[str, Any], expected: dict[str, Any], heads: list[Tensor]) -> None:
    """Sums, normalizers, and the gradients that each sum alone gives the heads."""
    assert found.keys() == expected.keys()
    for name in found:
        for mine, naive in zip(found[name], expected[name], strict=True):
            assert torch.as_tensor(mine).item() == pytest.approx(torch.as_tensor(naive).item(), rel=1e-4)
        mine, naive = (
            torch.autograd.grad(total, heads, retain_graph=True, allow_unused=True, materialize_grads=True)
            for total in (found[name][0], expected[name][0])
        )
        for a, b in zip(mine, naive, strict=True):
            assert torch.allclose(a, b, atol=1e-4)
        assert any(a.any() for a in mine)


@pytest.mark.parametrize(
    "kind, classes, absolute",
    [
        ("retinanet", 3, False),
        ("retinanet", 1, False),
        ("retinanet", 90, False),
        ("rotated", 2, False),
        ("rotated", 2, True),
    ],
)
def test_retinanet_loss_equals_plain_loops(kind: str, classes: int, absolute: bool) -> None:
    model = model_config(kind, classes)
    logits, boxes = random_heads(model, 2)
    targets = random_targets(model, 2, 5)
    expected = naive_retinanet(model, logits, boxes, targets, absolute)
    assert expected["box"][1] > 1
    assert_same(compute(model, logits, boxes, targets, absolute_angle=absolute), expected, logits + boxes)


# --- FCOS


def plain_points(boxes: list[list[float]], labels: list[int], strides=STRIDES, shapes=SHAPES):
    """(level, y, x, label, index, (l, t, r, b)) of each point of one image, by the paper's rules."""
    for level, (s, (h, w)) in enumerate(zip(strides, shapes, strict=True)):
        low = 0 if level == 0 else 4 * s
        high = math.inf if level == len(strides) - 1 else 8 * s
        for y, x in np.ndindex(h, w):
            px, py = (x + 0.5) * s, (y + 0.5) * s
            best = (math.inf, BACKGROUND, 0, (1.0, 1.0, 1.0, 1.0))
            for i, ((x1, y1, x2, y2), label) in enumerate(zip(boxes, labels, strict=True)):
                distances = (px - x1, py - y1, x2 + 1 - px, y2 + 1 - py)
                cx, cy = (x1 + x2 + 1) / 2, (y1 + y2 + 1) / 2
                area = (x2 - x1 + 1) * (y2 - y1 + 1)
                central = abs(px - cx) < 1.5 * s and abs(py - cy) < 1.5 * s
                if label >= 0 and min(distances) > 0 and central and low <= max(distances) <= high and area < best[0]:
                    best = (area, label, i, distances)
            yield level, y, x, *best[1:]


def naive_fcos(model: ModelConfig, logits, boxes, targets) -> dict[str, tuple[Tensor, float]]:
    cls = box = ctr = torch.zeros(())
    weights, foreground = 0.0, 0
    for image in range(len(logits[0])):
        points = plain_points(targets[0][image].tolist(), targets[1][image].tolist())
        for level, y, x, label, _, (left, top, right, bottom) in points:
            cls = cls + naive_focal(logits[level][image, :, y, x], torch.tensor(label), 0.25, 2.0)
            if label < 0:
                continue
            foreground += 1
            weight = math.sqrt(min(left, right) / max(left, right) * (min(top, bottom) / max(top, bottom)))
            weights += weight
            raw = boxes[level][image, :, y, x]
            pl, pt, pr, pb = raw[:4].relu() * STRIDES[level]
            shared = (pl.clamp(max=left) + pr.clamp(max=right)) * (pt.clamp(max=top) + pb.clamp(max=bottom))
            union = (pl + pr) * (pt + pb) + (left + right) * (top + bottom) - shared
            hull = (pl.clamp(min=left) + pr.clamp(min=right)) * (pt.clamp(min=top) + pb.clamp(min=bottom))
            iou = shared / union
            box = box + weight * (1 - (iou - (hull - union) / hull))
            ctr = ctr - weight * F.logsigmoid(raw[4]) - (1 - weight) * F.logsigmoid(-raw[4])
    return {"cls": (cls, foreground), "box": (box, weights), "centerness": (ctr, foreground)}


def test_fcos_loss_equals_plain_loops() -> None:
    model = model_config("fcos")
    logits, boxes = random_heads(model, 2)
    targets = random_targets(model, 2, 5)
    expected = naive_fcos(model, logits, boxes, targets)
    assert expected["cls"][1] > 1
    assert_same(compute(model, logits, boxes, targets), expected, logits + boxes)


@pytest.mark.parametrize("chunk", [assign.CHUNK_SIZE, 4000])
def test_assign_points_equals_plain_loops(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All five levels, boxes of 4 to 900 px, some equal: of equal areas the first wins."""
    monkeypatch.setattr(assign, "CHUNK_SIZE", chunk)
    strides, shapes = (8, 16, 32, 64, 128), ((32, 24), (16, 12), (8, 6), (4, 3), (2, 2))
    size = torch.exp(torch.empty(3, 12, 2).uniform_(math.log(4), math.log(900)))
    center = torch.rand(3, 12, 2) * torch.tensor([192.0, 256.0])
    boxes = torch.cat([center - size / 2, center + size / 2 - 1], -1)
    boxes[0, 1] = boxes[0, 0]
    labels = torch.randint(-1, 9, (3, 12))
    bases = [torch.tensor([[0.0, 0.0, s - 1.0, s - 1.0]]) for s in strides]
    points = geometry.center_and_size(place_anchors(bases, strides, shapes, torch.device("cpu")))[0]
    counts = torch.tensor([h * w for h, w in shapes])
    limits = torch.tensor(assign.level_limits(strides)).repeat_interleave(counts, 0)
    assert limits.unique(dim=0).tolist() == [[0, 64], [64, 128], [128, 256], [256, 512], [512, math.inf]]
    stride = torch.tensor(strides).repeat_interleave(counts)
    found, index = assign.assign_points(points, stride, limits, boxes, labels)
    for image in range(3):
        expected = list(plain_points(boxes[image].tolist(), labels[image].tolist(), strides, shapes))
        assert found[image].tolist() == [label for *_, label, _, _ in expected]
        chosen = [(i, j) for i, (*_, label, j, _) in zip(index[image].tolist(), expected, strict=True) if label >= 0]
        assert chosen and all(i == j for i, j in chosen)


def test_levels_of_one_stride_and_of_several_backbones_have_limits() -> None:
    assert assign.level_limits([16]) == [(0, math.inf)]
    assert assign.level_limits([8, 16, 8, 16]) == [(0, 64), (64, math.inf)] * 2


def test_losses_of_a_perfect_box_are_zero() -> None:
    distances = torch.tensor([[3.0, 4.0, 5.0, 6.0]])
    assert losses.giou_loss(distances, distances).item() == 0


def test_the_loss_of_a_box_without_area_is_finite() -> None:
    predicted = torch.zeros(1, 4, requires_grad=True)
    value = losses.giou_loss(predicted, torch.tensor([[3.0, 4.0, 5.0, 6.0]])).sum()
    value.backward()
    assert torch.isfinite(value) and torch.isfinite(gradient(predicted)).all()


# --- the dense head


def polygon(box: list[float]) -> shapely.Polygon:
    """A rotated box (x1, y1, x2, y2, theta) about its center, counterclockwise as seen on the screen (y down)."""
    x1, y1, x2, y2, theta = box
    upright = shapely.box(x1, y1, x2 + 1, y2 + 1)
    return shapely.affinity.rotate(upright, -theta, origin=((x1 + x2 + 1) / 2, (y1 + y2 + 1) / 2), use_radians=True)


def polygon_iou(a: shapely.Polygon, b: shapely.Polygon) -> float:
    shared = a.intersection(b).area
    return shared / (a.area + b.area - shared)


def plain_atss(points, boxes: list[list[float]], labels: list[int]) -> list[tuple[int, int]]:
    """(label, index) of each point of one image, box by box, by the paper's algorithm 1.

    Args:
        points: per level its stride and its points (x, y).
    """
    flat = [point for _, level in points for point in level]
    found = [(BACKGROUND, 0, -1.0)] * len(flat)
    for m, ((x1, y1, x2, y2, *theta), label) in enumerate(zip(boxes, labels, strict=True)):
        cx, cy = (x1 + x2 + 1) / 2, (y1 + y2 + 1) / 2
        shape = polygon(boxes[m]) if theta else shapely.box(x1, y1, x2 + 1, y2 + 1)
        candidates, first = [], 0
        for s, level in points:
            order = sorted(range(len(level)), key=lambda i: (level[i][0] - cx) ** 2 + (level[i][1] - cy) ** 2)
            for i in order[:9]:
                (x, y), half = level[i], 4 * s
                candidates.append((first + i, polygon_iou(shape, shapely.box(x - half, y - half, x + half, y + half))))
            first += len(level)
        ious = [iou for _, iou in candidates] + [0.0] * (45 - len(candidates))
        threshold = np.mean(ious) + np.std(ious, ddof=1)
        for i, iou in candidates:
            x, y = flat[i]
            inside = shape.contains(shapely.Point(x, y))
            if label >= 0 and inside and iou >= threshold and iou > found[i][2]:
                found[i] = (label, m, iou)
    return [(label, m) for label, m, _ in found]


def grid(strides=STRIDES, shapes=SHAPES) -> list[tuple[int, list[tuple[float, float]]]]:
    """Per level its stride and the points of its cells, by row and column."""
    return [
        (s, [((x + 0.5) * s, (y + 0.5) * s) for y, x in np.ndindex(h, w)])
        for s, (h, w) in zip(strides, shapes, strict=True)
    ]


LARGE = (8, 16, 32), ((16, 24), (8, 12), (4, 6))  # strides and shapes of P3 to P5 of an image of 192 × 128


def assign_atss(boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    strides, shapes = LARGE
    points = torch.tensor([point for _, level in grid(strides, shapes) for point in level])
    return assign.assign_atss(points, strides, [h * w for h, w in shapes], boxes, labels)


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("chunk", [assign.CHUNK_SIZE, 1])
def test_atss_equals_plain_loops(chunk: int, rotated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Boxes of 6 to 150 pixels, some on top of each other; the third of an image without boxes."""
    monkeypatch.setattr(assign, "CHUNK_SIZE", chunk)
    size = torch.exp(torch.empty(3, 9, 2).uniform_(math.log(6), math.log(150)))
    center = torch.rand(3, 9, 2) * torch.tensor([192.0, 128.0])
    boxes = torch.cat([center - size / 2, center + size / 2 - 1], -1)
    if rotated:
        boxes = torch.cat([boxes, torch.rand(3, 9, 1) * 6 - 3], -1)
    labels = torch.randint(0, 9, (3, 9))
    labels[0, -1] = labels[2] = -1
    found, index = assign_atss(boxes, labels)
    for image in range(3):
        expected = plain_atss(grid(*LARGE), boxes[image].tolist(), labels[image].tolist())
        assert found[image].tolist() == [label for label, _ in expected]
        foreground = found[image] >= 0
        assert index[image][foreground].tolist() == [m for label, m in expected if label >= 0]
        assert foreground.any() == (image < 2)


def test_equal_boxes_go_to_the_first() -> None:
    found, index = assign_atss(torch.tensor([[[20.0, 20, 79, 79]] * 2]), torch.tensor([[4, 5]]))
    assert (found == 4).any() and not (found == 5).any() and not index[found == 4].any()


@pytest.mark.parametrize("size", [(10, 10), (24, 60), (64, 64), (113, 65), (150, 100)])
def test_every_box_alone_in_an_image_gets_points(size: tuple[int, int]) -> None:
    """With a threshold over the candidates of P3 to P5 alone, the large ones got none."""
    box = torch.tensor([[[20.0, 10.0, 19.0 + size[0], 9.0 + size[1]]]])
    assert (assign_atss(box, torch.tensor([[2]]))[0] == 2).any()


def naive_dense(model: ModelConfig, logits, boxes, targets) -> dict[str, tuple[Tensor, float]]:
    """Point by point, class by class."""
    cls = box = torch.zeros(())
    weights, foreground = 0.0, 0
    for image in range(len(logits[0])):
        image_boxes = targets[0][image].tolist()
        assigned = iter(plain_atss(grid(), image_boxes, targets[1][image].tolist()))
        for level, (s, (h, w)) in enumerate(zip(STRIDES, SHAPES, strict=True)):
            for y, x in np.ndindex(h, w):
                label, m = next(assigned)
                values, quality = logits[level][image, :, y, x], 0.0
                if label >= 0:
                    foreground += 1
                    x1, y1, x2, y2 = image_boxes[m]
                    px, py = (x + 0.5) * s, (y + 0.5) * s
                    left, top, right, bottom = px - x1, py - y1, x2 + 1 - px, y2 + 1 - py
                    pl, pt, pr, pb = boxes[level][image, :, y, x].relu() * s
                    shared = (pl.clamp(max=left) + pr.clamp(max=right)) * (pt.clamp(max=top) + pb.clamp(max=bottom))
                    union = (pl + pr) * (pt + pb) + (left + right) * (top + bottom) - shared
                    hull = (pl.clamp(min=left) + pr.clamp(min=right)) * (pt.clamp(min=top) + pb.clamp(min=bottom))
                    weight = values.max().sigmoid().item()
                    box = box + 2 * weight * (1 - (shared / union - (hull - union) / hull))
                    weights += weight
                    quality = (shared / union).item()
                for c in range(model.classes):
                    wanted = torch.tensor(quality if c == label else 0.0)
                    entropy = F.binary_cross_entropy_with_logits(values[c], wanted)
                    cls = cls + (wanted - values[c].sigmoid()) ** 2 * entropy
    return {"cls": (cls, foreground), "box": (box, weights)}


@pytest.mark.parametrize("classes", [1, 3])
def test_dense_loss_equals_plain_loops(classes: int) -> None:
    model = model_config("dense", classes)
    logits, boxes = random_heads(model, 2)
    targets = random_targets(model, 2, 5)
    expected = naive_dense(model, logits, boxes, targets)
    assert expected["cls"][1] > 1
    assert_same(compute(model, logits, boxes, targets), expected, logits + boxes)


def naive_rotated_dense(model: ModelConfig, logits, boxes, targets) -> dict[str, tuple[Tensor, float]]:
    """Point by point; the IoU of polygons, whose value test_boxes.py compares with shapely's, gives the gradient."""
    cls = box = angle = torch.zeros(())
    weights, foreground = 0.0, 0
    for image in range(len(logits[0])):
        image_boxes = targets[0][image].tolist()
        assigned = iter(plain_atss(grid(), image_boxes, targets[1][image].tolist()))
        for level, (s, (h, w)) in enumerate(zip(STRIDES, SHAPES, strict=True)):
            for y, x in np.ndindex(h, w):
                label, m = next(assigned)
                values, quality = logits[level][image, :, y, x], 0.0
                if label >= 0:
                    foreground += 1
                    weight = values.max().sigmoid().item()
                    weights += weight
                    dx, dy, bw, bh, sin, cos = boxes[level][image, :, y, x]
                    cx, cy = (x + 0.5 + dx) * s, (y + 0.5 + dy) * s
                    hw, hh = bw.relu() * s / 2, bh.relu() * s / 2
                    theta = torch.atan2(sin, cos) / 2
                    found = torch.stack([cx - hw, cy - hh, cx + hw - 1, cy + hh - 1, theta])
                    iou = geometry.paired_rotated_iou(found, torch.tensor(image_boxes[m]))
                    quality = iou.item()
                    shape = polygon(image_boxes[m])
                    rx, ry = (
                        hw * theta.cos().abs() + hh * theta.sin().abs(),
                        hw * theta.sin().abs() + hh * theta.cos().abs(),
                    )
                    x1, y1, x2, y2 = shape.bounds
                    wide = (cx + rx).clamp(min=x2) - (cx - rx).clamp(max=x1)
                    high = (cy + ry).clamp(min=y2) - (cy - ry).clamp(max=y1)
                    shift = (cx - shape.centroid.x) ** 2 + (cy - shape.centroid.y) ** 2
                    box = box + 2 * weight * (1 - iou + shift / (wide**2 + high**2))
                    tx1, ty1, tx2, ty2, tt = image_boxes[m]
                    tw, th = tx2 - tx1 + 1, ty2 - ty1 + 1
                    tt += math.pi / 2 * (th > tw)  # of the longer side
                    for value, right in ((sin, math.sin(2 * tt)), (cos, math.cos(2 * tt))):
                        d = (value - right).abs()
                        one = 0.5 * d**2 / 0.11 if d < 0.11 else d - 0.5 * 0.11
                        angle = angle + 0.5 * weight * (1 - min(tw, th) / max(tw, th)) * one
                for c in range(model.classes):
                    wanted = torch.tensor(quality if c == label else 0.0)
                    entropy = F.binary_cross_entropy_with_logits(values[c], wanted)
                    cls = cls + (wanted - values[c].sigmoid()) ** 2 * entropy
    return {"cls": (cls, foreground), "box": (box, weights), "angle": (angle, weights)}


@pytest.mark.parametrize("classes", [1, 3])
def test_rotated_dense_loss_equals_plain_loops(classes: int) -> None:
    model = model_config("rotated dense", classes)
    logits, boxes = random_heads(model, 2)
    with torch.no_grad():
        for level in boxes:
            level[:, 2:4] += 2  # sides that mostly are positive
    targets = random_targets(model, 2, 5)
    expected = naive_rotated_dense(model, logits, boxes, targets)
    assert expected["cls"][1] > 1
    assert_same(compute(model, logits, boxes, targets), expected, logits + boxes)


def test_the_angle_of_a_box_and_of_its_other_form_is_one() -> None:
    """A quarter turn with sides swapped, and a half turn; and a square has no angle to learn."""
    box = torch.tensor([10.0, 20.0, 49.0, 31.0, 0.4])
    upright = torch.tensor([24.0, 6.0, 35.0, 45.0, 0.4 + math.pi / 2])  # the same polygon
    assert polygon_iou(polygon(box.tolist()), polygon(upright.tolist())) == pytest.approx(1)
    forms = torch.stack([box, upright, box + torch.tensor([0, 0, 0, 0, math.pi])])
    right = torch.tensor([math.sin(0.8), math.cos(0.8)])
    assert torch.allclose(losses.angle_loss(right.expand(3, 2), forms), torch.zeros(3), atol=1e-5)
    wrong = losses.angle_loss(-right.expand(3, 2), forms)
    assert (wrong > 1).all() and torch.allclose(wrong, wrong[0].expand(3), atol=1e-4)
    assert losses.angle_loss(-right, torch.tensor([10.0, 20.0, 49.0, 59.0, 0.4])) == 0


def test_a_rotated_box_beside_its_target_is_drawn_to_it() -> None:
    """Without overlap the IoU has no gradient, but the distance of the centers has."""
    box = torch.tensor([10.0, 10.0, 19.0, 15.0, 0.5], requires_grad=True)
    overlap, value = losses.rotated_box_loss(box, torch.tensor([60.0, 40.0, 79.0, 49.0, -0.5]))
    value.backward()
    change = gradient(box)[:4]
    assert overlap < 1e-9 and value > 1 and (change[:2] + change[2:] < 0).all()  # the center moves right and down


def test_quality_focal_loss_is_finite_at_large_logits() -> None:
    logits = torch.tensor([[-1e4, -100.0, 0.0, 100.0, 1e4]]).mT.requires_grad_()
    for label in (0, BACKGROUND):
        logits.grad = None
        value = losses.quality_focal_loss(logits, torch.full((5,), label), torch.full((5,), 0.7))
        value.backward()
        assert torch.isfinite(value) and torch.isfinite(gradient(logits)).all()


# --- what holds for every head

KINDS = ["retinanet", "rotated", "fcos", "dense", "rotated dense"]


@pytest.mark.parametrize("kind", KINDS)
def test_images_without_boxes_have_finite_losses_and_gradients(kind: str) -> None:
    model = model_config(kind)
    logits, boxes = random_heads(model, 2)
    found = compute(model, logits, boxes, (torch.zeros(2, 1, 5 if model.rotated else 4), torch.full((2, 1), -1)))
    assert found["cls"][0] > 0
    assert all(normalizer == 0 for _, normalizer in found.values())
    assert all(total == 0 for name, (total, _) in found.items() if name != "cls")
    total_loss(found).backward()
    assert all(torch.isfinite(gradient(level)).all() for level in logits + boxes)


@pytest.mark.parametrize("kind", KINDS)
def test_degenerate_boxes_are_background(kind: str) -> None:
    """The dataset refuses them; if one came through all the same, it must not spoil the step."""
    model = model_config(kind)
    logits, boxes = random_heads(model, 1)
    degenerate = F.pad(torch.tensor([[[20.0, 20.0, 10.0, 10.0], [20.0, 20.0, 19.0, 30.0]]]), (0, int(model.rotated)))
    found = compute(model, logits, boxes, (degenerate, torch.zeros(1, 2, dtype=torch.int64)))
    assert all(normalizer == 0 for _, normalizer in found.values())
    total_loss(found).backward()
    assert all(torch.isfinite(gradient(level)).all() for level in logits + boxes)


@pytest.mark.parametrize("kind", KINDS)
def test_memory_format_changes_nothing(kind: str) -> None:
    model = model_config(kind)
    logits, boxes = random_heads(model, 2)
    targets = random_targets(model, 2, 5)
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        heads = [
            [level.detach().contiguous(memory_format=memory_format).requires_grad_() for level in part]
            for part in (logits, boxes)
        ]
        found = compute(model, heads[0], heads[1], targets)
        total_loss(found).backward()
        results.append(([total for total, _ in found.values()], [gradient(level) for part in heads for level in part]))
    for a, b in zip(results[0][0] + results[0][1], results[1][0] + results[1][1], strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["retinanet", "fcos", "dense", "rotated dense"])
def test_the_loss_never_waits_for_the_device(kind: str) -> None:
    """The meta device has no values, so an operation that has to wait for one raises."""
    model = model_config(kind)
    logits, boxes = ([level.detach().to("meta").requires_grad_() for level in part] for part in random_heads(model, 2))
    targets = [part.to("meta") for part in random_targets(model, 2, 5)]
    found = compute(model, logits, boxes, targets)
    torch.stack([total / normalizer.clamp(min=1) for total, normalizer in found.values()]).sum().backward()
    assert all(level.grad is not None for level in logits + boxes)


def test_batches_add_up() -> None:
    """The sums of two images are those of each alone: gradient accumulation and several processes rely on it."""
    model = model_config("retinanet")
    logits, boxes = random_heads(model, 2)
    targets = random_targets(model, 3, 5)
    targets = targets[0][:2], targets[1][:2]
    together = compute(model, logits, boxes, targets)
    alone = [
        compute(model, [t[i, None] for t in logits], [t[i, None] for t in boxes], [t[i, None] for t in targets])
        for i in range(2)
    ]
    for name, parts in together.items():
        for k, value in enumerate(parts):
            assert value.item() == pytest.approx(sum(part[name][k].item() for part in alone), rel=1e-5)
