"""COCO annotations → an index of images and boxes, checked by one set of rules. No pixels.

Boxes are kept as COCO writes them: [x, y, w, h] in pixels of the image, x and y of the upper left corner;
rotated ones [x, y, w, h, theta], the un-turned box and its anticlockwise turn about its center in radians.

Each fault is either fixed, with one counted warning, or refused before the run starts:

  fixed    degenerate box (w or h not above 0, or not finite): dropped
           box beyond the image: clipped (rotated: kept); wholly outside (rotated: its center): dropped
           crowd: not used in training; duplicate annotation id: both are kept
           rotated run, box of four numbers: theta is 0
           image without width or height: taken from the file; odd pixels: see ``images.py``
           categories missing from the file: made from the annotations' category ids
  refused  broken or unreadable JSON; missing, truncated or unreadable image; wrong width or height
           duplicate image or category id; id that is no integer of 64 bits
           annotation of an unknown image or category
           bbox of the wrong form; five numbers in an axis-aligned run; theta beyond ±2π (degrees?)
           in training: a category without annotations; no boxes at all

EXIF: boxes belong to the raster whose width and height the annotations state. An image is turned by its EXIF
orientation only where the annotated size is the turned one and not the stored one; otherwise it is used as stored.
Without annotations there is no stated size, and images are turned as every viewer turns them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from ..categories import Category
from ..config import OdtkError
from .coco import CocoReader
from .images import EXTENSIONS, ImageError, read_headers
from .records import Fault, Image, image_of


@dataclass
class Dataset:
    """Images in the order of their file, categories sorted by id (a label is an index into them), faults found."""

    images: list[Image]
    categories: tuple[Category, ...]
    faults: list[Fault] = field(default_factory=list)
    rotated: bool = False

    @classmethod
    def load(
        cls, annotations: str | Path | None, images: str | Path, *, rotated: bool = False, training: bool = False
    ) -> Dataset:
        """Read and check annotations (None: every image file of the folder, without boxes).

        Raises:
            OdtkError: for an unreadable file, or naming the first refused fault and their number.
        """
        dataset = read(annotations, images, rotated=rotated, training=training)
        refused = [fault for fault in dataset.faults if not fault.fixed]
        if refused:
            more = f" ({len(refused) - 1} more faults like this: `odtk check` lists them)" if len(refused) > 1 else ""
            raise OdtkError(f"The dataset was refused: {refused[0]}{more}.")
        return dataset

    def warnings(self) -> list[str]:
        """One sentence for each rule that fixed something, with its count and the first case."""
        fixed = [fault for fault in self.faults if fault.fixed]
        counts = Counter(fault.rule for fault in fixed)
        first = {fault.rule: fault for fault in reversed(fixed)}
        return [f"{rule} ({count} ×, first {first[rule].file} {first[rule].id})" for rule, count in counts.items()]


def read(
    annotations: str | Path | None, images: str | Path, *, rotated: bool = False, training: bool = False
) -> Dataset:
    """The dataset with every fault listed in ``faults``; what is refused is left out of ``images``.

    Raises:
        OdtkError: the annotation file or the folder cannot be read at all.
    """
    folder = Path(images).expanduser()
    if not folder.is_dir():
        raise OdtkError(f"The image folder {folder} does not exist: give the right one with --images.")
    if annotations is None:
        return _read_folder(folder, rotated)
    found, categories, faults = CocoReader(Path(annotations).expanduser(), folder, rotated, training).read()
    return Dataset(found, categories, faults, rotated)


def _read_folder(folder: Path, rotated: bool) -> Dataset:
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS)
    if not paths:
        raise OdtkError(f"The folder {folder} has no images ({', '.join(sorted(EXTENSIONS))}).")
    dataset = Dataset([], (), rotated=rotated)
    for number, (path, header) in enumerate(zip(paths, read_headers(paths), strict=True), start=1):
        if isinstance(header, ImageError):
            dataset.faults.append(Fault(str(path), f"image {number}", str(header), False, "unusable image"))
            continue
        if header.rule:
            dataset.faults.append(Fault(str(path), f"image {number}", header.rule, True, header.rule))
        dataset.images.append(image_of(number, path, header, header.orientation, rotated))
    return dataset
