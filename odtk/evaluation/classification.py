"""What a classifier's answers are worth: top-1, top-5, precision, recall, F1 and the confusion matrix.

Every figure is that of scikit-learn, and the means are its ``macro`` averages: of all classes that an image has or that
was answered, each counts the same. Where nothing was to be found or answered, a figure is 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

TOP = 5  # answers that are looked at
SHOWN_CLASSES = 8  # in a line


@dataclass(frozen=True)
class ClassFigures:
    """One class.

    Attributes:
        precision: share of its answers that are right, 0…1.
        recall: share of its images that were answered so, 0…1.
        f1: 2 · precision · recall / (precision + recall).
        support: its images.
        answers: images that were answered so.
    """

    name: str
    precision: float
    recall: float
    f1: float
    support: int
    answers: int


@dataclass(frozen=True)
class Classification:
    """All classes.

    Attributes:
        top1: share of the images whose first answer is right, 0…1; −1 without images.
        top5: share of those whose class is among the first TOP answers; None with TOP classes or fewer.
        precision, recall, f1: means over the classes that occur.
        classes: in the order of the labels.
        confusion: [K, K] int, rows are the images' classes, columns the answers.
    """

    top1: float
    top5: float | None
    precision: float
    recall: float
    f1: float
    classes: tuple[ClassFigures, ...]
    confusion: np.ndarray

    def values(self) -> dict[str, float]:
        """The figures by name, for a log."""
        top5 = {} if self.top5 is None else {"top-5": self.top5}
        means = {"precision": self.precision, "recall": self.recall, "F1": self.f1}
        return {"top-1": self.top1, **top5, **means, **{f"F1/{c.name}": c.f1 for c in self.classes if c.support}}

    def line(self) -> str:
        """The figures for people, in a line: F1 of every class, or of the worst of many."""
        top5 = "" if self.top5 is None else f"  top-5 {self.top5:.3f}"
        found = [c for c in self.classes if c.support]
        worst = sorted(found, key=lambda c: c.f1)[:SHOWN_CLASSES]
        few = len(found) <= SHOWN_CLASSES
        listed = ", ".join(f"{c.name} {c.f1:.3f}" for c in (found if few else worst))
        return f"top-1 {self.top1:.3f}{top5}  F1 {self.f1:.3f}  ({'' if few else 'worst: '}{listed})"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        figures = {"top-1": self.top1, "top-5": self.top5, "precision": self.precision, "recall": self.recall}
        classes = [asdict(one) for one in self.classes]
        return {**figures, "F1": self.f1, "classes": classes, "confusion": self.confusion.tolist()}


def measure(labels: np.ndarray, answers: np.ndarray, names: Sequence[str]) -> Classification:
    """What answers are worth.

    Args:
        labels: int [n], the images' classes, 0…K − 1.
        answers: int [n, ≥ 1], classes by falling score, the first min(K, TOP) or more of them.
        names: of the K classes.
    """
    count = len(names)
    first = answers[:, 0]
    confusion = np.zeros((count, count), int)
    np.add.at(confusion, (labels, first), 1)
    right, support, answered = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    precision, recall, f1 = (
        np.divide(a, b, out=np.zeros(count), where=b > 0)
        for a, b in ((right, answered), (right, support), (2 * right, answered + support))
    )
    occurs = (support + answered) > 0
    classes = tuple(
        ClassFigures(name, float(precision[k]), float(recall[k]), float(f1[k]), int(support[k]), int(answered[k]))
        for k, name in enumerate(names)
    )
    means = [float(of[occurs].mean()) if occurs.any() else 0.0 for of in (precision, recall, f1)]
    top5 = None
    if count > TOP and len(labels):
        top5 = float((answers[:, :TOP] == labels[:, None]).any(1).mean())
    return Classification(
        top1=float((first == labels).mean()) if len(labels) else -1.0,
        top5=top5,
        precision=means[0],
        recall=means[1],
        f1=means[2],
        classes=classes,
        confusion=confusion,
    )


def table_lines(found: Classification) -> list[str]:
    """The figures of each class as lines of a table."""
    width = max([len("mean"), *(min(40, len(c.name)) for c in found.classes)])
    lines = [f"{'class':{width}}  precision  recall     F1  support"]
    for c in found.classes:
        name = c.name if len(c.name) <= 40 else c.name[:39] + "…"
        lines.append(f"{name:{width}}  {c.precision:9.3f}  {c.recall:6.3f}  {c.f1:5.3f}  {c.support:7d}")
    total = sum(c.support for c in found.classes)
    lines.append(f"{'mean':{width}}  {found.precision:9.3f}  {found.recall:6.3f}  {found.f1:5.3f}  {total:7d}")
    return lines
