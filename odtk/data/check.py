"""What `odtk check` says about a dataset: its faults, a summary, and the boxes that no anchor can match."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..text import plural
from .dataset import Dataset, read
from .images import ImageError, decode
from .records import Fault, Image


@dataclass(frozen=True)
class CheckReport:
    """Every fault of a dataset, and the dataset without its refused images."""

    faults: tuple[Fault, ...]
    dataset: Dataset

    @property
    def refused(self) -> int:
        """Number of faults that stop a run."""
        return sum(not fault.fixed for fault in self.faults)

    def summary(self) -> list[str]:
        """Lines about images, boxes and categories."""
        images = self.dataset.images
        boxes = [image.boxes for image in images if len(image.boxes)]
        empty = sum(not len(image.boxes) for image in images)
        lines = [f"{plural(len(images), 'usable image')}, {empty} of them without boxes"]
        if images:
            widths, heights = [image.width for image in images], [image.height for image in images]
            lines.append(f"image width {_spread(widths)}, height {_spread(heights)} pixels")
        if boxes:
            sizes = np.concatenate(boxes)[:, 2:4]
            area = sizes.prod(axis=1)
            small, large = (area < 32**2).mean(), (area >= 96**2).mean()  # COCO's own bounds
            lines.append(
                f"{plural(len(sizes), 'box', 'boxes')}, "
                f"width {_spread(sizes[:, 0])}, height {_spread(sizes[:, 1])} pixels; "
                f"small (below 32² pixels) {small:.0%}, medium {1 - small - large:.0%}, large (96² or more) {large:.0%}"
            )
        labels = Counter(int(label) for image in images for label in image.labels)
        lines += [
            f"category {category.id} {category.name}: {plural(labels[i], 'box', 'boxes')}"
            for i, category in enumerate(self.dataset.categories)
        ]
        return lines


def _spread(values: Any) -> str:
    """The least, largest and median value, as text."""
    low, middle, high = np.percentile(values, (0, 50, 100))
    return f"{low:g}…{high:g} (median {middle:g})"


def check(
    annotations: str | Path | None, images: str | Path, *, rotated: bool = False, pixels: bool = True
) -> CheckReport:
    """Every fault of a dataset, judged as training would; with ``pixels`` each image is decoded completely.

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
    return CheckReport(tuple(faults), dataset)


def _damage(images: list[Image]) -> list[tuple[Image, str]]:
    """Each image with the reason why it cannot be decoded, empty where it can."""

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
    """Counts the boxes that no anchor can match, and says what to change.

    Images are scaled as in inference. For a given anchor shape the IoU is largest at the cell whose anchor center is
    nearest to the box center, so one cell per level is enough. Rotated boxes are taken before their turn.

    Args:
        anchors: for each level its stride in pixels and base anchors [A, 4] (x1, y1, x2, y2) of the cell at 0, 0.
        resize: shorter side of the scaled image in pixels.
        max_size: upper limit of its longer side in pixels.
        threshold: an anchor is foreground from this IoU on.

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
        advice = "there is no single cause: lower --anchor-ious match more; what no anchor matches is not learned"
    share = f"{len(missed)} of {plural(len(boxes), 'box', 'boxes')} without a matching anchor"
    return len(missed), f"{share} at IoU {threshold:g}; {advice}"


def _best_iou(boxes: np.ndarray, stride: int, base: np.ndarray) -> np.ndarray:
    """Largest IoU [n] of boxes [n, 4] (x, y, w, h) with base anchors [A, 4] (x1, y1, x2, y2) at the nearest cell."""
    sizes = base[:, 2:] - base[:, :2]  # [A, 2]
    centers = (base[:, 2:] + base[:, :2]) / 2  # [A, 2]
    box_centers = boxes[:, :2] + boxes[:, 2:] / 2  # [n, 2]
    cells = np.maximum(np.round((box_centers[:, None] - centers) / stride), 0)  # [n, A, 2]
    offset = np.abs(cells * stride + centers - box_centers[:, None])  # [n, A, 2]
    overlap = np.minimum(boxes[:, None, 2:], sizes)  # along an axis on which one box contains the other
    overlap = np.clip(np.minimum(overlap, (boxes[:, None, 2:] + sizes) / 2 - offset), 0, None)  # [n, A, 2]
    intersection = overlap.prod(axis=2)  # [n, A]
    union = boxes[:, None, 2:].prod(axis=2) + sizes.prod(axis=1) - intersection
    return (intersection / union).max(axis=1, initial=0.0)
