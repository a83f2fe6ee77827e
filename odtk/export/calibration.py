"""INT8: the ranges of activations, from calibration images."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from onnx import ModelProto

from ..config import ExportConfig, LoaderConfig, OdtkError
from ..data.dataset import Dataset
from ..data.loader import create_loader
from .calibration_table import Table, load_table, save_table, table_path
from .graph import with_outputs
from .precision import LEVELS, scale_groups
from .session import open_session

MAX_IMAGES = 500
MIN_IMAGES = 8  # fewer are refused
FEW_IMAGES = 100  # fewer are warned about
METHODS = ("entropy", "percentile", "minmax")
PERCENTILE = 0.9999


def table_for(model: ModelProto, config: ExportConfig, fingerprint: str, stride: int) -> Table:
    """The table to export with: the file given, where there is one, else a new one from the images, which is saved.

    Raises:
        OdtkError: a table of another model or size, unusable images, neither table nor images.
    """
    path = table_path(config)
    if config.calibration_table and os.path.exists(path):
        table = load_table(path)
        needed = {name for group in scale_groups(model.graph) for name in group}
        if table.model != fingerprint or not needed <= table.scales.keys():
            raise OdtkError(f"{path} is the calibration table of another model: calibrate this one with images.")
        if table.size != config.size:
            own, asked = ("×".join(map(str, size)) for size in (table.size, config.size))
            raise OdtkError(f"{path} was calibrated at {own}, not {asked}: calibrate again with images.")
        print(f"INT8 scales of {len(table.scales)} tensors from {path}.")
        kept = tuple(dict.fromkeys([*table.fp16_layers, *config.fp16_layers]))
        return dataclasses.replace(table, fp16_layers=kept)
    if not config.calibration_images:
        raise OdtkError("INT8 needs --calibration-images DIR, or a --calibration-table PATH written earlier.")
    limit = MAX_IMAGES
    if config.calibration_batches is not None:
        limit = min(limit, config.calibration_batches * config.batch[1])
    dataset = sample(config.calibration_images, limit, config.seed)
    ranges = calibrate(model, images_of(dataset, config, stride), config.calibration_method, len(dataset.images))
    scales = shared_scales(scale_groups(model.graph), ranges)
    files = tuple(os.path.relpath(image.path, config.calibration_images) for image in dataset.images)
    table = Table(fingerprint, config.size, config.calibration_method, files, scales, config.fp16_layers)
    save_table(path, table)
    print(f"INT8 scales of {len(scales)} tensors written to {path}.")
    return table


def shared_scales(groups: Iterable[Sequence[str]], ranges: Mapping[str, float]) -> dict[str, float]:
    """The scale of each activation: of the largest range in its group."""
    scales: dict[str, float] = {}
    for group in groups:
        widest = max(ranges[name] for name in group)
        scales |= dict.fromkeys(group, float(np.float32(widest / LEVELS)))
    return scales


def sample(folder: str, limit: int, seed: int) -> Dataset:
    """Up to ``limit`` images of a folder, shuffled by the seed before they are cut.

    Raises:
        OdtkError: no such folder, none or unusable images in it, or fewer than MIN_IMAGES.
    """
    dataset = Dataset.load(None, folder)
    found = len(dataset.images)
    if found < MIN_IMAGES:
        raise OdtkError(f"{folder} has {found} images: calibration needs {MIN_IMAGES} at least, and better 500.")
    order = np.random.default_rng(seed).permutation(found)[:limit]
    dataset.images = [dataset.images[i] for i in order]
    if len(order) < FEW_IMAGES:
        print(f"Warning: calibration on {len(order)} images; with {FEW_IMAGES} to {MAX_IMAGES} ranges are surer.")
    return dataset


def images_of(dataset: Dataset, config: ExportConfig, stride: int) -> Iterator[np.ndarray]:
    """The dataset's images one by one as inference would prepare them: [1, 3, H, W] float32, normalized, padded."""
    assert config.calibration_images is not None
    data = LoaderConfig(images=config.calibration_images, batch=1, size=config.size, stride=stride)
    for batch in create_loader(dataset, data):
        yield batch.images.numpy()


class Histogram:
    """Magnitudes of one activation: counts over [0, limit), whose limit doubles when a larger value comes."""

    BINS = 2048

    def __init__(self) -> None:
        self.counts = np.zeros(self.BINS)
        self.limit = 0.0
        self.most = 0.0

    def add(self, values: np.ndarray) -> None:
        """Counts an array of any shape; zeros, which every scale represents, are left out.

        Raises:
            OdtkError: a value is not finite.
        """
        magnitudes = torch.from_numpy(values).abs().flatten()
        most = float(magnitudes.max())
        if not np.isfinite(most):
            raise OdtkError("The network is not finite on a calibration image: check the checkpoint.")
        self.most = max(self.most, most)
        if most == 0:
            return
        self.limit = self.limit or most
        while most > self.limit:
            merged = self.counts.reshape(-1, 2).sum(1)  # [2048] -> [1024]
            self.counts = np.concatenate([merged, np.zeros(self.BINS // 2)])
            self.limit *= 2
        counts = torch.histc(magnitudes, self.BINS, 0, self.limit).numpy().astype(np.float64)
        counts[0] -= np.count_nonzero(values == 0)
        self.counts += counts

    def range(self, method: str) -> float:
        """The magnitude that the largest int8 stands for; 1 for an activation that is always 0."""
        if self.most == 0:
            return 1.0
        if method == "minmax":
            return self.most
        if method == "percentile":
            inside = np.cumsum(self.counts) >= PERCENTILE * self.counts.sum()
            return min(self.most, self.limit * (int(np.argmax(inside)) + 1) / self.BINS)
        return min(self.most, self.limit * self.best_cut() / self.BINS)

    def best_cut(self) -> int:
        """The number of bins to keep so that int8 resembles the distribution most (Kullback–Leibler divergence).

        S. Migacz, 8-bit inference with TensorRT, GTC 2017.
        """
        best, least = self.BINS, np.inf
        for cut in range(LEVELS + 1, self.BINS + 1, 8):
            kept = self.counts[:cut]
            reference = kept.copy()
            reference[-1] += self.counts[cut:].sum()  # what is cut off lands on the largest level
            level = np.arange(cut) * (LEVELS + 1) // cut
            total, used = np.bincount(level, kept), np.bincount(level, kept > 0)
            candidate = np.where(kept > 0, (total / np.maximum(used, 1))[level], 0)  # each level spread over its bins
            p, q = smooth(reference), smooth(candidate)
            divergence = float((p * np.log(p / q)).sum())
            if divergence < least:
                best, least = cut, divergence
        return best


def smooth(counts: np.ndarray) -> np.ndarray:
    """Counts as probabilities, none of which is 0."""
    smoothed = counts + 1e-4 * max(1.0, counts.sum()) / len(counts)
    return smoothed / smoothed.sum()


def calibrate(model: ModelProto, images: Iterable[np.ndarray], method: str, total: int) -> dict[str, float]:
    """The range of every activation of a raw float32 graph that INT8 may quantize, image by image in fixed memory.

    Raises:
        OdtkError: an unknown method, or activations that are not finite.
    """
    if method not in METHODS:
        raise OdtkError(f"The calibration method {method!r} does not exist: use one of {', '.join(METHODS)}.")
    names = [name for group in scale_groups(model.graph) for name in group]
    session = open_session(with_outputs(model, names))
    histograms = {name: Histogram() for name in names}
    for i, image in enumerate(images):
        for name, values in zip(names, session.run(None, {"images": image}), strict=True):
            histograms[name].add(values)
        if i % 50 == 0:
            print(f"Calibrating: {i}/{total} images", flush=True)
    return {name: histogram.range(method) for name, histogram in histograms.items()}
