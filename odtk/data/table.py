"""The annotations of a COCO file as columns: what makes a million boxes quick to read and to check.

A typed decoder (msgspec) makes small structs instead of dictionaries, and NumPy finds the rows that no rule of coco.py
changes or refuses: plain_rows. Every other row is looked at by itself, as a dictionary, so there is one set of rules.
What the decoder does not take (wrong types, NaN, ids that are texts) is read by the json module, which is slower, takes
all that Python can read, and names what is wrong.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any, overload

import msgspec
import numpy as np

from .records import Image

MAX_ANGLE = 2 * np.pi  # radians
MAX_WHOLE = 2**53  # up to which a float holds every whole number


class _Annotation(msgspec.Struct, gc=False):
    image_id: int
    category_id: int
    bbox: tuple[int | float, ...]
    id: int
    iscrowd: int | bool | None = 0
    area: Any = None


class _Image(msgspec.Struct, gc=False):
    id: int
    file_name: str
    width: Any = None
    height: Any = None


class _File(msgspec.Struct):
    images: list[_Image]
    annotations: list[_Annotation] = []
    categories: list[dict[str, Any]] = []


class AnnotationTable(Sequence[dict[str, Any]]):
    """Annotations as columns, one row for each, in their order; an item is a dictionary, made when it is asked for.

    Attributes:
        id, image_id, category_id: int64 [n].
        bbox: float64 [n, 5], as in the file; beyond ``numbers`` of them, zeros.
        whole: bool [n, 5], whether a number is a whole one in the file, so that a message shows 5 and not 5.0.
        numbers: int64 [n], 4 or 5.
        crowd: bool [n].
        area: float64 [n], as stated, NaN where that is not a number.
        repeated: bool [n], whether an earlier row has the same id.
    """

    def __init__(self, rows: Sequence[_Annotation]) -> None:
        """Raises TypeError, ValueError or OverflowError where an id or a number does not fit its column."""
        n = len(rows)
        self.id = np.fromiter([row.id for row in rows], np.int64, n)
        self.image_id = np.fromiter([row.image_id for row in rows], np.int64, n)
        self.category_id = np.fromiter([row.category_id for row in rows], np.int64, n)
        self.crowd = np.fromiter([bool(row.iscrowd) for row in rows], bool, n)
        areas = [row.area if type(row.area) in (int, float) else np.nan for row in rows]
        self.area = np.fromiter(areas, np.float64, n)
        self.numbers = np.fromiter([len(row.bbox) for row in rows], np.int64, n)
        if not np.isin(self.numbers, (4, 5)).all():
            raise ValueError("a bbox has neither four nor five numbers")
        given = np.arange(5) < self.numbers[:, None]
        flat = list(chain.from_iterable([row.bbox for row in rows]))
        self.bbox, self.whole = np.zeros((n, 5)), np.zeros((n, 5), dtype=bool)
        self.bbox[given] = np.fromiter(flat, np.float64, len(flat))
        self.whole[given] = np.fromiter([type(value) is int for value in flat], bool, len(flat))
        if (self.whole & (np.abs(self.bbox) > MAX_WHOLE)).any():
            raise ValueError("a whole number is not that of its float")
        self.repeated = np.ones(n, dtype=bool)
        self.repeated[np.unique(self.id, return_index=True)[1]] = False  # the first row of each id

    @cached_property
    def has_area(self) -> np.ndarray:
        """bool [n], whether a box is finite, of positive width and height."""
        return np.asarray(np.isfinite(self.bbox).all(axis=1) & (self.bbox[:, 2:4] > 0).all(axis=1))

    def __len__(self) -> int:
        return len(self.id)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        numbers = zip(self.bbox[index].tolist(), self.whole[index].tolist(), strict=True)
        return {
            "id": int(self.id[index]),
            "image_id": int(self.image_id[index]),
            "category_id": int(self.category_id[index]),
            "bbox": [int(value) if whole else value for value, whole in numbers][: self.numbers[index]],
            "iscrowd": int(self.crowd[index]),
            "area": float(self.area[index]) if np.isfinite(self.area[index]) else None,
        }

    def of_images(self, ids: Collection[int]) -> list[dict[str, Any]]:
        """The rows of images with these ids."""
        return [self[i] for i in np.flatnonzero(np.isin(self.image_id, list(ids))).tolist()]


def decode(text: str) -> dict[str, Any] | None:
    """The content of a COCO file with what is needed to find its boxes, its annotations as an AnnotationTable.

    None where it has something that the decoder or a column does not take; coco.load_json then reads it.
    """
    try:
        file = msgspec.json.decode(text, type=_File)
        table = AnnotationTable(file.annotations)
    except (msgspec.MsgspecError, RecursionError, UnicodeEncodeError, TypeError, ValueError, OverflowError):
        return None
    images = [
        {"id": image.id, "file_name": image.file_name, "width": image.width, "height": image.height}
        for image in file.images
    ]
    return {"images": images, "annotations": table, "categories": file.categories}


@dataclass
class Rows:
    """The annotations that are used, of the n of a file.

    Attributes:
        kept: bool [n], whether a row is used.
        image: int64 [n], position of its image.
        label: int64 [n].
        boxes: float64 [n, 4 or 5], as Image.boxes.
    """

    kept: np.ndarray
    image: np.ndarray
    label: np.ndarray
    boxes: np.ndarray

    @classmethod
    def none_of(cls, n: int, width: int) -> Rows:
        """No row is used yet; a box has ``width`` numbers."""
        return cls(np.zeros(n, bool), np.zeros(n, np.int64), np.zeros(n, np.int64), np.zeros((n, width)))

    def give_to(self, images: Sequence[Image | None]) -> None:
        """Gives the images their boxes and labels, in the order of the rows; they are views of two arrays."""
        rows = np.flatnonzero(self.kept)
        rows = rows[np.argsort(self.image[rows], kind="stable")]
        boxes, labels = self.boxes[rows], self.label[rows]
        ends = np.cumsum(np.bincount(self.image[rows], minlength=len(images))).tolist()
        for image, first, last in zip(images, [0, *ends][:-1], ends, strict=True):
            if image is not None and last > first:
                image.boxes, image.labels = boxes[first:last], labels[first:last]


def plain_rows(
    table: AnnotationTable,
    images: Mapping[int, Image | None],
    labels: Mapping[int, int],
    tolerance: float,
    *,
    rotated: bool,
) -> Rows:
    """The rows to which no rule applies, with their boxes: in a known image that was read, of a known category, no
    crowd, no repeated id, with an area inside their image.

    Args:
        images: by id, None for one that was refused.
        labels: class index by category id.
        tolerance: pixels by which an axis-aligned box may leave its image and is clipped without a word.
        rotated: boxes are (x, y, w, h, theta), with their center inside the image.
    """
    found = Rows.none_of(len(table), 5 if rotated else 4)
    sizes = np.array([(0, 0) if i is None else (i.width, i.height) for i in images.values()], dtype=np.float64)
    known, found.image = positions(table.image_id, list(images))
    of_class, place = positions(table.category_id, list(labels))
    if not (known.any() and of_class.any()):
        return found
    found.label = np.array(list(labels.values()), dtype=np.int64)[place]
    limits = sizes[found.image]  # [n, 2] width and height; zeros of a refused image hold no box
    kept = known & of_class & table.has_area & ~table.crowd & ~table.repeated
    with np.errstate(over="ignore", invalid="ignore"):  # of boxes that are not plain
        if rotated:
            center = table.bbox[:, :2] + table.bbox[:, 2:4] / 2
            kept &= (table.numbers == 5) & (np.abs(table.bbox[:, 4]) <= MAX_ANGLE)
            kept &= (limits > 0).all(axis=1) & (center >= 0).all(axis=1) & (center <= limits).all(axis=1)
            found.boxes = table.bbox
        else:
            low, high = table.bbox[:, :2], table.bbox[:, :2] + table.bbox[:, 2:4]
            first, last = clip(low, limits), clip(high, limits)
            kept &= (table.numbers == 4) & (last > first).all(axis=1)
            kept &= (np.maximum(first - low, high - last) <= tolerance).all(axis=1)
            found.boxes = np.concatenate([first, last - first], axis=1)
    found.kept = kept
    return found


def clip(values: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """Coordinates [n, 2] between 0 and limits [n, 2], as min(max(value, 0), limit)."""
    values = np.where(values < 0, 0, values)
    return np.where(values > limits, limits, values)


def positions(ids: np.ndarray, known: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Which ids [n] are among the known ones, bool [n], and at which position, int64 [n] (0 where not)."""
    if not known:
        return np.zeros(len(ids), dtype=bool), np.zeros(len(ids), dtype=np.int64)
    listed = np.array(known, dtype=np.int64)
    order = np.argsort(listed)
    place = order[np.searchsorted(listed, ids, sorter=order).clip(max=len(listed) - 1)]
    is_known = listed[place] == ids
    return is_known, np.where(is_known, place, 0)
