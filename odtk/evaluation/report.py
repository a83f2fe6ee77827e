"""What `odtk export --verify` reports: tables on the terminal, values for JSON, and an HTML page with pictures."""

from __future__ import annotations

import base64
import html
import io
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
from ..data.images import ImageError, decode
from ..data.records import Image
from ..inference.drawing import LEGIBLE, annotate, coco_to_shapes
from .evaluate import Metrics

PICTURES = 6  # images that the HTML page shows
SHOWN_SCORE = 0.3  # the COCO metrics need detections from 0.05 on, but those would cover the image
COLUMNS = ("model", "AP", "AP50", "points lost", "ms per image", "MiB")
# Figures are wider than the text, nearly as wide as the window, so that labels can be read.
STYLE = """body{font:15px system-ui,sans-serif;margin:2em auto;max-width:64em;color:#222}table{border-collapse:collapse;
margin:1em 0}td,th{padding:.25em .8em;border-bottom:1px solid #ccc;text-align:right}td:first-child,th:first-child{
text-align:left}figure{margin:1em calc(50% - 48vw)}figure img{width:49%}.bad{color:#b00020}.good{color:#0a7a2f}"""


@dataclass(frozen=True)
class Run:
    """What one model scored on the verification set.

    Attributes:
        name: what ran it, and its precision: ``ONNX int8``.
        bytes: size of its file.
        metrics: COCO metrics on the set.
        latency: milliseconds per image at batch 1, from an image in memory to its detections; the median.
        results: its detections as COCO results.
    """

    name: str
    bytes: int
    metrics: Metrics
    latency: float
    results: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """Plain values without the detections, for JSON."""
        return {"name": self.name, "bytes": self.bytes, "latency_ms": round(self.latency, 2), **self.metrics.to_dict()}


@dataclass(frozen=True)
class Verdict:
    """What the verification found.

    Attributes:
        runs: PyTorch in fp32 first, the file that is verified last.
        max_ap_drop: points of AP (AP × 100) that the file may lose against PyTorch.
        sensitivity: decibels by layer, the most costly layer first (sensitivity.py); empty unless the file is INT8.
        fp16_layers: layers that the INT8 file keeps in FP16.
    """

    runs: tuple[Run, ...]
    max_ap_drop: float
    sensitivity: dict[str, float]
    fp16_layers: tuple[str, ...]

    @property
    def ap_drop(self) -> float:
        """Points of AP that the file loses against PyTorch."""
        return ap_drop(self.runs[0], self.runs[-1])

    @property
    def passed(self) -> bool:
        """Whether the file loses no more than it may."""
        return self.ap_drop <= self.max_ap_drop

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON, with the versions and the machine that gave them."""
        return {
            "odtk": __version__,
            "torch": torch.__version__,
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads"
            + (f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""),
            "runs": [run.to_dict() for run in self.runs],
            "drop_points": round(self.ap_drop, 3),
            "allowed_points": self.max_ap_drop,
            "within": self.passed,
            "fp16_layers": self.fp16_layers,
            "sensitivity_db": self.sensitivity,
        }


def ap_drop(reference: Run, run: Run) -> float:
    """Points of AP (AP × 100) that a run loses against the reference."""
    return 100 * (reference.metrics.ap - run.metrics.ap)


def run_rows(verdict: Verdict) -> list[list[str]]:
    """A row per run, with the cells of COLUMNS."""
    return [
        [
            run.name,
            f"{run.metrics.ap:.4f}",
            f"{run.metrics.ap50:.4f}",
            f"{ap_drop(verdict.runs[0], run):+.2f}",
            f"{run.latency:.1f}",
            f"{run.bytes / 2**20:.1f}",
        ]
        for run in verdict.runs
    ]


def class_rows(verdict: Verdict) -> list[list[str]]:
    """A row per class: its name, then its AP in each run."""
    per_run = [run.metrics.classes for run in verdict.runs]
    return [[entries[0].name, *(f"{entry.ap:.4f}" for entry in entries)] for entries in zip(*per_run, strict=True)]


def summarize(verdict: Verdict) -> str:
    """The verdict in one sentence."""
    relation = "within" if verdict.passed else "more than"
    loss = f"{verdict.runs[-1].name} loses {verdict.ap_drop:.2f} points of AP"
    return f"{loss}, {relation} the {verdict.max_ap_drop:g} allowed."


def print_verdict(verdict: Verdict, path: str) -> None:
    """Prints the tables, for INT8 the most costly layers, and the verdict on the file ``path``."""
    console = Console()
    names = [run.name for run in verdict.runs]
    for title, columns, rows in (
        (f"{path} on the verification set", COLUMNS, run_rows(verdict)),
        ("AP per class", ("class", *names), class_rows(verdict)),
    ):
        table = RichTable(title=title)
        for i, column in enumerate(columns):
            table.add_column(column, justify="right" if i else "left")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    if verdict.sensitivity:
        worst = list(verdict.sensitivity.items())[:5]
        print("Most costly layers in INT8: " + ", ".join(f"{name} ({value:g} dB)" for name, value in worst))
        print("In FP16: " + (", ".join(verdict.fp16_layers) or "none; every convolution is INT8"))
    print(summarize(verdict))


def html_page(verdict: Verdict, path: str, images: Sequence[Image]) -> str:
    """The report on the file ``path`` as one HTML page that loads no other file: tables, layers, and pictures.

    Args:
        images: the verification set; PICTURES of them are shown.
    """
    names = [run.name for run in verdict.runs]
    tone = "good" if verdict.passed else "bad"
    parts = [
        f"<p class={tone}><b>{html.escape(summarize(verdict))}</b></p>",
        html_table(COLUMNS, run_rows(verdict)),
        "<h2>AP per class</h2>",
        html_table(("class", *names), class_rows(verdict)),
    ]
    if verdict.sensitivity:
        kept = set(verdict.fp16_layers)
        costs = verdict.sensitivity.items()
        rows = [[name, f"{value:g}", "FP16" if name in kept else "INT8"] for name, value in costs]
        parts += [
            "<h2>What each layer costs in INT8</h2><p>Signal-to-error ratio of the raw outputs when only this layer is "
            "quantized. The lower it is, the more the layer costs; 6 dB less means twice the error.</p>",
            html_table(("layer", "dB", "written as"), rows),
        ]
    parts.append(
        f"<h2>{html.escape(names[0])} (left) and {html.escape(names[-1])} (right)</h2>"
        f"<p>The images on which the two differ most, with the boxes that score {SHOWN_SCORE} or more.</p>"
    )
    parts += html_figures(verdict.runs[0], verdict.runs[-1], images)
    title = html.escape(os.path.basename(path))
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{STYLE}</style>"
        f"<h1>{title}</h1>" + "\n".join(parts) + "</html>\n"
    )


def html_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of plain text, which is escaped."""

    def html_row(values: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(value)}</{tag}>" for value in values) + "</tr>"

    return "<table>" + html_row(columns, "th") + "".join(html_row(values, "td") for values in rows) + "</table>"


def html_figures(reference: Run, run: Run, images: Sequence[Image]) -> list[str]:
    """A figure for each image whose detections differ most between two runs: one picture per run, side by side.

    At most PICTURES of them. An image that cannot be decoded is left out: the loader has reported it.
    """
    sums = [score_sums(side.results) for side in (reference, run)]
    ranked = sorted(images, key=lambda image: -abs(sums[0].get(image.id, 0) - sums[1].get(image.id, 0)))
    figures = []
    for image in ranked[:PICTURES]:
        try:
            pixels = PILImage.fromarray(decode(image.path, image.orientation))  # turned as the boxes are
        except ImageError:
            continue
        shapes = [coco_to_shapes(shown_detections(side, image.id)) for side in (reference, run)]
        sources = [data_url(annotate(pixels, of, min_side=LEGIBLE)) for of in shapes]
        figures.append(
            "<figure>"
            + " ".join(f'<img alt="" src="{source}">' for source in sources)
            + f"<figcaption>{html.escape(os.path.basename(image.path))}</figcaption></figure>"
        )
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


def data_url(picture: PILImage.Image) -> str:
    """A picture as a JPEG inside the page."""
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()
