"""How much the detections change when one layer alone is quantized."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch
from onnx import ModelProto
from torch import Tensor

from ..boxes import iou
from ..exporting.calibration_table import CalibrationTable
from ..exporting.precision import insert_qdq, quantizable_layers
from ..exporting.session import open_session
from ..ops import rotated_iou
from ..postprocess import BatchDetections

MATCH_IOU = 0.5  # detections of a class that overlap at least so much are the same one


def measure_layer_costs(
    model: ModelProto,
    table: CalibrationTable,
    images: Sequence[np.ndarray],
    detect: Callable[[Sequence[np.ndarray]], BatchDetections],
    score_threshold: float,
) -> dict[str, float]:
    """Layer → how much the detections change when this layer alone is quantized, in percent, highest first.

    Args:
        model: the raw float32 graph.
        table: with the scales to quantize by.
        images: a few, each [1, 3, H, W] float32, normalized; the time is that of (layers + 1) · images runs.
        detect: the postprocessing: the raw outputs of one image → its detections.
        score_threshold: that of the detections.
    """
    session = open_session(model)
    expected = [detect(session.run(None, {"images": image})) for image in images]
    layers = quantizable_layers(model)
    costs = {}
    for layer in layers:
        one_quantized = ModelProto()
        one_quantized.CopyFrom(model)
        others = tuple(name for name in layers if name != layer)
        insert_qdq(one_quantized, dataclasses.replace(table, fp16_layers=others))
        session = open_session(one_quantized)
        actual = [detect(session.run(None, {"images": image})) for image in images]
        costs[layer] = detection_change(expected, actual, score_threshold)
    return {layer: round(cost, 3) for layer, cost in sorted(costs.items(), key=lambda item: -item[1])}


def detection_change(
    expected: Sequence[BatchDetections], actual: Sequence[BatchDetections], score_threshold: float
) -> float:
    """How much detections differ, in percent: 0 for the same ones, 100 if nothing is in common.

    A detection weighs what its score exceeds the lowest score that is shown, so that one which drops out there changes
    little. Two of the same class that overlap by MATCH_IOU or more have in common the lesser weight times their IoU.
    What is in common is divided by all there is, the greater weight of each pair and the weights of those without a
    partner: Jaccard's distance of weighted sets, over all images at once. Ten percent less of all scores, or boxes that
    overlap by 0.9 where they were equal, make 10 percent.

    Args:
        expected, actual: per image, each of a batch of one.
        score_threshold: that of the detections.
    """
    sums = [shared_and_all(*pair, score_threshold) for pair in zip(expected, actual, strict=True)]
    shared, everything = (sum(values) for values in zip(*sums, strict=True))
    return 100 * (1 - shared / everything) if everything > 0 else 0.0


def shared_and_all(expected: BatchDetections, actual: BatchDetections, score_threshold: float) -> tuple[float, float]:
    """The weight that the detections of one image have in common, and the weight of all; see detection_change."""
    # Where all rows are used, the least score is that of the last row: others may have been cut off below it.
    lowest = max(score_threshold, float(expected.scores[0, -1]), float(actual.scores[0, -1]))
    weights = [(side.scores[0] - lowest).clamp(min=0).double() for side in (expected, actual)]
    overlaps = same_class_iou(expected, actual)  # [D, D]
    free = torch.ones(overlaps.shape[1], dtype=torch.bool)
    shared = greater = 0.0
    for i in (weights[0] > 0).nonzero()[:, 0].tolist():  # by descending score
        overlap, j = (overlaps[i] * free * (weights[1] > 0)).max(0)
        if overlap < MATCH_IOU:
            greater += float(weights[0][i])
            continue
        free[j] = False
        shared += float(torch.minimum(weights[0][i], weights[1][j]) * overlap)
        greater += float(torch.maximum(weights[0][i], weights[1][j]))
    return shared, greater + float(weights[1][free].sum())


def same_class_iou(a: BatchDetections, b: BatchDetections) -> Tensor:
    """IoU [D, D] of the boxes of two images' detections; 0 where the classes differ."""
    overlap = (rotated_iou if a.boxes.shape[-1] == 6 else iou)(a.boxes[0], b.boxes[0])
    return overlap * (a.classes[0][:, None] == b.classes[0][None, :])
