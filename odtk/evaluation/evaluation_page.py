"""The page of `odtk evaluate --report`: what detections are worth, where they fail, and pictures of it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image as PILImage
from pycocotools.cocoeval import COCOeval

from .. import __version__
from ..data.images import ImageError
from ..data.records import Image
from ..inference.drawing import GREEN, LEGIBLE, RED, Shape, annotate, coco_to_outline
from ..text import plural
from .bootstrap import CONFIDENCE, MIN_IMAGES, Interval, resamples_for
from .breakdown import AREAS, Breakdown, breakdown
from .charts import Line, line_chart
from .confusion import Confusion, confusion
from .errors import KINDS, MISSED, RIGHT, Cost, Judgments, costs, judge
from .evaluate import Metrics, metrics_of
from .operating_point import CalibrationBin, ThresholdCurve, calibration, threshold_curve
from .page import Markup, Section, bar, join, page, paragraph, picture, table, text, tinted

PICTURES = 4  # of each kind of error
PICTURE_SIDE = 960  # pixels of the longer side of a picture, at most
MATRIX_CLASSES = 30  # of the confusion matrix; of more classes, those that are confused most
CHART_CLASSES = 100  # that get a chart of their own, those with the most objects
AREA_NAMES = {"small": "small, below 32² pixels", "medium": "medium, 32² to 96²", "large": "large, from 96² on"}


@dataclass(frozen=True)
class Findings:
    """What the page shows.

    Attributes:
        names: of the classes, in the order of params.catIds, as in all that follows.
        curves, curve: precision and recall of each class, and of all together.
    """

    names: list[str]
    metrics: Metrics
    parts: Breakdown
    judged: Judgments
    curves: list[ThresholdCurve]
    curve: ThresholdCurve
    confusion: Confusion
    bins: list[CalibrationBin]
    calibration_error: float
    costs: dict[int, Cost]

    @property
    def threshold(self) -> float:
        """The one with the best F1 over all classes; 0 where no detection is right."""
        return self.confusion.threshold


def find(coco_eval: COCOeval, log: Callable[[str], None] = print) -> Findings:
    """What the page shows of an evaluation (evaluate.run_cocoeval)."""
    metrics, params = metrics_of(coco_eval), coco_eval.params
    judged = judge(coco_eval)
    number = resamples_for(len(judged.score))
    if len(params.imgIds) >= MIN_IMAGES:
        log(f"Drawing the {len(params.imgIds)} images {number} times with replacement, for the intervals")
    entries = [coco_eval.cocoGt.imgs[id] for id in params.imgIds]
    sizes = [
        (int(e["width"]), int(e["height"])) if _is_side(e.get("width")) and _is_side(e.get("height")) else None
        for e in entries
    ]
    parts = breakdown(coco_eval, sizes, number)
    counts = ~judged.ignored
    right = judged.kind == RIGHT
    curves = []
    for k in range(judged.categories):
        own = counts & (judged.category == k)
        curves.append(threshold_curve(judged.score[own], right[own], int((judged.object_category == k).sum())))
    curve = threshold_curve(judged.score[counts], right[counts], len(judged.found))
    threshold = float(curve.thresholds[curve.best]) if curve.best is not None else 0.0
    bins, error = calibration(judged.score[counts], right[counts])
    return Findings(
        names=[c.name for c in metrics.classes],
        metrics=metrics,
        parts=parts,
        judged=judged,
        curves=curves,
        curve=curve,
        confusion=confusion(judged, threshold),
        bins=bins,
        calibration_error=error,
        costs=costs(judged, number)[1],
    )


def _is_side(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value) and value >= 1


def evaluation_page(
    coco_eval: COCOeval,
    title: str,
    pictures: Mapping[int, Image] | str,
    log: Callable[[str], None] = print,
) -> str:
    """The page.

    Args:
        coco_eval: from evaluate.run_cocoeval.
        title: what was evaluated on what; plain text.
        pictures: the images by id (data.dataset.Dataset), or the sentence that says why there are none.
        log: is told what takes time.
    """
    found = find(coco_eval, log)
    ap = found.parts.figures["AP"]
    params = coco_eval.params
    sizes = [
        plural(len(params.imgIds), "image"),
        plural(len(found.judged.found), "object"),
        plural(len(params.catIds), "class", "classes"),
        plural(len(found.judged.score), "detection"),
    ]
    what = {"segm": "masks", "bbox": "boxes"}[params.iouType]
    interval = f", {100 * CONFIDENCE:g} % interval {between(ap)}" if not math.isnan(ap.low) else ""
    opening = [
        Markup(f'<p class="big"><b>AP {figure(ap.value)}</b>{text(interval)}</p>'),
        paragraph(f"{', '.join(sizes)}. Overlap of {what}. odtk {__version__}, {time.strftime('%Y-%m-%d')}.", "soft"),
    ]
    sections = [
        Section("ap", "AP", ap_section(found, len(params.imgIds))),
        Section("thresholds", "Thresholds", threshold_section(found)),
        Section("confusion", "Confusion", confusion_section(found)),
        Section("calibration", "Calibration", calibration_section(found)),
        Section("sizes", "Sizes", size_section(found)),
        Section("errors", "Errors", error_section(found)),
        Section("worst", "Worst images", picture_section(coco_eval, found, pictures)),
    ]
    return page(title, opening, sections)


def figure(value: float) -> str:
    """A figure 0…1 with three decimals; a dash where there was nothing to find."""
    return "–" if math.isnan(value) or value < 0 else f"{value:.3f}"


def between(found: Interval, decimals: int = 3) -> str:
    """The ends of an interval, or a dash."""
    return "–" if math.isnan(found.low) else f"{found.low:.{decimals}f} to {found.high:.{decimals}f}"


# ---------------------------------------------------------------------------------------------------------------------
# Sections


def ap_section(found: Findings, images: int) -> Markup:
    """The COCO figures, and AP of each class."""
    rows = [[name, figure(of.value), between(of)] for name, of in found.parts.figures.items()]
    recalls = [[name, figure(value), ""] for name, value in found.metrics.to_dict()["stats"].items() if "AR" in name]
    per_class = []
    for c, ap, ap50 in zip(found.metrics.classes, found.parts.classes["all"], found.parts.classes50, strict=True):
        per_class.append(
            [c.name, figure(ap.value), between(ap), figure(ap50.value), between(ap50), c.images, c.instances]
        )
    interval = f"{100 * CONFIDENCE:g} % interval"
    meaning = (
        f"The {interval} holds the figure on other images of this kind; it comes from drawing these images with "
        "replacement. Two models whose intervals overlap may still differ: compare them on the same images."
        if images >= MIN_IMAGES
        else f"Fewer than {MIN_IMAGES} images give no interval."
    )
    return join(
        [
            paragraph(
                "AP is the mean over IoU 0.50, 0.55, … 0.95 as COCO defines it; AP50 asks for IoU 0.5 only. AR is the "
                "recall with so many detections per image. " + meaning
            ),
            table(["figure", "value", interval], [*rows, *recalls], "COCO figures"),
            table(["class", "AP", interval, "AP50", interval, "images", "objects"], per_class, "Per class"),
        ]
    )


def threshold_section(found: Findings) -> Markup:
    """Precision, recall and F1 against the threshold, and the best one of each class."""
    objects = np.bincount(found.judged.object_category, minlength=len(found.names))
    rows = [best_row(name, of, int(n)) for name, of, n in zip(found.names, found.curves, objects, strict=True)]
    if len(rows) > 1:
        rows.append(best_row("all classes", found.curve, int(objects.sum())))
    highest = max([1.0, *found.judged.score.tolist()])
    charts = [threshold_chart("All classes", found.curve, highest)]
    shown = sorted(range(len(found.names)), key=lambda k: -objects[k])[:CHART_CLASSES] if len(rows) > 1 else []
    for k in shown:
        chart = threshold_chart(found.names[k], found.curves[k], highest)
        opened = " open" if len(shown) <= 4 else ""
        charts.append(Markup(f"<details{opened}><summary>{text(found.names[k])}</summary>{chart}</details>"))
    left_out = len(found.names) - len(shown)
    if shown and left_out:
        charts.append(
            paragraph(f"Charts of the {CHART_CLASSES} classes with the most objects; {left_out} are left out.")
        )
    return join(
        [
            paragraph(
                "Only detections that score above the threshold count; one is right if it overlaps an object of its "
                "class by IoU 0.5. Precision is the share of detections that are right, recall the share of objects "
                "that are found, F1 = 2 · precision · recall / (precision + recall). The threshold with the best F1 is "
                "a good start for whoever uses the model."
            ),
            table(["class", "objects", "best threshold", "precision", "recall", "F1"], rows, "Best thresholds"),
            *charts,
        ]
    )


def best_row(name: str, curve: ThresholdCurve, objects: int) -> list[object]:
    """A class at the threshold of its best F1."""
    best = curve.best
    if best is None:
        return [name, objects, "–", "–", "–", "–"]
    values = (curve.thresholds[best], curve.precision[best], curve.recall[best], curve.f1[best])
    return [name, objects, *(f"{v:.3f}" for v in values)]


def threshold_chart(name: str, curve: ThresholdCurve, highest: float) -> Markup:
    """Precision, recall and F1 over the thresholds 0 to ``highest``."""
    lines = [
        Line(what, list(zip(curve.thresholds[::-1].tolist(), values[::-1].tolist(), strict=True)))
        for what, values in (("precision", curve.precision), ("recall", curve.recall), ("F1", curve.f1))
    ]
    best = curve.best
    markers = [] if best is None else [(float(curve.thresholds[best]), f"best F1 at {curve.thresholds[best]:.3f}")]
    return line_chart(name, lines, "score threshold", x_range=(0.0, highest), y_range=(0.0, 1.0), markers=markers)


def confusion_section(found: Findings) -> Markup:
    """The confusion matrix, or its most confused classes."""
    counts, threshold = found.confusion.counts, found.threshold
    classes = len(found.names)
    wrong = counts.sum(axis=0)[:classes] + counts.sum(axis=1)[:classes] - 2 * np.diag(counts)[:classes]
    shown = sorted(np.argsort(-wrong, kind="stable")[:MATRIX_CLASSES].tolist())
    places = [*shown, classes]
    names = [*(found.names[k] for k in shown), Markup("<i>background</i>")]
    rows = []
    for place, name in zip(places, names, strict=True):
        total = max(1, int(counts[place].sum()))
        cells: list[object] = [
            "" if place == other == classes else tinted(int(counts[place, other]), counts[place, other] / total)
            for other in places
        ]
        rows.append([name, *cells, int(counts[place].sum())])
    parts: list[object] = [
        paragraph(
            f"Detections that score above {threshold:.3f}, the threshold with the best F1, against objects, paired at "
            "IoU 0.5. A row says what the objects of one class were taken for: under background, those of which "
            "nothing was found. The row background counts detections where no object is. The color is the share of "
            "the row."
        ),
    ]
    if len(shown) < classes:
        parts.append(paragraph(f"The {len(shown)} of {classes} classes that are confused most; row sums are of all."))
    parts.append(table(["object ↓ detected as →", *names, "sum"], rows, "Confusion matrix"))
    return join(parts)


def calibration_section(found: Findings) -> Markup:
    """Whether scores are probabilities."""
    judged = found.judged
    if not len(judged.score):
        return paragraph("There are no detections.")
    if judged.ignored.all():
        return paragraph("There are no detections that count.")
    if judged.score.min() < 0 or judged.score.max() > 1:
        return paragraph("The scores are not between 0 and 1, so they are no probabilities.")
    known = [b for b in found.bins if b.count]
    most = max(b.count for b in known)
    rows = [
        [f"{b.low:.1f} to {b.high:.1f}", b.count, bar(b.count / most), figure(b.score), figure(b.right)]
        for b in found.bins
    ]
    lines = [
        Line("right", [(b.score, b.right) for b in known]),
        Line("as it would be if scores were probabilities", [(0.0, 0.0), (1.0, 1.0)]),
    ]
    return join(
        [
            paragraph(
                "A score is a probability if, of all detections with score 0.7, seven in ten are right (at IoU 0.5). "
                f"The expected calibration error is {found.calibration_error:.3f}: so far, on average, the share that "
                "is right is from the score. Above the diagonal, scores are too low; below it, too high."
            ),
            line_chart("Share of detections that are right", lines, "score", x_range=(0.0, 1.0), y_range=(0.0, 1.0)),
            table(["score", "detections", "", "mean score", "right"], rows, "Calibration"),
        ]
    )


def size_section(found: Findings) -> Markup:
    """AP by the size of objects and of images."""
    interval = f"{100 * CONFIDENCE:g} % interval"
    figures, parts = found.parts.figures, found.parts
    rows: list[list[object]] = []
    for name in AREAS[1:]:
        of = figures[f"AP {name}"]
        share = of.value if not math.isnan(of.value) else 0.0
        rows.append([AREA_NAMES[name], parts.objects[name], figure(of.value), bar(share), between(of)])
    per_class = [
        [name, *(cell for area in AREAS[1:] for cell in (figure(parts.classes[area][k].value),
                                                         between(parts.classes[area][k])))]
        for k, name in enumerate(found.names)
    ]  # fmt: skip
    images = [
        [name, count, figure(of.value), bar(0.0 if math.isnan(of.value) else of.value), between(of)]
        for name, count, of in parts.image_sizes
    ]
    columns = ["class", *(column for area in AREAS[1:] for column in (area, interval))]
    return join(
        [
            table(["objects", "number", "AP", "", interval], rows, "AP by the area of the object"),
            table(columns, per_class, "AP of each class by the area of the object"),
            table(["images", "number", "AP", "", interval], images, "AP by the size of the image")
            if images
            else paragraph("The annotations do not state the sizes of the images."),
        ]
    )


def error_section(found: Findings) -> Markup:
    """What each kind of error costs."""
    most = max([1e-9, *(cost.points.value for cost in found.costs.values())])
    rows = [
        [
            Markup(f'{text(KINDS[kind][0])}<br><span class="soft">{text(KINDS[kind][1])}</span>'),
            cost.count,
            "–" if math.isnan(cost.points.value) else f"{cost.points.value:.2f}",
            bar(cost.points.value / most if not math.isnan(cost.points.value) else 0.0),
            between(cost.points, 2),
        ]
        for kind, cost in found.costs.items()
    ]
    base = found.parts.figures["AP50"].value
    return join(
        [
            paragraph(
                f"How many points of AP50 (now {'–' if math.isnan(base) else f'{100 * base:.1f}'}) would be gained if "
                "the errors of one kind alone were put right; the gains do not add up to what is missing from 100. All "
                "detections count, however low they score. Kinds and costs are those of TIDE (arXiv 2008.08115)."
            ),
            table(["error", "number", "points", "", f"{100 * CONFIDENCE:g} % interval"], rows, "Kinds of error"),
        ]
    )


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def picture_section(coco_eval: COCOeval, found: Findings, pictures: Mapping[int, Image] | str) -> Markup:
    """The images with the worst errors of each kind."""
    if isinstance(pictures, str):
        return paragraph(pictures)
    parts: list[object] = [
        paragraph(
            f"Up to {PICTURES} images for each kind, those with the largest sum of the scores of its errors (of missed "
            "objects, with the most). Errors are red, with the class and the score; objects are green. Only errors "
            f"that score above {found.threshold:.3f} count, if a kind has such."
        )
    ]
    for kind, (name, meaning) in KINDS.items():
        figures = worst_pictures(coco_eval, found, kind, pictures)
        if figures:
            heading = Markup(f'<h3>{text(name)} <span class="soft">· {text(meaning)}</span></h3>')
            parts += [heading, Markup(f'<div class="pictures">{join(figures)}</div>')]
    return join(parts) if len(parts) > 1 else paragraph("There is no error to show.")


def worst_pictures(coco_eval: COCOeval, found: Findings, kind: int, pictures: Mapping[int, Image]) -> list[Markup]:
    """The pictures of one kind of error; images that cannot be decoded are left out."""
    judged = found.judged
    if kind == MISSED:
        chosen = np.flatnonzero(judged.missed)
        place, weight = judged.object_image[chosen], np.ones(len(chosen))
    else:
        of_kind = judged.kind == kind
        above = of_kind & (judged.score > found.threshold)
        chosen = np.flatnonzero(above if above.any() else of_kind)
        place, weight = judged.image[chosen], judged.score[chosen]
    sums = np.bincount(place, weight, minlength=judged.images)
    figures: list[Markup] = []
    for i in np.argsort(-sums, kind="stable").tolist():
        if len(figures) == PICTURES or not (place == i).any():
            break
        image = pictures.get(int(coco_eval.params.imgIds[i]))
        if image is None:
            continue
        try:
            pixels = PILImage.fromarray(image.decode())
        except ImageError:
            continue
        shapes = [Shape(coco_to_outline(entry["bbox"]), GREEN) for entry in objects_of(coco_eval, judged, i)]
        own = chosen[place == i]
        shapes += error_shapes(coco_eval, found, kind, own)
        drawn = annotate(pixels, shapes, min_side=LEGIBLE, max_side=PICTURE_SIDE)
        number = plural(len(own), "object" if kind == MISSED else "error")
        words = f"{KINDS[kind][0]}: {number} in {image.path.name}"
        figures.append(picture(drawn, words, f"{image.path.name}: {number}"))
    return figures


def objects_of(coco_eval: COCOeval, judged: Judgments, image: int) -> Sequence[dict[str, Any]]:
    """The annotations of one image that are objects."""
    entries = coco_eval.cocoGt.dataset["annotations"]
    return [entries[place] for place in judged.object[judged.object_image == image]]


def error_shapes(coco_eval: COCOeval, found: Findings, kind: int, errors: np.ndarray) -> list[Shape]:
    """Errors of one image, the highest score on top."""
    judged = found.judged
    if kind == MISSED:
        entries = coco_eval.cocoGt.dataset["annotations"]
        return [
            Shape(coco_to_outline(entries[judged.object[g]]["bbox"]), RED, found.names[judged.object_category[g]])
            for g in errors
        ]
    entries = coco_eval.cocoDt.dataset["annotations"]
    return [
        Shape(
            coco_to_outline(entries[judged.detection[d]]["bbox"]),
            RED,
            f"{found.names[judged.category[d]]} {judged.score[d]:.2f}",
        )
        for d in sorted(errors.tolist(), key=lambda d: judged.score[d])
    ]
