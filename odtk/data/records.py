"""What every reader of a dataset produces: images with their boxes, and faults."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .images import SWAPS_SIDES, Header, ImageError, decode
from .tars import Member, read_members

DAMAGED = "damaged image"  # the rule of a Fault that leaves an image out where that is asked for
OTHER_FORMAT = "boxes in another format"  # the rule of the Fault after which no box is read


@dataclass(frozen=True)
class Fault:
    """Something wrong with a dataset.

    Attributes:
        file: the annotation or image file that has it.
        id: ``image 5``, ``annotation 7``, ``category 3`` or empty.
        reason: what is wrong and, if it is fixed, what was done.
        fixed: whether a run can go on.
        rule: the reason without particulars, by which warnings are counted.
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
        id: from the annotations; without annotations, the position in the sorted folder, from 1.
        path: of the file.
        width, height: pixels, after the turn by ``orientation``.
        boxes: as COCO writes them, in pixels, x and y of the upper left corner: float64 [n, 4] (x, y, w, h), or
            [n, 5] (x, y, w, h, theta), the box before its turn and its turn about its center, counterclockwise
            in radians.
        labels: int64 [n], index into ``Dataset.categories``.
        orientation: EXIF orientation (1…8) to apply when decoding; 1 for none.
        plain: an upright 8-bit RGB or grayscale JPEG or PNG, which every decoder reads alike.
        pixels: those of an image that is no file, uint8 [H, W, 3] RGB; ``path`` then is its name, for messages.
        member: where it is, if it is in a tar file; ``path`` then is its name.
        content: of its file, where that has been read already.
    """

    id: int
    path: Path
    width: int
    height: int
    boxes: np.ndarray
    labels: np.ndarray
    orientation: int = 1
    plain: bool = True
    pixels: np.ndarray | None = None
    member: Member | None = None
    content: bytes | None = None

    def decode(self) -> np.ndarray:
        """The pixels, uint8 [H, W, 3] RGB.

        Raises:
            ImageError: the file cannot be decoded completely.
            OdtkError: it is on another machine, and the connection is lost.
        """
        if self.pixels is not None:
            return self.pixels
        in_memory = self.content is not None or self.member is not None
        return decode(io.BytesIO(self.read()) if in_memory else self.path, self.orientation)

    def read(self) -> bytes:
        """The content of the image's file.

        Raises:
            ImageError: the file cannot be read.
            OdtkError: it is on another machine, and the connection is lost.
        """
        if self.content is not None:
            return self.content
        if self.member is not None:
            return read_members([self.member])[0]
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise ImageError(str(error)) from error

    def state(self) -> tuple[object, ...]:
        """What changes with the content of its file; empty if there is no such file."""
        if self.member is not None:
            file = self.member.file
            return file.size, file.version, self.member.offset, self.member.size
        try:
            status = os.stat(self.path)
        except OSError:
            return ()
        return status.st_size, status.st_mtime_ns

    @classmethod
    def from_header(cls, id: int, path: Path, header: Header, orientation: int, *, rotated: bool) -> Image:
        """An image without boxes, of the size that the file's header and the given EXIF orientation make."""
        width, height = header.width, header.height
        if orientation in SWAPS_SIDES:
            width, height = height, width
        boxes, labels = np.zeros((0, 5 if rotated else 4)), np.zeros(0, dtype=np.int64)
        return cls(id, path, width, height, boxes, labels, orientation, header.plain and orientation == 1)
