"""YOLO datasets: a data.yaml and one .txt of labels per image, read as the content of a COCO file.

data.yaml holds ``names`` (a list, or a mapping from class to name) and per split (``train``, ``val``, ``test``) a
folder, a .txt that lists images, or several of these, relative to ``path``, which is relative to data.yaml. The labels
of images/…/a.jpg are in labels/…/a.txt, else beside the image. A line of labels is one object, in fractions of the
image's width and height:

  class cx cy w h                   the center and the size of a box
  class x1 y1 x2 y2 x3 y3 x4 y4     the corners of a rotated box (OBB)
  class x1 y1 x2 y2 x3 y3 …         the outline of an object: its box encloses it, the outline is kept as a mask

The fractions are of the image as it is shown, turned by its EXIF orientation, which is how YOLO's own tools read it.
An image without a .txt has no objects. Images are numbered from 1 in the order of their names; a category's id is its
class, or what ``category_ids`` says, a list in data.yaml that `odtk convert` writes and other tools ignore.

A line that cannot be read becomes an annotation that says so in ``unreadable``, which the rules of coco.py refuse.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ..config import OdtkError
from .box_format import fraction_fault
from .headers import read_headers
from .images import EXTENSIONS, SWAPS_SIDES, ImageError, images_in

SPLITS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}  # names of each in data.yaml
SLACK = 1.01  # a rectangle this much larger than the smallest around four corners counts as the smallest
SQUARE = 0.02  # how far corners may be from a rectangle's, in its shorter sides, and still be meant as one


def read_yaml(path: Path) -> dict[str, Any]:
    """The content of a data.yaml.

    Raises:
        OdtkError: it cannot be read, is not YAML, or has no names.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise OdtkError(f"The annotations {path} cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError) as error:
        raise OdtkError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(content, dict) or "names" not in content:
        raise OdtkError(f'{path} is not a YOLO dataset: it has no "names".')
    return content


def shown(value: Any) -> str:
    """A value of YAML in a message. Lists are not written out: aliases make short ones without bound (a YAML bomb)."""
    return "a list" if isinstance(value, list) else "a mapping" if isinstance(value, dict) else repr(value)


def splits_of(content: dict[str, Any]) -> dict[str, str]:
    """The splits that a data.yaml has, each with the key that it stands under."""
    found = {split: next((key for key in keys if content.get(key)), "") for split, keys in SPLITS.items()}
    return {split: key for split, key in found.items() if key}


def load(
    path: Path, split: str = "train", images: Path | None = None, *, rotated: bool | None = None
) -> tuple[dict[str, Any], Path]:
    """One split of a YOLO dataset, as load_json returns a COCO file's content, and the folder of its images.

    Args:
        path: of the data.yaml.
        split: one of splits_of.
        images: folder of the images, where they are not where data.yaml says.
        rotated: whether four corners are a rotated box; None: they are if every object has four corners, all are nearly
            rectangles, and not all are upright.

    Raises:
        OdtkError: data.yaml cannot be used, or the split has no images or no labels.
    """
    content = read_yaml(path)
    categories = read_names(content, path)
    names, folder = find_images(content, path, split, images)
    labels = {name: find_labels(names[name], folder, name, path.parent) for name in sorted(names)}
    if not any(labels.values()):
        first = next(iter(labels))
        raise OdtkError(
            f"None of the {len(labels)} images of {path}, {split}, has labels: that of {names[first]} would be "
            f"{label_path(names[first])}."
        )
    return assemble(labels, folder, categories, rotated, path), folder


def find_images(
    content: dict[str, Any], path: Path, split: str, images: Path | None = None
) -> tuple[dict[str, str], Path]:
    """The images of a split: their paths as data.yaml gives them, by their names in a folder; and that folder.

    Args:
        content: of the data.yaml at ``path``.
        split, images: as load takes them.

    Raises:
        OdtkError: there are none.
    """
    key = splits_of(content).get(split)
    if key is None:
        raise OdtkError(f"{path} has no split {split!r}.")
    listed = list_images(content[key], base_of(content, path), f"{path}, {key}")
    if not listed and images is None:
        raise OdtkError(f"{path} finds no images for {key}: {shown(content[key])}; give their folder with --images.")
    if not listed:
        assert images is not None
        listed = [str(file) for file in images_in(images)]
    if not listed:
        raise OdtkError(f"The folder {images} has no images ({', '.join(sorted(EXTENSIONS))}).")
    if any(map(os.path.isabs, listed)):
        listed = [os.path.abspath(file) for file in listed]
    root = Path(os.path.commonpath([os.path.dirname(file) for file in listed]))
    names = {os.path.relpath(file, root).replace(os.sep, "/"): file for file in listed}
    return names, images or root


def stray_labels(path: Path, split: str, images: Path | None = None) -> list[str]:
    """The files in the folders of a split's labels that are of no image, sorted; takes the same as load.

    Those of other splits' images and of unlisted images beside the listed ones are of an image.
    """
    content = read_yaml(path)
    used: set[str] = set()
    stems: dict[str, set[str]] = {}  # of the images whose labels are in a folder
    seen: set[tuple[str, str]] = set()
    folders: set[str] = set()
    for other in splits_of(content):
        try:
            names, folder = find_images(content, path, other, images if other == split else None)
        except OdtkError:  # that split has no images here
            continue
        for name, image in names.items():
            if (file := find_labels(image, folder, name, path.parent)) is None:
                continue
            used.add(os.path.realpath(file))
            place, beside = os.path.dirname(file), os.path.dirname(folder / name)
            if other == split:
                folders.add(place)
            if (place, beside) not in seen:
                seen.add((place, beside))
                files = map(os.path.splitext, os.listdir(beside))
                stems.setdefault(place, set()).update(stem for stem, end in files if end.lower() in EXTENSIONS)
    return [
        str(file)
        for place in sorted(folders)
        for file in sorted(Path(place).glob("*.txt"))
        if os.path.realpath(file) not in used and file.stem not in stems[place] and is_labels(file, content)
    ]


def is_labels(file: Path, content: dict[str, Any]) -> bool:
    """Whether a .txt is labels and no list of classes or images, or a text of a tool's."""
    entries = read_labels(str(file), {number: number for number in range(len(content["names"]))})
    return any("values" in entry for entry in entries)


def read_names(content: dict[str, Any], path: Path) -> list[dict[str, Any]]:
    """The categories of a data.yaml in the order of their classes, as COCO has them, each with its class.

    Raises:
        OdtkError: names or category_ids are not what the format says.
    """
    names = content["names"]
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, dict) or not names:
        raise OdtkError(f'{path}: "names" is neither a list of names nor a mapping from class to name.')
    for number, name in names.items():
        if type(number) is not int or not 0 <= number < 2**63:
            raise OdtkError(f'{path}: the class {number!r} in "names" is not a whole number, 0 or more.')
        if isinstance(name, bool) or not isinstance(name, (str, int, float)):
            raise OdtkError(f"{path}: the name {shown(name)} of class {number} is not a text: put it in quotes.")
    classes = sorted(names)
    ids = content.get("category_ids", classes)
    if (
        not isinstance(ids, list)
        or len(ids) != len(classes)
        or not all(type(id) is int and -(2**63) <= id < 2**63 for id in ids)
        or len(set(ids)) != len(ids)
    ):
        raise OdtkError(f'{path}: "category_ids" is not a list of {len(classes)} different whole numbers.')
    return [{"id": id, "name": str(names[c]), "class": c} for id, c in zip(ids, classes, strict=True)]


def base_of(content: dict[str, Any], path: Path) -> Path:
    """The folder that the splits of a data.yaml are relative to."""
    given = content.get("path")
    base = path.parent / given if isinstance(given, str) else path.parent
    return base if os.path.isdir(base) else path.parent  # `path` is often that of another machine


def list_images(value: Any, base: Path, where: str) -> list[str]:
    """Paths of the images that a split's value names, those of folders sorted; empty where there are none.

    Args:
        value: a folder, a .txt of paths, or a list of these.
        base: the folder that they are relative to.
        where: for the sentence of an error.
    """
    found: list[str] = []
    for part in value if isinstance(value, list) else [value]:
        if not isinstance(part, str):
            raise OdtkError(f"{where}: {shown(part)} is not a path.")
        # Roboflow writes ../train/images for what is at train/images.
        for candidate in (base / part, base / part.removeprefix("../")):
            if os.path.isdir(candidate):
                found += map(str, images_in(candidate))
                break
            if os.path.isfile(candidate):
                found += read_list(candidate, base)
                break
    return list(dict.fromkeys(found))


def read_list(path: Path, base: Path) -> list[str]:
    """The images that a .txt lists, one path per line: relative to the .txt, or to ``base``."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise OdtkError(f"The list of images {path} cannot be read: {error}.") from None
    names = [line.strip() for line in lines if line.strip()]
    near = [os.path.normpath(path.parent / name) for name in names]
    far = [os.path.normpath(base / name) for name in names]
    return [b if not os.path.isfile(a) and os.path.isfile(b) else a for a, b in zip(near, far, strict=True)]


def label_path(image: str) -> str:
    """Where YOLO keeps the labels of an image: images/…/a.jpg → labels/…/a.txt; without such a folder, beside it."""
    *folders, name = image.split("/")
    at = [i for i, part in enumerate(folders) if part == "images"]
    if at:
        folders[at[-1]] = "labels"
    return "/".join([*folders, os.path.splitext(name)[0] + ".txt"])


def find_labels(image: str, folder: Path, name: str, base: Path) -> str | None:
    """The file of an image's labels, or None where there is none.

    Args:
        image: its path, as data.yaml gives it.
        folder, name: where it is if --images says so.
        base: the folder of data.yaml.
    """

    def candidates() -> Iterator[str]:  # most often it is the first
        yield label_path(image)
        yield os.path.splitext(image)[0] + ".txt"
        text = os.path.splitext(name)[0] + ".txt"
        yield label_path(str(folder / name))
        yield str(folder / text)
        yield str(base / "labels" / text)

    return next((file for file in candidates() if os.path.isfile(file)), None)


def assemble(
    labels: dict[str, str | None], folder: Path, categories: list[dict[str, Any]], rotated: bool | None, path: Path
) -> dict[str, Any]:
    """The content of a COCO file.

    Args:
        labels: the file of its labels, or None, by the name of each image in the folder.
        categories: of read_names.
        rotated: as load takes it.
        path: of the data.yaml, for the sentence of an error.

    Raises:
        OdtkError: the labels are all in another format.
    """
    ids = {category["class"]: category["id"] for category in categories}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    headers = read_headers([folder / name for name in labels])
    for id, ((name, file), header) in enumerate(zip(labels.items(), headers, strict=True), start=1):
        image: dict[str, Any] = {"id": id, "file_name": name}
        size = None
        if not isinstance(header, ImageError):
            size = (header.width, header.height)
            if header.orientation in SWAPS_SIDES:
                size = size[::-1]
            image |= {"width": size[0], "height": size[1]}
        images.append(image)
        for entry in read_labels(file, ids) if file else ():
            if size is None and "unreadable" not in entry:
                entry["unreadable"] = f"the size of its image is not known, as of {folder / name}: {header}"
            entry |= {"id": len(annotations) + 1, "image_id": id, "size": size}
            annotations.append(entry)
    if fault := fraction_fault([entry["values"] for entry in annotations if "values" in entry]):
        raise OdtkError(f"The labels of {path} cannot be used: {fault}.")
    usable = [entry for entry in annotations if "unreadable" not in entry]
    if rotated is None:
        rotated = all(is_rectangle(entry) for entry in usable) and not all(is_upright(entry) for entry in usable)
    for entry in usable:
        place_box(entry, rotated=rotated)
    for entry in annotations:
        entry.pop("size")
        entry.pop("values", None)
    return {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": category["id"], "name": category["name"]} for category in categories],
    }


def read_labels(path: str, ids: dict[int, int]) -> list[dict[str, Any]]:
    """One entry per line of a file of labels: its category_id, source and values, or a fault instead of values.

    Args:
        ids: of the categories by their class.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        return [{"source": path, "unreadable": f"the labels cannot be read: {error}"}]
    entries = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        entry: dict[str, Any] = {"source": f"{path}, line {number}"}
        try:
            first, *values = map(float, line.split())
        except ValueError:
            entry["unreadable"] = "it is not a class and its numbers, separated by spaces"
        else:
            if not (math.isfinite(first) and int(first) in ids and first == int(first)):
                entry["unreadable"] = f'its class {first:g} is not in "names"'
            elif len(values) != 4 and (len(values) < 6 or len(values) % 2):
                entry["unreadable"] = (
                    f"it has {len(values)} numbers after the class: a box has 4, an outline pairs of x and y, 6 or more"
                )
            else:
                entry |= {"category_id": ids[int(first)], "values": values}
        entries.append(entry)
    return entries


def place_box(entry: dict[str, Any], *, rotated: bool) -> None:
    """Gives an entry its bbox in pixels, and its outline as segmentation where it has one."""
    values, (width, height) = entry["values"], entry["size"]
    if len(values) == 4:
        center_x, center_y, w, h = (v * side for v, side in zip(values, (width, height) * 2, strict=True))
        entry["bbox"] = [center_x - w / 2, center_y - h / 2, w, h]
    else:
        points = np.array(values).reshape(-1, 2) * (width, height)  # [2·k] → [k, 2]
        if rotated and len(points) == 4 and np.isfinite(points).all():
            entry["bbox"] = rectangle_around(points)
        else:
            low, high = points.min(axis=0), points.max(axis=0)
            entry["bbox"] = [*low.tolist(), *(high - low).tolist()]
            entry["segmentation"] = [points.reshape(-1).tolist()]  # [k, 2] → [2·k]
    entry["area"] = entry["bbox"][2] * entry["bbox"][3]


def is_rectangle(entry: dict[str, Any]) -> bool:
    """Whether an entry's values are the four corners of a rectangle, up to rounding."""
    if len(entry["values"]) != 8 or not np.isfinite(entry["values"]).all():
        return False
    points = np.array(entry["values"]).reshape(4, 2) * entry["size"]  # [8] → [4, 2]
    sides = np.linalg.norm(points - np.roll(points, -1, axis=0), axis=1)
    diagonals = np.linalg.norm(points[:2] - points[2:], axis=1)
    middles = np.linalg.norm(points[0] + points[2] - points[1] - points[3])
    return bool(max(abs(diagonals[0] - diagonals[1]), middles) <= max(SQUARE * sides.min(), 1))


def is_upright(entry: dict[str, Any]) -> bool:
    """Whether two corners of a rectangle share their x or their y, within half a pixel."""
    (ax, ay), (bx, by) = np.array(entry["values"]).reshape(4, 2)[:2] * entry["size"]  # [8] → [4, 2]
    return min(abs(ax - bx), abs(ay - by)) <= 0.5


def rectangle_around(points: np.ndarray) -> list[float]:
    """The smallest rectangle [x, y, w, h, theta] around four corners in pixels, theta in radians, counterclockwise.

    One of its sides lies along a side of the corners' hull (Freeman and Shapira 1975, "Determining the
    minimum-area encasing rectangle"). Of a rectangle, w is the side from the first corner to the second.

    Args:
        points: float [4, 2], in their order around the box.
    """
    best: tuple[float, list[float]] | None = None
    order = np.concatenate([points, points[::2], points[1::2]])  # the sides, and the diagonals of a crossed outline
    for a, b in ((0, 1), (1, 2), (2, 3), (3, 0), (4, 5), (6, 7)):
        along = order[b % 4 if b < 4 else b] - order[a]
        if not along.any():
            continue
        theta = math.atan2(-along[1], along[0])  # y points down
        axes = np.array([[math.cos(theta), -math.sin(theta)], [math.sin(theta), math.cos(theta)]])
        turned = points @ axes.T  # [4, 2], in the frame of the box
        low, high = turned.min(axis=0), turned.max(axis=0)
        size, center = high - low, (low + high) / 2 @ axes
        if best is None or size.prod() * SLACK < best[0]:
            best = (float(size.prod()), [*(center - size / 2).tolist(), *size.tolist(), theta])
    return best[1] if best else [*points[0].tolist(), 0.0, 0.0, 0.0]  # four equal corners: a box without area


def corners_of(box: Sequence[float]) -> np.ndarray:
    """The corners [4, 2] of a box [x, y, w, h] or [x, y, w, h, theta]; clockwise from its own upper left."""
    x, y, w, h = box[:4]
    theta = box[4] if len(box) == 5 else 0.0
    cos, sin = math.cos(theta), math.sin(theta)
    offsets = np.array([[-w, -h], [w, -h], [w, h], [-w, h]]) / 2
    return offsets @ np.array([[cos, -sin], [sin, cos]]) + (x + w / 2, y + h / 2)
