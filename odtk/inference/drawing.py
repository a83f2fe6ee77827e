"""Boxes with labels on images. All pictures get their boxes and their colors here, and nowhere else."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont
from torch import Tensor

from ..boxes import coco_to_corners, corners

LEGIBLE = 400  # pixels of the shorter side from which the labels of many boxes can be read
MIN_FONT, MAX_FONT = 10, 40  # pixels
MAX_LONG_SIDE = 32000  # pixels: two pictures fit side by side into a JPEG, which holds 65500
RED = (255, 0, 0)  # of something that is wrong
GREEN = (0, 200, 83)  # of what should have been found
PLASMA = np.array([[13, 8, 135], [126, 3, 168], [204, 71, 120], [248, 149, 64], [240, 249, 33]])  # low to high values

Color = tuple[int, int, int]  # red, green, blue, 0 to 255
Outline = Sequence[tuple[float, float]]  # corners (x, y) in pixels, in order
Rectangle = tuple[float, float, float, float]  # left, top, right, bottom in pixels


@dataclass(frozen=True)
class Shape:
    """One closed outline to draw on an image.

    Attributes:
        outline: corners (x, y) in pixels of the image.
        color: red, green, blue, 0 to 255.
        label: text beside the outline; empty for none.
        thickness: of the line: 0 is one pixel, 1 suits the size of the picture, 2 is twice that.
    """

    outline: Outline
    color: Color
    label: str = ""
    thickness: int = 1


def coco_to_shapes(entries: Iterable[dict[str, Any]], names: dict[int, str] | None = None) -> list[Shape]:
    """COCO annotations or results → shapes, labeled with category, score and track; the highest score is drawn last.

    Args:
        entries: each with a ``bbox`` [x, y, w, h] or [x, y, w, h, theta] in pixels and radians, and a ``category_id``.
        names: category names by id, for entries without a ``category``; the id is written where both lack the name.
    """
    found = []
    for entry in sorted(entries, key=lambda e: e.get("score", 1.0)):
        category = entry["category_id"]
        name = entry.get("category") or (names or {}).get(category) or str(category)
        label = f"{name} {entry['score']:.2f}" if "score" in entry else name
        if "track_id" in entry:
            label += f" #{entry['track_id']}"
        found.append(Shape(coco_to_outline(entry["bbox"]), category_color(category), label))
    return found


def coco_to_outline(bbox: Sequence[float]) -> list[tuple[float, float]]:
    """COCO box [x, y, w, h] or [x, y, w, h, theta], in pixels and radians → its four corners.

    Clockwise from the corner that is at the top left before theta turns the box, counterclockwise, about its center.
    """
    rotated = torch.tensor((*bbox, 0.0)[:5], dtype=torch.float64)
    return box_to_outline(coco_to_corners(rotated))


def box_to_outline(box: Tensor) -> list[tuple[float, float]]:
    """Box [4] or [5], with the inclusive corners of boxes.py, in pixels → its four corners, as of coco_to_outline."""
    rotated = box if len(box) == 5 else torch.cat([box, box.new_zeros(1)])
    return [(x, y) for x, y in corners(rotated).tolist()]


def category_color(category: int) -> Color:
    """A color per category id, far from that of its neighbors: hues a golden ratio apart, alternating brightness."""
    red, green, blue = colorsys.hsv_to_rgb(category * 0.618034 % 1, 0.85, 1.0 if category % 2 else 0.85)
    return round(red * 255), round(green * 255), round(blue * 255)


def annotate(
    image: PILImage.Image, shapes: Sequence[Shape], *, min_side: int = 0, max_side: int = MAX_LONG_SIDE
) -> PILImage.Image:
    """A copy of an RGB image with shapes and their labels drawn on it; the last shape is on top.

    A label lies where it covers least of the other shapes. Where every place would cover another label, it is left out.

    Args:
        shapes: their outlines are in pixels of ``image``.
        min_side: the copy is enlarged by a whole number until its shorter side has so many pixels; 0: it keeps the
            size of the image.
        max_side: its longer side has at most so many pixels.
    """
    factor = min(max(1, math.ceil(min_side / min(image.size))), max_side / max(image.size))
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    picture = image.copy() if size == image.size else image.resize(size, PILImage.Resampling.BICUBIC)
    draw = ImageDraw.Draw(picture)
    side = min(picture.size)
    font = ImageFont.load_default(min(max(MIN_FONT, side // 36), MAX_FONT))
    line = max(2, side // 240)
    scaled = [(shape, [(x * factor, y * factor) for x, y in shape.outline]) for shape in shapes]
    for shape, points in scaled:
        draw.line([*points, points[0], points[1]], fill=shape.color, width=line * shape.thickness or 1, joint="curve")
    extents = np.array([extent(points) for _, points in scaled]).reshape(-1, 4)  # [n, 4]
    taken: list[Rectangle] = []
    for index in range(len(scaled) - 1, -1, -1):  # the shape on top chooses first where its label goes
        shape, points = scaled[index]
        if shape.label:
            left, top, right, bottom = font.getbbox(shape.label)
            others = np.delete(extents, index, axis=0)
            place = place_label((right - left + 6, bottom - top + 6), points, picture.size, taken, others)
            if place is not None:
                draw_label(draw, shape, place, font)
                taken.append(place)
    return picture


def draw_label(draw: ImageDraw.ImageDraw, shape: Shape, place: Rectangle, font: Any) -> None:
    """Writes a shape's label into a rectangle of the shape's color."""
    left, top, _, _ = font.getbbox(shape.label)
    draw.rectangle(place, fill=shape.color)
    red, green, blue = shape.color
    dark = 0.299 * red + 0.587 * green + 0.114 * blue < 140  # luma of BT.601
    draw.text((place[0] + 3 - left, place[1] + 3 - top), shape.label, fill="white" if dark else "black", font=font)


def extent(points: Outline) -> Rectangle:
    """The smallest rectangle around an outline."""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    return min(xs), min(ys), max(xs), max(ys)


def place_label(
    label: tuple[float, float],
    points: Outline,
    size: tuple[int, int],
    taken: Sequence[Rectangle],
    others: np.ndarray,
) -> Rectangle | None:
    """Where a label goes: at a corner of its outline, inside the picture, where it covers least of its neighbors.

    Args:
        label: its width and height in pixels.
        points: the outline that it belongs to.
        size: (width, height) of the picture in pixels.
        taken: places of other labels, none of which may be covered.
        others: extents [n, 4] of the other shapes.

    Returns:
        The place, or None if each one would cover a label.
    """
    w, h = label
    left, top, right, bottom = extent(points)
    places: list[tuple[float, Rectangle]] = []
    for x, y in (
        (left, top - h),
        (left, top),
        (left, bottom),
        (right - w, top - h),
        (right - w, bottom - h),
        (right - w, bottom),
        (right, top),
        (left - w, top),
    ):
        x, y = min(max(x, 0), max(0, size[0] - w)), min(max(y, 0), max(0, size[1] - h))
        place = (x, y, x + w, y + h)
        if not any(intersect(place, other) for other in taken):
            places.append((covered(place, others), place))
    return min(places, key=lambda entry: entry[0])[1] if places else None  # of equals, the first


def covered(place: Rectangle, others: np.ndarray) -> float:
    """Pixels of a rectangle that lie on others [n, 4]; those on several count several times."""
    low, high = np.maximum(others[:, :2], place[:2]), np.minimum(others[:, 2:], place[2:])
    return float(np.prod(np.clip(high - low, 0, None), axis=1).sum())


def intersect(a: Rectangle, b: Rectangle) -> bool:
    """Whether two rectangles share more than an edge."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def side_by_side(ground_truth: PILImage.Image, detections: PILImage.Image) -> PILImage.Image:
    """Two pictures of the same size next to each other, each under its title."""
    font = ImageFont.load_default(max(14, min(ground_truth.size) // 30))
    header = round(font.getbbox("Ag")[3]) + 8
    width, height = ground_truth.size
    picture = PILImage.new("RGB", (width + detections.width + 8, height + header), "white")
    draw = ImageDraw.Draw(picture)
    for x, part, title in ((0, ground_truth, "ground truth"), (width + 8, detections, "detections")):
        picture.paste(part, (x, header))
        draw.text((x + 4, 2), title, fill="black", font=font)
    return picture
