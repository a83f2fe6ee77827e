"""One image with its boxes, and one fault of a dataset: what every reader of annotations makes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .images import SWAPS_SIDES, Header


@dataclass(frozen=True)
class Fault:
    """Something wrong with a dataset.

    Attributes:
        file: where it stands (annotation or image file).
        id: ``image 5``, ``annotation 7``, ``category 3`` or empty.
        reason: what is wrong and, where it is fixed, what was done.
        fixed: whether the run may go on.
        rule: the reason without particulars; warnings are counted by it.
    """

    file: str
    id: str
    reason: str
    fixed: bool
    rule: str

    def __str__(self) -> str:
        return ": ".join(part for part in (self.file, self.id, self.reason) if part)


@dataclass
class Image:
    """One image and its boxes (crowd excluded).

    Attributes:
        id: of the annotations; position in the sorted folder from 1 where there are none.
        path: of the file.
        width, height: pixels, after the turn by ``orientation``.
        boxes: float64 [n, 4] (x, y, w, h) or [n, 5] (x, y, w, h, theta), pixels and radians.
        labels: int64 [n], index into ``Dataset.categories``.
        orientation: the EXIF turn to apply when decoding; 1 for none.
        plain: an upright 8-bit RGB or grayscale JPEG or PNG.
    """

    id: int
    path: Path
    width: int
    height: int
    boxes: np.ndarray
    labels: np.ndarray
    orientation: int = 1
    plain: bool = True


def image_of(id: int, path: Path, header: Header, orientation: int, rotated: bool) -> Image:
    width, height = header.width, header.height
    if orientation in SWAPS_SIDES:
        width, height = height, width
    boxes, labels = np.zeros((0, 5 if rotated else 4)), np.zeros(0, dtype=np.int64)
    return Image(id, path, width, height, boxes, labels, orientation, header.plain and orientation == 1)
