"""Images with one class each: a folder with one subfolder per class (ImageFolder), or a CSV of files and classes.

As a Dataset, an image has one box, which is the whole image, and the label of its class.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..categories import Category
from ..config import OdtkError
from ..text import plural
from .coco import leads_out
from .dataset import MAX_LISTED, Dataset
from .headers import read_headers
from .images import EXTENSIONS, ImageError, MissingImage, images_in, is_hidden, is_image
from .records import DAMAGED, Fault, Image

FILE_COLUMNS = ("file", "file_name", "filename", "image", "path")
CLASS_COLUMNS = ("class", "label", "category")
SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}  # no classes, where all are such
LISTED = 5  # names in a message


@dataclass(frozen=True)
class Listing:
    """The files of a set and their classes, before any file is opened.

    Attributes:
        source: the folder or the CSV, for messages.
        folder: that the files' names are relative to.
        files, names: of each image its path and the name of its class.
        classes: the names of all classes, sorted.
        faults: those found while listing.
    """

    source: Path
    folder: Path
    files: list[Path]
    names: list[str]
    classes: tuple[str, ...]
    faults: list[Fault] = field(default_factory=list)


def list_labeled(images: str | Path | None, labels: str | Path | None, *, part: str = "") -> Listing:
    """The files of a set and their classes.

    Args:
        images: without ``labels`` the folder of the classes' folders; with it, the folder that its file names are
            relative to, None for the CSV's own.
        labels: a CSV of a file name and a class per line, separated by commas, semicolons or tabs; its first line may
            name the columns (FILE_COLUMNS, CLASS_COLUMNS), in any order and among others.
        part: what the flags begin with that messages name: ``val-`` for --val-images and --val-labels.

    Raises:
        OdtkError: something is missing, or there are no classes or images.
    """
    if labels is not None:
        path = Path(labels).expanduser()
        return list_csv(path, path.parent if images is None else Path(images).expanduser(), part)
    assert images is not None
    return list_folder(Path(images).expanduser(), part)


def list_folder(folder: Path, part: str = "") -> Listing:
    """A folder with one subfolder per class, whose images may lie in subfolders of it."""
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise OdtkError(f"{folder} {what}: give the folder of the classes' folders with --{part}images.")
    own = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not is_hidden(entry.name))
    if not own:
        raise OdtkError(
            f"{folder} has no subfolders: give it one per class, or name the classes in a CSV (--{part}labels)."
        )
    if all(entry.name.lower() in SPLITS for entry in own):
        found = " and ".join(entry.name for entry in own)
        raise OdtkError(f"{folder} holds {found}, which are no classes: give --images {own[0]}, and --val-images.")
    files: list[Path] = []
    names: list[str] = []
    for entry in own:
        images = images_in(entry)
        if not images:
            raise OdtkError(
                f"The folder {entry}, a class, has no images ({', '.join(sorted(EXTENSIONS))}): remove it, or add some."
            )
        files += images
        names += [entry.name] * len(images)
    loose = [str(entry) for entry in sorted(folder.iterdir()) if is_image(entry.name) and entry.is_file()]
    outside = "outside of every class's folder: left out"
    faults = [Fault(name, "", outside, True, f"image {outside}") for name in loose]
    return Listing(folder, folder, files, names, tuple(entry.name for entry in own), faults)


def list_csv(path: Path, folder: Path, part: str = "") -> Listing:
    """A CSV of file names, relative to a folder, and classes."""
    rows = read_rows(path, f"--{part}labels")
    if not rows:
        raise OdtkError(f"{path} has no lines: write a file name and a class in each, such as cats/1.jpg,cat.")
    file_at, class_at, first = columns_of(rows[0][1], path)
    found: dict[str, str] = {}
    faults: list[Fault] = []
    for line, row in rows[first:]:
        if len(row) <= max(file_at, class_at) or not row[file_at].strip() or not row[class_at].strip():
            raise OdtkError(f"{path}, line {line}: it needs a file name and a class, not {','.join(row)!r}.")
        given, of = row[file_at].strip(), row[class_at].strip()
        name = name_within(folder, given)
        if name is None:
            raise OdtkError(f"{path}, line {line}: {given} is not in {folder}; --{part}images names that folder.")
        if found.setdefault(name, of) != of:
            raise OdtkError(f"{path}, line {line}: {name} is {of} here and {found[name]} before: keep one class.")
    if not found:
        raise OdtkError(f"{path} has no line below its first: write a file name and a class in each.")
    repeated = len(rows) - first - len(found)
    if repeated:
        rule = "named again: counted once"
        faults = [Fault(str(path), "", rule, True, f"image {rule}")] * repeated
    files = [folder / name for name in found]
    return Listing(path, folder, files, [*found.values()], tuple(sorted({*found.values()})), faults)


def read_rows(path: Path, flag: str) -> list[tuple[int, list[str]]]:
    """The lines of a CSV that are not blank, as their number in the file and their cells.

    Commas, semicolons or tabs separate them, whichever the first line has.
    """
    try:
        content = path.read_bytes()
        text = content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
        top = next((line for line in text.splitlines() if line.strip()), "")
        mark = next((mark for mark in ",;\t" if mark in top), ",")
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=mark)
        return [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except OSError as error:
        raise OdtkError(f"Cannot read {flag} {path}: {error.strerror}.") from error
    except UnicodeDecodeError:
        raise OdtkError(f"{path} is no text in UTF-8: save it as a CSV in UTF-8.") from None
    except csv.Error as error:
        raise OdtkError(f"{path} is no CSV of file names and classes: {error}.") from error


def name_within(folder: Path, given: str) -> str | None:
    """A file name of a CSV as a path relative to a folder, in one spelling; None if it leads out of the folder."""
    if "\\" in given and not os.path.exists(folder / given):  # as Windows writes it
        given = given.replace("\\", "/")
    if "\0" in given:
        return None
    name = os.path.normpath(given)
    if os.path.isabs(name):
        name = os.path.relpath(name, os.path.abspath(folder))
    return None if leads_out(name) else name


def columns_of(row: Sequence[str], path: Path) -> tuple[int, int, int]:
    """Which columns of a CSV hold the file and the class, and the first row of values, by its first row."""
    cells = [cell.strip().lower() for cell in row]
    files = [cells.index(name) for name in FILE_COLUMNS if name in cells]
    classes = [cells.index(name) for name in CLASS_COLUMNS if name in cells]
    if files and classes:
        return files[0], classes[0], 1
    if len(row) != 2:
        raise OdtkError(
            f"{path}: a CSV of {plural(len(row), 'column')} needs a first line that names the columns, one of them "
            f"{' or '.join(FILE_COLUMNS)}, another {' or '.join(CLASS_COLUMNS)}."
        )
    return 0, 1, 0


def read_labeled(listing: Listing, classes: Iterable[str] | None = None) -> Dataset:
    """A listing as a Dataset; unusable images are refused faults (Dataset.accepted).

    Args:
        classes: those of the training set, which a validation set may lack some of; None: the listing's own.

    Raises:
        OdtkError: an image is of a class that is not among ``classes``, or is missing.
    """
    known = {name: label for label, name in enumerate(listing.classes if classes is None else classes)}
    if strange := sorted({*listing.names} - known.keys()):
        listed = ", ".join(strange[:LISTED]) + (" …" if len(strange) > LISTED else "")
        raise OdtkError(f"{listing.source} has classes that are not trained ({listed}): rename or remove them.")
    categories = tuple(Category(label + 1, name) for name, label in known.items())
    dataset = Dataset([], categories, list(listing.faults))
    headers = read_headers(listing.files)
    missing = [path for path, header in zip(listing.files, headers, strict=True) if isinstance(header, MissingImage)]
    if missing:
        listed = ", ".join(str(path.relative_to(listing.folder)) for path in missing[:MAX_LISTED])
        is_heading = missing[0] == listing.files[0] and not is_image(missing[0].name)
        advice = f"{' or '.join(FILE_COLUMNS)} and {' or '.join(CLASS_COLUMNS)} are names of columns"
        raise OdtkError(
            f"{listing.source}: {plural(len(missing), 'file')} not found in {listing.folder}: {listed}"
            f"{', …' if len(missing) > MAX_LISTED else ''}; mend the names, or give the right folder with --images"
            f"{f' ({advice})' if is_heading else ''}."
        )
    for id, (path, name, header) in enumerate(zip(listing.files, listing.names, headers, strict=True), start=1):
        if isinstance(header, ImageError):
            dataset.faults.append(Fault(str(path), f"image {id}", str(header), False, DAMAGED))
        else:
            if header.rule:
                dataset.faults.append(Fault(str(path), f"image {id}", header.rule, True, header.rule))
            image = Image.from_header(id, path, header, header.orientation, rotated=False)
            image.boxes = np.array([[0.0, 0.0, image.width, image.height]])
            image.labels = np.array([known[name]])
            dataset.images.append(image)
    return dataset
