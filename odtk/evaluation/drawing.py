"""Boxes with labels on images: the only place that draws them and knows their colors."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont
from torch import Tensor

from ..boxes import coco_to_corners, corners

LEGIBLE = 400  # pixels: smaller pictures are enlarged until their shorter side has as many
LARGEST = 32000  # pixels of a picture's longer side: two stand side by side in a JPEG, which holds 65500


@dataclass(frozen=True)
class Shape:
    """Something to draw on an image: its outline (x, y pairs, pixels of the image), color, label and line width.

    Attributes:
        weight: 0 for a hair line, 1 for a line that suits the picture, 2 for twice as wide.
    """

    outline: Sequence[tuple[float, float]]
    color: tuple[int, int, int]
    label: str = ""
    weight: int = 1


def shapes(entries: Iterable[dict[str, Any]], names: dict[int, str] | None = None) -> list[Shape]:
    """COCO annotations or results → outlines with "name score", the best on top."""
    found = []
    for entry in sorted(entries, key=lambda e: e.get("score", 1.0)):
        category = entry["category_id"]
        name = entry.get("category") or (names or {}).get(category) or str(category)
        label = f"{name} {entry['score']:.2f}" if "score" in entry else name
        found.append(Shape(outline(entry["bbox"]), color(category), label))
    return found


def outline(box: Sequence[float]) -> list[tuple[float, float]]:
    """COCO box [x, y, w, h] or [x, y, w, h, theta] → its four corners, from the un-rotated top left clockwise."""
    turned = torch.tensor((*box, 0.0)[:5], dtype=torch.float64)
    return [(x, y) for x, y in corners(coco_to_corners(turned)).tolist()]


def color(category: int) -> tuple[int, int, int]:
    """Distinct for neighboring ids: hues by the golden ratio, alternating brightness."""
    red, green, blue = colorsys.hsv_to_rgb(category * 0.618034 % 1, 0.85, 1.0 if category % 2 else 0.85)
    return round(red * 255), round(green * 255), round(blue * 255)


def annotate(image: PILImage.Image, shapes: Sequence[Shape]) -> PILImage.Image:
    """A copy of an RGB image with shapes and their labels, enlarged if it is small, reduced if no JPEG holds it."""
    factor = min(max(1, math.ceil(LEGIBLE / min(image.size))), LARGEST / max(image.size))
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    picture = image.resize(size, PILImage.Resampling.BICUBIC)
    draw = ImageDraw.Draw(picture)
    side = min(picture.size)
    font = ImageFont.load_default(max(12, side // 36))
    line = max(2, side // 240)
    outlines = [[(x * factor, y * factor) for x, y in shape.outline] for shape in shapes]
    for shape, points in zip(shapes, outlines, strict=True):
        draw.line([*points, points[0], points[1]], fill=shape.color, width=line * shape.weight or 1, joint="curve")
    taken: list[tuple[float, float, float, float]] = []
    for shape, points in list(zip(shapes, outlines, strict=True))[::-1]:  # the best finds room first
        if shape.label:
            taken.append(draw_label(draw, shape, points, font, picture.size, taken))
    return picture


def draw_label(
    draw: ImageDraw.ImageDraw,
    shape: Shape,
    points: Sequence[tuple[float, float]],
    font: Any,
    size: tuple[int, int],
    taken: Sequence[tuple[float, float, float, float]],
) -> tuple[float, float, float, float]:
    """Writes a label at the first free place around its outline, inside the picture, and returns the place."""
    left, top, right, bottom = font.getbbox(shape.label)
    w, h = right - left + 6, bottom - top + 6
    xs, ys = [x for x, _ in points], [y for _, y in points]
    places = []
    for x, y in (
        (min(xs), min(ys) - h),
        (min(xs), min(ys)),
        (min(xs), max(ys)),
        (max(xs) - w, min(ys) - h),
        (max(xs) - w, max(ys) - h),
        (max(xs), min(ys)),
    ):
        x, y = min(max(x, 0), max(0, size[0] - w)), min(max(y, 0), max(0, size[1] - h))
        places.append((x, y, x + w, y + h))
    place = next((p for p in places if not any(overlap(p, other) for other in taken)), places[0])
    draw.rectangle(place, fill=shape.color)
    red, green, blue = shape.color
    dark = 0.299 * red + 0.587 * green + 0.114 * blue < 140  # luma of BT.601
    draw.text((place[0] + 3 - left, place[1] + 3 - top), shape.label, fill="white" if dark else "black", font=font)
    return place


def overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def beside(left: PILImage.Image, right: PILImage.Image) -> PILImage.Image:
    """Two pictures of one size side by side, under "truth" and "detections"."""
    font = ImageFont.load_default(max(14, min(left.size) // 30))
    header = round(font.getbbox("Ag")[3]) + 8
    picture = PILImage.new("RGB", (left.width + right.width + 8, left.height + header), "white")
    draw = ImageDraw.Draw(picture)
    for x, part, title in ((0, left, "truth"), (left.width + 8, right, "detections")):
        picture.paste(part, (x, header))
        draw.text((x + 4, 2), title, fill="black", font=font)
    return picture


def points(box: Tensor) -> list[tuple[float, float]]:
    """Corners of a box [4|5] of boxes.py."""
    turned = box if len(box) == 5 else torch.cat([box, box.new_zeros(1)])
    return [(x, y) for x, y in corners(turned).tolist()]
