"""What `odtk export --verify` reports: tables on the terminal, values for JSON, and an HTML page with pictures."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image as PILImage
from rich.console import Console
from rich.table import Table as RichTable

from .. import __version__
from ..data.images import ImageError
from ..data.records import Image
from ..inference.drawing import LEGIBLE, annotate, coco_to_shapes
from ..text import plural, printable
from .bootstrap import CONFIDENCE, Comparison, Matches
from .evaluate import Metrics
from .page import Markup, Section, image_tag, join, page, paragraph, table, text

PICTURES = 6  # images that the HTML page shows
SHOWN_SCORE = 0.3  # the COCO metrics need detections from 0.05 on, but those would cover the image
COLUMNS = ("model", "AP", "AP50", "change in points", "ms per image", "MiB")


@dataclass(frozen=True)
class Run:
    """What one model scored on the verification set.

    Attributes:
        name: what ran it, and its precision: ``ONNX int8``.
        bytes: size of its file.
        metrics: COCO metrics on the set.
        latency: milliseconds per image at batch 1, from an image in memory to its detections; the median.
        results: its detections as COCO results.
        matches: what they matched, for comparisons (bootstrap.py).
    """

    name: str
    bytes: int
    metrics: Metrics
    latency: float
    results: list[dict[str, Any]]
    matches: Matches

    def to_dict(self) -> dict[str, Any]:
        """Plain values without the detections, for JSON."""
        return {"name": self.name, "bytes": self.bytes, "latency_ms": round(self.latency, 2), **self.metrics.to_dict()}


@dataclass(frozen=True)
class Verdict:
    """What the verification found.

    Attributes:
        runs: PyTorch in fp32 first, the file that is verified last.
        comparisons: of each run with PyTorch.
        layer_costs: change of the detections in percent by layer, the most costly layer first (sensitivity.py); empty
            unless the file is INT8.
        fp16_layers: layers that the INT8 file keeps in FP16.
    """

    runs: tuple[Run, ...]
    comparisons: tuple[Comparison, ...]
    layer_costs: dict[str, float]
    fp16_layers: tuple[str, ...]

    @property
    def comparison(self) -> Comparison:
        """That of the file."""
        return self.comparisons[-1]

    @property
    def passed(self) -> bool:
        """Whether the file may be used, see Comparison."""
        return self.comparison.passed

    @property
    def exit_code(self) -> int:
        """0 if the file passed; 2 if it loses too much for certain, 3 if it did on these images, which cannot tell."""
        if self.passed:
            return 0
        return 2 if self.comparison.verdict == "beyond" else 3

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON, with the versions and the machine that gave them."""
        return {
            "odtk": __version__,
            "torch": torch.__version__,
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads"
            + (f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""),
            "runs": [
                {**run.to_dict(), **drop_values(found)} for run, found in zip(self.runs, self.comparisons, strict=True)
            ],
            **drop_values(self.comparison),
            "allowed_points": self.comparison.allowed,
            "images": self.comparison.images,
            "verdict": self.comparison.verdict,
            "images_needed": self.comparison.images_needed if self.comparison.verdict == "cannot tell" else None,
            "passed": self.passed,
            "fp16_layers": self.fp16_layers,
            "layer_costs_percent": self.layer_costs,
        }


def drop_values(found: Comparison) -> dict[str, Any]:
    """The points that were lost, and their interval, for JSON."""
    return {"drop_points": round(found.drop, 3), "drop_interval": [round(found.low, 3), round(found.high, 3)]}


def run_rows(verdict: Verdict) -> list[list[str]]:
    """A row per run, with the cells of COLUMNS."""
    return [
        [
            run.name,
            f"{run.metrics.ap:.4f}",
            f"{run.metrics.ap50:.4f}",
            f"{signed(-found.drop)} ({interval_of(found)})" if i else "",
            f"{run.latency:.1f}",
            f"{run.bytes / 2**20:.1f}",
        ]
        for i, (run, found) in enumerate(zip(verdict.runs, verdict.comparisons, strict=True))
    ]


def signed(points: float) -> str:
    """A change in points of AP, such as +0.10; 0.00 has no sign."""
    text = f"{points:+.2f}"
    return "0.00" if text in ("+0.00", "-0.00") else text


def interval_of(found: Comparison) -> str:
    """The interval of the change of AP, from the worst to the best."""
    return f"{signed(-found.high)} to {signed(-found.low)}"


def class_rows(verdict: Verdict) -> list[list[str]]:
    """A row per class: its name, then its AP in each run."""
    per_run = [run.metrics.classes for run in verdict.runs]
    return [[entries[0].name, *(f"{entry.ap:.4f}" for entry in entries)] for entries in zip(*per_run, strict=True)]


def summarize(name: str, found: Comparison) -> str:
    """What a comparison of the model ``name`` with PyTorch found, and whether it passes."""
    points = signed(-found.drop)
    change = {"+": f"gains {points[1:]} points of AP", "-": f"loses {points[1:]} points of AP"}
    interval = f"{100 * CONFIDENCE:g} % interval of the change: {interval_of(found)}"
    known = f"{name} {change.get(points[0], 'keeps its AP')} ({interval})"
    if found.verdict != "cannot tell":
        return f"{known}, {found.verdict} the {found.allowed:g} that it may lose."
    needed = found.images_needed
    enough = f"about {needed} would do" if needed else "many more are needed"
    outcome = "It passes, because it does not here" if found.passed else "It fails, because it does here"
    doubt = f"{plural(found.images, 'image')} cannot tell whether it loses more than the {found.allowed:g} allowed"
    return f"{known}. {doubt}; {enough}. {outcome}."


def print_verdict(verdict: Verdict, path: str) -> None:
    """Prints the tables, for INT8 the most costly layers, and the verdict on the file ``path``."""
    console = Console(markup=False, emoji=False)  # names are names, whatever is in them
    names = [run.name for run in verdict.runs]
    for title, columns, rows in (
        (f"{printable(path)} on the verification set", COLUMNS, run_rows(verdict)),
        ("AP per class", ("class", *names), class_rows(verdict)),
    ):
        table = RichTable(title=title)
        for i, column in enumerate(columns):
            table.add_column(column, justify="right" if i else "left")
        for row in rows:
            table.add_row(*map(printable, row))
        console.print(table)
    if verdict.layer_costs:
        worst = list(verdict.layer_costs.items())[:5]
        print("Most costly layers in INT8: " + ", ".join(f"{printable(name)} ({value:.2g} %)" for name, value in worst))
        print("In FP16: " + (", ".join(map(printable, verdict.fp16_layers)) or "none; every convolution is INT8"))
    print(summarize(verdict.runs[-1].name, verdict.comparison))


def html_page(verdict: Verdict, path: str, images: Sequence[Image]) -> str:
    """The report on the file ``path`` as one HTML page that loads no other file: tables, layers, and pictures.

    Args:
        images: the verification set; PICTURES of them are shown.
    """
    names = [run.name for run in verdict.runs]
    tone = "unsure" if verdict.comparison.verdict == "cannot tell" else "good" if verdict.passed else "bad"
    opening = [Markup(f"<p class={tone}><b>{text(summarize(names[-1], verdict.comparison))}</b></p>")]
    sections = [
        Section("models", "Models", table(COLUMNS, run_rows(verdict))),
        Section("classes", "AP per class", table(("class", *names), class_rows(verdict))),
    ]
    if verdict.layer_costs:
        kept = set(verdict.fp16_layers)
        costs = verdict.layer_costs.items()
        rows = [[name, f"{value:.2f}", "FP16" if name in kept else "INT8"] for name, value in costs]
        meaning = paragraph(
            "How much the detections of a few images change, in scores and boxes, when only this layer is quantized: "
            "0 % is no change, 100 % that no detection is left."
        )
        body = join([meaning, table(("layer", "%", "written as"), rows)])
        sections.append(Section("layers", "What each layer costs in INT8", body))
    figures = html_figures(verdict.runs[0], verdict.runs[-1], images)
    shown = paragraph(f"The images on which the two differ most, with the boxes that score {SHOWN_SCORE} or more.")
    heading = f"{names[0]} (left) and {names[-1]} (right)"
    sections.append(Section("pictures", heading, join([shown, *figures])))
    return page(os.path.basename(path), opening, sections)


def html_figures(reference: Run, run: Run, images: Sequence[Image]) -> list[Markup]:
    """A figure for each image whose detections differ most between two runs: one picture per run, side by side.

    At most PICTURES of them. An image that cannot be decoded is left out: the loader has reported it.
    """
    sums = [score_sums(side.results) for side in (reference, run)]
    ranked = sorted(images, key=lambda image: -abs(sums[0].get(image.id, 0) - sums[1].get(image.id, 0)))
    figures = []
    for image in ranked[:PICTURES]:
        try:
            pixels = PILImage.fromarray(image.decode())  # turned as the boxes are
        except ImageError:
            continue
        shapes = [coco_to_shapes(shown_detections(side, image.id)) for side in (reference, run)]
        name = os.path.basename(image.path)
        pair = [
            image_tag(annotate(pixels, of, min_side=LEGIBLE), f"{name}: detections of {side.name}")
            for of, side in zip(shapes, (reference, run), strict=True)
        ]
        figures.append(Markup(f'<figure class="pair">{join(pair)}<figcaption>{text(name)}</figcaption></figure>'))
    return figures


def score_sums(results: Sequence[dict[str, Any]]) -> dict[int, float]:
    """The sum of the detections' scores by image id."""
    sums: dict[int, float] = {}
    for result in results:
        sums[result["image_id"]] = sums.get(result["image_id"], 0.0) + result["score"]
    return sums


def shown_detections(run: Run, image_id: int) -> list[dict[str, Any]]:
    """The detections of one image that its picture shows."""
    return [r for r in run.results if r["image_id"] == image_id and r["score"] >= SHOWN_SCORE]
