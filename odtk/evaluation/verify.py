"""The written file beside PyTorch in fp32: both run on one annotated set, through the code of inference.

For INT8 it also measures how much each layer changes the detections, and reverts the worst of them to FP16 until the
loss is within the limit. Losses are in points (COCO AP × 100) and stand with their interval (bootstrap.py).
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..config import ExportConfig, LoaderConfig, PostprocessConfig
from ..data.coco import prepare_ground_truth
from ..data.dataset import Dataset
from ..data.layouts import load_annotations
from ..data.loader import create_loader
from ..exporting.calibration_table import load_table, save_table, table_path
from ..exporting.export import export
from ..exporting.graph import trace
from ..exporting.metadata import ENGINES
from ..exporting.precision import quantizable_layers
from ..files import atomic_write
from ..inference.backends import Backend, open_backend
from ..inference.detect import detect
from ..inference.infer import loader_config, match_categories
from ..model.checkpoint import build_detector, load
from ..model.detector import Detector, normalize
from ..postprocess import BatchDetections, postprocess
from ..ranks import silent
from ..text import plural, printable
from .bootstrap import compare, matches_of
from .evaluate import filter_categories, metrics_of, run_cocoeval
from .report import Run, Verdict, html_page, print_verdict, score_sums, summarize
from .sensitivity import measure_layer_costs

PRECISIONS = ("fp32", "fp16", "int8")  # from the highest to the lowest
SENSITIVITY_IMAGES = 4


def verify(config: ExportConfig, *, annotations: str, images: str, max_ap_drop: float) -> Verdict:
    """Compares the exported file ``config.output`` with PyTorch in fp32, and with exports in each higher precision.

    Prints a table and writes OUTPUT.verify.json and OUTPUT.verify.html. An INT8 file that loses too much is written
    again, and so is its calibration table, with more layers in FP16.

    Args:
        annotations: of the set, in any format of layouts.py.
        images: its image folder.
        max_ap_drop: points of AP that the file may lose against PyTorch.

    Returns:
        What was found about the file as last written.
    """
    device = "cuda:0" if config.output.endswith(ENGINES) else "cpu"
    evaluator = Evaluator(config, annotations, images, device)
    config = dataclasses.replace(config, size=evaluator.size)  # rounded up to the stride
    with tempfile.TemporaryDirectory() as folder:
        runs = [evaluator.run(config.path, "PyTorch fp32")]
        for precision in PRECISIONS[: PRECISIONS.index(config.precision)]:
            path = os.path.join(folder, precision + os.path.splitext(config.output)[1])
            export(dataclasses.replace(config, output=path, precision=precision))
            runs.append(evaluator.run(path))
    runs.append(evaluator.run(config.output))
    layer_costs: dict[str, float] = {}
    fp16_layers: tuple[str, ...] = ()
    if config.precision == "int8":
        layer_costs = load_or_measure_layer_costs(config, evaluator, runs[0])
        runs[-1], fp16_layers = revert_layers_to_fp16(
            config, evaluator, runs[0], runs[-1], list(layer_costs), max_ap_drop
        )
    comparisons = tuple(compare(runs[0].matches, run.matches, max_ap_drop) for run in runs)
    verdict = Verdict(tuple(runs), comparisons, layer_costs, fp16_layers)
    print_verdict(verdict, config.output)
    for suffix, text in (
        ("json", json.dumps(verdict.to_dict(), indent=1)),
        ("html", html_page(verdict, config.output, evaluator.dataset.images)),
    ):
        with atomic_write(f"{config.output}.verify.{suffix}") as file:
            file.write(text.encode())
    print(f"Report: {printable(config.output)}.verify.html and .json")
    return verdict


class Evaluator:
    """Evaluates models on one annotated set, whose images are prepared as inference prepares them for the written file.

    Attributes:
        size: (H, W) of the written file's input in pixels.
        dataset: the images and their annotations.
    """

    def __init__(self, config: ExportConfig, annotations: str, images: str, device: str) -> None:
        self.device = device
        written = open_backend(config.output, device=device, precision="fp32", thresholds=None)
        data = LoaderConfig(images=images, annotations=annotations, batch=1, device=device)
        self.data = loader_config(data, written)
        assert self.data.size is not None  # an exported file has one
        self.size = self.data.size
        self.dataset = Dataset.load(annotations, images, rotated=written.rotated)
        truth = load_annotations(annotations, images, rotated=written.rotated).content
        self.ground_truth = prepare_ground_truth(truth, annotations)
        self.categories = match_categories(written, self.dataset.categories)
        self.thresholds = written.thresholds

    def run(self, path: str, name: str = "") -> Run:
        """Runs a model on the whole set and evaluates its detections."""
        backend = open_backend(path, device=self.device, precision="fp32", thresholds=self.thresholds, log=silent)
        timed = TimedBackend(backend)
        name = name or f"{'TensorRT' if path.endswith(ENGINES) else 'ONNX'} {backend.precision}"
        print(f"Running {name} on {plural(len(self.dataset.images), 'image')}", flush=True)
        data = dataclasses.replace(self.data, input_type=backend.input_type)
        results = detect(timed, create_loader(self.dataset, data), self.categories)
        scored = filter_categories(results, self.ground_truth)
        evaluation = run_cocoeval(scored, self.ground_truth, rotated=backend.rotated)
        latency = statistics.median(timed.milliseconds)
        return Run(name, os.path.getsize(path), metrics_of(evaluation), latency, results, matches_of(evaluation))

    def fullest_images(self, run: Run, count: int) -> list[Any]:
        """The images whose detections have the largest sum of scores in a run, each [1, 3, H, W] float32, normalized.

        On those, rather than on the first ones, which may be empty, a change of the detections can be seen.
        """
        sums = score_sums(run.results)
        fullest = copy.copy(self.dataset)
        fullest.images = sorted(self.dataset.images, key=lambda image: -sums.get(image.id, 0.0))[:count]
        batches = create_loader(fullest, self.data)
        return [normalize(batch.images, self.data.mean, self.data.std).cpu().numpy() for batch in batches]


class TimedBackend:
    """A backend that records how long each call takes."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.milliseconds: list[float] = []

    def __call__(self, images: Tensor) -> BatchDetections:
        start = time.perf_counter()
        found = self.backend(images)
        found.scores.cpu()  # waits for the GPU
        self.milliseconds.append(1e3 * (time.perf_counter() - start))
        return found


def load_or_measure_layer_costs(config: ExportConfig, evaluator: Evaluator, reference: Run) -> dict[str, float]:
    """The layers' costs (sensitivity.py) from the calibration table; measured and saved there if it has none."""
    path = table_path(config)
    table = load_table(path)
    if not table.layer_costs:
        detector = build_detector(load(config.path)).fold()
        model = trace(detector, evaluator.size)
        layers = plural(len(quantizable_layers(model)), "layer")
        print(f"Measuring what {layers} cost, quantizing one at a time", flush=True)
        images = evaluator.fullest_images(reference, SENSITIVITY_IMAGES)
        limits = evaluator.thresholds
        costs = measure_layer_costs(model, table, images, postprocessing_of(detector, limits), limits.score_threshold)
        table = dataclasses.replace(table, layer_costs=costs)
        save_table(path, table)
    return table.layer_costs


def postprocessing_of(detector: Detector, limits: PostprocessConfig) -> Callable[[Sequence[Any]], BatchDetections]:
    """The function from a raw graph's outputs, the logits and then the boxes of all levels, to detections."""
    anchors, strides = detector.anchors(), detector.strides

    def detections(outputs: Sequence[Any]) -> BatchDetections:
        levels = [torch.from_numpy(output) for output in outputs]
        logits, boxes = levels[: len(strides)], levels[len(strides) :]
        return postprocess(logits, boxes, anchors=anchors, strides=strides, model=detector.config, config=limits)

    return detections


def revert_layers_to_fp16(
    config: ExportConfig, evaluator: Evaluator, reference: Run, run: Run, ranked: Sequence[str], allowed: float
) -> tuple[Run, tuple[str, ...]]:
    """Writes an INT8 file again with the 1, 2, 4 … most costly layers in FP16, until its loss passes (bootstrap.py).

    Args:
        reference: PyTorch's run.
        run: the INT8 file's run.
        ranked: the quantizable layers, the most costly first.
        allowed: points of AP that may be lost against the reference.

    Returns:
        The run of the last file written, and the layers that it has in FP16.
    """
    path = table_path(config)
    table = load_table(path)
    given = tuple(dict.fromkeys([*table.fp16_layers, *config.fp16_layers]))
    fp16_layers, count = given, 1
    while not (found := compare(reference.matches, run.matches, allowed)).passed and not set(ranked) <= set(
        fp16_layers
    ):
        fp16_layers = tuple(dict.fromkeys([*given, *ranked[:count]]))
        print(f"{summarize('INT8', found)} Writing it again with {', '.join(fp16_layers)} in FP16.", flush=True)
        save_table(path, dataclasses.replace(table, fp16_layers=fp16_layers))
        export(dataclasses.replace(config, calibration_table=path))
        run = evaluator.run(config.output)
        count *= 2
    return run, fp16_layers
