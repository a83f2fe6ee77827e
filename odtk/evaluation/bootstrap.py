"""How far a difference of AP between two models can be believed: a paired bootstrap over the images of one set.

Both models ran on the same images. Images are drawn with replacement, as many as there are, RESAMPLES times; each draw
gives the AP of both models, and so their difference. What the two have in common, such as an image that is hard for
both, cancels out, so the interval is narrower than that of either AP. Source: B. Efron and R. Tibshirani, An
Introduction to the Bootstrap, 1993, chapters 6 and 13 (percentile interval).

COCO matches detections with objects image by image, so a draw needs no new matching: what pycocotools found is weighted
with how often each image was drawn.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import numpy as np
from pycocotools.cocoeval import COCOeval

RESAMPLES = 1000
CONFIDENCE = 0.95
MIN_IMAGES = 5  # resamples of fewer are too much alike to say anything
MOST_TIMES = 100  # where more than this many times the images would be needed, no number is stated
CHUNK = 1 << 22  # resamples × detections at a time


@dataclass(frozen=True)
class CategoryMatches:
    """What pycocotools matched of one category, of N images with D detections, at T IoU thresholds.

    Attributes:
        images: [D] int, the image of each detection as its index from 0; detections by descending score.
        matched: [T, D] bool, the detection found an object.
        ignored: [T, D] bool, the detection counts neither as right nor as wrong (crowds).
        objects: [N] int, objects to find in each image.
    """

    images: np.ndarray
    matched: np.ndarray
    ignored: np.ndarray
    objects: np.ndarray


@dataclass(frozen=True)
class Matches:
    """What pycocotools matched on a set.

    Attributes:
        images: number of images, N.
        recalls: [R] recalls at which precision is read.
        categories: one entry per category.
    """

    images: int
    recalls: np.ndarray
    categories: tuple[CategoryMatches, ...]


@dataclass(frozen=True)
class Comparison:
    """What a model loses against a reference on the same images, in points (COCO AP × 100); negative if it gains.

    Attributes:
        drop: points lost on the set itself.
        low, high: the interval that holds the loss on new images of this kind with CONFIDENCE.
        images: number of images.
        allowed: points that may be lost.
    """

    drop: float
    low: float
    high: float
    images: int
    allowed: float

    @property
    def verdict(self) -> str:
        """``within``: the whole interval is at most the allowed loss; ``beyond``: it is more; else ``cannot tell``."""
        if self.high <= self.allowed:
            return "within"
        return "beyond" if self.low > self.allowed else "cannot tell"

    @property
    def passed(self) -> bool:
        """Whether the loss is within, or, where the interval cannot tell, was so on the set itself."""
        return self.verdict == "within" or (self.verdict == "cannot tell" and self.drop <= self.allowed)

    @property
    def images_needed(self) -> int | None:
        """About how many images could tell, were the loss the same; None if that cannot be said.

        An interval narrows with the square root of the number of images. Rounded to two digits.
        """
        margin = abs(self.allowed - self.drop)
        width = self.high - self.drop if self.drop <= self.allowed else self.drop - self.low
        if self.images < MIN_IMAGES or width >= margin * math.sqrt(MOST_TIMES):
            return None
        needed = self.images * (width / margin) ** 2
        step = 10 ** max(0, math.floor(math.log10(max(needed, 1))) - 1)
        return max(self.images, math.ceil(needed / step) * step)


def matches_of(coco_eval: COCOeval) -> Matches:
    """The matches of an evaluation (evaluate.run_cocoeval), over all object sizes."""
    params = coco_eval.params
    count, areas = len(params.imgIds), len(params.areaRng)
    thresholds = len(params.iouThrs)
    categories = []
    for k in range(len(params.catIds)):
        entries = coco_eval.evalImgs[k * areas * count : (k * areas + 1) * count]  # of the first area range: all sizes
        found = [(i, entry) for i, entry in enumerate(entries) if entry is not None]
        objects = np.zeros(count, np.int64)
        for i, entry in found:
            objects[i] = np.count_nonzero(np.asarray(entry["gtIgnore"]) == 0)
        scores = np.concatenate([np.zeros(0), *(entry["dtScores"] for _, entry in found)])
        order = np.argsort(-scores, kind="stable")  # as pycocotools orders them
        images = np.concatenate([np.zeros(0, np.int64), *(np.full(len(e["dtScores"]), i) for i, e in found)])
        matched, ignored = (
            np.concatenate([np.zeros((thresholds, 0), bool), *(np.asarray(e[key]) > 0 for _, e in found)], axis=1)
            for key in ("dtMatches", "dtIgnore")
        )
        categories.append(CategoryMatches(images[order], matched[:, order], ignored[:, order], objects))
    return Matches(count, np.asarray(params.recThrs), tuple(categories))


def average_precision(matches: Matches, counts: np.ndarray) -> np.ndarray:
    """COCO AP [B] of B resamples of a set; NaN for one without any object.

    Args:
        counts: [B, N] how often each image is in the resample; all 1 give pycocotools' AP.
    """
    per_category = [category_precision(category, counts, matches.recalls) for category in matches.categories]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a resample without objects
        return np.nanmean(np.stack(per_category), axis=0) if per_category else np.full(len(counts), np.nan)


def category_precision(category: CategoryMatches, counts: np.ndarray, recalls: np.ndarray) -> np.ndarray:
    """AP [B] of one category, as average_precision.

    The precision at a recall is the highest at that recall or a higher one. It can only rise at a detection that found
    an object, so only those are looked at; an image drawn twice makes such a detection count for two.
    """
    step = max(1, CHUNK // max(1, len(category.images)))
    parts = [resampled_precision(category, counts[i : i + step], recalls) for i in range(0, len(counts), step)]
    return np.concatenate(parts)


def resampled_precision(category: CategoryMatches, counts: np.ndarray, recalls: np.ndarray) -> np.ndarray:
    """category_precision of as many resamples as fit into memory."""
    weights = counts[:, category.images].astype(np.float64)  # [B, D]
    objects = (counts @ category.objects).astype(np.float64)  # [B]
    total = np.zeros(len(counts))
    detections = weights
    for t, (matched, ignored) in enumerate(zip(category.matched, category.ignored, strict=True)):
        if t == 0 or (ignored != category.ignored[t - 1]).any():
            detections = np.cumsum(weights * ~ignored, axis=1)  # [B, D], those so far
        right = np.flatnonzero(matched & ~ignored)
        if not len(right):
            continue
        found = np.cumsum(weights[:, right], axis=1)  # [B, P]
        precision = found / (detections[:, right] + np.spacing(1))
        highest = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        reached = np.searchsorted(recalls, found / np.maximum(objects, 1)[:, None], side="right")  # recalls so far
        total += (np.diff(reached, axis=1, prepend=0) * highest).sum(axis=1)
    return np.where(objects > 0, total / (len(category.matched) * len(recalls)), np.nan)


def compare(reference: Matches, other: Matches, allowed: float, seed: int = 0) -> Comparison:
    """What ``other`` loses against ``reference``, with the interval of its loss; the same for the same seed.

    Args:
        reference, other: of two models on one set.
        allowed: points of AP that may be lost.
    """
    count = reference.images
    whole = np.ones((1, count), np.int64)
    ap = [float(average_precision(matches, whole)[0]) for matches in (reference, other)]
    drop = 100 * (ap[0] - ap[1])
    if count < MIN_IMAGES or math.isnan(drop):
        return Comparison(0.0 if math.isnan(drop) else drop, -100.0, 100.0, count, allowed)
    counts = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    drops = 100 * (average_precision(reference, counts) - average_precision(other, counts))
    tail = 50 * (1 - CONFIDENCE)  # percent
    low, high = np.nanpercentile(drops, [tail, 100 - tail])
    return Comparison(drop, float(low), float(high), count, allowed)
