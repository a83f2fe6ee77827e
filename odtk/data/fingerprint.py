"""Numbers that describe a dataset, from which a training run can be planned (training/plan.py).

They follow from the files alone: the same dataset has the same fingerprint on every machine. Sizes are in pixels of the
image files, not of the network's input.

Near-duplicates (video frames, augmented copies of one photo) are images whose difference hashes are at most
HASH_DISTANCE of 64 bits apart: the signs of horizontal differences in a 9×8 thumbnail
(https://www.hackerfactor.com/blog/index.php?/archives/529-Kind-of-Like-That.html). An image and its mirror image or
quarter turn count as copies too, as exports of annotation tools are often augmented that way.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PILImage

from ..categories import Category
from ..config import OdtkError
from ..files import atomic_write, cache_folder
from ..text import plural
from .dataset import Dataset
from .images import ImageError
from .records import Image

VERSION = 4  # of the fields: a cached fingerprint of another version is made anew
PERCENTILES = (1, 10, 50, 90, 99)
MAX_DECODED = 2000  # images that are looked at for color and duplicates: of larger sets a seeded sample
HASH_DISTANCE = 3
BIT_COUNTS = np.array([bin(byte).count("1") for byte in range(256)])
CROWDED_IOU = 0.3  # boxes of one class that overlap by more are crowded: NMS may take one for the other
MIN_GRAY_SHARE = 0.95  # of images that are gray for the set to count as gray
MIN_WHOLE = 20  # boxes inside their image that a class needs for a statement about their shape


@dataclass(frozen=True)
class Fingerprint:
    """What a dataset is like.

    Attributes:
        images, empty: number of images, and of those without a box.
        width, height, shorter, longer: percentiles PERCENTILES of the images' sides, px.
        boxes: number of boxes.
        side: percentiles of √(width · height) of boxes, px.
        relative_side: the same divided by the shorter side of its image.
        aspect: percentiles of width / height of boxes.
        per_image: percentiles of the number of boxes in an image that has any.
        classes: (id, name, boxes, images with one) of each category, in the order of the class indices.
        lean: the largest |median of ln(width / height)| of a class; 0 where objects lie as often as they stand.
        depth: |correlation| between the size of boxes, relative to their class, and how far down they are: in pictures
            of a scene, what is nearer is larger and lower.
        drop: the mean height of the boxes' centers in the image, from −0.5 (all at the top) to 0.5 (at the bottom).
        light: how much brighter the images' upper halves are than the lower ones, in mean gray levels of 255.
        contrast: standard deviation of the gray levels in an image of 32×32 pixels, mean over images.
        whole: boxes that touch no border of their image; lean, depth and drop are of these, lean and depth of those
            of classes with MIN_WHOLE of them. Of rotated boxes all four are of the upright boxes around them.
        gray: share of the images looked at that have no color.
        crowded: share of boxes that another box of their class overlaps by more than CROWDED_IOU.
        decoded: images looked at for color and duplicates.
        copies: how many of those have a near-duplicate that comes before them.
        groups: for each image looked at its position in the dataset and the number of its group of near-duplicates.
    """

    images: int
    empty: int
    width: tuple[float, ...]
    height: tuple[float, ...]
    shorter: tuple[float, ...]
    longer: tuple[float, ...]
    boxes: int
    side: tuple[float, ...]
    relative_side: tuple[float, ...]
    aspect: tuple[float, ...]
    per_image: tuple[float, ...]
    classes: tuple[tuple[int, str, int, int], ...]
    lean: float
    depth: float
    drop: float
    light: float
    contrast: float
    whole: int
    gray: float
    crowded: float
    decoded: int
    copies: int
    groups: tuple[tuple[int, int], ...]
    version: int = VERSION

    @property
    def distinct_images(self) -> int:
        """Images that are not near-duplicates of another, estimated from those looked at."""
        return round(self.images * (1 - self.copies / self.decoded)) if self.decoded else self.images

    @property
    def is_gray(self) -> bool:
        return self.gray >= MIN_GRAY_SHARE

    @property
    def imbalance(self) -> float:
        """Boxes of the most frequent class for one of the rarest that has any; 1 without boxes."""
        counts = [boxes for _, _, boxes, _ in self.classes if boxes]
        return max(counts) / min(counts) if counts else 1.0

    def lines(self) -> list[str]:
        """What people read, a finding a line."""
        found = [
            f"{plural(self.images, 'image')}, {self.empty} without boxes; width {_spread(self.width)}, "
            f"height {_spread(self.height)} pixels"
        ]
        if self.boxes:
            found += [
                f"{plural(self.boxes, 'box', 'boxes')}, side (√area) {_spread(self.side)} pixels, "
                f"{self.relative_side[1]:.1%} to {self.relative_side[3]:.1%} of the image's shorter side; "
                f"width over height {_spread(self.aspect)}",
                f"{_spread(self.per_image)} boxes in an image; {self.crowded:.0%} are overlapped by another of their "
                f"class (IoU above {CROWDED_IOU:g})",
                plural(len(self.classes), "class", "classes") + self._balance(),
            ]
        kind = "gray" if self.is_gray else "color" if self.gray <= 1 - MIN_GRAY_SHARE else "mixed"
        found.append(
            f"{kind} images ({self.gray:.0%} gray), {self.copies} of {plural(self.decoded, 'image')} looked at "
            f"{'is a near-duplicate' if self.copies == 1 else 'are near-duplicates'} of another"
        )
        return found

    def _balance(self) -> str:
        if len(self.classes) == 1:
            return ""
        if self.imbalance < 1.5:
            return ", each with about as many boxes"
        return f", the most frequent with {self.imbalance:.2g} times the boxes of the rarest"

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Fingerprint:
        """The inverse of to_json.

        Raises:
            ValueError: text of another version, or damaged.
        """
        values = json.loads(text)
        if not isinstance(values, dict) or values.get("version") != VERSION:
            raise ValueError("another version")
        made: dict[str, Any] = {
            name: tuple(tuple(part) if isinstance(part, list) else part for part in value)
            if isinstance(value, list)
            else value
            for name, value in values.items()
        }
        try:
            return cls(**made)
        except TypeError as error:
            raise ValueError(str(error)) from error


def fingerprint(dataset: Dataset, *, cache: Path | None = None) -> Fingerprint:
    """The fingerprint of a dataset, from the cache where neither boxes nor image files have changed since.

    Args:
        cache: folder for the cached fingerprints; None: odtk's own in the user's cache folder.

    Raises:
        OdtkError: a dataset without images.
    """
    if not dataset.images:
        raise OdtkError("The dataset has no usable image.")
    key = _key(dataset)
    try:
        path = (cache or cache_folder("fingerprints")) / f"{key}.json"
        return Fingerprint.from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        pass
    except OdtkError:  # there is no cache
        return _measure(dataset)
    found = _measure(dataset)
    try:  # a cache that cannot be written costs time, nothing else
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(found.to_json().encode())
    except (OSError, OdtkError):
        pass
    return found


def _key(dataset: Dataset) -> str:
    """A hash over everything that the fingerprint depends on: boxes, labels, categories, and the state of each file."""
    digest = hashlib.sha256(repr([(c.id, c.name) for c in dataset.categories]).encode())
    folders: dict[str, str] = {}  # by the name that they go by: to resolve the path of every image takes seconds
    for image in dataset.images:
        state = image.state() or (0, 0)
        folder, name = os.path.split(image.path)
        if folder not in folders:
            folders[folder] = os.path.realpath(folder)
        path = os.path.join(folders[folder], name)
        digest.update(repr((path, image.width, image.height, *state)).encode())
        digest.update(np.ascontiguousarray(image.boxes).tobytes() + np.ascontiguousarray(image.labels).tobytes())
    return digest.hexdigest()[:32]


def _measure(dataset: Dataset) -> Fingerprint:
    images = dataset.images
    boxes = np.concatenate([image.boxes[:, :4] for image in images])  # [B, 4] x, y, w, h
    shorter = np.concatenate([np.full(len(image.boxes), min(image.width, image.height)) for image in images])
    side = np.sqrt(boxes[:, 2] * boxes[:, 3])
    looked_at = _sample(len(images))
    hashes, gray, light, contrast = _look([images[i] for i in looked_at])
    groups = near_duplicates(hashes)
    sides = np.array([(image.width, image.height) for image in images])
    return Fingerprint(
        images=len(images),
        empty=sum(not len(image.boxes) for image in images),
        width=_percentiles(sides[:, 0]),
        height=_percentiles(sides[:, 1]),
        shorter=_percentiles(sides.min(axis=1)),
        longer=_percentiles(sides.max(axis=1)),
        boxes=len(boxes),
        side=_percentiles(side),
        relative_side=_percentiles(side / shorter),
        aspect=_percentiles(boxes[:, 2] / boxes[:, 3]),
        per_image=_percentiles([len(image.boxes) for image in images if len(image.boxes)]),
        classes=_classes(dataset.categories, images),
        **_posture(images, len(dataset.categories)),
        light=_mean(light, 2),
        contrast=_mean(contrast, 2),
        gray=_mean(gray, 4),
        crowded=_crowded(images),
        decoded=len(looked_at),
        copies=len(groups) - len(set(groups)),
        groups=tuple(zip(looked_at, groups, strict=True)),
    )


def _percentiles(values: Sequence[float] | np.ndarray) -> tuple[float, ...]:
    if not len(values):
        return ()
    return tuple(round(float(v), 4) for v in np.percentile(values, PERCENTILES, method="nearest"))


def _spread(percentiles: tuple[float, ...]) -> str:
    """The 1st, 50th and 99th of PERCENTILES for people."""
    low, middle, high = (f"{v:.0f}" if v >= 100 else f"{v:.3g}" for v in (percentiles[i] for i in (0, 2, 4)))
    return low if low == high else f"{low}…{high} (median {middle})"


def _classes(categories: Sequence[Category], images: Sequence[Image]) -> tuple[tuple[int, str, int, int], ...]:
    boxes: Counter[int] = Counter()
    holding: Counter[int] = Counter()
    for image in images:
        boxes.update(image.labels.tolist())
        holding.update(set(image.labels.tolist()))
    return tuple((c.id, c.name, boxes[i], holding[i]) for i, c in enumerate(categories))


def _posture(images: Sequence[Image], classes: int) -> dict[str, Any]:
    """Fingerprint.lean, depth, drop and whole: whether objects and images have an upright direction."""
    rows = []
    for image in images:
        x, y, w, h = _upright(image.boxes).T
        whole = (x > 1) & (y > 1) & (x + w < image.width - 1) & (y + h < image.height - 1)
        down = (y + h / 2) / image.height - 0.5
        rows.append(np.stack([image.labels, np.log(w / h), np.log(w * h) / 2, down], axis=1)[whole])
    table = np.concatenate(rows)  # [whole boxes, 4] label, ln aspect, ln side, height of the center
    lean, pairs = 0.0, [np.zeros((0, 2))]
    for label in range(classes):
        own = table[table[:, 0] == label]
        if len(own) >= MIN_WHOLE:
            lean = max(lean, abs(float(np.median(own[:, 1]))))
            pairs.append(own[:, 2:] - own[:, 2:].mean(axis=0))
    side, down = np.concatenate(pairs).T
    spread = math.sqrt(float((side**2).sum() * (down**2).sum()))
    depth = abs(float((side * down).sum())) / spread if spread > 1e-9 else 0.0
    drop = float(table[:, 3].mean()) if len(table) else 0.0
    return {"lean": round(lean, 4), "depth": round(depth, 4), "drop": round(drop, 4), "whole": len(table)}


def _upright(boxes: np.ndarray) -> np.ndarray:
    """The boxes (x, y, w, h) [n, 4] themselves, or the smallest upright ones around rotated boxes [n, 5]."""
    if boxes.shape[1] == 4:
        return boxes
    size, turn = boxes[:, 2:4], boxes[:, 4:]
    around = np.abs(np.cos(turn)) * size + np.abs(np.sin(turn)) * size[:, ::-1]
    return np.concatenate([boxes[:, :2] + 0.5 * (size - around), around], axis=1)


def _crowded(images: Sequence[Image]) -> float:
    """See Fingerprint.crowded."""
    crowded = total = 0
    for image in images:
        first, last = image.boxes[:, :2], image.boxes[:, :2] + image.boxes[:, 2:4]
        total += len(first)
        for label in set(image.labels.tolist()):
            same = image.labels == label
            a, b = first[same], last[same]
            overlap = np.minimum(b[:, None], b) - np.maximum(a[:, None], a)  # [n, n, 2]
            intersection = overlap.clip(min=0).prod(axis=2)
            area = (b - a).prod(axis=1)
            iou = intersection / (area[:, None] + area - intersection)
            np.fill_diagonal(iou, 0)
            crowded += int((iou > CROWDED_IOU).any(axis=1).sum())
    return round(crowded / total, 4) if total else 0.0


def _sample(count: int) -> list[int]:
    """Positions of the images to look at: all, or MAX_DECODED of them, the same at every call."""
    if count <= MAX_DECODED:
        return list(range(count))
    return sorted(np.random.default_rng(0).choice(count, MAX_DECODED, replace=False).tolist())


def _look(images: Sequence[Image]) -> tuple[list[tuple[int, ...]], list[bool], list[float], list[float]]:
    """Hashes of each image; whether it is gray; its part of ``light`` and of ``contrast``.

    A damaged image has no hashes and is left out of the others.
    """

    def one(image: Image) -> tuple[tuple[int, ...], bool, float, float] | None:
        try:
            pixels = image.decode()
        except ImageError:
            return None
        small = PILImage.fromarray(pixels).resize((32, 32), PILImage.Resampling.BOX)
        channels = np.asarray(small, dtype=np.int16)  # [32, 32, 3]
        gray = bool((channels.max(axis=2) - channels.min(axis=2) <= 8).all())  # JPEG leaves a little color
        light = float(channels[:16].mean() - channels[16:].mean())
        return difference_hashes(pixels), gray, light, float(channels.mean(axis=2).std())

    with ThreadPoolExecutor() as pool:
        found = list(pool.map(one, images))
    seen = [values for values in found if values is not None]
    return (
        [() if values is None else values[0] for values in found],
        [gray for _, gray, _, _ in seen],
        [light for _, _, light, _ in seen],
        [contrast for *_, contrast in seen],
    )


def _mean(values: Sequence[float], digits: int) -> float:
    return round(float(np.mean(values)), digits) if values else 0.0


def difference_hashes(pixels: np.ndarray) -> tuple[int, ...]:
    """64-bit difference hashes of an image [H, W, 3] uint8 as it is and in its seven other orientations."""
    square = np.asarray(PILImage.fromarray(pixels).convert("L").resize((72, 72), PILImage.Resampling.BOX))
    hashes = []
    for mirrored in (square, square[:, ::-1]):
        for turns in range(4):
            turned = PILImage.fromarray(np.ascontiguousarray(np.rot90(mirrored, turns)))
            small = np.asarray(turned.resize((9, 8), PILImage.Resampling.BOX), dtype=np.int16)  # [8, 9]
            bits = (small[:, 1:] > small[:, :-1]).reshape(-1)  # [8, 8] → [64]
            hashes.append(int.from_bytes(np.packbits(bits).tobytes(), "big"))
    return tuple(hashes)


def near_duplicates(hashes: Sequence[tuple[int, ...]]) -> list[int]:
    """Group numbers: images that a chain of near-duplicates connects have one, that of the first among them.

    Args:
        hashes: of each image as difference_hashes gives them; empty for an image that is in no other's group.
    """
    group = list(range(len(hashes)))

    def root(i: int) -> int:
        while group[i] != i:
            group[i] = group[group[i]]
            i = group[i]
        return i

    known = [i for i, one in enumerate(hashes) if one]
    upright = np.array([hashes[i][0] for i in known], dtype=np.uint64)  # [n]
    for position, i in enumerate(known):
        oriented = np.array(hashes[i], dtype=np.uint64)  # [8]
        different = (
            (upright[:position, None] ^ oriented).view(np.uint8).reshape(position, 8, 8)
        )  # bytes of [position, 8]
        distance = BIT_COUNTS[different].sum(axis=2).min(axis=1, initial=64)  # [position]
        for j in np.flatnonzero(distance <= HASH_DISTANCE):
            a, b = root(known[j]), root(i)
            group[max(a, b)] = min(a, b)
    return [root(i) for i in range(len(hashes))]
