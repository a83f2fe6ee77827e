"""Boxes against restatements in plain Python, and rotated IoU against shapely."""

import math
import random

import numpy as np
import pytest
import torch
from torch import Tensor

from odtk import boxes as geometry

INF, NAN = math.inf, math.nan


def random_boxes(n: int, *, extent: float = 100.0, rotated: bool = False) -> Tensor:
    start = torch.rand(n, 2) * extent
    box = torch.cat([start, start + torch.rand(n, 2) * extent], -1)
    return torch.cat([box, (torch.rand(n, 1) * 2 - 1) * math.pi], -1) if rotated else box


def plain_iou(a: list[float], b: list[float]) -> float:
    """Of one pair, in inclusive pixels."""
    w = min(a[2], b[2]) - max(a[0], b[0]) + 1
    h = min(a[3], b[3]) - max(a[1], b[1]) + 1
    shared = max(w, 0) * max(h, 0)
    areas = [(box[2] - box[0] + 1) * (box[3] - box[1] + 1) for box in (a, b)]
    return shared / (sum(areas) - shared)


# --- coding against anchors


def test_decode_is_the_formula_in_plain_python() -> None:
    anchors, deltas = random_boxes(50), torch.randn(50, 4) * 0.3
    found = geometry.decode(deltas, anchors, (120, 90))
    for (x1, y1, x2, y2), (dx, dy, dw, dh), box in zip(anchors.tolist(), deltas.tolist(), found.tolist(), strict=True):
        w, h = x2 - x1 + 1, y2 - y1 + 1
        cx, cy = dx * w + x1 + 0.5 * w, dy * h + y1 + 0.5 * h
        pw, ph = math.exp(dw) * w, math.exp(dh) * h
        expected = [cx - pw / 2, cy - ph / 2, cx + pw / 2 - 1, cy + ph / 2 - 1]
        assert box == pytest.approx([min(max(v, 0), (119, 89)[i % 2]) for i, v in enumerate(expected)], abs=1e-3)


def test_encode_is_the_inverse_of_decode() -> None:
    anchors, targets = random_boxes(200), random_boxes(200)
    assert torch.allclose(geometry.decode(geometry.encode(targets, anchors), anchors, (300, 300)), targets, atol=1e-3)


def test_zero_deltas_give_the_anchor() -> None:
    anchor = torch.tensor([[3.0, 4.0, 10.0, 20.0]])
    assert torch.equal(geometry.decode(torch.zeros(1, 4), anchor, (64, 64)), anchor)
    assert torch.equal(geometry.encode(anchor, anchor), torch.zeros(1, 4))


def test_rotated_coding_keeps_the_boxs_own_angle() -> None:
    anchors, targets = random_boxes(100, rotated=True), random_boxes(100, rotated=True)
    numbers = geometry.encode_rotated(targets, anchors)
    assert torch.allclose(numbers[:, 4], targets[:, 4].sin()) and torch.allclose(numbers[:, 5], targets[:, 4].cos())
    back = geometry.decode_rotated(numbers, anchors, (300, 300))
    assert torch.allclose(back[:, :4], targets[:, :4], atol=1e-3)
    assert torch.allclose(torch.atan2(back[:, 4], back[:, 5]), targets[:, 4], atol=1e-5)


def test_the_doubled_angle_decodes_to_the_box_wherever_the_angle_starts_over() -> None:
    """θ and θ + π are one box; near ±π/4 and ±π/2 the two branches of the formula meet."""
    angles = torch.cat([torch.linspace(-math.pi, math.pi, 1001), math.pi / 4 * torch.arange(-4, 5)])
    angles = torch.cat([angles, angles + 1e-6, angles - 1e-6])
    box = torch.tensor([8.0, 12.0, 47.0, 21.0]).expand(len(angles), 4)
    center, size = geometry.center_and_size(box)
    point = torch.tensor([20.0, 30.0])
    length = torch.rand(len(angles), 1) * 2 + 0.01
    twice = 2 * angles.double()
    numbers = torch.cat([center - point, size, length * torch.stack([twice.sin(), twice.cos()], -1).float()], -1)
    found = geometry.decode_center_size_angle(numbers, point, (64, 48))
    assert torch.allclose(found[:, :4], box)
    theta = torch.atan2(found[:, 4].double(), found[:, 5].double())
    halves = (theta - angles.double()) / math.pi
    assert (halves - halves.round()).abs().max() < 1e-6
    assert theta.min() > -math.pi / 4 - 1e-5 and theta.max() < 3 * math.pi / 4 + 1e-5


def test_a_rotated_box_of_a_point_may_reach_beyond_the_image() -> None:
    """Clamping the sides before the rotation would cut a standing box at the left border, which it does not cross."""
    numbers = torch.tensor([[0.0, 0.0, 40.0, 8.0, 0.0, -1.0]])  # 40 long, upright after a quarter turn
    found = geometry.decode_center_size_angle(numbers, torch.tensor([6.0, 30.0]), (64, 64))
    assert found[0, :4].tolist() == [-14.0, 26.0, 25.0, 33.0]
    assert geometry.circumscribe(found)[0].tolist() == pytest.approx([2.0, 10.0, 9.0, 49.0])
    far = geometry.decode_center_size_angle(numbers + 1e6, torch.tensor([6.0, 30.0]), (64, 32))[0]
    assert torch.stack(geometry.center_and_size(far)).tolist() == [[64.0, 32.0], [96.0, 96.0]]


@pytest.mark.parametrize("bad", [INF, -INF, NAN])
@pytest.mark.parametrize("place", range(6))
def test_no_regressed_number_gives_a_box_that_is_not_finite(bad: float, place: int) -> None:
    numbers = torch.zeros(1, 6)
    numbers[0, place] = bad
    anchor = torch.tensor([[3.0, 4.0, 10.0, 20.0, 0.0]])
    box = geometry.decode_rotated(numbers, anchor, (64, 32))[0]
    assert torch.isfinite(box[:4]).all() and not box.isnan().any()
    assert (box[:4] >= 0).all() and (box[:4] <= torch.tensor([63.0, 31.0, 63.0, 31.0])).all()
    if place < 4:
        assert torch.equal(geometry.decode(numbers[:, :4], anchor[:, :4], (64, 32))[0], box[:4])
        distances = torch.full((1, 4), 5.0)
        distances[0, place] = bad
        assert torch.isfinite(geometry.decode_distances(distances, torch.tensor([[7.0, 8.0]]), (64, 32))).all()
    assert torch.isfinite(geometry.decode_center_size_angle(numbers, torch.tensor([[7.0, 8.0]]), (64, 32))).all()


def test_distances_are_to_the_edges_of_the_continuous_box() -> None:
    box = geometry.decode_distances(torch.tensor([3.0, 2.0, 5.0, 4.0]), torch.tensor([12.0, 20.0]), (64, 64))
    assert box.tolist() == [9.0, 18.0, 16.0, 23.0]  # width 3 + 5, height 2 + 4


# --- IoU


def test_iou_is_that_of_inclusive_pixels() -> None:
    a, b = random_boxes(40), random_boxes(30)
    found = geometry.iou(a, b)
    assert found.shape == (40, 30)
    for i, j in np.ndindex(40, 30):
        assert found[i, j].item() == pytest.approx(plain_iou(a[i].tolist(), b[j].tolist()), abs=1e-5)
    batched = geometry.iou(a.view(4, 10, 4), b[None, :7])
    assert torch.equal(batched, found[:, :7].view(4, 10, 7))


def test_iou_of_one_pixel_and_of_none() -> None:
    pixel, nothing = torch.tensor([[5.0, 5.0, 5.0, 5.0]]), torch.tensor([[5.0, 5.0, 4.0, 4.0]])
    assert geometry.iou(pixel, pixel).item() == 1
    assert geometry.iou(pixel, nothing).item() == 0
    assert geometry.iou(nothing, nothing).item() == 0
    assert geometry.iou(pixel, torch.tensor([[6.0, 5.0, 9.0, 9.0]])).item() == 0  # neighbors share no pixel


# --- rotation


def test_a_positive_angle_turns_counterclockwise_on_the_screen() -> None:
    """A lying bar, turned by 45°: its right end goes up, which is to smaller y."""
    bar = torch.tensor([0.0, 4.0, 9.0, 5.0, math.pi / 4])  # center (5, 5), 10 × 2
    middle_of_right_end = geometry.corners(bar)[1:3].mean(0)
    assert middle_of_right_end.tolist() == pytest.approx([5 + 5 * math.sqrt(0.5), 5 - 5 * math.sqrt(0.5)], abs=1e-5)


def test_corners_of_an_unturned_box_are_its_edges() -> None:
    assert geometry.corners(torch.tensor([2.0, 3.0, 5.0, 4.0, 0.0])).tolist() == [[2, 3], [6, 3], [6, 5], [2, 5]]


def test_a_turn_by_ninety_degrees_swaps_the_sides() -> None:
    turned = torch.tensor([[0.0, 4.0, 9.0, 5.0, math.pi / 2]])
    assert torch.allclose(geometry.circumscribe(turned), torch.tensor([[4.0, 0.0, 5.0, 9.0]]), atol=1e-5)


def test_circumscribed_boxes_hold_the_corners_tightly() -> None:
    rotated = random_boxes(300, rotated=True)
    corners, around = geometry.corners(rotated), geometry.circumscribe(rotated)
    assert torch.allclose(corners.amin(1), around[:, :2], atol=1e-4)
    assert torch.allclose(corners.amax(1), around[:, 2:] + 1, atol=1e-4)


def test_six_numbers_mean_the_same_box_as_the_angle() -> None:
    rotated = random_boxes(50, rotated=True)
    factor = 0.1 + 3 * torch.rand(50, 1)  # a head does not regress unit vectors
    six = torch.cat([rotated[:, :4], rotated[:, 4:].sin() * factor, rotated[:, 4:].cos() * factor], -1)
    assert torch.allclose(geometry.corners(six), geometry.corners(rotated), atol=1e-3)


@pytest.mark.parametrize("theta", [-7.0, -math.pi, -math.pi / 2, -0.8, -math.pi / 4, 0.0, math.pi / 4, 2.0, 3.2, 9.0])
def test_normalized_angles_mean_the_same_shape(theta: float) -> None:
    box = torch.tensor([[2.0, 3.0, 21.0, 7.0, theta]], dtype=torch.float64)
    folded, wrapped = geometry.normalize_angle(box), geometry.normalize_angle(box, absolute=True)
    assert -math.pi / 4 <= folded[0, 4] < math.pi / 4
    assert -math.pi <= wrapped[0, 4] < math.pi
    assert geometry.rotated_iou(box, folded).item() == pytest.approx(1)
    assert torch.allclose(geometry.corners(wrapped), geometry.corners(box))  # the front stays the front
    anchor = torch.tensor([[0.5], [-2.0]], dtype=torch.float64)
    near = geometry.normalize_angle(box.expand(2, 5), around=anchor)
    assert ((near[:, 4:] - anchor).abs() <= math.pi / 4).all()
    assert geometry.paired_rotated_iou(box, near).tolist() == pytest.approx([1, 1])


# --- rotated IoU against an independent polygon library


def shapely_iou(a: Tensor, b: Tensor) -> np.ndarray:
    """Pair by pair, from corners worked out here: a rotation by complex numbers, y mirrored to be a plane's."""
    import shapely

    def polygon(box: list[float]):
        x1, y1, x2, y2, theta = box
        center, turn = complex((x1 + x2 + 1) / 2, -(y1 + y2 + 1) / 2), complex(math.cos(theta), math.sin(theta))
        half_w, half_h = (x2 - x1 + 1) / 2, (y2 - y1 + 1) / 2
        points = [center + turn * complex(sx * half_w, sy * half_h) for sx, sy in ((-1, 1), (1, 1), (1, -1), (-1, -1))]
        return shapely.Polygon([(p.real, p.imag) for p in points])

    first, second = ([polygon(box) for box in boxes.double().tolist()] for boxes in (a, b))
    shared = shapely.area(shapely.intersection(first, second, grid_size=1e-9))  # without a grid it finds 1 for some
    # neighbors that only share an edge
    union = shapely.area(first) + shapely.area(second) - shared
    return np.where(union > 0, shared / np.where(union > 0, union, 1), 0)


def random_pairs(n: int) -> tuple[Tensor, Tensor]:
    """Boxes of 0.5 to 200 px at up to 2000 px, the second near the first."""
    size = torch.exp(torch.empty(n, 1, 2).uniform_(math.log(0.5), math.log(200)) + torch.randn(n, 2, 2) * 0.3)
    center = torch.rand(n, 1, 2) * 2000 + torch.randn(n, 2, 2) * size.amin(1, keepdim=True) * 0.3
    angle = (torch.rand(n, 2, 1) * 2 - 1) * math.pi
    pairs = torch.cat([center - size / 2, center + size / 2 - 1, angle], -1)
    return pairs[:, 0], pairs[:, 1]


def degenerate_pairs(n: int) -> tuple[Tensor, Tensor]:
    """Identical, turned by quarters, sharing edges or corners, contained, tiny angles apart, in whole numbers."""
    chosen = random.Random(0)
    first, second = [], []
    for i in range(n):
        w, h = chosen.randint(1, 60), chosen.randint(1, 60)
        theta = chosen.choice([0, math.pi / 4, -math.pi / 4, math.pi / 2, math.pi, math.pi / 6, chosen.uniform(-3, 3)])
        x, y = (chosen.choice([0, 7, 500, 1300.5]) for _ in range(2))
        a = [x, y, x + w - 1, y + h - 1, theta]
        b = list(a)
        kind = i % 9
        if kind == 1:
            b[4] += math.pi / 2 * chosen.randint(1, 3)
        elif kind == 2:  # moved along its own axes by its size: a shared edge or corner
            step = chosen.choice([(w, 0), (0, h), (w, h), (-w, h), (-w, 0)])
            dx = math.cos(theta) * step[0] + math.sin(theta) * step[1]
            dy = -math.sin(theta) * step[0] + math.cos(theta) * step[1]
            b = [a[0] + dx, a[1] + dy, a[2] + dx, a[3] + dy, theta]
        elif kind == 3:  # half of it, along an edge
            cx, cy = (a[0] + a[2] + 1) / 2, (a[1] + a[3] + 1) / 2
            cx, cy = cx - math.cos(theta) * w / 4, cy + math.sin(theta) * w / 4
            b = [cx - w / 4, cy - h / 2, cx + w / 4 - 1, cy + h / 2 - 1, theta]
        elif kind == 4:  # contained, same center
            b = [a[0] + w / 4, a[1] + h / 4, a[2] - w / 4, a[3] - h / 4, chosen.choice([theta, 0.0])]
        elif kind == 5:  # a hair apart
            b[4] += chosen.choice([1e-14, 1e-9, 1e-7, 1e-6, 1e-5, 1e-4]) * chosen.choice([-1, 1])
        elif kind == 6:  # no area
            b[2] = b[0] - 1
        elif kind == 7:  # shifted by whole pixels
            b = [b[0] + chosen.randint(-9, 0), b[1], b[2] + chosen.randint(0, 9), b[3], theta]
        elif kind == 8:  # far
            b = [b[0] + 1e4, b[1], b[2] + 1e4, b[3], theta]
        first.append(a)
        second.append(b)
    return torch.tensor(first, dtype=torch.float64), torch.tensor(second, dtype=torch.float64)


@pytest.mark.parametrize("pairs", [random_pairs, degenerate_pairs])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rotated_iou_of_ten_thousand_pairs_equals_shapelys(pairs, dtype: torch.dtype) -> None:
    a, b = (box.to(dtype) for box in pairs(10_000))
    expected = shapely_iou(a, b)
    for first, second in ((a, b), (b, a)):
        found = geometry.paired_rotated_iou(first, second)
        assert found.dtype == dtype
        assert np.abs(found.numpy() - expected).max() < 1e-6
    assert (expected > 0.3).mean() > 0.1  # the pairs do overlap


def test_rotated_iou_of_unturned_boxes_equals_the_axis_aligned_one() -> None:
    a, b = random_boxes(30), random_boxes(40)
    flat = torch.zeros(1)
    found = geometry.rotated_iou(torch.cat([a, flat.expand(30, 1)], -1), torch.cat([b, flat.expand(40, 1)], -1))
    assert torch.allclose(found, geometry.iou(a, b), atol=1e-5)


def test_rotated_iou_takes_batches_and_both_forms() -> None:
    a, b = random_boxes(12, rotated=True), random_boxes(10, rotated=True)
    six = torch.cat([b[:, :4], b[:, 4:].sin(), b[:, 4:].cos()], -1)
    matrix = geometry.rotated_iou(a, b)
    assert matrix.shape == (12, 10)
    assert torch.allclose(geometry.rotated_iou(a.view(3, 4, 5), b), matrix.view(3, 4, 10), atol=1e-6)
    six_a = torch.cat([a[:, :4], a[:, 4:].sin(), a[:, 4:].cos()], -1)
    assert torch.allclose(geometry.rotated_iou(six_a, six), matrix, atol=1e-5)


# --- COCO's form


def test_coco_form_scaled_and_back() -> None:
    assert geometry.coco_to_corners(torch.tensor([10.0, 20.0, 30.0, 40.0]), (0.5, 2.0)).tolist() == [5, 40, 19, 119]
    original = torch.cat([torch.rand(3, 7, 4) * 50 + 1, torch.rand(3, 7, 1)], -1)
    scale = torch.tensor([[0.5, 0.6], [1.0, 1.0], [2.0, 3.0]])[:, None]  # per image
    back = geometry.corners_to_coco(geometry.coco_to_corners(original, scale), scale)
    assert torch.allclose(back, original, atol=1e-4)


def test_six_numbers_become_an_angle_in_coco_form() -> None:
    box = torch.tensor([1.0, 2.0, 10.0, 21.0, 2 * math.sin(0.3), 2 * math.cos(0.3)])
    assert geometry.corners_to_coco(box).tolist() == pytest.approx([1, 2, 10, 20, 0.3], abs=1e-6)
