"""The written file itself beside PyTorch in fp32, on one annotated set, through inference's own path.

For INT8 also which layers cost most, and FP16 for the worst of them until the loss of accuracy is inside the bar.
Points are of COCO AP × 100.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..config import ExportConfig, LoaderConfig
from ..data.coco import load_json
from ..data.dataset import Dataset
from ..data.loader import create_loader
from ..export import calibration_table, precision
from ..export.export import export
from ..export.graph import trace
from ..export.metadata import ENGINES
from ..files import atomic_write
from ..inference.backends import Backend, open_backend
from ..inference.detect import detect
from ..inference.infer import loader_config, resolve_categories
from ..model.checkpoint import build, load
from ..postprocess import Detections
from ..ranks import silent
from . import sensitivity
from .evaluate import evaluate, filter_categories, prepare_ground_truth
from .report import Run, Verdict, ap_drop, html_page, print_verdict

PRECISIONS = ("fp32", "fp16", "int8")
SENSITIVITY_IMAGES = 4


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
        runs[-1], fp16_layers = restore_accuracy(config, bench, runs[0], runs[-1], list(sensitivity), max_ap_drop)
    verdict = Verdict(tuple(runs), max_ap_drop, sensitivity, fp16_layers)
    print_verdict(verdict, config.output)
    for suffix, text in (
        ("json", json.dumps(verdict.to_dict(), indent=1)),
        ("html", html_page(verdict, config.output, bench.dataset.images)),
    ):
        with atomic_write(f"{config.output}.verify.{suffix}") as file:
            file.write(text.encode())
    print(f"Report: {config.output}.verify.html and .json")
    return verdict.passed


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
        self.truth = prepare_ground_truth(load_json(Path(annotations)), annotations)
        self.categories = resolve_categories(written, self.dataset.categories)
        self.thresholds = written.postprocess

    def run(self, path: str, name: str = "") -> Run:
        """One model on the whole set."""
        backend = open_backend(path, device=self.device, precision="fp32", postprocess=self.thresholds, say=silent)
        timed = Timed(backend)
        name = name or f"{'TensorRT' if path.endswith(ENGINES) else 'ONNX'} {backend.precision}"
        print(f"Running {name} on {len(self.dataset.images)} images", flush=True)
        results = detect(timed, create_loader(self.dataset, self.data), self.categories)
        metrics = evaluate(filter_categories(results, self.truth), self.truth, rotated=backend.rotated)
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
    table = calibration_table.load_table(calibration_table.table_path(config))
    if not table.sensitivity:
        model = trace(build(load(config.path)).fold(), bench.size)
        print(f"Quantizing each of {len(precision.layers(model))} layers alone, to see what it costs", flush=True)
        found = sensitivity.sensitivity(model, table, bench.images(SENSITIVITY_IMAGES))
        table = dataclasses.replace(table, sensitivity=found)
        calibration_table.save_table(calibration_table.table_path(config), table)
    return table.sensitivity


def restore_accuracy(
    config: ExportConfig, bench: Bench, reference: Run, run: Run, ranked: Sequence[str], allowed: float
) -> tuple[Run, tuple[str, ...]]:
    """Writes an INT8 file again with the 1, 2, 4 … most costly layers in FP16 until it is inside the bar.

    Args:
        ranked: the layers, the most costly first.

    Returns:
        The run of the last file written, and the layers it has in FP16.
    """
    path = calibration_table.table_path(config)
    table = calibration_table.load_table(path)
    own = tuple(dict.fromkeys([*table.fp16_layers, *config.fp16_layers]))
    kept, count = own, 1
    while ap_drop(reference, run) > allowed and not set(ranked) <= set(kept):
        kept = tuple(dict.fromkeys([*own, *ranked[:count]]))
        lost = ap_drop(reference, run)
        print(f"INT8 loses {lost:.2f} points of AP, {allowed:g} allowed. FP16 for {', '.join(kept)}.")
        calibration_table.save_table(path, dataclasses.replace(table, fp16_layers=kept))
        export(dataclasses.replace(config, calibration_table=path))
        run = bench.run(config.output)
        count *= 2
    return run, kept
