"""What `odtk check` says about a dataset: its faults, remarks that stop nothing, and a summary."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..files import file_hash
from ..text import plural
from .dataset import Dataset, read
from .images import ImageError
from .layouts import find_source
from .records import DAMAGED, OTHER_FORMAT, Fault, Image
from .yolo import stray_labels

FEW_BOXES = 10  # a category with fewer is remarked on
STRAY_LABELS = "labels without an image"
DECODING_DAMAGE = "image damaged in its pixels: zeros without boxes in training, no detections in infer"


@dataclass(frozen=True)
class CheckReport:
    """Every fault of a dataset, and the dataset without its refused images.

    Attributes:
        faults: refused or fixed, as training does.
        remarks: what may be a mistake but changes nothing; their ``fixed`` is true.
        annotated: whether there are annotations to train on.
    """

    faults: tuple[Fault, ...]
    remarks: tuple[Fault, ...]
    dataset: Dataset
    annotated: bool = True

    @property
    def refused(self) -> int:
        """Number of faults that stop a run."""
        return sum(not fault.fixed for fault in self.faults)

    @property
    def damaged(self) -> int:
        """Number of images that cannot be decoded."""
        return sum(fault.rule in (DAMAGED, DECODING_DAMAGE) for fault in self.faults)

    def lines(self, *, verbose: bool) -> list[str]:
        """One line for each kind of finding, with its number and the first example; with ``verbose`` for each."""
        refused = [fault for fault in self.faults if not fault.fixed]
        fixed = [fault for fault in self.faults if fault.fixed]
        found = []
        stopping = "REFUSED" if self.annotated else "damaged"
        for word, faults in ((stopping, refused), ("fixed", fixed), ("note", self.remarks)):
            kinds: dict[str, list[Fault]] = defaultdict(list)
            for fault in faults:
                kinds[fault.rule].append(fault)
            for rule, same in kinds.items():
                if verbose or len(same) == 1:
                    found += [f"{word:8}{fault}" for fault in same]
                else:
                    first = same[0]
                    reason = f" ({first.reason})" if first.reason != rule else ""
                    place = ": ".join(part for part in (first.file, first.id) if part)
                    found.append(f"{word:8}{len(same)} × {rule}, first {place}{reason}")
        return found

    def summary(self, resize: int, max_size: int) -> list[str]:
        """Lines about images, boxes and categories; none where no box was read, as its format is another.

        Args:
            resize, max_size: shorter side and cap of the longer side of the network's input in pixels.
        """
        if any(fault.rule == OTHER_FORMAT for fault in self.faults):
            return []
        images = self.dataset.images
        empty = sum(not len(image.boxes) for image in images)
        lines = [plural(len(images), "usable image")]
        if self.dataset.categories:
            lines[0] += f", {empty} of them without boxes"
        if images:
            sizes = np.array([(image.width, image.height) for image in images], dtype=np.float64)
            scales = np.minimum(resize / sizes.min(axis=1), max_size / sizes.max(axis=1))
            lines += _sizes("images", sizes, sizes * scales[:, None])
        if empty < len(images):
            boxes = np.concatenate([image.boxes[:, 2:4] for image in images])
            counts = [len(image.boxes) for image in images]
            area = boxes.prod(axis=1)
            small, large = area < 32**2, area >= 96**2  # COCO's own bounds
            lines.append(
                f"{plural(len(boxes), 'box', 'boxes')}: small (below 32² pixels of the file) "
                f"{small.mean():.0%}, medium {(~small & ~large).mean():.0%}, large (96² or more) {large.mean():.0%}"
            )
            lines += _sizes("boxes", boxes, boxes * np.repeat(scales, counts)[:, None])
        labels = Counter(int(label) for image in images for label in image.labels)
        if labels:  # else all images or boxes were refused, and zeros would say something else
            lines += [
                f"category {category.id} {category.name}: {plural(labels[i], 'box', 'boxes')}"
                for i, category in enumerate(self.dataset.categories)
            ]
        return lines


def _sizes(what: str, file: np.ndarray, network: np.ndarray) -> list[str]:
    """Lines about sizes [n, 2] (width, height), in pixels of the file and of the network's input."""
    return [
        f"{what}: width {_spread(sizes[:, 0])}, height {_spread(sizes[:, 1])} pixels {where}"
        for sizes, where in ((file, "in the file"), (network, "in the network's input"))
    ]


def _spread(values: Any) -> str:
    """The least, largest and median value, as text."""
    low, middle, high = np.percentile(values, (0, 50, 100))
    return f"{_short(low)}…{_short(high)} (median {_short(middle)})"


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.3g}"


def check(
    annotations: str | Path | None, images: str | Path, *, rotated: bool = False, pixels: bool = True
) -> CheckReport:
    """Every fault of a dataset, judged as training would; without annotations, of every image in a folder.

    Args:
        pixels: decode each image completely, and compare the files with each other.

    Raises:
        OdtkError: the annotation file or the folder cannot be read at all.
    """
    dataset = read(annotations, images, rotated=rotated, training=annotations is not None)
    faults, remarks = list(dataset.faults), [*_identical_annotations(dataset), *_categories(dataset)]
    if annotations is not None and (source := find_source(annotations)).format == "yolo":
        strays = stray_labels(source.path, source.split or "train", Path(images).expanduser())
        remarks += [Fault(file, "", STRAY_LABELS, True, STRAY_LABELS) for file in strays]
    if pixels:
        for image, reason in _damage(dataset.images):
            if reason:
                # Training goes on, as its own scan reads headers alone.
                rule = DECODING_DAMAGE if annotations else DAMAGED
                faults.append(Fault(str(image.path), f"image {image.id}", reason, bool(annotations), rule))
        remarks = _same_files(dataset.images) + remarks
    return CheckReport(tuple(faults), tuple(remarks), dataset, annotations is not None)


def _same_files(images: Sequence[Image]) -> list[Fault]:
    """A remark for each image whose file has the same bytes as that of an earlier one."""
    of_size: dict[int, list[Image]] = defaultdict(list)
    for image in images:
        of_size[image.path.stat().st_size if image.member is None else image.member.size].append(image)
    suspects = [image for same in of_size.values() if len(same) > 1 for image in same]
    with ThreadPoolExecutor() as pool:
        digests = pool.map(_hash, suspects)
    first: dict[str, Image] = {}
    remarks = []
    for image, digest in zip(suspects, digests, strict=True):
        earlier = first.setdefault(digest, image)
        if earlier is not image:
            what = "the file is listed twice" if earlier.path == image.path else "the same image twice"
            reason = f"its file has the bytes of image {earlier.id}, {earlier.path.name}"
            remarks.append(Fault(str(image.path), f"image {image.id}", reason, True, what))
    return remarks


def _hash(image: Image) -> str:
    return file_hash(image.path) if image.member is None else hashlib.sha256(image.read()).hexdigest()


def _identical_annotations(dataset: Dataset) -> list[Fault]:
    """A remark for each image that has several boxes of one category at the same place."""
    remarks = []
    for image in dataset.images:
        rows = np.column_stack([image.labels, image.boxes])
        unique, counts = np.unique(rows, axis=0, return_counts=True)
        if len(unique) < len(rows):
            row, count = unique[counts.argmax()], counts.max()
            name = dataset.categories[int(row[0])].name
            box = ", ".join(f"{value:g}" for value in row[1:])
            reason = f"{count} annotations of {name!r} with the box [{box}]"
            remarks.append(Fault(str(image.path), f"image {image.id}", reason, True, "identical annotations"))
    return remarks


def _categories(dataset: Dataset) -> list[Fault]:
    """Remarks on categories of one name, and on those with few boxes."""
    counts = Counter(int(label) for image in dataset.images for label in image.labels)
    first: dict[str, int] = {}
    remarks = []
    for label, category in enumerate(dataset.categories):
        earlier = first.setdefault(category.name.strip().casefold(), category.id)
        if earlier != category.id:
            reason = f"category {earlier} is called {category.name!r} too: the two are learned as different classes"
            remarks.append(Fault("", f"category {category.id}", reason, True, "two categories of one name"))
        if 0 < counts[label] < FEW_BOXES:
            reason = f"{category.name!r} has only {plural(counts[label], 'box', 'boxes')}, too few to learn from"
            rule = f"category with fewer than {FEW_BOXES} boxes"
            remarks.append(Fault("", f"category {category.id}", reason, True, rule))
    return remarks


def _damage(images: list[Image]) -> list[tuple[Image, str]]:
    """Each image with the reason why it cannot be decoded, empty where it can."""

    def reason(image: Image) -> str:
        try:
            image.decode()
        except ImageError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor() as pool:
        return list(zip(images, pool.map(reason, images), strict=True))
