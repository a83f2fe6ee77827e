"""What `odtk check` says of a dataset: its faults, a summary, and the boxes that no anchor can match."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .dataset import Dataset, read
from .images import ImageError, decode
from .records import Fault, Image


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
    the IoU is largest at the cell whose anchor center is nearest to the box center, so one cell per level is enough.
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
    centers = (base[:, 2:] + base[:, :2]) / 2  # [A, 2]
    box_centers = boxes[:, :2] + boxes[:, 2:] / 2  # [n, 2]
    cells = np.maximum(np.round((box_centers[:, None] - centers) / stride), 0)  # [n, A, 2]
    offset = np.abs(cells * stride + centers - box_centers[:, None])  # [n, A, 2]
    overlap = np.minimum(boxes[:, None, 2:], sizes)  # where one box holds the other, per axis
    overlap = np.clip(np.minimum(overlap, (boxes[:, None, 2:] + sizes) / 2 - offset), 0, None)  # [n, A, 2]
    intersection = overlap.prod(axis=2)  # [n, A]
    union = boxes[:, None, 2:].prod(axis=2) + sizes.prod(axis=1) - intersection
    return (intersection / union).max(axis=1, initial=0.0)
