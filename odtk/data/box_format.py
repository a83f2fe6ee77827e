"""Boxes in another format than COCO's x y w h are told by the whole file, as no single box shows it.

A format is only suspected on evidence that a set of x y w h, its sloppy boxes included, does not give: read as x y w h
several boxes leave their image, and read as the other format (almost) none does. Sloppy x y w h boxes do not fit as x1
y1 x2 y2, as most are narrower than they are far from the left; nor as cx cy w h, as those at the left and upper edges
then leave the image. A few boxes decide nothing.
"""

from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np

from ..text import plural

MIN_LEAVING = 3  # boxes that leave their image as x y w h; fewer decide nothing
LEAVING = {"xyxy": 0.3, "cxcywh": 0.01}  # the least share of them in a file of that format
REVERSED = 0.01  # the largest share of boxes whose x2 y2 are not beyond x1 y1, as no file is without mistakes
LEAVING_STILL = 0.1  # how many of those that leave as x y w h may leave in the other format
FAR = 1e12  # pixels
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
    if (boxes[:, 4] == 5).any():  # a rotated box may leave its image, and has no corners x1 y1 x2 y2
        return ""
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


def _inside(low: np.ndarray, high: np.ndarray, frames: np.ndarray) -> np.ndarray:
    """Which boxes, given by their corners [n, 2], lie in their images but for the tolerance: bool [n]."""
    slack = np.maximum(TOLERANCE, RELATIVE_TOLERANCE * frames)
    return np.all((low >= -slack) & (high <= frames + slack), axis=1)


def _command(path: Path, name: str) -> str:
    """The command that converts such boxes into a file of another name."""
    source, target = shlex.quote(str(path)), shlex.quote(str(path.with_name(f"{path.stem}-xywh.json")))
    return f"`odtk convert {source} {target} --to coco --from {name}`"
