"""Draws docs/rotated.png: the convention of rotated boxes on the left, an image of `odtk synth --rotated` on the right.

    python docs/rotated.py
    python docs/rotated.py pictures/0000[1-6]_*.jpg     # docs/rotated-found.jpg instead: these pictures, joined

The outlines come from odtk's own geometry (boxes.corners), so the picture shows what odtk really does.
"""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from odtk.config import LoaderConfig
from odtk.data.synthetic import synthesize
from odtk.evaluation.visualize import draw_ground_truth
from odtk.inference.drawing import coco_to_outline

SIDE = 480
BOX = (120.0, 190.0, 240.0, 120.0)  # x, y, w, h
THETA = math.pi / 6
SEED = 0  # gives an image with several kinds of shapes
GRAY, BLUE, RED = (150, 150, 150), (30, 90, 200), (200, 40, 40)


def draw_polygon(draw: ImageDraw.ImageDraw, points: list[tuple[float, float]], color: tuple[int, int, int]) -> None:
    draw.line([*points, points[0], points[1]], fill=color, width=3, joint="curve")


def draw_arrow(
    draw: ImageDraw.ImageDraw, start: tuple[float, float], end: tuple[float, float], color: tuple[int, int, int]
) -> None:
    draw.line([start, end], fill=color, width=2)
    angle = math.atan2(end[1] - start[1], end[0] - start[0])
    wings = [(end[0] - 12 * math.cos(angle + s), end[1] - 12 * math.sin(angle + s)) for s in (-0.4, 0.4)]
    draw.polygon([end, *wings], fill=color)


def draw_convention(font: Any, small: Any) -> Image.Image:
    picture = Image.new("RGB", (SIDE, SIDE), "white")
    draw = ImageDraw.Draw(picture)
    x, y, w, h = BOX
    center = (x + w / 2, y + h / 2)
    draw_arrow(draw, (20, 20), (110, 20), (0, 0, 0))
    draw_arrow(draw, (20, 20), (20, 110), (0, 0, 0))
    draw.text((115, 10), "x", fill="black", font=font)
    draw.text((14, 114), "y", fill="black", font=font)

    draw_polygon(draw, coco_to_outline((*BOX, 0.0)), GRAY)
    rotated = coco_to_outline((*BOX, THETA))
    draw_polygon(draw, rotated, BLUE)
    draw.line([center, (center[0] + w / 2 + 60, center[1])], fill=GRAY, width=1)
    far = (w / 2 + 60) * math.cos(THETA), -(w / 2 + 60) * math.sin(THETA)
    draw.line([center, (center[0] + far[0], center[1] + far[1])], fill=BLUE, width=1)
    radius = w / 2 + 45
    angles = [THETA * t / 20 for t in range(20)]
    arc = [(center[0] + radius * math.cos(a), center[1] - radius * math.sin(a)) for a in angles]
    draw.line(arc, fill=RED, width=2)
    draw_arrow(draw, arc[-2], arc[-1], RED)
    draw.text((center[0] + radius + 12, center[1] - 48), "theta", fill=RED, font=font)

    for name, corner in zip("0123", rotated, strict=True):
        draw.ellipse([corner[0] - 5, corner[1] - 5, corner[0] + 5, corner[1] + 5], fill=BLUE)
        draw.text((corner[0] + 8, corner[1] - 26), name, fill=BLUE, font=small)
    draw.ellipse([x - 5, y - 5, x + 5, y + 5], fill=GRAY)
    draw.text((x - 50, y - 26), "(x, y)", fill=GRAY, font=small)
    draw.text((x + w / 2 - 6, y + h + 4), "w", fill=GRAY, font=font)
    draw.text((x + w + 8, y + h * 0.7), "h", fill=GRAY, font=font)
    draw.text((20, SIDE - 56), "gray: [x, y, w, h], the box before rotation", fill=GRAY, font=small)
    draw.text((20, SIDE - 32), f"blue: [x, y, w, h, theta = {THETA:.3f}], corners 0 to 3", fill=BLUE, font=small)
    return picture


def draw_example() -> Image.Image:
    """A synthetic image with its ground truth."""
    with tempfile.TemporaryDirectory() as folder:
        synthesize(folder, images=2, size=(240, 240), seed=SEED, rotated=True)
        data = LoaderConfig(images=f"{folder}/train", annotations=f"{folder}/train.json")
        with Image.open(draw_ground_truth(data, f"{folder}/pictures")[0]) as picture:
            return picture.convert("RGB").resize((SIDE, SIDE))


def join(pictures: Sequence[Image.Image], columns: int, gap: int = 8) -> Image.Image:
    """Pictures of one size in rows, black between them."""
    width, height = pictures[0].width + gap, pictures[0].height + gap
    rows = math.ceil(len(pictures) / columns)
    joined = Image.new("RGB", (columns * width - gap, rows * height - gap), "black")
    for place, picture in enumerate(pictures):
        joined.paste(picture, (place % columns * width, place // columns * height))
    return joined


if __name__ == "__main__":
    here, paths = Path(__file__), sys.argv[1:]
    if paths:
        join([Image.open(path) for path in paths], columns=3).save(here.with_name("rotated-found.jpg"), quality=80)
    else:
        convention = draw_convention(ImageFont.load_default(20), ImageFont.load_default(16))
        join([convention, draw_example()], columns=2).save(here.with_name("rotated.png"), optimize=True)
