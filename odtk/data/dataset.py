"""The index of a dataset: its images with their boxes, its categories, and the faults found while reading. No pixels.

It comes from an annotation file (coco.py has its rules) or from a folder without annotations. Such a folder has no
stated image sizes, so its images are turned by their EXIF orientation, as every viewer does.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from ..categories import Category
from ..config import OdtkError
from ..text import plural
from .coco import CocoReader
from .images import EXTENSIONS, ImageError, read_headers
from .records import Fault, Image


@dataclass
class Dataset:
    """A dataset that has been read.

    Attributes:
        images: in the order of the annotation file, or of the sorted folder.
        categories: sorted by id; a label is an index into them.
        faults: those found while reading.
        rotated: boxes are (x, y, w, h, theta).
    """

    images: list[Image]
    categories: tuple[Category, ...]
    faults: list[Fault] = field(default_factory=list)
    rotated: bool = False

    @classmethod
    def load(
        cls, annotations: str | Path | None, images: str | Path, *, rotated: bool = False, training: bool = False
    ) -> Dataset:
        """Reads and checks a dataset.

        Args:
            annotations: COCO file; None takes every image file of the folder, without boxes.
            images: folder of the images.
            rotated: boxes are (x, y, w, h, theta).
            training: check what training needs too.

        Raises:
            OdtkError: a file cannot be read, or a fault is refused; names the first such fault and counts the others.
        """
        dataset = read(annotations, images, rotated=rotated, training=training)
        refused = [fault for fault in dataset.faults if not fault.fixed]
        if refused:
            others = len(refused) - 1
            more = f" ({plural(others, 'more fault')} like this: `odtk check` lists all)" if others else ""
            raise OdtkError(f"The dataset was refused: {refused[0]}{more}.")
        return dataset

    def warnings(self) -> list[str]:
        """One sentence for each kind of fixed fault, with their number and the first of them."""
        fixed = [fault for fault in self.faults if fault.fixed]
        counts = Counter(fault.rule for fault in fixed)
        first = {fault.rule: fault for fault in reversed(fixed)}
        return [f"{rule} ({count} ×, first {first[rule].file} {first[rule].id})" for rule, count in counts.items()]


def read(
    annotations: str | Path | None, images: str | Path, *, rotated: bool = False, training: bool = False
) -> Dataset:
    """Reads a dataset as Dataset.load does, but lists refused faults instead of raising; refused images are left out.

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
        dataset.images.append(Image.from_header(number, path, header, header.orientation, rotated=rotated))
    return dataset
