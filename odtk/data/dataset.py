"""COCO annotations → an index of images and boxes, checked by one set of rules. No pixels.

Boxes are kept as COCO writes them: [x, y, w, h] in pixels of the image, x and y of the upper left corner;
rotated ones [x, y, w, h, theta], the un-turned box and its anticlockwise turn about its centre in radians.

Each fault is either fixed, with one counted warning, or refused before the run starts:

  fixed    degenerate box (w or h not above 0, or not finite): dropped
           box beyond the image: clipped (rotated: kept); wholly outside (rotated: its centre): dropped
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

import json
import math
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from ..config import OdtkError
from .images import EXTENSIONS, SWAPS_SIDES, Header, ImageError, decode, read_header

CLIP_TOLERANCE = 1.0  # pixels a box may reach out of its image before the clipping is worth a warning
SCAN_THREADS = 16  # headers are read from disk, not computed


@dataclass(frozen=True)
class Category:
    """A class of objects: the id of the annotations and its name."""

    id: int
    name: str


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
    return _CocoReader(Path(annotations).expanduser(), folder, rotated, training).read()


def _read_folder(folder: Path, rotated: bool) -> Dataset:
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS)
    if not paths:
        raise OdtkError(f"The folder {folder} has no images ({', '.join(sorted(EXTENSIONS))}).")
    dataset = Dataset([], (), rotated=rotated)
    for number, (path, header) in enumerate(zip(paths, _headers(paths), strict=True), start=1):
        if isinstance(header, ImageError):
            dataset.faults.append(Fault(str(path), f"image {number}", str(header), False, "unusable image"))
            continue
        if header.rule:
            dataset.faults.append(Fault(str(path), f"image {number}", header.rule, True, header.rule))
        dataset.images.append(_image(number, path, header, header.orientation, rotated))
    return dataset


def _headers(paths: Sequence[Path]) -> list[Header | ImageError]:
    def header(path: Path) -> Header | ImageError:
        try:
            return read_header(path)
        except ImageError as error:
            return error

    with ThreadPoolExecutor(SCAN_THREADS) as pool:
        return list(pool.map(header, paths))


def _image(id: int, path: Path, header: Header, orientation: int, rotated: bool) -> Image:
    width, height = header.width, header.height
    if orientation in SWAPS_SIDES:
        width, height = height, width
    boxes, labels = np.zeros((0, 5 if rotated else 4)), np.zeros(0, dtype=np.int64)
    return Image(id, path, width, height, boxes, labels, orientation, header.plain and orientation == 1)


def load_json(path: Path) -> dict[str, Any]:
    """The object of a COCO annotation file.

    Raises:
        OdtkError: no such file, no permission, not JSON (with line and column), not a COCO object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise OdtkError(f"The annotation file {path} does not exist: give the right one with --annotations.") from None
    except json.JSONDecodeError as error:
        raise OdtkError(
            f"{path} is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise OdtkError(f"The annotation file {path} cannot be read: {error}.") from None
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise OdtkError(f'{path} is not a COCO annotation file: it has no list "images".')
    for name in ("annotations", "categories"):
        if not isinstance(content.get(name, []), list):
            raise OdtkError(f'{path} is not a COCO annotation file: "{name}" is not a list.')
    for name in ("images", "annotations", "categories"):
        if not all(isinstance(entry, dict) for entry in content.get(name, [])):
            raise OdtkError(f'{path} is not a COCO annotation file: "{name}" has an entry that is not an object.')
    return content


class _CocoReader:
    """Reads one annotation file; each method applies the rules for one kind of entry."""

    def __init__(self, path: Path, folder: Path, rotated: bool, training: bool) -> None:
        self.path, self.folder, self.rotated, self.training = path, folder, rotated, training
        self.content = load_json(path)
        self.faults: list[Fault] = []
        self.boxes_of_label: Counter[int] = Counter()  # those of refused images too

    def read(self) -> Dataset:
        categories = self.read_categories()
        images = self.read_images()
        self.read_boxes(images, {category.id: i for i, category in enumerate(categories)})
        if self.training:
            self.check_training(categories)
        usable = [image for image in images.values() if image is not None]
        return Dataset(usable, categories, self.faults, self.rotated)

    def fix(self, id: str, rule: str, reason: str = "", file: Path | None = None) -> None:
        self.faults.append(Fault(str(file or self.path), id, reason or rule, True, rule))

    def refuse(self, id: str, rule: str, reason: str = "", file: Path | None = None) -> None:
        self.faults.append(Fault(str(file or self.path), id, reason or rule, False, rule))

    def read_categories(self) -> tuple[Category, ...]:
        entries = categories_of(self.content)
        if entries and not self.content.get("categories"):
            self.fix("", 'no "categories": made from the annotations\' category ids')
        categories: dict[int, Category] = {}
        for entry in entries:
            id = entry.get("id")
            if not is_id(id):
                self.refuse(f"category {id!r}", "the category id is not an integer of 64 bits")
            elif id in categories:
                self.refuse(f"category {id}", "duplicate category id")
            else:
                categories[id] = Category(id, str(entry.get("name", id)))
        return tuple(categories[id] for id in sorted(categories))

    def read_images(self) -> dict[int, Image | None]:
        """Image by id; None for one that was refused, so that its annotations are not faults of their own."""
        entries: dict[int, dict[str, Any]] = {}
        for entry in self.content["images"]:
            id = entry.get("id")
            if not is_id(id):
                self.refuse(f"image {id!r}", "the image id is not an integer of 64 bits")
            elif id in entries:
                self.refuse(f"image {id}", "duplicate image id")
            elif not isinstance(entry.get("file_name"), str):
                self.refuse(f"image {id}", "the image has no file_name")
            else:
                entries[id] = entry
        if not self.content["images"]:
            raise OdtkError(f"{self.path} lists no images.")
        paths = [self.folder / entry["file_name"] for entry in entries.values()]
        images: dict[int, Image | None] = {}
        for (id, entry), path, header in zip(entries.items(), paths, _headers(paths), strict=True):
            if isinstance(header, ImageError):
                self.refuse(f"image {id}", "unusable image", str(header), path)
                images[id] = None
            else:
                images[id] = self.read_image(id, entry, path, header)
        return images

    def read_image(self, id: int, entry: dict[str, Any], path: Path, header: Header) -> Image | None:
        name = f"image {id}"
        if header.rule:
            self.fix(name, header.rule, file=path)
        stored = (header.width, header.height)
        turned = stored[::-1] if header.orientation in SWAPS_SIDES else stored
        stated: tuple[Any, Any] = (entry.get("width"), entry.get("height"))
        orientation = 1
        if not all(is_id(side) and side > 0 for side in stated):
            self.fix(name, "no width or height in the annotations: taken from the file")
        elif stated != stored and stated == turned:
            orientation = header.orientation
            self.fix(name, "turned by its EXIF orientation, as the annotated size says", file=path)
        elif stated != stored:
            self.refuse(
                name,
                "wrong width or height",
                f"the annotations say {stated[0]}×{stated[1]}, {path.name} is {stored[0]}×{stored[1]}, "
                "so its boxes cannot be trusted",
            )
            return None
        elif header.orientation != 1:
            self.fix(name, "EXIF orientation ignored, as the annotated size is that of the stored image", file=path)
        return _image(id, path, header, orientation, self.rotated)

    def read_boxes(self, images: dict[int, Image | None], labels: dict[int, int]) -> None:
        found: dict[int, list[tuple[list[float], int]]] = {id: [] for id in images}
        seen: set[Any] = set()
        for position, entry in enumerate(self.content.get("annotations", [])):
            name = f"annotation {entry.get('id', f'at position {position}')}"
            if "id" in entry and str(entry["id"]) in seen:
                self.fix(name, "duplicate annotation id: both annotations are kept")
            seen.add(str(entry.get("id")))
            image_id = entry.get("image_id")
            if not is_id(image_id) or image_id not in images:
                self.refuse(name, "unknown image", f"its image_id {image_id!r} is not among the images")
                continue
            label = labels.get(entry["category_id"]) if is_id(entry.get("category_id")) else None
            if label is None:
                reason = f"its category_id {entry.get('category_id')!r} is not among the categories"
                self.refuse(name, "unknown category", reason)
                continue
            image = images[image_id]
            box = self.read_box(name, entry, image) if image is not None else None
            self.boxes_of_label[label] += image is None or box is not None
            if box is not None:
                found[image_id].append((box, label))
        for id, image in images.items():
            if image is not None and found[id]:
                image.boxes = np.array([box for box, _ in found[id]], dtype=np.float64)
                image.labels = np.array([label for _, label in found[id]], dtype=np.int64)

    def read_box(self, name: str, entry: dict[str, Any], image: Image) -> list[float] | None:
        """The usable part of an annotation's box, or None."""
        box = entry.get("bbox")
        if not isinstance(box, list) or len(box) not in (4, 5) or not all(is_number(value) for value in box):
            self.refuse(name, "bbox is not a list of four numbers" + (" or five" if self.rotated else ""))
            return None
        if len(box) == 5 and not self.rotated:
            self.refuse(name, "bbox has five numbers: rotated boxes need --rotated-bbox")
            return None
        if entry.get("iscrowd", 0):
            self.fix(name, "crowd: not used in training")
            return None
        if is_degenerate(box):
            self.fix(name, "degenerate box dropped", f"degenerate box {box} dropped")
            return None
        return self.keep_rotated(name, box, image) if self.rotated else self.clip(name, box, image)

    def keep_rotated(self, name: str, box: list[float], image: Image) -> list[float] | None:
        if len(box) == 4:
            self.fix(name, "axis-aligned box in a rotated run: theta is 0")
            box = [*box, 0.0]
        if abs(box[4]) > 2 * math.pi:
            self.refuse(name, "theta is beyond ±2π: it must be in radians", f"theta {box[4]} is not in radians")
            return None
        centre_x, centre_y = box[0] + box[2] / 2, box[1] + box[3] / 2
        if not (0 <= centre_x <= image.width and 0 <= centre_y <= image.height):
            self.fix(name, "box with its centre outside the image dropped")
            return None
        return box

    def clip(self, name: str, box: list[float], image: Image) -> list[float] | None:
        x, y, w, h = box
        x1, y1 = min(max(x, 0), image.width), min(max(y, 0), image.height)
        x2, y2 = min(max(x + w, 0), image.width), min(max(y + h, 0), image.height)
        if x2 <= x1 or y2 <= y1:
            self.fix(name, "box outside the image dropped", f"box {box} outside the image dropped")
            return None
        if max(x1 - x, y1 - y, x + w - x2, y + h - y2) > CLIP_TOLERANCE:
            self.fix(name, "box clipped to the image", f"box {box} clipped to the image")
        return [x1, y1, x2 - x1, y2 - y1]

    def check_training(self, categories: tuple[Category, ...]) -> None:
        if not self.boxes_of_label.total():
            self.refuse("", "no usable boxes: there is nothing to learn from")
            return
        for label, category in enumerate(categories):
            if not self.boxes_of_label[label]:
                self.refuse(
                    f"category {category.id}",
                    "category without annotations",
                    f"{category.name!r} has no annotations, so it could never be learned: "
                    "remove it from the categories or annotate it",
                )


def is_id(value: Any) -> TypeGuard[int]:
    """Whether a value can be the id of an image or a category: tensors hold ids as int64."""
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_degenerate(box: Sequence[float]) -> bool:
    """Whether a box [x, y, w, h(, theta)] has no area, or is not finite."""
    return not all(math.isfinite(value) for value in box) or box[2] <= 0 or box[3] <= 0


def categories_of(content: dict[str, Any]) -> list[dict[str, Any]]:
    """The categories of a COCO object; where it lists none, those made from its annotations' category ids."""
    found = {a["category_id"] for a in content.get("annotations", []) if is_id(a.get("category_id"))}
    return content.get("categories") or [{"id": id, "name": str(id)} for id in sorted(found)]


@dataclass(frozen=True)
class Report:
    """What `odtk check` prints."""

    faults: tuple[Fault, ...]
    dataset: Dataset

    @property
    def refused(self) -> int:
        """Number of faults that would stop a run."""
        return sum(not fault.fixed for fault in self.faults)

    def summary(self) -> list[str]:
        """Lines about images, boxes and categories."""
        images = self.dataset.images
        boxes = [image.boxes for image in images if len(image.boxes)]
        lines = [f"{len(images)} usable images, {sum(not len(image.boxes) for image in images)} of them without boxes"]
        if images:
            widths, heights = [image.width for image in images], [image.height for image in images]
            lines.append(f"image width {_spread(widths)}, height {_spread(heights)} pixels")
        if boxes:
            sizes = np.concatenate(boxes)[:, 2:4]
            area = sizes.prod(axis=1)
            small, large = (area < 32**2).mean(), (area >= 96**2).mean()  # COCO's own bounds
            lines.append(
                f"{len(sizes)} boxes, width {_spread(sizes[:, 0])}, height {_spread(sizes[:, 1])} pixels; "
                f"small (below 32² pixels) {small:.0%}, medium {1 - small - large:.0%}, large (96² or more) {large:.0%}"
            )
        labels = Counter(int(label) for image in images for label in image.labels)
        lines += [
            f"category {category.id} {category.name}: {labels[i]} boxes"
            for i, category in enumerate(self.dataset.categories)
        ]
        return lines


def _spread(values: Any) -> str:
    low, middle, high = np.percentile(values, (0, 50, 100))
    return f"{low:g}…{high:g} (median {middle:g})"


def check(annotations: str | Path | None, images: str | Path, *, rotated: bool = False, pixels: bool = True) -> Report:
    """Every fault of a dataset, as training would see it; with ``pixels`` each image is decoded to its end.

    Raises:
        OdtkError: the annotation file or the folder cannot be read at all.
    """
    dataset = read(annotations, images, rotated=rotated, training=annotations is not None)
    faults = list(dataset.faults)
    if pixels:
        damaged = [(image, reason) for image, reason in _damage(dataset.images) if reason]
        faults += [
            Fault(str(image.path), f"image {image.id}", reason, False, "unusable image") for image, reason in damaged
        ]
    return Report(tuple(faults), dataset)


def _damage(images: list[Image]) -> list[tuple[Image, str]]:
    def reason(image: Image) -> str:
        try:
            decode(image.path)
        except ImageError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor() as pool:
        return list(zip(images, pool.map(reason, images), strict=True))


def unmatched_boxes(
    dataset: Dataset, anchors: Sequence[tuple[int, np.ndarray]], *, resize: int, max_size: int, threshold: float
) -> tuple[int, str]:
    """How many boxes no anchor reaches, with the advice.

    An image is scaled as in inference (shorter side ``resize``, longer at most ``max_size``). For a given anchor shape
    the IoU is largest at the cell whose anchor centre is nearest to the box centre, so one cell per level is enough.
    Rotated boxes are taken un-turned.

    Args:
        anchors: for each level its stride in pixels and base anchors [A, 4] (x1, y1, x2, y2) of the cell at 0, 0.
        threshold: IoU from which an anchor is foreground.

    Returns:
        The number of boxes whose best IoU is below ``threshold``, and a sentence of advice (empty when there are none).
    """
    scaled = [
        image.boxes[:, :4] * min(resize / min(image.width, image.height), max_size / max(image.width, image.height))
        for image in dataset.images
    ]
    boxes = np.concatenate(scaled) if scaled else np.zeros((0, 4))
    best = np.zeros(len(boxes))
    for stride, base in anchors:
        best = np.maximum(best, _best_iou(boxes, stride, base[:, :4].astype(np.float64)))
    missed = boxes[best < threshold]
    if not len(missed):
        return 0, ""
    side = np.sqrt(missed[:, 2] * missed[:, 3])
    finest = math.sqrt(min(((a[:, 2] - a[:, 0]) * (a[:, 3] - a[:, 1])).min() for _, a in anchors))
    ratio = np.maximum(missed[:, 2] / missed[:, 3], missed[:, 3] / missed[:, 2])
    if np.median(side) < finest:
        advice = "most are smaller than the smallest anchor: try smaller --anchor-scales, or a larger --resize"
    elif np.median(ratio) > 3:
        advice = "most are longer and thinner than the anchors: add to --anchor-ratios"
    else:
        advice = "no single cause: lower --anchor-ious would match more, others are not learned"
    return len(missed), f"{len(missed)} of {len(boxes)} boxes match no anchor at IoU {threshold:g}; {advice}"


def _best_iou(boxes: np.ndarray, stride: int, base: np.ndarray) -> np.ndarray:
    """Largest IoU [n] of boxes [n, 4] (x, y, w, h) with the base anchors [A, 4] placed at the nearest cell."""
    sizes = base[:, 2:] - base[:, :2]  # [A, 2]
    centres = (base[:, 2:] + base[:, :2]) / 2  # [A, 2]
    box_centres = boxes[:, :2] + boxes[:, 2:] / 2  # [n, 2]
    cells = np.maximum(np.round((box_centres[:, None] - centres) / stride), 0)  # [n, A, 2]
    offset = np.abs(cells * stride + centres - box_centres[:, None])  # [n, A, 2]
    overlap = np.minimum(boxes[:, None, 2:], sizes)  # where one box holds the other, per axis
    overlap = np.clip(np.minimum(overlap, (boxes[:, None, 2:] + sizes) / 2 - offset), 0, None)  # [n, A, 2]
    intersection = overlap.prod(axis=2)  # [n, A]
    union = boxes[:, None, 2:].prod(axis=2) + sizes.prod(axis=1) - intersection
    return (intersection / union).max(axis=1, initial=0.0)
