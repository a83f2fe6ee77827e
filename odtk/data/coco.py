"""COCO annotations: the reader, and the rules for what is used, fixed and refused.

A fault is either fixed, with one counted warning, or refused before the run starts:

  fixed    degenerate box (w or h not above 0, or not finite): dropped
           box that reaches beyond the image: clipped (rotated: kept as it is)
           box wholly outside the image (rotated: with its center outside): dropped
           crowd: not used in training
           duplicate annotation id: both annotations are kept
           rotated run, box of four numbers: theta is 0
           image without width or height: taken from the file
           unusual kind of image: see images.py
           no categories in the file: made from the annotations' category ids
           in training: a category without annotations keeps its place and its id
  refused  broken or unreadable JSON
           missing image; wrong width or height
           damaged image: truncated or unreadable (left out on request, see Dataset.load)
           boxes that are all in another format (box_format.py)
           duplicate image or category id; an id that is not a 64-bit integer
           annotation of an unknown image or category
           bbox of the wrong form; five numbers in an axis-aligned run; theta beyond ±2π (degrees?)
           in training: no boxes at all

EXIF: boxes belong to the raster whose width and height the annotations state. An image is turned by its EXIF
orientation only where the stated size is that of the turned image and not that of the stored one.

Training and `odtk check` list every fault (CocoReader); scoring stops at the first (prepare_ground_truth).
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from ..categories import Category
from ..config import OdtkError
from ..files import parse_json
from .box_format import find_format
from .headers import read_headers
from .images import SWAPS_SIDES, Header, ImageError, MissingImage
from .missing import NearestFiles, none_found
from .records import DAMAGED, OTHER_FORMAT, Fault, Image
from .table import AnnotationTable, Rows, decode, plain_rows, positions
from .tars import Member, TarSet

CLIP_TOLERANCE = 1.0  # pixels by which a box may leave its image before its clipping is worth a warning
ID_FAULT = "its id is not a 64-bit integer"
MAX_MASK_SIDE = MAX_MASK_COORDINATE = 65535  # pixels: the run lengths of a larger mask do not fit pycocotools' 32 bits
MAX_INT = 2**1023  # JSON's whole numbers have no bound, floats have
Place = tuple[str, str]  # file and id of a Fault


def load_json(path: Path) -> dict[str, Any]:
    """The content of a COCO annotation file: lists of objects, their values not yet checked.

    Raises:
        OdtkError: the file is missing or cannot be read, is not JSON (with line and column), or is not COCO's object.
    """
    return parse_content(read_text(path), path)


def load_boxes(path: Path) -> dict[str, Any]:
    """As load_json, but what no dataset needs (outlines, areas …) may be left out, and the annotations may be an
    AnnotationTable, which is read and checked many times faster.

    Raises:
        OdtkError: as load_json.
    """
    text = read_text(path)
    return decode(text) or parse_content(text, path)


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # a byte order mark is skipped
    except FileNotFoundError:
        raise OdtkError(f"The annotation file {path} does not exist: give the right one with --annotations.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise OdtkError(f"The annotation file {path} cannot be read: {error}.") from None


def parse_content(text: str, path: Path) -> dict[str, Any]:
    content = parse_json(text, path)
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise OdtkError(f'{path} is not a COCO annotation file: it has no list "images".')
    for name in ("annotations", "categories"):
        if not isinstance(content.get(name, []), list):
            raise OdtkError(f'{path} is not a COCO annotation file: "{name}" is not a list.')
    for name in ("images", "annotations", "categories"):
        if not all(isinstance(entry, dict) for entry in content.get(name, [])):
            raise OdtkError(f'{path} is not a COCO annotation file: "{name}" has an entry that is not an object.')
    return content


class CocoReader:
    """Takes the content of one annotation file and collects its faults; each method applies the rules for one kind of
    entry.

    Args:
        content: as load_json returns it. Where it was read from another format, an entry may say in ``source`` where
            it comes from (``labels/a.txt, line 3``); its faults then show that as their place.
        path: the file or folder that the content was read from.
        folder: of the images, or the tar files that they are in.
        rotated: boxes become (x, y, w, h, theta).
        training: what training needs is checked too.
    """

    def __init__(
        self, content: dict[str, Any], path: Path, folder: Path | TarSet, rotated: bool, training: bool
    ) -> None:
        self.content, self.path, self.folder = content, path, folder
        self.rotated, self.training = rotated, training
        self.has_sources = path.suffix.lower() != ".json"  # a user's own key "source" means something else
        self.faults: list[Fault] = []
        self.boxes_of_label: Counter[int] = Counter()  # counts the boxes of refused images too

    def read(self) -> tuple[list[Image], tuple[Category, ...], list[Fault]]:
        """The usable images in the order of the file, the categories sorted by id, and every fault.

        Raises:
            OdtkError: the file lists no images.
        """
        categories = self.read_categories()
        images = self.read_images()
        if not self.refuse_format(images):  # else every box would be a fault of its own
            self.read_boxes(images, {category.id: i for i, category in enumerate(categories)})
            if self.training:
                self.check_trainable(categories)
        usable = [image for image in images.values() if image is not None]
        return usable, categories, self.faults

    def fix(self, where: Place, rule: str, reason: str = "") -> None:
        self.faults.append(Fault(*where, reason or rule, True, rule))

    def refuse(self, where: Place, rule: str, reason: str = "") -> None:
        self.faults.append(Fault(*where, reason or rule, False, rule))

    def place(self, name: str, entry: dict[str, Any] | None = None) -> Place:
        """Where a fault of an entry is: at its source if it has one, else in the annotation file under its name."""
        source = entry.get("source") if entry and self.has_sources else None
        return (source, "") if isinstance(source, str) else (str(self.path), name)

    def read_categories(self) -> tuple[Category, ...]:
        entries = categories_of(self.content)
        if entries and not self.content.get("categories"):
            self.fix(self.place(""), 'no "categories": made from the annotations\' category ids')
        categories: dict[int, Category] = {}
        for entry in entries:
            id = entry.get("id")
            if not is_id(id):
                self.refuse(self.place(f"category {id!r}", entry), ID_FAULT)
            elif id in categories:
                self.refuse(self.place(f"category {id}", entry), "duplicate category id")
            else:
                categories[id] = Category(id, str(entry.get("name", id)))
        return tuple(categories[id] for id in sorted(categories))

    def read_images(self) -> dict[int, Image | None]:
        """Images by id; None stands for a refused one, so that its annotations are not further faults."""
        entries: dict[int, dict[str, Any]] = {}
        for entry in self.content["images"]:
            id = entry.get("id")
            if not is_id(id):
                self.refuse(self.place(f"image {id!r}", entry), ID_FAULT)
            elif id in entries:
                self.refuse(self.place(f"image {id}", entry), "duplicate image id")
            elif reason := reading_fault(entry):
                self.refuse(self.place(f"image {id}", entry), "unreadable annotations", reason)
            elif not isinstance(entry.get("file_name"), str):
                self.refuse(self.place(f"image {id}", entry), "it has no 'file_name'")
            else:
                entries[id] = entry
        if not self.content["images"]:
            raise OdtkError(f"{self.path} lists no images.")
        for id, entry in entries.items():
            in_folder = not (self.has_sources or isinstance(self.folder, TarSet))
            if in_folder and leads_out(entry["file_name"]):
                self.fix(
                    self.place(f"image {id}", entry), "its file_name leads out of the image folder: taken as it is"
                )
        paths, headers, members = self.look_up([entry["file_name"] for entry in entries.values()])
        images: dict[int, Image | None] = {}
        for (id, entry), path, header in zip(entries.items(), paths, headers, strict=True):
            if isinstance(header, ImageError):
                images[id] = None
                if not isinstance(header, MissingImage):
                    self.refuse((str(path), f"image {id}"), DAMAGED, str(header))
            else:
                images[id] = self.read_image(id, entry, path, header)
        for image, member in zip(images.values(), members, strict=True):
            if image is not None:
                image.member = member
        missing = [i for i, header in enumerate(headers) if isinstance(header, MissingImage)]
        if missing:
            self.refuse_missing([(id, entries[id]["file_name"]) for id in entries], missing)
        return images

    def look_up(self, names: list[str]) -> tuple[list[Path], list[Header | ImageError], list[Member | None]]:
        """Path, header and, in a tar file, place of each image."""
        if isinstance(self.folder, TarSet):
            found = [self.folder.find(name) for name in names]
            return [one.member.path for one in found], [one.header for one in found], [one.member for one in found]
        paths = [self.folder / name for name in names]
        return paths, read_headers(paths), [None] * len(names)

    def refuse_missing(self, names: list[tuple[int, str]], missing: list[int]) -> None:
        """One fault for each image that does not exist, or one for all where none does.

        Args:
            names: id and file name of every image.
            missing: the positions in it of those that do not exist.
        """
        if isinstance(self.folder, TarSet):
            for id, name in (names[i] for i in missing):
                reason = f"there is no such image in {self.folder}"
                self.refuse((name, f"image {id}"), "missing image", reason)
            return
        if len(missing) == len(names) > 1:
            self.refuse(self.place(""), "no image found", none_found(self.folder, [name for _, name in names]))
            return
        nearest = NearestFiles(self.folder)
        for id, name in (names[i] for i in missing):
            meant = nearest.find(name)
            reason = "the file is missing" + (f" (did you mean {meant}?)" if meant else "")
            self.refuse((str(self.folder / name), f"image {id}"), "missing image", reason)

    def read_image(self, id: int, entry: dict[str, Any], path: Path, header: Header) -> Image | None:
        """The image without its boxes, or None where the stated size is not that of the file."""
        stated_at, file = self.place(f"image {id}", entry), (str(path), f"image {id}")
        if header.rule:
            self.fix(file, header.rule)
        stored = (header.width, header.height)
        turned = stored[::-1] if header.orientation in SWAPS_SIDES else stored
        stated: tuple[Any, Any] = (entry.get("width"), entry.get("height"))
        orientation = 1
        if not all(is_id(side) and side > 0 for side in stated):
            self.fix(stated_at, "no width or height in the annotations: taken from the file")
        elif stated != stored and stated == turned:
            orientation = header.orientation
            self.fix(file, "turned by its EXIF orientation, as the annotated size says")
        elif stated != stored:
            self.refuse(
                stated_at,
                "wrong width or height",
                f"the annotations say {stated[0]}×{stated[1]}, {path.name} is {stored[0]}×{stored[1]}, "
                "so its boxes cannot be trusted",
            )
            return None
        elif header.orientation != 1:
            self.fix(file, "EXIF orientation ignored, as the annotated size is that of the stored image")
        return Image.from_header(id, path, header, orientation, rotated=self.rotated)

    def refuse_format(self, images: dict[int, Image | None]) -> bool:
        """Refuses boxes that are all in another format; says whether they are."""
        sizes = image_sizes(self.content, images)
        fault = format_fault(self.content.get("annotations", []), sizes, self.path)
        if fault:
            self.refuse(self.place(""), OTHER_FORMAT, fault)
        return bool(fault)

    def read_boxes(self, images: dict[int, Image | None], labels: dict[int, int]) -> None:
        """Gives the images their boxes and labels; ``labels`` maps a category id to its class index."""
        entries = self.content.get("annotations", [])
        if isinstance(entries, AnnotationTable):
            rows = plain_rows(entries, images, labels, CLIP_TOLERANCE, rotated=self.rotated)
        else:
            rows = Rows.none_of(len(entries), 5 if self.rotated else 4)
        self.boxes_of_label.update(dict(enumerate(np.bincount(rows.label[rows.kept]).tolist())))
        repeated = repeated_ids(entries)
        number_of = {id: number for number, id in enumerate(images)}
        for position in np.flatnonzero(~rows.kept).tolist():
            found = self.read_annotation(position, entries[position], images, labels, repeated=bool(repeated[position]))
            if found is not None:
                image_id, rows.label[position], rows.boxes[position] = found
                rows.image[position], rows.kept[position] = number_of[image_id], True
        rows.give_to(list(images.values()))

    def read_annotation(
        self,
        position: int,
        entry: dict[str, Any],
        images: dict[int, Image | None],
        labels: dict[int, int],
        *,
        repeated: bool,
    ) -> tuple[int, int, list[float]] | None:
        """The id of the image, the label and the usable part of an annotation's box; None where there is none.

        Args:
            position: of the annotation in the file, from 0.
            repeated: an earlier one has its id.
        """
        where = self.place(f"annotation {entry.get('id', f'at position {position}')}", entry)
        if repeated:
            self.fix(where, "duplicate annotation id: both annotations are kept")
        unread, of = reading_fault(entry), entry.get("image_id")
        damaged = is_id(of) and of in images and images[of] is None  # then the image is the fault
        if unread and not (damaged and "category_id" in entry):
            self.refuse(where, "unreadable annotation", unread)
            return None
        if reason := reference_fault(entry, "image_id", images):
            self.refuse(where, "unknown image", reason)
            return None
        if reason := reference_fault(entry, "category_id", labels):
            self.refuse(where, "unknown category", reason)
            return None
        image_id, label = entry["image_id"], labels[entry["category_id"]]
        image = images[image_id]
        box = self.read_box(where, entry, image) if image is not None else None
        self.boxes_of_label[label] += image is None or box is not None
        return None if box is None else (image_id, label, box)

    def read_box(self, where: Place, entry: dict[str, Any], image: Image) -> list[float] | None:
        """The usable part of an annotation's box, (x, y, w, h) or (x, y, w, h, theta); None where there is none."""
        if reason := bbox_fault(entry, rotated=self.rotated):
            self.refuse(where, reason)
            return None
        box = entry["bbox"]
        if entry.get("iscrowd", 0):
            self.fix(where, "crowd: not used in training")
            return None
        if is_degenerate(box):
            self.fix(where, "degenerate box dropped", f"degenerate box {box} dropped")
            return None
        return self.check_rotated_box(where, box, image) if self.rotated else self.clip_box(where, box, image)

    def check_rotated_box(self, where: Place, box: list[float], image: Image) -> list[float] | None:
        """The box (x, y, w, h, theta) unclipped, or None where it cannot be used."""
        if len(box) == 4:
            self.fix(where, "axis-aligned box in a rotated run: theta is 0")
            box = [*box, 0.0]
        if abs(box[4]) > 2 * math.pi:
            self.refuse(where, "theta beyond ±2π", f"theta {box[4]} is beyond ±2π: it must be in radians")
            return None
        center_x, center_y = box[0] + box[2] / 2, box[1] + box[3] / 2
        if not (0 <= center_x <= image.width and 0 <= center_y <= image.height):
            self.fix(where, "box with its center outside the image dropped")
            return None
        return box

    def clip_box(self, where: Place, box: list[float], image: Image) -> list[float] | None:
        """The part of a box (x, y, w, h) inside its image, or None where there is none."""
        x, y, w, h = box
        x1, y1 = min(max(x, 0), image.width), min(max(y, 0), image.height)
        x2, y2 = min(max(x + w, 0), image.width), min(max(y + h, 0), image.height)
        if x2 <= x1 or y2 <= y1:
            self.fix(where, "box outside the image dropped", f"box {box} outside the image dropped")
            return None
        if max(x1 - x, y1 - y, x + w - x2, y + h - y2) > CLIP_TOLERANCE:
            self.fix(where, "box clipped to the image", f"box {box} clipped to the image")
        return [x1, y1, x2 - x1, y2 - y1]

    def check_trainable(self, categories: tuple[Category, ...]) -> None:
        if not self.boxes_of_label.total():
            self.refuse(self.place(""), "there are no usable boxes to learn from")
            return
        rule = "category without annotations: it keeps its place and its id"
        for label, category in enumerate(categories):
            if not self.boxes_of_label[label]:
                reason = f"{category.name!r} has no annotations: it keeps its place and its id, but is not learned"
                self.fix(self.place(f"category {category.id}"), rule, reason)


def is_id(value: Any) -> TypeGuard[int]:
    """Whether a value can be the id of an image or a category. Tensors hold ids as int64."""
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is a number that fits a float; JSON's true and false are not. NaN and infinity are."""
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) < MAX_INT
    return isinstance(value, float)


def is_degenerate(box: Sequence[float]) -> bool:
    """Whether a box [x, y, w, h(, theta)] has no area, or is not finite."""
    return not all(math.isfinite(value) for value in box) or box[2] <= 0 or box[3] <= 0


def is_mask(value: Any) -> bool:
    """Whether pycocotools can draw a "segmentation".

    It does not check that itself: a NaN or a coordinate of 1e9 makes it use all memory, or crash.
    """
    if isinstance(value, list):
        return all(
            isinstance(polygon, list)
            and len(polygon) >= 6
            and len(polygon) % 2 == 0
            and all(is_number(v) and abs(v) <= MAX_MASK_COORDINATE for v in polygon)  # false for a NaN
            for polygon in value
        )
    if not isinstance(value, dict):
        return False
    size, counts = value.get("size"), value.get("counts")
    if not isinstance(size, list) or len(size) != 2 or not all(is_mask_side(side) for side in size):
        return False
    if isinstance(counts, list):  # lengths of runs, which together fill the mask
        return all(is_id(run) and run >= 0 for run in counts) and sum(counts) == size[0] * size[1]
    return isinstance(counts, (str, bytes))


def is_mask_side(value: Any) -> TypeGuard[int]:
    """Whether a value can be the width or the height of a mask, in pixels."""
    return is_id(value) and 0 < value <= MAX_MASK_SIDE


def repeated_ids(entries: Sequence[dict[str, Any]]) -> Sequence[bool] | np.ndarray:
    """Which annotations have the id of an earlier one."""
    if isinstance(entries, AnnotationTable):
        return entries.repeated
    seen: set[str] = set()
    repeated = []
    for entry in entries:
        repeated.append("id" in entry and str(entry["id"]) in seen)
        seen.add(str(entry.get("id")))
    return repeated


def reading_fault(entry: dict[str, Any]) -> str:
    """Why a reader of another format (yolo.py, voc.py) found an entry unreadable, or an empty string."""
    reason = entry.get("unreadable")
    return reason if isinstance(reason, str) and isinstance(entry.get("source"), str) else ""


def reference_fault(entry: dict[str, Any], key: str, known: Container[Any], *, floats: bool = False) -> str:
    """Why an "image_id" or "category_id" names nothing in the dataset, or an empty string.

    Args:
        known: the dataset's ids.
        floats: 7.0 is taken for 7, as pycocotools does.
    """
    id = entry.get(key)
    if id is None:
        return f"it has no {key!r}"
    if (is_number(id) if floats else is_id(id)) and id in known:
        return ""
    return f"its {key} {id!r} is not among the {'images' if key == 'image_id' else 'categories'}"


def bbox_fault(entry: dict[str, Any], *, rotated: bool) -> str:
    """Why a "bbox" does not have the form [x, y, w, h], or if ``rotated`` also [x, y, w, h, theta]; or an empty string.

    The numbers themselves are not checked (see is_degenerate).
    """
    box = entry.get("bbox")
    if not isinstance(box, list) or len(box) not in (4, 5) or not all(is_number(value) for value in box):
        return f"its bbox is not a list of {'four or five' if rotated else 'four'} numbers"
    if len(box) == 5 and not rotated:
        return "its bbox has five numbers: rotated boxes require --rotated-bbox"
    return ""


def entry_fault(
    entry: Any, image_ids: Container[int], category_ids: Container[int], *, segmentation: bool = False
) -> str:
    """Why an annotation or a detection cannot be scored, or an empty string.

    Args:
        image_ids, category_ids: those of the annotations.
        segmentation: masks are scored, so they are checked too.
    """
    if not isinstance(entry, dict):
        return "it is not a dictionary"
    fault = (
        reading_fault(entry)
        or reference_fault(entry, "image_id", image_ids, floats=True)
        or reference_fault(entry, "category_id", category_ids, floats=True)
        or bbox_fault(entry, rotated=True)
    )
    if not fault and segmentation and not all(abs(v) <= MAX_MASK_COORDINATE for v in entry["bbox"][:4]):
        return f"its 'bbox' reaches beyond {MAX_MASK_COORDINATE} pixels, which no mask can"
    if not fault and segmentation and entry.get("segmentation") and not is_mask(entry["segmentation"]):
        return (
            "its 'segmentation' is neither a list of polygons [x, y, x, y, x, y, …] in pixels "
            f"nor an RLE mask {{size, counts}}, of at most {MAX_MASK_SIDE} pixels in width and height"
        )
    return fault


def image_sizes(content: dict[str, Any], images: Mapping[int, Image | None]) -> dict[int, tuple[int, int]]:
    """(width, height) in pixels by image id: of the images that were read, else as the annotations state it."""
    sizes = {id: (image.width, image.height) for id, image in images.items() if image is not None}
    for entry in content["images"]:
        stated = (entry.get("width"), entry.get("height"))
        if is_id(entry.get("id")) and all(is_id(side) and side > 0 for side in stated):
            sizes.setdefault(entry["id"], stated)
    return sizes


def format_fault(entries: Sequence[dict[str, Any]], sizes: Mapping[int, tuple[int, int]], path: Path) -> str:
    """What the boxes of all annotations are, if it is not COCO's x y w h, and what converts them; or an empty string.

    Args:
        entries: annotations; those without a usable box or a known image are left out.
        sizes: (width, height) in pixels by image id.
        path: of the annotations, for the command.
    """
    if isinstance(entries, AnnotationTable):
        known, place = positions(entries.image_id, list(sizes))
        used = known & entries.has_area
        boxes = np.concatenate([entries.bbox[used, :4], entries.numbers[used, None]], axis=1)
        frames = np.array(list(sizes.values()), dtype=np.float64).reshape(-1, 2)[place[used]]
        return find_format(boxes, frames, path) if len(boxes) else ""
    listed, listed_frames = [], []
    for entry in entries:
        id = entry.get("image_id")
        if is_id(id) and id in sizes and not bbox_fault(entry, rotated=True) and not is_degenerate(entry["bbox"]):
            listed.append(entry["bbox"][:4] + [len(entry["bbox"])])
            listed_frames.append(sizes[id])
    if not listed:
        return ""
    return find_format(np.array(listed, dtype=np.float64), np.array(listed_frames, dtype=np.float64), path)


def categories_of(content: dict[str, Any]) -> list[dict[str, Any]]:
    """The categories of a COCO file; where it lists none, categories made from its annotations' category ids."""
    if content.get("categories"):
        return content["categories"]
    found = {a["category_id"] for a in content.get("annotations", []) if is_id(a.get("category_id"))}
    return [{"id": id, "name": str(id)} for id in sorted(found)]


def prepare_ground_truth(truth: dict[str, Any], file: str = "", *, segmentation: bool = False) -> dict[str, Any]:
    """A copy of annotations that can be scored: with every list that COCO files may lack, without degenerate boxes.

    It accepts at least what training and `odtk check` accept; images are not opened, and crowds are kept.

    Args:
        truth: as load_json returns it; not modified.
        file: its name for error messages.
        segmentation: masks are scored, so they are checked too.

    Raises:
        OdtkError: names the first entry that cannot be used.
    """
    of = f" of {file}" if file else ""
    boxes, categories = truth.get("annotations", []), categories_of(truth)
    for what, entries in (("Image", truth["images"]), ("Category", categories)):
        for entry in entries:
            if not is_id(entry.get("id")):
                raise OdtkError(f"{what} {entry.get('id')!r}{of}: {ID_FAULT}.")
            if fault := reading_fault(entry):
                raise OdtkError(f"{entry['source']}: {fault}.")
    image_ids, category_ids = {image["id"] for image in truth["images"]}, {category["id"] for category in categories}
    for i, entry in enumerate(boxes):
        if fault := entry_fault(entry, image_ids, category_ids, segmentation=segmentation):
            place = entry["source"] if reading_fault(entry) else f"Annotation {entry.get('id', f'at position {i}')}{of}"
            raise OdtkError(f"{place}: {fault}.")
    if fault := format_fault(boxes, image_sizes(truth, {}), Path(file or "annotations.json")):
        raise OdtkError(f"The annotations{of} cannot be used: {fault}.")
    kept = [a for a in boxes if not is_degenerate(a["bbox"])]
    return {"images": truth["images"], "categories": categories, "annotations": kept}


def leads_out(name: str) -> bool:
    """Whether a file name, relative to a folder, means a file outside of it."""
    return os.path.isabs(name) or os.path.normpath(name).split(os.sep)[0] == os.pardir
