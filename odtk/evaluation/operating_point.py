"""What scores mean: precision and recall at every threshold, the one with the best F1, and which share is right.

The COCO figures need detections with scores from 0.05 on, nearly all of them wrong. Who looks at pictures, or uses a
model, wants one threshold.
"""

from __future__ import annotations

import contextlib
import io
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools.cocoeval import COCOeval

from ..data.coco import prepare_ground_truth
from .evaluate import RotatedCOCOeval, check_detections, coco_index, filter_categories

BINS = 10  # of scores from 0 to 1, for the calibration
MATCH_IOU = 0.5  # a detection is right if it overlaps an object of its category by so much
BEST_PER_IMAGE = 20  # detections shown of an image for which no threshold is known


@dataclass(frozen=True)
class OperatingPoint:
    """A score threshold and what it gives.

    Attributes:
        threshold: detections count that score above it.
        f1: 2 · precision · recall / (precision + recall), 0…1, over the objects of all categories.
    """

    threshold: float
    f1: float


@dataclass(frozen=True)
class ThresholdCurve:
    """What each threshold gives: n thresholds, the highest first; a detection counts that scores above it.

    Attributes:
        thresholds: [n], each halfway between two scores that follow each other.
        precision, recall, f1: [n], 0…1.
    """

    thresholds: np.ndarray
    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray

    @property
    def best(self) -> int | None:
        """The threshold with the best F1, the highest of equals; None where no detection is right."""
        return int(np.argmax(self.f1)) if self.f1.any() else None


def threshold_curve(scores: np.ndarray, right: np.ndarray, objects: int) -> ThresholdCurve:
    """Precision, recall and F1 at each threshold that makes a difference.

    Args:
        scores: [n] of the detections that count, in any order.
        right: [n] bool, the detection found an object.
        objects: number of objects to find.
    """
    order = np.argsort(-scores, kind="stable")
    scores, right = scores[order], right[order]
    last = np.flatnonzero(np.append(scores[1:] < scores[:-1], np.ones(min(len(scores), 1), bool)))  # of equal scores
    found, counted = np.cumsum(right)[last], last + 1
    following = np.append(scores[last[:-1] + 1], 0.0)[: len(last)]
    return ThresholdCurve(
        thresholds=(scores[last] + following) / 2,
        precision=found / counted,
        recall=found / max(objects, 1),
        f1=2 * found / (counted + objects),  # 2 TP / (TP + FP + TP + FN)
    )


@dataclass(frozen=True)
class CalibrationBin:
    """The detections whose scores lie in one interval.

    Attributes:
        low, high: the interval; the lower end is part of it, and the upper end of the last one.
        count: how many they are.
        score: their mean score; NaN if there are none.
        right: the share of them that found an object; NaN if there are none.
    """

    low: float
    high: float
    count: int
    score: float
    right: float


def calibration(scores: np.ndarray, right: np.ndarray) -> tuple[list[CalibrationBin], float]:
    """How far scores are probabilities: BINS bins, and the expected calibration error (NaN without detections).

    That error is the mean over all detections of |share that is right − mean score| of their bin (C. Guo et al., On
    Calibration of Modern Neural Networks, 2017, arXiv 1706.04599, equation 3).

    Args:
        scores, right: [n], as threshold_curve; scores 0…1.
    """
    place = np.clip((scores * BINS).astype(int), 0, BINS - 1)
    bins = []
    for i in range(BINS):
        own = place == i
        count = int(own.sum())
        means = (float(scores[own].mean()), float(right[own].mean())) if count else (np.nan, np.nan)
        bins.append(CalibrationBin(i / BINS, (i + 1) / BINS, count, *means))
    error = sum(b.count * abs(b.right - b.score) for b in bins if b.count) / len(scores) if len(scores) else np.nan
    return bins, error


def best_f1(detections: list[dict[str, Any]], truth: dict[str, Any]) -> OperatingPoint | None:
    """The threshold with the best F1, matching as COCO does at MATCH_IOU: one detection per object, crowds ignored.

    It lies halfway between the last score that is counted and the next one.

    Args:
        detections: COCO results; those of categories that the annotations lack do not count.
        truth: COCO annotations, as data.coco.load_json returns them.

    Returns:
        None where no detection is right, as without objects.

    Raises:
        OdtkError: as evaluate.
    """
    truth = prepare_ground_truth(truth)
    detections = filter_categories(detections, truth)
    check_detections(detections, truth)
    curve = threshold_curve(*match(detections, truth))
    best = curve.best
    return None if best is None else OperatingPoint(float(curve.thresholds[best]), float(curve.f1[best]))


def match(detections: list[dict[str, Any]], truth: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, int]:
    """Scores [n] of the detections that count, whether each is right [n], and the number of objects."""
    rotated = any(len(entry["bbox"]) == 5 for entry in (*truth["annotations"], *detections))
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints each step
        gt, dt = (coco_index(truth, entries, 5 if rotated else 4) for entries in (truth["annotations"], detections))
        coco_eval = (RotatedCOCOeval if rotated else COCOeval)(gt, dt, "bbox")
        coco_eval.params.iouThrs = np.array([MATCH_IOU])
        coco_eval.params.areaRng, coco_eval.params.areaRngLbl = coco_eval.params.areaRng[:1], ["all"]
        coco_eval.evaluate()
    scores, right, objects = [np.zeros(0)], [np.zeros(0, dtype=bool)], 0
    for entry in coco_eval.evalImgs:  # one per category and image
        if entry is None:
            continue
        counts = ~entry["dtIgnore"][0].astype(bool)
        scores.append(np.asarray(entry["dtScores"], dtype=float)[counts])
        right.append(entry["dtMatches"][0][counts] > 0)
        objects += int((np.asarray(entry["gtIgnore"]) == 0).sum())
    return np.concatenate(scores), np.concatenate(right), objects


def choose(
    detections: list[dict[str, Any]], truth: dict[str, Any] | None, threshold: float | None
) -> tuple[list[dict[str, Any]], str]:
    """The detections to draw, and the words that say which these are.

    Args:
        detections: COCO results.
        truth: the annotations, as data.coco.load_json returns them, if there are any.
        threshold: draw what scores above it; None: above the one with the best F1, and where it is not known, the
            best BEST_PER_IMAGE of each image.
    """
    if threshold is not None:
        return [d for d in detections if d["score"] > threshold], f"detections that score above {threshold:g}"
    point = best_f1(detections, truth) if truth is not None else None
    if point is not None:
        words = f"detections that score above {point.threshold:.3f}, which gives the best F1 ({point.f1:.3f})"
        return [d for d in detections if d["score"] > point.threshold], words
    by_image: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for detection in detections:
        by_image[detection["image_id"]].append(detection)
    best = [d for of in by_image.values() for d in sorted(of, key=lambda d: -d["score"])[:BEST_PER_IMAGE]]
    return best, f"the best {BEST_PER_IMAGE} detections of each image"
