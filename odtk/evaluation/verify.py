"""The written file itself beside PyTorch in fp32, on one annotated set, through inference's own path.

For INT8 also which layers cost most, and FP16 for the worst of them until the loss of accuracy is inside the bar.
Points are of COCO AP × 100.
"""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import itertools
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table as RichTable
from torch import Tensor

from .. import __version__
from ..config import ExportConfig, LoaderConfig
from ..data.dataset import Dataset, load_json
from ..data.images import ImageError, decode
from ..data.loader import create_loader
from ..export import precision
from ..export.export import ENGINES, export, trace
from ..inference.backends import Backend, open_backend, silent
from ..inference.infer import detect, loader_config, resolve_categories
from ..model.checkpoint import build, load, replacing
from ..postprocess import Detections
from .evaluate import Metrics, evaluate, known, usable

PRECISIONS = ("fp32", "fp16", "int8")
SENSITIVITY_IMAGES = 4
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


def verify(config: ExportConfig, *, annotations: str, images: str, max_ap_drop: float = 0.3) -> bool:
    """Runs ``config.output``, which export has written, and its higher precisions, beside PyTorch in fp32.

    Prints a table, and writes OUT.verify.json and OUT.verify.html beside the file. An INT8 file that loses too much is
    written again with more layers in FP16, and its calibration table with it.

    Args:
        annotations, images: the set: COCO JSON and image folder.
        max_ap_drop: points of AP that may be lost.

    Returns:
        Whether the file, as it now is, stays inside the bar.
    """
    device = "cuda:0" if config.output.endswith(ENGINES) else "cpu"
    bench = Bench(config, annotations, images, device)
    config = dataclasses.replace(config, size=bench.size)  # rounded up
    with tempfile.TemporaryDirectory() as folder:
        runs = [bench.run(config.path, "PyTorch fp32")]
        for precision in PRECISIONS[: PRECISIONS.index(config.precision)]:
            path = os.path.join(folder, precision + os.path.splitext(config.output)[1])
            export(dataclasses.replace(config, output=path, precision=precision))
            runs.append(bench.run(path))
    runs.append(bench.run(config.output))
    sensitivity: dict[str, float] = {}
    fp16_layers: tuple[str, ...] = ()
    if config.precision == "int8":
        sensitivity = measure_sensitivity(config, bench)
        runs[-1], fp16_layers = rescue(config, bench, runs[0], runs[-1], list(sensitivity), max_ap_drop)
    verdict = Verdict(tuple(runs), max_ap_drop, sensitivity, fp16_layers)
    show(verdict, config.output)
    for suffix, text in (("json", json.dumps(to_dict(verdict), indent=1)), ("html", page(verdict, bench))):
        with replacing(f"{config.output}.verify.{suffix}") as file:
            file.write(text.encode())
    print(f"Report: {config.output}.verify.html and .json")
    return verdict.within


class Bench:
    """The set that all runs see, prepared as inference prepares it for the written file."""

    def __init__(self, config: ExportConfig, annotations: str, images: str, device: str) -> None:
        self.config, self.device = config, device
        written = open_backend(config.output, device=device, precision="fp32", postprocess=None)
        wanted = LoaderConfig(images=images, annotations=annotations, batch=1, device=device)
        self.data = loader_config(wanted, written)
        assert self.data.size is not None  # of an exported file
        self.size = self.data.size
        self.dataset = Dataset.load(annotations, images, rotated=written.rotated)
        self.truth = usable(load_json(Path(annotations)), annotations)
        self.categories = resolve_categories(written, self.dataset.categories)
        self.thresholds = written.postprocess

    def run(self, path: str, name: str = "") -> Run:
        """One model on the whole set."""
        backend = open_backend(path, device=self.device, precision="fp32", postprocess=self.thresholds, say=silent)
        timed = Timed(backend)
        name = name or f"{'TensorRT' if path.endswith(ENGINES) else 'ONNX'} {backend.precision}"
        print(f"Running {name} on {len(self.dataset.images)} images", flush=True)
        results = detect(timed, create_loader(self.dataset, self.data), self.categories)
        metrics = evaluate(known(results, self.truth), self.truth, rotated=backend.rotated)
        return Run(name, os.path.getsize(path), metrics, statistics.median(timed.times), results)

    def images(self, count: int) -> list[Any]:
        """The first few images of the set as arrays [1, 3, H, W] float32."""
        batches = itertools.islice(create_loader(self.dataset, self.data), count)
        return [batch.images.cpu().numpy() for batch in batches]


class Timed:
    """A backend that notes the milliseconds of each call."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.times: list[float] = []

    def __call__(self, images: Tensor) -> Detections:
        start = time.perf_counter()
        found = self.backend(images)
        found.scores.cpu()  # waits for a GPU
        self.times.append(1e3 * (time.perf_counter() - start))
        return found


def measure_sensitivity(config: ExportConfig, bench: Bench) -> dict[str, float]:
    """Decibels per layer, the worst first (quantize.sensitivity), on a few images; also put into the table."""
    table = precision.load_table(precision.table_path(config))
    if not table.sensitivity:
        model = trace(build(load(config.path)).fold(), bench.size)
        print(f"Quantising each of {len(precision.layers(model))} layers alone, to see what it costs", flush=True)
        found = precision.sensitivity(model, table, bench.images(SENSITIVITY_IMAGES))
        table = dataclasses.replace(table, sensitivity=found)
        precision.save_table(precision.table_path(config), table)
    return table.sensitivity


def rescue(
    config: ExportConfig, bench: Bench, reference: Run, run: Run, ranked: Sequence[str], allowed: float
) -> tuple[Run, tuple[str, ...]]:
    """Writes an INT8 file again with the 1, 2, 4 … most costly layers in FP16 until it is inside the bar.

    Args:
        ranked: the layers, the most costly first.

    Returns:
        The run of the last file written, and the layers it has in FP16.
    """
    path = precision.table_path(config)
    table = precision.load_table(path)
    own = tuple(dict.fromkeys([*table.fp16_layers, *config.fp16_layers]))
    kept, count = own, 1
    while drop(reference, run) > allowed and not set(ranked) <= set(kept):
        kept = tuple(dict.fromkeys([*own, *ranked[:count]]))
        print(f"INT8 loses {drop(reference, run):.2f} points of AP, {allowed:g} allowed. FP16 for {', '.join(kept)}.")
        precision.save_table(path, dataclasses.replace(table, fp16_layers=kept))
        export(dataclasses.replace(config, calibration_table=path))
        run = bench.run(config.output)
        count *= 2
    return run, kept


# ---------------------------------------------------------------------------------------------------------------------
# reports


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


def page(verdict: Verdict, bench: Bench) -> str:
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
            "quantised; the lower, the more costly. Six decibels halve the error.</p>",
            html_table(("layer", "dB", "written as"), cells),
        ]
    parts.append(
        f"<h2>{html.escape(names[0])} (left) and {html.escape(names[-1])} (right)</h2>"
        f"<p>Where the two differ most; boxes that score {SHOWN_SCORE} or more.</p>"
    )
    parts += pictures(verdict.runs[0], verdict.runs[-1], bench)
    title = html.escape(os.path.basename(bench.config.output))
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{STYLE}</style>"
        f"<h1>{title}</h1>" + "\n".join(parts) + "</html>\n"
    )


def html_table(columns: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    def row(values: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(value)}</{tag}>" for value in values) + "</tr>"

    return "<table>" + row(columns, "th") + "".join(row(values, "td") for values in cells) + "</table>"


def pictures(reference: Run, run: Run, bench: Bench) -> list[str]:
    """Figures of the images whose detections differ most between two runs; not of one that the loader found damaged."""
    sums = [scores_by_image(side.results) for side in (reference, run)]
    images = sorted(bench.dataset.images, key=lambda image: -abs(sums[0].get(image.id, 0) - sums[1].get(image.id, 0)))
    figures = []
    for image in images[:PICTURES]:
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
        colour = f"hsl({result['category_id'] * 137 % 360}, 90%, 45%)"  # the golden angle keeps neighbours apart
        x, y, w, h = result["bbox"][:4]
        corners = result.get("segmentation", [[x, y, x + w, y, x + w, y + h, x, y + h]])[0]
        canvas.line([*corners, *corners[:2]], fill=colour, width=2)
        canvas.text((corners[0] + 3, corners[1] + 2), f"{result['category']} {result['score']:.2f}", fill=colour)
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()
