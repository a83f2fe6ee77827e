"""How far an AP, or a difference of AP between two models, can be believed: a bootstrap over the images of one set.

Images are drawn with replacement, as many as there are, RESAMPLES times; each draw gives an AP. Two models that ran on
the same images are compared on the same draws, which give their difference. What the two have in common, such as an
image that is hard for both, cancels out, so its interval is narrower than that of either AP. Source: B. Efron and R.
Tibshirani, An Introduction to the Bootstrap, 1993, chapters 6 and 13 (percentile interval).

COCO matches detections with objects image by image, so a draw needs no new matching: what pycocotools found is weighted
with how often each image was drawn.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import numpy as np
from pycocotools.cocoeval import COCOeval

RESAMPLES, FEW_RESAMPLES = 1000, 200
CONFIDENCE = 0.95
MIN_IMAGES = 5  # resamples of fewer are too much alike to say anything
WORK = 10**8  # resamples × detections of a report; large sets get fewer resamples, as they vary less
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
class Interval:
    """A figure with the interval that holds it on new images of this kind with CONFIDENCE; all NaN if unknown.

    Attributes:
        value: on the set itself.
        low, high: the interval; NaN on sets of fewer than MIN_IMAGES images.
    """

    value: float
    low: float
    high: float


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


def matches_of(coco_eval: COCOeval, area: int = 0) -> Matches:
    """The matches of an evaluation (evaluate.run_cocoeval).

    Args:
        area: object sizes that count, as an index of params.areaRng: 0 all, 1 small, 2 medium, 3 large.
    """
    params = coco_eval.params
    count, areas = len(params.imgIds), len(params.areaRng)
    thresholds = len(params.iouThrs)
    categories = []
    for k in range(len(params.catIds)):
        first = (k * areas + area) * count
        entries = coco_eval.evalImgs[first : first + count]
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
    return mean_of_known(precisions(matches, counts).mean(axis=2))


def precisions(matches: Matches, counts: np.ndarray) -> np.ndarray:
    """AP [categories, B, T] of each category at each IoU threshold, as average_precision."""
    per_category = [category_precision(category, counts, matches.recalls) for category in matches.categories]
    return np.stack(per_category) if per_category else np.zeros((0, len(counts), 1))


def mean_of_known(values: np.ndarray) -> np.ndarray:
    """The mean over the first axis of what is not NaN; NaN where nothing is."""
    if not len(values):
        return np.full(values.shape[1:], np.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a resample without objects
        return np.nanmean(values, axis=0)


def resamples_for(detections: int) -> int:
    """How many resamples a report of a set with so many detections is made of: RESAMPLES to FEW_RESAMPLES."""
    return min(RESAMPLES, max(FEW_RESAMPLES, WORK // max(detections, 1)))


def resamples(count: int, number: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """How often each of ``count`` images is in the set itself (the first row), and then in each resample [B, count].

    A set of fewer than MIN_IMAGES images has no resamples.
    """
    drawn = number if count >= MIN_IMAGES else 0
    counts = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / max(count, 1)), size=drawn)
    return np.concatenate([np.ones((1, count), np.int64), counts.reshape(drawn, count)])


def interval(values: np.ndarray) -> Interval:
    """The interval of a figure [B] on the set itself (the first) and on its resamples."""
    known = values[1:][~np.isnan(values[1:])]
    if not len(known) or math.isnan(values[0]):
        return Interval(float(values[0]), math.nan, math.nan)
    tail = 50 * (1 - CONFIDENCE)  # percent
    low, high = np.percentile(known, [tail, 100 - tail])
    return Interval(float(values[0]), float(low), float(high))


def category_precision(category: CategoryMatches, counts: np.ndarray, recalls: np.ndarray) -> np.ndarray:
    """AP [B, T] of one category.

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
    total = np.zeros((len(counts), len(category.matched)))  # [B, T]
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
        total[:, t] = (np.diff(reached, axis=1, prepend=0) * highest).sum(axis=1)
    return np.where(objects[:, None] > 0, total / len(recalls), np.nan)


def compare(reference: Matches, other: Matches, allowed: float, seed: int = 0) -> Comparison:
    """What ``other`` loses against ``reference``, with the interval of its loss; the same for the same seed.

    Args:
        reference, other: of two models on one set.
        allowed: points of AP that may be lost.
    """
    count = reference.images
    counts = resamples(count, seed=seed)
    found = interval(100 * (average_precision(reference, counts) - average_precision(other, counts)))
    if math.isnan(found.low):
        return Comparison(0.0 if math.isnan(found.value) else found.value, -100.0, 100.0, count, allowed)
    return Comparison(found.value, found.low, found.high, count, allowed)
