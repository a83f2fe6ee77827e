"""Calibration for INT8: the range of each activation over a set of images, and the scales that follow from it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import torch
from onnx import ModelProto

from ..config import ExportConfig, LoaderConfig, OdtkError
from ..data.dataset import Dataset
from ..data.loader import create_loader
from ..model.detector import Detector, normalize
from ..settings import CALIBRATION_METHOD_OF_HEAD, CALIBRATION_METHODS
from ..text import plural, printable
from .calibration_table import CalibrationTable, load_table, save_table, table_path
from .graph import with_outputs
from .precision import INT8_MAX, quantizable_activations
from .session import open_session

MAX_IMAGES = 500
MIN_IMAGES = 8  # fewer are refused
FEW_IMAGES = 100  # fewer get a warning
PERCENTILE = 0.9999  # share of the values inside the range of the method "percentile"


def load_or_calibrate(
    model: ModelProto, config: ExportConfig, weights_hash: str, detector: Detector
) -> CalibrationTable:
    """The calibration table of an export: ``config.calibration_table`` if that file exists, else a new one, saved.

    Args:
        model: the raw float32 graph.
        weights_hash: of the checkpoint (checkpoint.weights_hash); a table of other weights is refused.
        detector: what the graph was traced from; it says how images are prepared.

    Raises:
        OdtkError: the table belongs to another model or size, the images are unusable, or neither is given.
    """
    path = table_path(config)
    if config.calibration_table and os.path.exists(path):
        table = load_table(path)
        if table.model != weights_hash or not set(quantizable_activations(model.graph)) <= table.scales.keys():
            raise OdtkError(f"{path} is the calibration table of another model: calibrate this model with images.")
        if table.size != config.input_size:
            own, wanted = ("×".join(map(str, size)) for size in (table.size, config.input_size))
            raise OdtkError(f"{path} was calibrated at {own}, not {wanted}: calibrate again with images.")
        if config.calibration_method not in (None, table.method):
            raise OdtkError(
                f"{path} was calibrated by {table.method}, not {config.calibration_method}: leave out "
                "--calibration-method, or calibrate into another file."
            )
        print(f"Read the INT8 scales of {plural(len(table.scales), 'tensor')} from {printable(path)}.")
        fp16_layers = tuple(dict.fromkeys([*table.fp16_layers, *config.fp16_layers]))
        return dataclasses.replace(table, fp16_layers=fp16_layers)
    if not config.calibration_images:
        raise OdtkError("INT8 needs --calibration-images DIR, or a --calibration-table PATH that was written earlier.")
    limit = MAX_IMAGES
    if config.calibration_batches is not None:
        limit = min(limit, config.calibration_batches * config.batch[1])
    dataset = sample_images(config.calibration_images, limit, config.seed)
    images = calibration_images(dataset, config, detector)
    method = config.calibration_method or CALIBRATION_METHOD_OF_HEAD[detector.config.head]
    ranges = activation_ranges(model, images, method, len(dataset.images))
    scales = scales_of(ranges)
    files = tuple(os.path.relpath(image.path, config.calibration_images) for image in dataset.images)
    table = CalibrationTable(weights_hash, config.input_size, method, files, scales, config.fp16_layers)
    save_table(path, table)
    print(f"Wrote the INT8 scales of {plural(len(scales), 'tensor')} to {printable(path)}.")
    return table


def scales_of(ranges: Mapping[str, float]) -> dict[str, float]:
    """Activation → its scale, the value of one step of its int8, from its range."""
    return {name: float(np.float32(value / INT8_MAX)) for name, value in ranges.items()}


def sample_images(folder: str, limit: int, seed: int) -> Dataset:
    """A random choice of up to ``limit`` images of a folder, the same for the same seed.

    Raises:
        OdtkError: the folder does not exist, holds unusable images, or has fewer than MIN_IMAGES.
    """
    dataset = Dataset.load(None, folder)
    found = len(dataset.images)
    if found < MIN_IMAGES:
        raise OdtkError(
            f"{folder} has {plural(found, 'image')}: calibration needs at least {MIN_IMAGES}, preferably {MAX_IMAGES}."
        )
    order = np.random.default_rng(seed).permutation(found)[:limit]
    dataset.images = [dataset.images[i] for i in order]
    if len(order) < FEW_IMAGES:
        print(
            f"Warning: calibration on {plural(len(order), 'image')} only; "
            f"{FEW_IMAGES} to {MAX_IMAGES} give more reliable ranges."
        )
    return dataset


def calibration_images(dataset: Dataset, config: ExportConfig, detector: Detector) -> Iterator[np.ndarray]:
    """The dataset's images one by one, prepared as for inference and normalized: [1, 3, H, W] float32, padded."""
    assert config.calibration_images is not None
    data = LoaderConfig(
        images=config.calibration_images,
        batch=1,
        size=config.size,
        stride=detector.stride,
        input_type=config.input_type,
        **detector.config.pixels,
    )
    for batch in create_loader(dataset, data):
        yield normalize(batch.images, detector.config.mean, detector.config.std).numpy()


class Histogram:
    """Histogram of the magnitudes of one activation.

    Attributes:
        counts: values per bin [BINS]; the bins divide [0, limit] evenly.
        limit: doubled when a larger magnitude comes, so that the number of bins stays the same.
        largest: the largest magnitude so far.
    """

    BINS = 2048

    def __init__(self) -> None:
        self.counts = np.zeros(self.BINS)
        self.limit = 0.0
        self.largest = 0.0

    def add(self, values: np.ndarray) -> None:
        """Counts an array of any shape, except for zeros, which every scale represents exactly.

        Raises:
            OdtkError: a value is not finite.
        """
        magnitudes = torch.from_numpy(values).abs().flatten()
        largest = float(magnitudes.max())
        if not np.isfinite(largest):
            raise OdtkError(
                "The network computes values that are not finite on a calibration image: check the checkpoint."
            )
        self.largest = max(self.largest, largest)
        if largest == 0:
            return
        self.limit = self.limit or largest
        while largest > self.limit:
            merged = self.counts.reshape(-1, 2).sum(1)  # [2048] -> [1024]
            self.counts = np.concatenate([merged, np.zeros(self.BINS // 2)])
            self.limit *= 2
        counts = torch.histc(magnitudes, self.BINS, 0, self.limit).numpy().astype(np.float64)
        counts[0] -= np.count_nonzero(values == 0)
        self.counts += counts

    def range(self, method: str) -> float:
        """The magnitude that becomes int8's 127; 1 for an activation that is always 0."""
        if self.largest == 0:
            return 1.0
        if method == "minmax":
            return self.largest
        if method == "percentile":
            inside = np.cumsum(self.counts) >= PERCENTILE * self.counts.sum()
            return min(self.largest, self.limit * (int(np.argmax(inside)) + 1) / self.BINS)
        return min(self.largest, self.limit * self.entropy_cut() / self.BINS)

    def entropy_cut(self) -> int:
        """The number of bins to keep so that the int8 distribution has the least Kullback–Leibler divergence.

        Source: S. Migacz, 8-bit Inference with TensorRT, GTC 2017.
        """
        best, least = self.BINS, np.inf
        for cut in range(INT8_MAX + 1, self.BINS + 1, 8):
            kept = self.counts[:cut]
            reference = kept.copy()
            reference[-1] += self.counts[cut:].sum()  # what is cut off is clipped to the largest int8
            level = np.arange(cut) * (INT8_MAX + 1) // cut
            total, used = np.bincount(level, kept), np.bincount(level, kept > 0)
            # The count of each int8 value, spread evenly over its bins that are not empty.
            candidate = np.where(kept > 0, (total / np.maximum(used, 1))[level], 0)
            p, q = smoothed(reference), smoothed(candidate)
            divergence = float((p * np.log(p / q)).sum())
            if divergence < least:
                best, least = cut, divergence
        return best


def smoothed(counts: np.ndarray) -> np.ndarray:
    """Counts as probabilities, none of them 0."""
    positive = counts + 1e-4 * max(1.0, counts.sum()) / len(counts)
    return positive / positive.sum()


def activation_ranges(model: ModelProto, images: Iterable[np.ndarray], method: str, total: int) -> dict[str, float]:
    """Activation → its range, for all of precision.quantizable_activations; memory does not grow with images.

    Args:
        model: the raw float32 graph.
        images: each [1, 3, H, W] float32, normalized.
        method: one of CALIBRATION_METHODS.
        total: number of images, for the progress.

    Raises:
        OdtkError: the method is unknown, or an activation is not finite.
    """
    if method not in CALIBRATION_METHODS:
        known = ", ".join(CALIBRATION_METHODS)
        raise OdtkError(f"The calibration method {method!r} does not exist: use one of {known}.")
    names = quantizable_activations(model.graph)
    session = open_session(with_outputs(model, names))
    histograms = {name: Histogram() for name in names}
    for i, image in enumerate(images):
        for name, values in zip(names, session.run(None, {"images": image}), strict=True):
            histograms[name].add(values)
        if i % 50 == 0:
            print(f"Calibrating: {i}/{total} images", flush=True)
    return {name: histogram.range(method) for name, histogram in histograms.items()}
