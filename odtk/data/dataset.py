"""The index of a dataset: its images with their boxes, its categories, and the faults found while reading. No pixels.

It comes from an annotation file (coco.py has its rules) or from a folder without annotations. Such a folder has no
stated image sizes, so its images are turned by their EXIF orientation, as every viewer does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..categories import Category
from ..config import OdtkError
from ..text import plural
from .coco import CocoReader
from .headers import read_headers
from .images import Header, ImageError
from .layouts import Annotations, load_annotations
from .listing import list_images
from .records import DAMAGED, Fault, Image
from .tars import TarSet, tar_sources

MAX_LISTED = 10  # damaged images in a message


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
        cls,
        annotations: str | Path | None,
        images: str | Path | Sequence[str],
        *,
        rotated: bool = False,
        training: bool = False,
        skip_damaged: bool = False,
    ) -> Dataset:
        """Reads and checks a dataset.

        Args:
            annotations: of any format (layouts.py), PATH or PATH:SPLIT; None takes every image file of the folder,
                without boxes.
            images: folder of the images; without annotations also files and patterns (listing.py).
            rotated: boxes are (x, y, w, h, theta).
            training: check what training needs too.
            skip_damaged: damaged images are left out, which is a fixed fault; otherwise they are refused.

        Raises:
            OdtkError: a file cannot be read, a fault is refused, or every image is damaged; names the first such fault
                and counts the others, or lists the damaged images if there is nothing else.
        """
        return read(annotations, images, rotated=rotated, training=training).accepted(skip_damaged)

    @classmethod
    def of(cls, annotations: Annotations, *, rotated: bool, training: bool, skip_damaged: bool) -> Dataset:
        """As load, of annotations that have been read."""
        if annotations.tars is None:
            check_folder(annotations.images)
        return read_entries(annotations, rotated=rotated, training=training).accepted(skip_damaged)

    def accepted(self, skip_damaged: bool) -> Dataset:
        """Itself, with damaged images as fixed faults if they are to be left out.

        Raises:
            OdtkError: as load.
        """
        if skip_damaged:
            self.faults = [replace(f, fixed=True) if f.rule == DAMAGED else f for f in self.faults]
        refused = [fault for fault in self.faults if not fault.fixed]
        damaged = [fault for fault in self.faults if fault.rule == DAMAGED]
        if refused and all(fault.rule == DAMAGED for fault in refused):
            raise OdtkError(
                f"The dataset was refused: {list_damaged(damaged)}; mend or remove these files, or leave them out "
                "(--skip-damaged; infer does so without --strict)."
            )
        if refused:
            first = next(fault for fault in refused if fault.rule != DAMAGED)
            others = len(refused) - 1
            more = f" ({plural(others, 'more fault')}: `odtk check` lists all)" if others else ""
            raise OdtkError(f"The dataset was refused: {first}{more}.")
        if damaged and not self.images:
            raise OdtkError(f"No image is left: {list_damaged(damaged)}.")
        return self

    def part(self, ids: Collection[int], *, rest: bool = False) -> Dataset:
        """The images with these ids, or the rest without them."""
        chosen = set(ids)
        return replace(self, images=[image for image in self.images if (image.id in chosen) != rest])

    def warnings(self) -> list[str]:
        """One sentence for each kind of fixed fault, with their number and the first of them; damaged images, which
        are left out, are listed."""
        fixed = [fault for fault in self.faults if fault.fixed]
        counts = Counter(fault.rule for fault in fixed)
        first = {fault.rule: fault for fault in reversed(fixed)}
        found = []
        for rule, count in counts.items():
            if rule == DAMAGED:
                found.append(f"left out, {list_damaged([fault for fault in fixed if fault.rule == DAMAGED])}")
            else:
                place = " ".join(part for part in (first[rule].file, first[rule].id) if part)
                found.append(f"{rule} ({count} ×, first {place})")
        return found


def list_damaged(faults: Sequence[Fault]) -> str:
    """Damaged images with their reasons, up to MAX_LISTED, for a message."""
    listed = ", ".join(f"{fault.file} ({fault.reason})" for fault in faults[:MAX_LISTED])
    more = f" and {len(faults) - MAX_LISTED} more" if len(faults) > MAX_LISTED else ""
    return f"{plural(len(faults), 'damaged image')}: {listed}{more}"


def read(
    annotations: str | Path | None,
    images: str | Path | Sequence[str],
    *,
    rotated: bool = False,
    training: bool = False,
) -> Dataset:
    """Reads a dataset as Dataset.load does, but lists refused faults instead of raising; refused images are left out.

    Raises:
        OdtkError: the annotation file or the folder cannot be read at all.
    """
    tars = tar_sources(images)
    if annotations is None:
        return read_tars(TarSet(tars), rotated) if tars else read_images(list_images(images), rotated)
    if not tars:
        assert isinstance(images, (str, Path))  # of annotations: one folder
        check_folder(Path(images).expanduser())
    entries = load_annotations(annotations, images, rotated=rotated, boxes_only=True)
    return read_entries(entries, rotated=rotated, training=training)


def check_folder(folder: Path) -> None:
    """Raises OdtkError where there is no such folder of images."""
    if folder.is_file():
        raise OdtkError(f"{folder} is a file: with --annotations, --images takes the folder of the images.")
    if not folder.is_dir():
        raise OdtkError(f"The image folder {folder} does not exist: give the right one with --images.")


def read_entries(annotations: Annotations, *, rotated: bool, training: bool) -> Dataset:
    """Annotations as a dataset, with every fault."""
    content, folder, path, tars = annotations
    found, categories, faults = CocoReader(content, path, tars or folder, rotated, training).read()
    return Dataset(found, categories, faults, rotated)


def read_tars(tars: TarSet, rotated: bool) -> Dataset:
    """The images in tar files, without annotations, numbered from 1 in the order of their names."""
    images = list(tars.images.values())
    dataset = of_headers([image.member.path for image in images], [image.header for image in images], rotated)
    members = {image.member.path: image.member for image in images}
    for image in dataset.images:
        image.member = members[image.path]
    return dataset


def read_images(paths: Sequence[Path], rotated: bool) -> Dataset:
    """Image files without annotations, numbered from 1; unusable ones are faults."""
    return of_headers(paths, read_headers(paths), rotated)


def of_headers(paths: Sequence[Path], headers: Sequence[Header | ImageError], rotated: bool) -> Dataset:
    """Images without annotations, from their paths and headers."""
    dataset = Dataset([], (), rotated=rotated)
    for number, (path, header) in enumerate(zip(paths, headers, strict=True), start=1):
        if isinstance(header, ImageError):
            dataset.faults.append(Fault(str(path), f"image {number}", str(header), False, DAMAGED))
            continue
        if header.rule:
            dataset.faults.append(Fault(str(path), f"image {number}", header.rule, True, header.rule))
        dataset.images.append(Image.from_header(number, path, header, header.orientation, rotated=rotated))
    return dataset
