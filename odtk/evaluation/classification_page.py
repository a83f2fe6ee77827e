"""The page of `odtk pretrain --report`: what a classifier's answers are worth, and its surest mistakes."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from PIL import Image as PILImage

from .. import __version__
from ..data.images import ImageError
from ..data.records import Image
from ..text import plural
from .charts import Line, line_chart
from .classification import Classification
from .operating_point import calibration
from .page import Markup, Section, bar, join, page, paragraph, picture, table, tinted

PICTURES = 24  # mistakes that are shown
PICTURE_SIDE = 320  # pixels of the longer side of a picture
MATRIX_CLASSES = 30  # of the confusion matrix; of more classes, those that are confused most


@dataclass(frozen=True)
class Answers:
    """What a classifier says of n images.

    Attributes:
        images: of the set, as they were read.
        labels: int [n], their classes.
        answers: int [n, k], classes by falling score.
        scores: float [n, k], their probabilities.
    """

    images: list[Image]
    labels: np.ndarray
    answers: np.ndarray
    scores: np.ndarray


def classification_page(found: Classification, said: Answers, title: str) -> str:
    """The page.

    Args:
        found: classification.measure of what was said.
        title: what was evaluated on what; plain text.
    """
    sizes = [plural(len(said.labels), "image"), plural(len(found.classes), "class", "classes")]
    top5 = "" if found.top5 is None else f", top-5 {found.top5:.3f}"
    opening = [
        Markup(f'<p class="big"><b>top-1 {found.top1:.3f}</b>{top5}, mean F1 {found.f1:.3f}</p>'),
        paragraph(f"{', '.join(sizes)}. odtk {__version__}, {time.strftime('%Y-%m-%d')}.", "soft"),
    ]
    sections = [
        Section("classes", "Classes", class_section(found)),
        Section("confusion", "Confusion", confusion_section(found)),
        Section("calibration", "Calibration", calibration_section(said)),
        Section("mistakes", "Surest mistakes", mistake_section(found, said)),
    ]
    return page(title, opening, sections)


def class_section(found: Classification) -> Markup:
    """Precision, recall and F1 of every class."""
    rows: list[list[object]] = [
        [c.name, c.support, c.answers, f"{c.precision:.3f}", f"{c.recall:.3f}", f"{c.f1:.3f}", bar(c.f1)]
        for c in found.classes
    ]
    total = sum(c.support for c in found.classes)
    means = [f"{value:.3f}" for value in (found.precision, found.recall, found.f1)]
    rows.append([Markup("<i>mean</i>"), total, total, *means, bar(found.f1)])
    meaning = (
        "Precision is the share of a class's answers that are right, recall the share of its images that were answered "
        "so, F1 = 2 · precision · recall / (precision + recall). In the means every class that occurs counts the same; "
        "top-1 is the share of all images that were answered right."
    )
    return join(
        [paragraph(meaning), table(["class", "images", "answers", "precision", "recall", "F1", ""], rows, "Per class")]
    )


def confusion_section(found: Classification) -> Markup:
    """The confusion matrix, or its most confused classes."""
    counts, names = found.confusion, [c.name for c in found.classes]
    wrong = counts.sum(0) + counts.sum(1) - 2 * np.diag(counts)
    shown = sorted(np.argsort(-wrong, kind="stable")[:MATRIX_CLASSES].tolist())
    rows = []
    for place in shown:
        total = int(counts[place].sum())
        cells = [tinted(int(counts[place, other]), counts[place, other] / max(1, total)) for other in shown]
        rows.append([names[place], *cells, total])
    parts: list[object] = [
        paragraph("A row says what the images of one class were answered as. The color is the share of the row.")
    ]
    if len(shown) < len(names):
        parts.append(paragraph(f"The {len(shown)} of {len(names)} classes that are confused most; sums are of all."))
    parts.append(table(["class ↓ answered as →", *(names[k] for k in shown), "sum"], rows, "Confusion matrix"))
    return join(parts)


def calibration_section(said: Answers) -> Markup:
    """Whether the score of the first answer is a probability."""
    if not len(said.labels):
        return paragraph("There are no images.")
    bins, error = calibration(said.scores[:, 0], said.answers[:, 0] == said.labels)
    known = [b for b in bins if b.count]
    lines = [
        Line("right", [(b.score, b.right) for b in known]),
        Line("as it would be if scores were probabilities", [(0.0, 0.0), (1.0, 1.0)]),
    ]
    rows = [[f"{b.low:.1f} to {b.high:.1f}", b.count, f"{b.score:.3f}", f"{b.right:.3f}"] for b in known]
    meaning = (
        "A score is a probability if, of all images whose first answer has score 0.7, seven in ten are right. The "
        f"expected calibration error is {error:.3f}: so far, on average, the share that is right is from the score. "
        "Label smoothing makes scores lower than that share."
    )
    return join(
        [
            paragraph(meaning),
            line_chart("Share of answers that are right", lines, "score", x_range=(0.0, 1.0), y_range=(0.0, 1.0)),
            table(["score", "images", "mean score", "right"], rows, "Calibration"),
        ]
    )


def mistake_section(found: Classification, said: Answers) -> Markup:
    """The wrong answers with the highest scores; images that cannot be decoded are left out."""
    wrong = np.flatnonzero(said.answers[:, 0] != said.labels)
    if not len(wrong):
        return paragraph("Every answer is right.")
    names = [c.name for c in found.classes]
    figures: list[Markup] = []
    for i in wrong[np.argsort(-said.scores[wrong, 0], kind="stable")].tolist():
        if len(figures) == PICTURES:
            break
        image = said.images[i]
        try:
            pixels = PILImage.fromarray(image.decode())
        except ImageError:
            continue
        scale = PICTURE_SIDE / max(pixels.size)
        shown = pixels.resize((max(1, round(pixels.width * scale)), max(1, round(pixels.height * scale))))
        words = f"{names[said.labels[i]]}, answered {names[said.answers[i, 0]]} {said.scores[i, 0]:.2f}"
        figures.append(picture(shown, f"{image.path.name}: {words}", f"{words} · {image.path.name}"))
    meaning = (
        f"{plural(len(wrong), 'answer')} of {len(said.labels)} {'is' if len(wrong) == 1 else 'are'} wrong; first those "
        "with the highest score, up to "
        f"{PICTURES}. Several of one kind are often wrong labels, or two classes that look alike."
    )
    return join([paragraph(meaning), Markup(f'<div class="pictures">{join(figures)}</div>')])
