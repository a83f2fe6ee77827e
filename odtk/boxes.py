"""THE coordinate convention, and the geometry of boxes: coding against anchors, IoU, COCO's format. Pure torch.

A box is ``[x1, y1, x2, y2]`` in pixels of the network's input (x right, y down) with INCLUSIVE corners: its width is
``x2 − x1 + 1``. As a continuous shape it covers ``[x1, x2 + 1) × [y1, y2 + 1)``, so its center is
``x1 + 0.5·width``. This is the convention of NVIDIA's published ODTK 0.2 checkpoints.

A rotated box is ``[x1, y1, x2, y2, theta]``: an un-rotated box and the angle in radians by which it is rotated about
its center, counterclockwise as seen on the screen. A point ``(dx, dy)`` from the center goes to
``(cosθ·dx + sinθ·dy, −sinθ·dx + cosθ·dy)``. Detections have ``(sinθ, cosθ)`` instead of the angle: 6 numbers.

Deltas, which a head regresses relative to an anchor, are ``(dx, dy, dw, dh)``: the shift of the center in units of the
anchor's size, and the logarithm of the ratio of the sizes. R-CNN, https://arxiv.org/abs/1311.2524, appendix C.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SMALLEST = 1e-9  # px², avoids 0 / 0 in the IoU of boxes without area
LONGEST = 1e4  # cap of a regressed sine or cosine of the doubled angle, so that its square is finite


def center_and_size(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Center [..., 2] and size (w, h) [..., 2], both px, of boxes [..., 4 or more]; an angle is ignored."""
    size = boxes[..., 2:4] - boxes[..., :2] + 1
    return boxes[..., :2] + 0.5 * size, size


def area(boxes: Tensor) -> Tensor:
    """Area [...] in px² of boxes [..., 4 or more]; 0 if a side is not positive."""
    size = center_and_size(boxes)[1].clamp(min=0)
    return size[..., 0] * size[..., 1]


def encode(boxes: Tensor, anchors: Tensor) -> Tensor:
    """Deltas [..., 4] that take the anchors [..., 4] to the boxes [..., 4]."""
    center, size = center_and_size(boxes)
    anchor_center, anchor_size = center_and_size(anchors)
    return torch.cat([(center - anchor_center) / anchor_size, torch.log(size / anchor_size)], -1)


def decode(deltas: Tensor, anchors: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes [..., 4] from deltas [..., 4] and anchors [..., 4]: the inverse of encode, clamped.

    Args:
        size: (width, height) in px of the level, stride·cells; corners are clamped to [0, size − 1].

    A NaN delta gives a corner of 0, an infinite one a clamped corner, so that every box is finite.
    """
    anchor_center, anchor_size = center_and_size(anchors)
    center = deltas[..., :2] * anchor_size + anchor_center
    half = 0.5 * (torch.exp(deltas[..., 2:4]) * anchor_size)
    return clamp(torch.cat([center - half, center + half - 1], -1), size)


def encode_rotated(boxes: Tensor, anchors: Tensor) -> Tensor:
    """(dx, dy, dw, dh, sinθ, cosθ) [..., 6] of rotated boxes [..., 5] against rotated anchors [..., 5].

    Center and size are coded against the un-rotated anchor; θ is the box's own angle, not relative to the anchor's.
    """
    angle = boxes[..., 4:5]
    return torch.cat([encode(boxes[..., :4], anchors[..., :4]), torch.sin(angle), torch.cos(angle)], -1)


def decode_rotated(deltas: Tensor, anchors: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes (x1, y1, x2, y2, sinθ, cosθ) [..., 6] from six numbers [..., 6] and rotated anchors [..., 5].

    The corners of the un-rotated box are clamped as in decode. sin and cos stay as regressed, but NaN becomes 0.
    """
    corners_ = decode(deltas[..., :4], anchors[..., :4], size)
    return torch.cat([corners_, deltas[..., 4:6].nan_to_num(nan=0.0)], -1)


def decode_distances(distances: Tensor, points: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes [..., 4] from distances (left, top, right, bottom) [..., 4] in px to the points (x, y) [..., 2].

    FCOS, https://arxiv.org/abs/1904.01355 eq. 1, in inclusive corners; clamped as in decode.
    """
    return clamp(torch.cat([points - distances[..., :2], points + distances[..., 2:4] - 1], -1), size)


def decode_center_size_angle(numbers: Tensor, points: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes (x1, y1, x2, y2, sinθ, cosθ) [..., 6] from (dx, dy, w, h, sin 2θ, cos 2θ) [..., 6] and points (x, y).

    (dx, dy) px lead from the point [..., 2] to the box's center; w and h, px, are the sides before the rotation. The
    doubled angle is the same for θ and θ + π, which are one box without a front, so nothing jumps where θ starts over.

    A rotated box may reach beyond the image, so the corners are not clamped, but the center to [0, width] × [0, height]
    and the sides to [0, width + height]; a NaN becomes 0. θ lies in [−π/4, 3π/4]; sin and cos are not normalized.
    """
    width, height = size
    x = (points[..., 0] + numbers[..., 0]).nan_to_num(nan=0.0).clamp(0, width)
    y = (points[..., 1] + numbers[..., 1]).nan_to_num(nan=0.0).clamp(0, height)
    center = torch.stack([x, y], -1)
    half = 0.5 * numbers[..., 2:4].nan_to_num(nan=0.0).clamp(0, width + height)
    return torch.cat([center - half, center + half - 1, halve_angle(numbers[..., 4:6])], -1)


def halve_angle(doubled: Tensor) -> Tensor:
    """(sinθ, cosθ) [..., 2] times an unknown length, from (sin 2θ, cos 2θ) [..., 2] of any length; θ in [−π/4, 3π/4].

    tan θ = sin 2θ / (1 + cos 2θ) = (1 − cos 2θ) / sin 2θ, of which each branch takes the one without cancellation.
    """
    sin, cos = doubled.nan_to_num(nan=0.0).clamp(-LONGEST, LONGEST).unbind(-1)
    length = torch.sqrt(sin * sin + cos * cos)
    behind = cos < 0
    return torch.stack([torch.where(behind, length - cos, sin), torch.where(behind, sin, length + cos)], -1)


def clamp(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes [..., 4] with their corners clamped to [0, size − 1], size = (width, height) px; NaN becomes 0."""
    width, height = size
    x, y = boxes[..., 0::2].clamp(0, width - 1), boxes[..., 1::2].clamp(0, height - 1)
    return torch.stack([x[..., 0], y[..., 0], x[..., 1], y[..., 1]], -1).nan_to_num(nan=0.0)


def intersection(a: Tensor, b: Tensor) -> Tensor:
    """Area [..., N, M] in px² of the intersections of boxes a [..., N, 4] and b [..., M, 4]."""
    ax1, ay1, ax2, ay2 = a[..., :, None, :].movedim(-1, 0).contiguous()  # each [..., N, 1]
    bx1, by1, bx2, by2 = b[..., None, :, :].movedim(-1, 0).contiguous()  # each [..., 1, M]
    width = torch.minimum(ax2, bx2).sub_(torch.maximum(ax1, bx1)).add_(1).clamp_(min=0)
    height = torch.minimum(ay2, by2).sub_(torch.maximum(ay1, by1)).add_(1).clamp_(min=0)
    return width.mul_(height)


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union [..., N, M], in [0, 1], of boxes a [..., N, 4] and b [..., M, 4]; 0 without area."""
    shared = intersection(a, b)
    union = (area(a)[..., :, None] + area(b)[..., None, :]).sub_(shared)
    return shared.div_(union.clamp_(min=SMALLEST))


def rotation(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """(sinθ, cosθ), each [...], of rotated boxes [..., 5 or 6]; those of a detection are normalized."""
    angle = boxes[..., 4] if boxes.shape[-1] == 5 else torch.atan2(boxes[..., 4], boxes[..., 5])
    return torch.sin(angle), torch.cos(angle)


def corners(boxes: Tensor) -> Tensor:
    """Corners (x, y) [..., 4, 2] of rotated boxes [..., 5 or 6], as a continuous shape (w = x2 − x1 + 1).

    They start at the top left of the un-rotated box and go clockwise on the screen.
    """
    center, size = center_and_size(boxes)
    half = 0.5 * size.clamp(min=0)
    dx = torch.stack([-half[..., 0], half[..., 0], half[..., 0], -half[..., 0]], -1)  # [..., 4]
    dy = torch.stack([-half[..., 1], -half[..., 1], half[..., 1], half[..., 1]], -1)
    sin, cos = (value[..., None] for value in rotation(boxes))
    return torch.stack([cos * dx + sin * dy, cos * dy - sin * dx], -1) + center[..., None, :]


def circumscribe(boxes: Tensor) -> Tensor:
    """The smallest axis-aligned boxes [..., 4] around rotated boxes [..., 5 or 6]."""
    center, size = center_and_size(boxes)
    sin, cos = (value.abs()[..., None] for value in rotation(boxes))
    half = 0.5 * (cos * size + sin * size.flip(-1)).clamp(min=0)
    return torch.cat([center - half, center + half - 1], -1)


def paired_rotated_iou(a: Tensor, b: Tensor) -> Tensor:
    """Exact IoU [...], in [0, 1], of the polygons of rotated boxes a and b [..., 5 or 6], pair by pair.

    Seen from b, as the rectangle |x| ≤ W, |y| ≤ H, the intersection's area is by Green's theorem the integral of
    clamp(x, −W, W) dy along those parts of a's four edges where |y| ≤ H. It needs no list of intersection points and
    no sorting, and it is continuous, so identical boxes, shared edges and touching corners are no special cases.
    It is computed in float64, relative to b's center.
    """
    kind = torch.promote_types(a.dtype, b.dtype)
    a, b = torch.broadcast_tensors(a.double(), b.double())
    (center_a, size_a), (center_b, size_b) = center_and_size(a), center_and_size(b)
    moved = torch.cat([center_a - center_b - 0.5 * size_a, center_a - center_b + 0.5 * size_a - 1, a[..., 4:]], -1)
    sin, cos = (value[..., None] for value in rotation(b))
    x, y = corners(moved).unbind(-1)  # [..., 4], relative to b's center
    x, y = cos * x - sin * y, sin * x + cos * y  # rotated back by b's angle: b is now axis-aligned
    half = 0.5 * size_b.clamp(min=0)
    inside = _area_in_rectangle(x, y, half[..., :1], half[..., 1:])
    union = area(a) + area(b) - inside
    return (inside / union.clamp(min=SMALLEST)).to(kind)


def _area_in_rectangle(x: Tensor, y: Tensor, w: Tensor, h: Tensor) -> Tensor:
    """Area [...] of the polygons with corners x, y [..., V] inside |x| ≤ w, |y| ≤ h, both [..., 1]."""
    next_x, next_y = x.roll(-1, -1), y.roll(-1, -1)
    start, end = y.clamp(-h, h), next_y.clamp(-h, h)  # the part of each edge where |y| ≤ h
    slope = _ratio(next_x - x, next_y - y)
    x0, x1 = x + slope * (start - y), x + slope * (end - y)
    # clamp(x, −w, w) along that part is linear between the parameters where x passes −w and w: trapezia are exact
    enter, leave = (_ratio(side - x0, x1 - x0).clamp(0, 1) for side in (-w, w))
    first, second = torch.minimum(enter, leave), torch.maximum(enter, leave)
    v0, v1, v2, v3 = ((x0 + t * (x1 - x0)).clamp(-w, w) for t in (torch.zeros_like(first), first, second, 1.0))
    mean = 0.5 * (first * (v0 + v1) + (second - first) * (v1 + v2) + (1 - second) * (v2 + v3))
    return ((end - start) * mean).sum(-1).abs()


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where b is 0."""
    return torch.where(b == 0, 0.0, a / torch.where(b == 0, 1.0, b))


def rotated_iou(a: Tensor, b: Tensor) -> Tensor:
    """Exact IoU [..., N, M] of the polygons of rotated boxes a [..., N, 5 or 6] and b [..., M, 5 or 6].

    Every pair is computed, without a host synchronization; ops.rotated_iou skips the pairs that cannot overlap.
    """
    return paired_rotated_iou(a[..., :, None, :], b[..., None, :, :])


def normalize_angle(boxes: Tensor, *, around: Tensor | float = 0.0, absolute: bool = False) -> Tensor:
    """The same rotated boxes [..., 5] with theta in [−π/4, π/4) + around, or in [−π, π) + around if ``absolute``.

    Without ``absolute`` a box has no front, so quarter turns are undone by swapping its width and height.

    Args:
        around: radians; a tensor is broadcast against [..., 1].
    """
    period = 2 * math.pi if absolute else math.pi / 2
    turns = torch.floor((boxes[..., 4:5] - around + period / 2) / period)
    angle = boxes[..., 4:5] - turns * period
    if absolute:
        return torch.cat([boxes[..., :4], angle], -1)
    center, size = center_and_size(boxes)
    half = 0.5 * torch.where(turns % 2 == 1, size.flip(-1), size)
    return torch.cat([center - half, center + half - 1, angle], -1)


def coco_to_corners(boxes: Tensor, scale: Tensor | tuple[float, float] = (1.0, 1.0)) -> Tensor:
    """COCO's [x, y, w, h] or [x, y, w, h, theta] in px of the image → [x1, y1, x2, y2] or [..., theta] of the input.

    Args:
        scale: (sx, sy), px of the input per px of the image; a tuple, or a tensor that broadcasts against [..., 2].
    """
    factor = torch.as_tensor(scale, dtype=boxes.dtype, device=boxes.device)
    start, end = boxes[..., :2] * factor, (boxes[..., :2] + boxes[..., 2:4]) * factor - 1
    return torch.cat([start, end, boxes[..., 4:]], -1)


def corners_to_coco(boxes: Tensor, scale: Tensor | tuple[float, float] = (1.0, 1.0)) -> Tensor:
    """The inverse of coco_to_corners; boxes [..., 6] (a rotated model's detections) give [x, y, w, h, theta] too."""
    factor = torch.as_tensor(scale, dtype=boxes.dtype, device=boxes.device)
    start, size = boxes[..., :2] / factor, (boxes[..., 2:4] - boxes[..., :2] + 1) / factor
    angle = torch.atan2(boxes[..., 4:5], boxes[..., 5:6]) if boxes.shape[-1] == 6 else boxes[..., 4:]
    return torch.cat([start, size, angle], -1)
