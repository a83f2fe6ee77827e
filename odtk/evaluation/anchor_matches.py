"""Pictures of anchors: which of them training would match with which boxes."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..boxes import iou
from ..config import LoaderConfig, OdtkError
from ..data.batch import Batch
from ..inference.drawing import LEGIBLE, RED, Shape, annotate, box_to_outline, category_color
from ..model import checkpoint
from ..model.anchors import place_anchors
from ..model.detector import Detector
from ..ops import rotated_iou
from ..text import plural
from .pictures import input_picture, network_inputs, open_pictures

MAX_ANCHORS = 20  # drawn per box, those of the greatest IoU

# (anchors [P, 4|5], boxes [N, M, 4|5], labels [N, M]) → (labels [N, P], index [N, P] of each anchor's box): the rule
# training.assign.assign with its IoU thresholds bound. It is an argument because evaluation may not import training.
Assign = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def draw_anchors(path: str, data: LoaderConfig, assign: Assign, folder: str, *, count: int) -> list[str]:
    """Boxes and the anchors that training would match with them: one PNG per image. Returns the paths.

    A box that no anchor matches is red, and drawn with the anchor of the greatest IoU. A label says how many anchors
    match, on which stride the one of the greatest IoU is, and that IoU.

    Args:
        path: checkpoint with the retinanet head.
        assign: the rule of training, which decides what matches (see Assign).
        count: images to draw, the first ones.

    Raises:
        OdtkError: the model has another head, which has no anchors.
    """
    detector = checkpoint.build_detector(checkpoint.load(path))
    if detector.config.head != "retinanet":
        raise OdtkError(
            f"--anchors requires a model with the retinanet head: the {detector.config.head} head has points, not "
            "anchors."
        )
    writer = open_pictures(data, folder, rotated=detector.config.rotated)
    written = []
    for image, batch in network_inputs(detector, writer.dataset, data, count):
        picture = annotate(
            input_picture(batch, detector.config), anchor_shapes(detector, batch, assign), min_side=LEGIBLE
        )
        written.append(writer.save(picture, image, "_anchors.png"))
    return written


def anchor_shapes(detector: Detector, batch: Batch, assign: Assign) -> list[Shape]:
    """The boxes of a batch of one image, each after its anchors, in pixels of the network's input."""
    height, width = batch.images.shape[2:]
    cells = [(math.ceil(height / stride), math.ceil(width / stride)) for stride in detector.strides]
    anchors = place_anchors(detector.anchors(), detector.strides, cells, torch.device("cpu"))  # [P, 4|5]
    per_cell = detector.config.num_anchors
    stride_of = torch.cat(
        [torch.full((h * w * per_cell,), s) for (h, w), s in zip(cells, detector.strides, strict=True)]
    )  # [P]
    labels, index = assign(anchors, batch.boxes, batch.labels)  # [1, P] each
    found = []
    for i in (batch.labels[0] >= 0).nonzero()[:, 0].tolist():
        box = batch.boxes[0, i]
        overlaps = (rotated_iou if detector.config.rotated else iou)(box[None], anchors)[0]  # [P]
        best = int(overlaps.argmax())
        matched = ((labels[0] >= 0) & (index[0] == i)).nonzero()[:, 0]
        color = category_color(i + 1) if len(matched) else RED
        shown = matched[overlaps[matched].argsort(descending=True)][:MAX_ANCHORS]
        found += [Shape(box_to_outline(anchors[a]), color, thickness=0) for a in (shown.tolist() or [best])]
        label = f"{plural(len(matched), 'anchor')}, stride {int(stride_of[best])}, IoU {overlaps[best]:.2f}"
        found.append(Shape(box_to_outline(box), color, label, thickness=2))
    return found
