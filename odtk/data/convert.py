"""Annotations from one format to another: COCO, YOLO, Pascal VOC. Images are not copied, and no file is overwritten.

  coco   TARGET is a .json
  yolo   TARGET is a folder: data.yaml, train.txt (the images of the split), labels/ and images, a link to the folder of
         the images, because YOLO's tools look for the labels of …/images/a.jpg in …/labels/a.txt
  voc    TARGET is a folder: Annotations/ and JPEGImages, a link to the folder of the images

What the target's format cannot hold is a loss, which is refused with its reason, or accepted with ``lossy``:

  YOLO   crowds (left out), key points, and masks but those of one outline around which the box lies (their boxes are
         written; so are those of all masks if one box is rotated)
  VOC    crowds, key points and all masks; rotated boxes (the boxes around them are written); categories without boxes,
         or of the same name

Names of images and categories are kept. Ids are kept where the format has them: YOLO's classes are 0, 1, 2 …, so other
ids of categories are written to ``category_ids`` in data.yaml; VOC has no ids.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any
from xml.etree import ElementTree

import numpy as np
import yaml

from ..config import OdtkError
from ..files import check_writable, make_folder, os_error_reason, write_json
from ..text import plural
from . import voc
from .coco import ID_FAULT, categories_of, entry_fault, is_id, is_mask, is_number, load_json, reading_fault
from .headers import read_headers
from .images import SWAPS_SIDES, Header
from .layouts import find_source, load_annotations, parse, sources
from .yolo import corners_of

BOX_FORMATS: dict[str, Callable[[list[float], float, float], list[float]]] = {  # (box, width, height) → x y w h, pixels
    "xyxy": lambda b, _w, _h: [b[0], b[1], b[2] - b[0], b[3] - b[1]],
    "normalized": lambda b, w, h: [b[0] * w, b[1] * h, b[2] * w, b[3] * h],
    "cxcywh": lambda b, _w, _h: [b[0] - b[2] / 2, b[1] - b[3] / 2, b[2], b[3]],
}
CARRIED = {  # keys of an annotation that mean something to every format
    *("id", "image_id", "category_id", "bbox", "area", "iscrowd", "segmentation", "keypoints", "num_keypoints"),
}
Sizes = dict[int, tuple[int, int]]  # (width, height) in pixels by image id
SAME_BOX = 1e-3  # pixels between the sides of a box and those of the one around its mask that are equal
SAME = 0.02  # pixels between the corners of a mask and those of its box that are equal, as both are rounded


def convert(
    source: str,
    target: str,
    to: str,
    *,
    images: str | None = None,
    box_format: str | None = None,
    lossy: bool = False,
) -> list[str]:
    """Writes annotations in another format and returns what to say about it.

    Args:
        source: PATH or PATH:SPLIT of annotations (layouts.py).
        target: a .json, or a folder to make; must not exist.
        to: "coco", "yolo" or "voc".
        images: folder of the images; None looks for it.
        box_format: what the boxes of a COCO file are in place of x y w h in pixels (a key of BOX_FORMATS).
        lossy: go on where something is lost.

    Raises:
        OdtkError: the source cannot be read or is faulty, the target exists or cannot be written, or something would be
            lost.
    """
    if os.path.lexists(target):
        raise OdtkError(f"{target} exists already: give another name, nothing is overwritten.")
    content, folder, format = read_source(source, images, keep_names=to == "coco")
    if box_format and format != "coco":
        raise OdtkError(f"--from {box_format} is for the boxes of a COCO file, and {source} is none.")
    check_content(content, source)
    if format != "coco":  # then it is the place in a file, which the new one does not need
        for entry in (*content["images"], *content["annotations"]):
            entry.pop("source", None)
    if box_format:
        mend_boxes(content, folder, box_format)
    lost = [] if to == "coco" else losses(content, to)
    if lost and not lossy:
        raise OdtkError(f"{to.upper()} cannot hold {' and '.join(lost)} of {source}: --lossy goes on without.")
    written = write_coco(content, target) if to == "coco" else write_folder(content, folder, target, to)
    return [*written, *([f"Lost: {', '.join(lost)}."] if lost else []), *notes(content, to)]


def read_source(source: str, images: str | None, *, keep_names: bool) -> tuple[dict[str, Any], Path, str]:
    """The content of annotations, the folder of their images, and their format.

    Args:
        keep_names: file names stay as a COCO file has them, also those that only another machine understands.
    """
    path, split = parse(source)
    found = sources(path)
    if split is None and len(found) > 1:
        named = ", ".join(f"{source}:{name}" for name in found)
        raise OdtkError(f"{source} holds several splits, which are converted one by one: give one of {named}.")
    if split is None and None not in found:
        source = f"{source}:{next(iter(found))}"
    content, folder, path, tars = load_annotations(source, images)
    if tars is not None:
        raise OdtkError(f"--images {tars}: convert takes a folder of images, not tar files.")
    format = find_source(source).format
    return load_json(path) if keep_names and format == "coco" else content, folder, format


def check_content(content: dict[str, Any], source: str) -> None:
    """Refuses what cannot be converted.

    Raises:
        OdtkError: names the first such entry.
    """
    content["categories"], content["annotations"] = categories_of(content), content.get("annotations", [])
    for what, entries in (("Image", content["images"]), ("Category", content["categories"])):
        ids: set[int] = set()
        for entry in entries:
            id = entry.get("id")
            fault = (
                reading_fault(entry) or ("" if is_id(id) else ID_FAULT) or (f"duplicate id {id}" if id in ids else "")
            )
            if not fault and what == "Image" and not isinstance(entry.get("file_name"), str):
                fault = "it has no 'file_name'"
            if fault:
                place = entry["source"] if reading_fault(entry) else f"{what} {id!r} of {source}"
                raise OdtkError(f"{place}: {fault}.")
            ids.add(id)  # type: ignore[arg-type]
    image_ids = {image["id"] for image in content["images"]}
    category_ids = {category["id"] for category in content["categories"]}
    for i, entry in enumerate(content["annotations"]):
        if fault := entry_fault(entry, image_ids, category_ids):
            name = f"Annotation {entry.get('id', f'at position {i}')} of {source}"
            raise OdtkError(f"{entry['source'] if reading_fault(entry) else name}: {fault}.")


def sizes_of(content: dict[str, Any], folder: Path) -> Sizes:
    """(width, height) in pixels of each image by its id, as stated, else from its file."""
    sizes: Sizes = {}
    unknown = []
    for entry in content["images"]:
        stated = (entry.get("width"), entry.get("height"))
        if all(is_id(side) and side > 0 for side in stated):
            sizes[entry["id"]] = stated
        else:
            unknown.append(entry)
    headers = read_headers([folder / entry["file_name"] for entry in unknown])
    for entry, header in zip(unknown, headers, strict=True):
        if not isinstance(header, Header):
            raise OdtkError(f"{folder / entry['file_name']}: its size is not stated, and {header}.")
        sizes[entry["id"]] = (header.width, header.height)
    return sizes


def mend_boxes(content: dict[str, Any], folder: Path, box_format: str) -> None:
    """Turns boxes of another format into x y w h in pixels."""
    sizes = sizes_of(content, folder) if box_format == "normalized" else {}
    for i, entry in enumerate(content["annotations"]):
        if len(entry["bbox"]) != 4 and box_format == "normalized":  # of which side of the image, tools do not agree
            name = entry.get("id", f"at position {i}")
            raise OdtkError(f"Annotation {name} has an angle: --from normalized is for boxes of four numbers.")
        width, height = sizes.get(entry["image_id"], (1, 1))
        entry["bbox"] = BOX_FORMATS[box_format](entry["bbox"][:4], width, height) + entry["bbox"][4:]
        if box_format == "normalized" and is_normalized(entry.get("segmentation")):
            entry["segmentation"] = [
                [value * (height if i % 2 else width) for i, value in enumerate(outline)]
                for outline in entry["segmentation"]
            ]
            entry.pop("area", None)
        if not entry.get("segmentation"):
            entry["area"] = entry["bbox"][2] * entry["bbox"][3]


def is_normalized(outlines: Any) -> bool:
    """Whether a mask's outlines are in fractions of the image, as its box is."""
    values = [value for outline in outlines if isinstance(outline, list) for value in outline] if outlines else []
    return bool(values) and all(is_number(value) and abs(value) <= 1 for value in values)


def losses(content: dict[str, Any], to: str) -> list[str]:
    """What a format cannot hold of annotations, each with its number."""
    entries = content["annotations"]
    kept = [entry for entry in entries if not is_lost_crowd(entry, to)]
    used = {entry["category_id"] for entry in kept}
    names = Counter(str(category.get("name", category["id"])) for category in content["categories"])
    holds_outlines = to == "yolo" and not has_rotated(content)
    masks = [entry for entry in kept if entry.get("segmentation") and not is_outline_of_box(entry)]
    found = [
        (sum(is_lost_crowd(entry, to) for entry in entries), "crowd", "crowds"),
        (sum(not (holds_outlines and outline_of(entry)) for entry in masks), "mask", "masks"),
        (sum(bool(entry.get("keypoints")) for entry in kept), "set of key points", "sets of key points"),
    ]
    if to == "voc":
        found += [
            (sum(is_turned(entry) for entry in kept), "rotated box", "rotated boxes"),
            (
                sum(category["id"] not in used for category in content["categories"]),
                "category without boxes",
                "categories without boxes",
            ),
            (
                sum(count - 1 for count in names.values()),
                "category of the same name as another",
                "categories of the same name as others",
            ),
        ]
    return [plural(count, noun, nouns) for count, noun, nouns in found if count]


def is_lost_crowd(entry: dict[str, Any], to: str) -> bool:
    """Whether a format cannot hold an annotation because it is a crowd; VOC has "difficult" objects."""
    return bool(entry.get("iscrowd")) and not (to == "voc" and entry.get("difficult") == 1)


def is_turned(entry: dict[str, Any]) -> bool:
    return len(entry["bbox"]) == 5 and entry["bbox"][4] != 0


def has_rotated(content: dict[str, Any]) -> bool:
    return any(len(entry["bbox"]) == 5 for entry in content["annotations"])


def outline_of(entry: dict[str, Any]) -> list[float]:
    """The mask as the one outline [x, y, x, y, …] in pixels that YOLO can hold; empty if it is another or none.

    YOLO makes the box from the outline, so it must be the one around it.
    """
    mask = entry.get("segmentation")
    if not isinstance(mask, list) or len(mask) != 1 or not is_mask(mask) or is_outline_of_box(entry):
        return []
    points = np.array(mask[0], dtype=np.float64).reshape(-1, 2)  # [2·k] → [k, 2]
    x, y, w, h = entry["bbox"][:4]
    around = np.concatenate([points.min(axis=0), points.max(axis=0)])
    same = (np.abs(around - (x, y, x + w, y + h)) <= SAME_BOX).all()
    if len(points) == 4:  # which could be read as a rotated box: closed, it is none
        points = np.concatenate([points, points[:1]])
    return points.reshape(-1).tolist() if same else []


def is_outline_of_box(entry: dict[str, Any]) -> bool:
    """Whether a mask only repeats the box, as Roboflow writes it."""
    outline = entry["segmentation"]
    if not isinstance(outline, list) or len(outline) != 1 or not isinstance(outline[0], list):
        return False
    try:
        points = np.array(outline[0], dtype=np.float64).reshape(-1, 2)  # [2·k] → [k, 2]
    except (ValueError, TypeError):
        return False
    corners = corners_of(entry["bbox"])
    apart = np.abs(points[:, None] - corners).max(axis=2)  # [k, 4]
    return len(points) >= 4 and bool((apart.min(axis=1) < SAME).all() and (apart.min(axis=0) < SAME).all())


def notes(content: dict[str, Any], to: str) -> list[str]:
    """What else does not travel: ids that the format has not, and keys of a tool's own."""
    if to == "coco":
        return []
    said = []
    by_name = sorted(content["images"], key=lambda image: image["file_name"])
    if [image["id"] for image in by_name] != list(range(1, len(by_name) + 1)):
        said.append(f"Images have no ids in {to.upper()}: read again, they are numbered by name, from 1.")
    if to == "voc":
        named = sorted((str(category.get("name")), category["id"]) for category in content["categories"])
        if [id for _, id in named] != list(range(1, len(named) + 1)):
            said.append("Categories have no ids in VOC: read again, they are numbered by name, from 1.")
    keys = {key for key in content if key not in ("images", "annotations", "categories")}
    carried = CARRIED | set(voc.EXTRAS if to == "voc" else ())
    keys |= {key for entry in content["annotations"] for key in entry if key not in carried}
    keys |= {key for entry in content["categories"] for key in entry if key not in ("id", "name")}
    if keys:
        said.append(f"Not carried over: {', '.join(sorted(map(str, keys)))}.")
    return said


def write_coco(content: dict[str, Any], target: str) -> list[str]:
    """Writes a COCO file."""
    if not target.lower().endswith(".json"):
        raise OdtkError(f"{target}: a COCO file is a .json.")
    check_writable(target)
    write_json(content, target)
    return [f"Wrote {target}: {counts(content)}."]


def counts(content: dict[str, Any]) -> str:
    return (
        f"{plural(len(content['images']), 'image')}, {plural(len(content['annotations']), 'box', 'boxes')}, "
        f"{plural(len(content['categories']), 'category', 'categories')}"
    )


def write_folder(content: dict[str, Any], folder: Path, target: str, to: str) -> list[str]:
    """Writes a dataset of YOLO or VOC, whole or not at all."""
    names = {image["id"]: PurePosixPath(image["file_name"]) for image in content["images"]}
    if not names:
        raise OdtkError("There are no images, so there is nothing to convert.")
    outside = next((name for name in names.values() if name.is_absolute() or ".." in name.parts), None)
    if outside is not None or not any(os.path.isfile(folder / name) for name in names.values()):
        raise OdtkError(
            f"The images are not in {folder}: give their folder with --images ({outside or names.popitem()[1]})."
        )
    sizes = sizes_of(content, folder)
    shared = os.path.commonpath([name.parent for name in names.values()])
    folder = folder / shared
    names = {id: name.relative_to(shared) if shared else name for id, name in names.items()}
    twice = [stem for stem, count in Counter(name.with_suffix("") for name in names.values()).items() if count > 1]
    if twice:
        raise OdtkError(
            f"Two images are called {twice[0]}, with different endings: {to.upper()} has one file for both."
        )
    write = write_yolo if to == "yolo" else write_voc
    with whole_folder(target) as place:
        write(content, names, sizes, folder, place)
    link = "images" if to == "yolo" else "JPEGImages"
    start = f"{target}/data.yaml" if to == "yolo" else target
    return [f"Wrote {start}: {counts(content)}; {target}/{link} is a link to {folder}."]


@contextlib.contextmanager
def whole_folder(target: str) -> Iterator[Path]:
    """A new folder that gets its name when the block has ended; if it fails, nothing stays of it.

    The folders above it are made where they are missing.
    """
    path = Path(target).absolute()
    make_folder(str(path.parent))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir()
        yield temporary
        os.rename(temporary, path)
    except (OSError, UnicodeEncodeError) as error:
        raise OdtkError(f"{target} could not be written ({os_error_reason(error)}).") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def objects_of(content: dict[str, Any], to: str) -> dict[int, list[dict[str, Any]]]:
    """The annotations that a format holds, by image id."""
    found: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in content["images"]}
    for entry in content["annotations"]:
        if not is_lost_crowd(entry, to):
            found[entry["image_id"]].append(entry)
    return found


def write_yolo(
    content: dict[str, Any], names: dict[int, PurePosixPath], sizes: Sizes, folder: Path, place: Path
) -> None:
    """Writes data.yaml, train.txt, labels/ and the link; OBB's four corners for all boxes if one is rotated, else
    outlines for the masks that are one, and for the boxes beside them in their image.

    Args:
        names, sizes: of the images, by their ids; the names are relative to the folder.
        place: where to write.
    """
    inner = next((name for name in names.values() if "images" in name.parts[:-1]), None)
    if inner:
        raise OdtkError(
            f"{folder / inner}: YOLO's tools would look for its labels among the images; rename that folder."
        )
    refuse_unturned(names, sizes, folder)
    categories = sorted(content["categories"], key=lambda category: category["id"])
    ids = [category["id"] for category in categories]
    label = {id: number for number, id in enumerate(ids)}
    rotated = has_rotated(content)
    for id, entries in objects_of(content, "yolo").items():
        width, height = sizes[id]
        lines = []
        outlines = [[] if rotated else outline_of(entry) for entry in entries]
        outlined = any(outlines)  # Ultralytics refuses a file that has both: a box is then an outline too, closed
        for entry, outline in zip(entries, outlines, strict=True):
            x, y, w, h = entry["bbox"][:4]
            if rotated:
                values = (corners_of(entry["bbox"]) / (width, height)).reshape(-1).tolist()  # [4, 2] → [8]
            elif outlined:
                corners = corners_of(entry["bbox"])  # [4, 2]
                points = np.array(outline).reshape(-1, 2) if outline else np.concatenate([corners, corners[:1]])
                values = (points / (width, height)).reshape(-1).tolist()  # [2·k], fractions
            else:
                values = [(x + w / 2) / width, (y + h / 2) / height, w / width, h / height]
            lines.append(" ".join([str(label[entry["category_id"]]), *(f"{value:.12g}" for value in values)]) + "\n")
        write_text(place / "labels" / names[id].with_suffix(".txt"), "".join(lines))
    listed = sorted(names.values(), key=str)
    write_text(place / "train.txt", "".join(f"./images/{name}\n" for name in listed))
    described: dict[str, Any] = {
        "train": "train.txt",
        "names": {number: str(c.get("name", c["id"])) for number, c in enumerate(categories)},
    }
    if ids != list(range(len(ids))):
        described["category_ids"] = ids
    write_text(place / "data.yaml", yaml.safe_dump(described, sort_keys=False, allow_unicode=True))
    os.symlink(folder.resolve(), place / "images")


def refuse_unturned(names: dict[int, PurePosixPath], sizes: Sizes, folder: Path) -> None:
    """Refuses boxes of an image as it is stored where it is shown turned, because YOLO's are of the turned image."""
    headers = read_headers([folder / name for name in names.values()])
    for (id, name), header in zip(names.items(), headers, strict=True):
        if not isinstance(header, Header) or header.orientation not in SWAPS_SIDES:
            continue
        if sizes[id] == (header.width, header.height) and header.width != header.height:
            raise OdtkError(
                f"{folder / name} is shown turned by its EXIF orientation, and its boxes are not: YOLO has no such "
                "boxes, so turn the image or remove the orientation."
            )


def write_voc(
    content: dict[str, Any], names: dict[int, PurePosixPath], sizes: Sizes, folder: Path, place: Path
) -> None:
    """Writes Annotations/ and the link; takes the same as write_yolo."""
    categories = {category["id"]: str(category.get("name", category["id"])) for category in content["categories"]}
    for text in (*categories.values(), *map(str, names.values())):
        if not text or text != text.strip() or any(character < " " for character in text):
            raise OdtkError(f"XML cannot keep the name {text!r}, with its spaces or control characters: rename it.")
    for id, entries in objects_of(content, "voc").items():
        root = ElementTree.Element("annotation")
        fields = {"folder": "JPEGImages", "filename": names[id].name}
        for key, value in fields.items():
            ElementTree.SubElement(root, key).text = value
        size = ElementTree.SubElement(root, "size")
        for key, number in zip(("width", "height", "depth"), (*sizes[id], 3), strict=True):
            ElementTree.SubElement(size, key).text = str(number)
        ElementTree.SubElement(root, "segmented").text = "0"
        for entry in entries:
            add_object(root, categories[entry["category_id"]], entry)
        ElementTree.indent(root)
        text = ElementTree.tostring(root, encoding="unicode") + "\n"
        write_text(place / "Annotations" / names[id].with_suffix(".xml"), text)
    os.symlink(folder.resolve(), place / "JPEGImages")


def add_object(root: ElementTree.Element, name: str, entry: dict[str, Any]) -> None:
    """Appends an <object> of VOC: its pixels are counted from 1 (voc.py)."""
    one = ElementTree.SubElement(root, "object")
    ElementTree.SubElement(one, "name").text = name
    for key in voc.EXTRAS:
        if key in entry or key != "occluded":  # which only some tools have
            ElementTree.SubElement(one, key).text = "1" if entry.get(key) == 1 else "0"
    if is_turned(entry):
        corners = corners_of(entry["bbox"])
        (x1, y1), (x2, y2) = corners.min(axis=0).tolist(), corners.max(axis=0).tolist()
    else:
        x1, y1, w, h = entry["bbox"][:4]
        x2, y2 = x1 + w, y1 + h
    box = ElementTree.SubElement(one, "bndbox")
    for key, value in zip(voc.NUMBERS, (x1 + 1, y1 + 1, x2, y2), strict=True):
        ElementTree.SubElement(box, key).text = f"{value:.12g}"
