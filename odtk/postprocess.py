"""From raw levels to detections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from . import ops
from .config import ModelConfig, PostprocessConfig


@dataclass
class BatchDetections:
    """What was found in a batch. A row is used if its score is above zero; unused rows are zero and come last.

    Attributes:
        scores: [N, D] float32 in (0, 1], descending.
        boxes: [N, D, 4] float32, px of the network's input, inclusive corners; [N, D, 6] with (sin, cos) if rotated.
        classes: [N, D] int64, 0-based.
    """

    scores: Tensor
    boxes: Tensor
    classes: Tensor


def postprocess(
    logits: Sequence[Tensor],
    boxes: Sequence[Tensor],
    *,
    anchors: Sequence[Tensor],
    strides: Sequence[int],
    model: ModelConfig,
    config: PostprocessConfig,
) -> BatchDetections:
    """Decodes the raw levels of a Detector (ops.decode) and suppresses all but the best of overlapping boxes (ops.nms).

    Args:
        logits, boxes: per level [N, A·C, h, w] and [N, A·V, h, w], V being the head_values of the model's box coder.
        anchors: per level [A, 4], or [A, 5] where anchors are turned, in px: what Detector.anchors() returns.
        strides: px per cell, per level.
        model: says how the numbers of ``boxes`` are decoded.
        config: the thresholds and limits.
    """
    candidates = ops.decode(
        logits,
        boxes,
        anchors,
        strides,
        score_threshold=config.score_threshold,
        top_n=config.top_n,
        coder=model.box_coder,
    )
    return BatchDetections(*ops.nms(*candidates, threshold=config.nms_threshold, detections=config.detections))
