"""The confusion matrix: which class the detections above a threshold say, and which class the objects have."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .errors import RIGHT, Judgments


@dataclass(frozen=True)
class Confusion:
    """Of K classes.

    Attributes:
        counts: [K + 1, K + 1] int. Row: the object's class, and last background, for detections that overlap no object.
            Column: the detection's class, and last background, for objects without a detection.
        threshold: detections count that score above it.
    """

    counts: np.ndarray
    threshold: float


def confusion(judged: Judgments, threshold: float) -> Confusion:
    """Pairs detections with objects at IoU 0.5, one to one.

    First each with its own class, as COCO does, so that the diagonal is what precision and recall are made of. Then
    what is left over, of different classes: the highest score first, with the object that it overlaps most.
    """
    counts = np.zeros((judged.categories + 1, judged.categories + 1), int)
    background = judged.categories
    counted = (judged.score > threshold) & ~judged.ignored
    right = counted & (judged.kind == RIGHT)
    np.add.at(counts, (judged.category[right], judged.category[right]), 1)

    detection, object = judged.overlaps.T  # [P] each
    free_object = np.ones(len(judged.found), bool)
    free_object[judged.target[right]] = False
    free_detection = counted & ~right
    for pair in np.lexsort((-judged.overlap, -judged.score[detection])):
        d, g = detection[pair], object[pair]
        if free_detection[d] and free_object[g] and judged.category[d] != judged.object_category[g]:
            free_detection[d] = free_object[g] = False
            counts[judged.object_category[g], judged.category[d]] += 1
    counts[background, :background] += np.bincount(judged.category[free_detection], minlength=background)
    counts[:background, background] += np.bincount(judged.object_category[free_object], minlength=background)
    return Confusion(counts, threshold)
