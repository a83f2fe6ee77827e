"""COCO JSON → images, categories and faults."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from ..categories import Category
from ..config import OdtkError
from .images import SWAPS_SIDES, Header, ImageError, read_headers
from .records import Fault, Image, image_of

CLIP_TOLERANCE = 1.0  # pixels a box may reach out of its image before the clipping is worth a warning


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


class CocoReader:
    """Reads one annotation file; each method applies the rules for one kind of entry."""

    def __init__(self, path: Path, folder: Path, rotated: bool, training: bool) -> None:
        self.path, self.folder, self.rotated, self.training = path, folder, rotated, training
        self.content = load_json(path)
        self.faults: list[Fault] = []
        self.boxes_of_label: Counter[int] = Counter()  # those of refused images too

    def read(self) -> tuple[list[Image], tuple[Category, ...], list[Fault]]:
        categories = self.read_categories()
        images = self.read_images()
        self.read_boxes(images, {category.id: i for i, category in enumerate(categories)})
        if self.training:
            self.check_training(categories)
        usable = [image for image in images.values() if image is not None]
        return usable, categories, self.faults

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
        for (id, entry), path, header in zip(entries.items(), paths, read_headers(paths), strict=True):
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
        return image_of(id, path, header, orientation, self.rotated)

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
        center_x, center_y = box[0] + box[2] / 2, box[1] + box[3] / 2
        if not (0 <= center_x <= image.width and 0 <= center_y <= image.height):
            self.fix(name, "box with its center outside the image dropped")
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
