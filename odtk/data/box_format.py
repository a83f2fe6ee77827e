"""Boxes in another format than COCO's x y w h are told by the whole file, as no single box shows it.

A format is only suspected on evidence that a set of x y w h, its sloppy boxes included, does not give: read as x y w h
several boxes leave their image, and read as the other format (almost) none does. Sloppy x y w h boxes do not fit as x1
y1 x2 y2, as most are narrower than they are far from the left; nor as cx cy w h, as those at the left and upper edges
then leave the image. A few boxes decide nothing.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..text import plural

MIN_LEAVING = 3  # boxes that leave their image as x y w h; fewer decide nothing
LEAVING = {"xyxy": 0.3, "cxcywh": 0.01}  # the least share of them in a file of that format
REVERSED = 0.01  # the largest share of boxes whose x2 y2 are not beyond x1 y1, as no file is without mistakes
LEAVING_STILL = 0.1  # how many of those that leave as x y w h may leave in the other format
FAR = 1e12  # pixels
CENTERS_OUTSIDE = 0.1  # the least share of centers outside their image in a file of rotated x1 y1 x2 y2
PIXELS = 2.0  # no box in fractions of its image has a number above this, unless by mistake
IN_PIXELS = 0.5  # the least share of boxes with such a number in a file of pixels
TOLERANCE, RELATIVE_TOLERANCE = 2.0, 0.02  # pixels, and share of the image's side, by which a box may leave it
NAMES = {"xyxy": "x1 y1 x2 y2", "cxcywh": "cx cy w h (center and size)"}


def find_format(boxes: np.ndarray, frames: np.ndarray, path: Path) -> str:
    """What boxes that should be x y w h are instead and the command that converts them; an empty string if they are.

    Args:
        boxes: float [n, 5], n ≥ 1: the first four numbers of each bbox, all finite, the last two positive, and how many
            numbers it has (5: with an angle).
        frames: float [n, 2] width and height in pixels of each box's image.
        path: of the annotations, for the command.
    """
    values = boxes[:, :4].clip(-FAR, FAR)  # numbers beyond would overflow, and say no more
    total = plural(len(values), "box", "boxes")
    if (np.abs(values) <= 1.0).all() and frames.min() > 1:
        command = _command(path, "normalized")
        return f"no number of its {total} is above 1, so they are not in pixels: {command} converts them"
    if (boxes[:, 4] == 5).any():
        return _turned_fault(values, frames, path)
    leaving = int((~_inside(values[:, :2], values[:, :2] + values[:, 2:], frames)).sum())
    corners = {
        "xyxy": (values[:, :2], values[:, 2:]),
        "cxcywh": (values[:, :2] - values[:, 2:] / 2, values[:, :2] + values[:, 2:] / 2),
    }
    found = [
        name
        for name, (low, high) in corners.items()
        if leaving >= max(MIN_LEAVING, LEAVING[name] * len(values))
        and (high <= low).any(axis=1).sum() <= REVERSED * len(values)
        and (~_inside(low, high, frames)).sum() <= LEAVING_STILL * leaving
    ]
    if not found:
        return ""
    return (
        f"its boxes look like {' or '.join(NAMES[name] for name in found)}, not x y w h (read as such, {leaving} of "
        f"{total} leave their image): {' or '.join(_command(path, name) for name in found)} converts them"
    )


def fraction_fault(lines: Sequence[Sequence[float]]) -> str:
    """What labels are that should be YOLO's, in fractions of the image, and are not; an empty string if they are.

    Args:
        lines: the numbers of each object: cx cy w h, or the x y x y … of an outline or of four corners.
    """
    beyond = sum(any(PIXELS < abs(value) < math.inf for value in values) for values in lines)
    if beyond and beyond >= IN_PIXELS * len(lines):
        of = f"{beyond} of {plural(len(lines), 'object')}"
        return f"{of} with numbers above 1: these are pixels, YOLO wants fractions"
    boxes = np.array([values for values in lines if len(values) == 4], dtype=np.float64).reshape(-1, 4)
    boxes = boxes[np.isfinite(boxes).all(axis=1)]
    low, high = boxes[:, :2], boxes[:, 2:]

    def outside(low: np.ndarray, high: np.ndarray) -> int:
        beyond = (low < -RELATIVE_TOLERANCE) | (high > 1 + RELATIVE_TOLERANCE)
        return int(beyond.any(axis=1).sum())

    leaving = outside(low - high / 2, low + high / 2)
    if (
        leaving < max(MIN_LEAVING, LEAVING["xyxy"] * len(boxes))
        or (high <= low).any(axis=1).sum() > REVERSED * len(boxes)
        or outside(low, high) > LEAVING_STILL * leaving
    ):
        return ""
    return (
        f"read as cx cy w h, {leaving} of its {plural(len(boxes), 'box', 'boxes')} leave their image: these are x1 y1 "
        "x2 y2; YOLO wants cx cy w h as fractions of the image"
    )


def _turned_fault(values: np.ndarray, frames: np.ndarray, path: Path) -> str:
    """As find_format, of files with rotated boxes, whose first four numbers are given: x1 y1 x2 y2 only.

    A rotated box may leave its image, but its center hardly does. Centers read as upper left corners mostly stay in the
    image, so cx cy w h cannot be told safely.
    """
    low, high = values[:, :2], values[:, 2:]
    centers = low + high / 2
    leaving = int((~_inside(centers, centers, frames)).sum())
    if (
        leaving < max(MIN_LEAVING, CENTERS_OUTSIDE * len(values))
        or (high <= low).any(axis=1).sum() > REVERSED * len(values)
        or (~_inside(low, high, frames)).sum() > LEAVING_STILL * leaving
    ):
        return ""
    return (
        f"its boxes look like x1 y1 x2 y2 theta, not x y w h theta (read as such, the centers of {leaving} of "
        f"{plural(len(values), 'box', 'boxes')} are outside their image): {_command(path, 'xyxy')} converts them"
    )


def _inside(low: np.ndarray, high: np.ndarray, frames: np.ndarray) -> np.ndarray:
    """Which boxes, given by their corners [n, 2], lie in their images but for the tolerance: bool [n]."""
    slack = np.maximum(TOLERANCE, RELATIVE_TOLERANCE * frames)
    return np.all((low >= -slack) & (high <= frames + slack), axis=1)


def _command(path: Path, name: str) -> str:
    """The command that converts such boxes into a file of another name."""
    source, target = shlex.quote(str(path)), shlex.quote(str(path.with_name(f"{path.stem}-xywh.json")))
    return f"`odtk convert {source} {target} --to coco --from {name}`"
