"""What quantizing each layer alone costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from onnx import ModelProto

from ..export.calibration_table import Table
from ..export.precision import insert_qdq, layers
from ..export.session import open_session


def sensitivity(model: ModelProto, table: Table, images: Sequence[np.ndarray]) -> dict[str, float]:
    """What quantizing each layer alone costs: signal over error of the raw outputs in decibels, the worst layer first.

    Args:
        model: the raw float32 graph.
        images: a few, each [1, 3, H, W]; the time is that of (layers + 1) · images runs.
    """
    expected = [open_session(model).run(None, {"images": image}) for image in images]
    every = layers(model)
    found = {}
    for layer in every:
        alone = ModelProto()
        alone.CopyFrom(model)
        insert_qdq(alone, dataclasses.replace(table, fp16_layers=tuple(name for name in every if name != layer)))
        session = open_session(alone)
        actual = [session.run(None, {"images": image}) for image in images]
        found[layer] = decibels(expected, actual)
    return dict(sorted(found.items(), key=lambda item: item[1]))


def decibels(expected: Sequence[Sequence[np.ndarray]], actual: Sequence[Sequence[np.ndarray]]) -> float:
    """Signal over error, each output's own, averaged over outputs and images; at most 100 dB.

    The signal is the variance: an offset that all cells share (the prior of the scores) says nothing of an image.
    """
    ratios = [
        10 * np.log10(max(float(a.var()), 1e-20) / max(float(np.mean((a - b) ** 2)), 1e-20))
        for outputs, others in zip(expected, actual, strict=True)
        for a, b in zip(outputs, others, strict=True)
    ]
    return round(min(100.0, float(np.mean(ratios))), 2)
