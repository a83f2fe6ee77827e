"""The report of a verification: tables, HTML page, pictures."""

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
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table as RichTable

from .. import __version__
from ..data.images import ImageError, decode
from ..data.records import Image as DatasetImage
from .evaluate import Metrics

PICTURES = 6
SHOWN_SCORE = 0.3  # of boxes in pictures


@dataclass(frozen=True)
class Run:
    """One model on the whole set.

    Attributes:
        name: what ran it, and its precision.
        bytes: size of its file.
        metrics: COCO figures.
        latency: milliseconds per image at batch 1, from images in memory to detections; the median.
        results: its detections in COCO form.
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
    """What verify found: the runs (PyTorch first, the written file last) and what INT8's layers cost.

    Attributes:
        allowed: points of AP that the written file may lose against PyTorch.
        sensitivity, fp16_layers: see quantize.Table; empty unless the file is INT8.
    """

    runs: tuple[Run, ...]
    allowed: float
    sensitivity: dict[str, float]
    fp16_layers: tuple[str, ...]

    @property
    def drop(self) -> float:
        return drop(self.runs[0], self.runs[-1])

    @property
    def within(self) -> bool:
        return self.drop <= self.allowed


def drop(reference: Run, run: Run) -> float:
    """Points of AP that a run loses against the reference."""
    return 100 * (reference.metrics.ap - run.metrics.ap)


def to_dict(verdict: Verdict) -> dict[str, Any]:
    """A verdict as plain values, for JSON."""
    return {
        "odtk": __version__,
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads"
        + (f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""),
        "runs": [run.to_dict() for run in verdict.runs],
        "drop_points": round(verdict.drop, 3),
        "allowed_points": verdict.allowed,
        "within": verdict.within,
        "fp16_layers": verdict.fp16_layers,
        "sensitivity_db": verdict.sensitivity,
    }


COLUMNS = ("model", "AP", "AP50", "points lost", "ms per image", "MiB")


def rows(verdict: Verdict) -> list[list[str]]:
    """The cells of the table of runs, under COLUMNS."""
    return [
        [
            run.name,
            f"{run.metrics.ap:.4f}",
            f"{run.metrics.ap50:.4f}",
            f"{drop(verdict.runs[0], run):+.2f}",
            f"{run.latency:.1f}",
            f"{run.bytes / 2**20:.1f}",
        ]
        for run in verdict.runs
    ]


def class_rows(verdict: Verdict) -> list[list[str]]:
    """A row per class: its name, and the AP of each run."""
    per_run = [run.metrics.classes for run in verdict.runs]
    return [[entries[0].name, *(f"{entry.ap:.4f}" for entry in entries)] for entries in zip(*per_run, strict=True)]


def sentence(verdict: Verdict) -> str:
    """The verdict in words."""
    relation = "inside" if verdict.within else "beyond"
    return f"{verdict.runs[-1].name} loses {verdict.drop:.2f} points of AP: {relation} the {verdict.allowed:g} allowed."


def show(verdict: Verdict, path: str) -> None:
    """Prints the tables, and for INT8 the most costly layers."""
    console = Console()
    names = [run.name for run in verdict.runs]
    for title, columns, cells in (
        (f"{path} on the verification set", COLUMNS, rows(verdict)),
        ("AP per class", ("class", *names), class_rows(verdict)),
    ):
        table = RichTable(title=title)
        for i, column in enumerate(columns):
            table.add_column(column, justify="right" if i else "left")
        for row in cells:
            table.add_row(*row)
        console.print(table)
    if verdict.sensitivity:
        worst = list(verdict.sensitivity.items())[:5]
        print("Most costly layers in INT8: " + ", ".join(f"{name} ({value:g} dB)" for name, value in worst))
        print("In FP16: " + (", ".join(verdict.fp16_layers) or "none; every convolution is INT8"))
    print(sentence(verdict))


STYLE = """body{font:15px system-ui,sans-serif;margin:2em auto;max-width:64em;color:#222}table{border-collapse:collapse;
margin:1em 0}td,th{padding:.25em .8em;border-bottom:1px solid #ccc;text-align:right}td:first-child,th:first-child{
text-align:left}figure{margin:1em 0}figure img{width:49%}.bad{color:#b00020}.good{color:#0a7a2f}"""


def page(verdict: Verdict, path: str, images: Sequence[DatasetImage]) -> str:
    """The report as one HTML file that needs no other: tables, layers, and pictures of both side by side."""
    names = [run.name for run in verdict.runs]
    tone = "good" if verdict.within else "bad"
    parts = [
        f"<p class={tone}><b>{html.escape(sentence(verdict))}</b></p>",
        html_table(COLUMNS, rows(verdict)),
        "<h2>AP per class</h2>",
        html_table(("class", *names), class_rows(verdict)),
    ]
    if verdict.sensitivity:
        kept = set(verdict.fp16_layers)
        costs = verdict.sensitivity.items()
        cells = [[name, f"{value:g}", "FP16" if name in kept else "INT8"] for name, value in costs]
        parts += [
            "<h2>What each layer costs in INT8</h2><p>Signal over error of the raw outputs when this layer alone is "
            "quantized; the lower, the more costly. Six decibels halve the error.</p>",
            html_table(("layer", "dB", "written as"), cells),
        ]
    parts.append(
        f"<h2>{html.escape(names[0])} (left) and {html.escape(names[-1])} (right)</h2>"
        f"<p>Where the two differ most; boxes that score {SHOWN_SCORE} or more.</p>"
    )
    parts += pictures(verdict.runs[0], verdict.runs[-1], images)
    title = html.escape(os.path.basename(path))
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{STYLE}</style>"
        f"<h1>{title}</h1>" + "\n".join(parts) + "</html>\n"
    )


def html_table(columns: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    def row(values: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(value)}</{tag}>" for value in values) + "</tr>"

    return "<table>" + row(columns, "th") + "".join(row(values, "td") for values in cells) + "</table>"


def pictures(reference: Run, run: Run, images: Sequence[DatasetImage]) -> list[str]:
    """Figures of the images whose detections differ most between two runs; not of one that the loader found damaged."""
    sums = [scores_by_image(side.results) for side in (reference, run)]
    ranked = sorted(images, key=lambda image: -abs(sums[0].get(image.id, 0) - sums[1].get(image.id, 0)))
    figures = []
    for image in ranked[:PICTURES]:
        try:
            picture = Image.fromarray(decode(image.path, image.orientation))  # the raster that the boxes belong to
        except ImageError:
            continue
        drawn = [draw(picture.copy(), side.results, image.id) for side in (reference, run)]
        figures.append(
            "<figure>"
            + " ".join(f'<img alt="" src="{side}">' for side in drawn)
            + f"<figcaption>{html.escape(os.path.basename(image.path))}</figcaption></figure>"
        )
    return figures


def scores_by_image(results: Sequence[dict[str, Any]]) -> dict[int, float]:
    """The sum of scores per image."""
    sums: dict[int, float] = {}
    for result in results:
        sums[result["image_id"]] = sums.get(result["image_id"], 0.0) + result["score"]
    return sums


def draw(picture: Image.Image, results: Sequence[dict[str, Any]], image_id: int) -> str:
    """One image with its boxes and names as a data URL."""
    canvas = ImageDraw.Draw(picture)
    for result in results:
        if result["image_id"] != image_id or result["score"] < SHOWN_SCORE:
            continue
        color = f"hsl({result['category_id'] * 137 % 360}, 90%, 45%)"  # the golden angle keeps neighbors apart
        x, y, w, h = result["bbox"][:4]
        corners = result.get("segmentation", [[x, y, x + w, y, x + w, y + h, x, y + h]])[0]
        canvas.line([*corners, *corners[:2]], fill=color, width=2)
        canvas.text((corners[0] + 3, corners[1] + 2), f"{result['category']} {result['score']:.2f}", fill=color)
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()
