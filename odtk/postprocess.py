"""Raw levels → Detections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from . import ops
from .config import ModelConfig, PostprocessConfig


@dataclass
class Detections:
    """What was found in a batch. A row is used iff its score is above zero; unused rows are zero and come last.

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
) -> Detections:
    """Decode the raw levels of a Detector and suppress all but the best of overlapping boxes (spec §2, Decoding).

    Args:
        logits, boxes: per level [N, A·C, h, w] and [N, A·V, h, w].
        anchors: per level [A, 4], or [A, 5] rotated, of Detector.anchors().
        strides: px per cell, per level.
    """
    candidates = ops.decode(
        logits,
        boxes,
        anchors,
        strides,
        score_threshold=config.score_threshold,
        top_n=config.top_n,
        values=model.box_values,
    )
    return Detections(*ops.nms(*candidates, threshold=config.nms_threshold, detections=config.detections))
