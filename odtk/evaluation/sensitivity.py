"""How much the raw outputs suffer when one layer alone is quantized."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from onnx import ModelProto

from ..exporting.calibration_table import CalibrationTable
from ..exporting.precision import insert_qdq, quantizable_layers
from ..exporting.session import open_session


def measure_sensitivity(model: ModelProto, table: CalibrationTable, images: Sequence[np.ndarray]) -> dict[str, float]:
    """Layer → signal-to-noise ratio of the raw outputs in dB when this layer alone is quantized, lowest first.

    Args:
        model: the raw float32 graph.
        table: with the scales to quantize by.
        images: a few, each [1, 3, H, W] float32, normalized; the time is that of (layers + 1) · images runs.
    """
    expected = [open_session(model).run(None, {"images": image}) for image in images]
    layers = quantizable_layers(model)
    ratios = {}
    for layer in layers:
        one_quantized = ModelProto()
        one_quantized.CopyFrom(model)
        others = tuple(name for name in layers if name != layer)
        insert_qdq(one_quantized, dataclasses.replace(table, fp16_layers=others))
        session = open_session(one_quantized)
        actual = [session.run(None, {"images": image}) for image in images]
        ratios[layer] = signal_to_noise(expected, actual)
    return dict(sorted(ratios.items(), key=lambda item: item[1]))


def signal_to_noise(expected: Sequence[Sequence[np.ndarray]], actual: Sequence[Sequence[np.ndarray]]) -> float:
    """Signal-to-noise ratio in dB, averaged over the outputs of all images; at most 100.

    The signal is the variance of an output, not its power: an offset that all cells share (the bias that the scores
    start from) carries no information about the image.

    Args:
        expected, actual: per image, the outputs.
    """
    ratios = [
        10 * np.log10(max(float(a.var()), 1e-20) / max(float(np.mean((a - b) ** 2)), 1e-20))
        for outputs, others in zip(expected, actual, strict=True)
        for a, b in zip(outputs, others, strict=True)
    ]
    return round(min(100.0, float(np.mean(ratios))), 2)
