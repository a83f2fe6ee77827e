"""How many boxes of a dataset no anchor would learn, and which settings would change that.

The boxes are counted with training's own assign on the images as inference resizes them. Better settings are looked
for by a quicker rule, which leaves out that boxes compete for anchors; what they would leave is counted with assign
again.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..boxes import center_and_size
from ..config import LoaderConfig, LossConfig, ModelConfig
from ..data.dataset import Dataset
from ..data.sampler import Sampler
from ..model.anchors import base_anchors, place_anchors
from ..text import plural
from .assign import assign

MAX_IMAGES = 300  # with boxes, evenly chosen: enough for advice, and few enough to wait for
SCALES = tuple(2 ** (k / 3) for k in range(-3, 16))  # that are tried, 0.5 to 32 strides
RATIOS = (0.1, 0.2, 0.25, 1 / 3, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 10.0)
MAX_ADDED = 3  # scales and ratios
MIN_GAIN = 0.1  # of the boxes without an anchor, and …
MIN_GAIN_OF_ALL = 0.001  # … of all boxes: what helps fewer is not worth its cost
FEW = 0.01  # share of all boxes; where fewer have no anchor and nothing helps, nothing need be done
ENLARGEMENTS = (1.25, 1.5, 2.0, 3.0)  # of --resize that are tried
BOUND_SLACK = 1e-3  # of IoU, for rounding


@dataclass(frozen=True)
class Unlearned:
    """The boxes that were looked at.

    Attributes:
        boxes: float64 [n, 4] (x, y, w, h), pixels of the network's input; rotated boxes before their turn.
        scales: float64 [n], network pixels per image pixel.
        missed: bool [n], whether no anchor learns the box.
    """

    boxes: np.ndarray
    scales: np.ndarray
    missed: np.ndarray

    @property
    def least_gain(self) -> float:
        """How many boxes a change has to help to be worth its cost."""
        return max(1.0, MIN_GAIN * int(self.missed.sum()), MIN_GAIN_OF_ALL * len(self.missed))


def anchor_advice(
    dataset: Dataset,
    model: ModelConfig,
    loss: LossConfig,
    strides: Sequence[int],
    *,
    padding: int,
    resize: int,
    max_size: int,
) -> list[str]:
    """Lines that say how many boxes no anchor learns, and what would help; empty if there are no boxes.

    Args:
        model: whose anchors are meant; its head is retinanet.
        loss: its bounds of IoU.
        strides: of the model's levels in pixels.
        padding: images are padded to a multiple of this, in pixels.
        resize, max_size: shorter side and cap of the longer side of the network's input in pixels.
    """
    with_boxes = [image for image in dataset.images if len(image.boxes)]
    if not with_boxes:
        return []
    chosen = with_boxes[:: math.ceil(len(with_boxes) / MAX_IMAGES)]
    sample = dataclasses.replace(dataset, images=chosen)
    found = unlearned(sample, model, loss, strides, padding=padding, resize=resize, max_size=max_size)
    count, total = int(found.missed.sum()), plural(len(found.missed), "box", "boxes")
    counted = "" if len(chosen) == len(with_boxes) else f" (counted in {len(chosen)} of {len(with_boxes)} images)"
    if not count:
        return [f"every box has an anchor that matches it at IoU {loss.foreground_iou:g}{counted}"]
    missed = found.boxes[found.missed, 2:]
    width, height = np.median(missed, axis=0)
    file_width, file_height = np.median(missed / found.scales[found.missed, None], axis=0)
    lines = [
        f"{count} of {total} without a matching anchor at IoU {loss.foreground_iou:g}{counted}: their median size is "
        f"{width:.0f}×{height:.0f} pixels in the network's input, {file_width:.0f}×{file_height:.0f} in the file"
    ]
    better = more_anchors(found, model, loss, strides)
    if better != model:
        left = unlearned(sample, better, loss, strides, padding=padding, resize=resize, max_size=max_size).missed.sum()
        if left < count:
            lines.append(f"  {anchor_flags(model, better)} would leave {left}")
    larger = larger_input(sample, found, model, loss, strides, resize=resize, max_size=max_size)
    if larger is not None:
        left = unlearned(
            sample, model, loss, strides, padding=padding, resize=larger[0], max_size=larger[1]
        ).missed.sum()
        if left < count:
            work = (larger[0] / resize) ** 2
            lines.append(f"  --resize {larger[0]} --max-size {larger[1]} would leave {left}, at {work:.1f} × the work")
    if len(lines) == 1 and count >= FEW * len(found.missed):
        lines.append("  no other sizes or shapes of anchors would help much: a lower --anchor-ious FG matches more")
    return lines


def unlearned(
    dataset: Dataset,
    model: ModelConfig,
    loss: LossConfig,
    strides: Sequence[int],
    *,
    padding: int,
    resize: int,
    max_size: int,
) -> Unlearned:
    """Assigns the anchors of each image as training does, without its random changes, and finds the boxes left over."""
    config = LoaderConfig("", resize=resize, max_size=max_size, stride=padding, rotated=model.rotated)
    sampler = Sampler(dataset, config)
    base = [base_anchors(stride, model) for stride in strides]
    placed: dict[tuple[int, int], list[Tensor]] = {}
    boxes, scales, missed = [], [], []
    for number in range(len(dataset.images)):
        plan = sampler.plan(number)
        sample = plan.samples[0]
        if not len(sample.boxes):
            continue
        size = (plan.height, plan.width)
        if size not in placed:
            placed = {size: _place(base, strides, size)}  # only the last one: most datasets have few sizes
        truth = torch.from_numpy(sample.boxes)
        learned = np.zeros(len(truth), dtype=bool)
        anchors = _possible(placed[size], base, truth, loss.foreground_iou)
        if len(anchors):
            labels, index = assign(
                anchors,
                truth[None],
                torch.from_numpy(sample.labels)[None],
                background_iou=loss.background_iou,
                foreground_iou=loss.foreground_iou,
            )
            learned[index[labels >= 0].unique().numpy()] = True
        corners, extent = truth[:, :2], center_and_size(truth)[1]
        boxes.append(torch.cat([corners, extent], 1).double().numpy())
        scales.append(np.full(len(truth), math.sqrt(sample.scale[0] * sample.scale[1])))
        missed.append(~learned)
    if not boxes:
        return Unlearned(np.zeros((0, 4)), np.zeros(0), np.zeros(0, dtype=bool))
    return Unlearned(np.concatenate(boxes), np.concatenate(scales), np.concatenate(missed))


def _place(base: Sequence[Tensor], strides: Sequence[int], size: tuple[int, int]) -> list[Tensor]:
    """The anchors of each level, [cells, A, 4 or 5], for an input of ``size`` (h, w) in pixels."""
    levels = []
    for anchors, stride in zip(base, strides, strict=True):
        cells = (math.ceil(size[0] / stride), math.ceil(size[1] / stride))
        level = place_anchors([anchors], [stride], [cells], torch.device("cpu"))
        levels.append(level.view(-1, *anchors.shape))  # [h·w·A, 4 or 5] → [h·w, A, 4 or 5]
    return levels


def _possible(levels: Sequence[Tensor], base: Sequence[Tensor], boxes: Tensor, least: float) -> Tensor:
    """The anchors [P, 4 or 5] whose size alone does not rule out an IoU of ``least`` with one of the boxes.

    The others would only be background, so leaving them out changes nothing but the time.
    """
    sizes = center_and_size(boxes)[1][:, None]  # [M, 1, 2]
    kept = []
    for level, anchors in zip(levels, base, strict=True):
        shapes = center_and_size(anchors)[1]  # [A, 2]
        area, other = sizes.prod(-1), shapes.prod(-1)  # [M, 1], [A]
        shared = torch.minimum(area, other) if boxes.shape[-1] == 5 else torch.minimum(sizes, shapes).prod(-1)
        bound = shared / (area + other - shared)  # [M, A]
        kept.append(level[:, (bound >= least - BOUND_SLACK).any(0)].flatten(0, 1))
    return torch.cat(kept)


def more_anchors(found: Unlearned, model: ModelConfig, loss: LossConfig, strides: Sequence[int]) -> ModelConfig:
    """The model with up to MAX_ADDED scales and ratios more, each the one that matches most of what is left."""
    left = found.boxes[found.missed]
    for _ in range(MAX_ADDED):
        options = [
            dataclasses.replace(model, scales=tuple(sorted((*model.scales, round(scale, 2)))))
            for scale in SCALES
            if min(abs(math.log2(scale / known)) for known in model.scales) > 1 / 4
        ] + [
            dataclasses.replace(model, ratios=(*model.ratios, round(ratio, 2)))
            for ratio in RATIOS
            if min(abs(math.log2(ratio / known)) for known in model.ratios) > 1 / 4
        ]
        remaining = [left[best_iou(left, option, strides) < loss.foreground_iou] for option in options]
        best = min(range(len(options)), key=lambda i: len(remaining[i]), default=None)
        if best is None or len(left) - len(remaining[best]) < found.least_gain:
            break
        model, left = options[best], remaining[best]
    return model


def larger_input(
    dataset: Dataset,
    found: Unlearned,
    model: ModelConfig,
    loss: LossConfig,
    strides: Sequence[int],
    *,
    resize: int,
    max_size: int,
) -> tuple[int, int] | None:
    """(--resize, --max-size), in pixels, of the least enlargement that does most of what enlarging can do.

    None where the boxes without an anchor are not small, so that they would not gain by it. The cap of the longer side
    is as large as the images need it.
    """
    missed = found.boxes[found.missed]
    finest = min(center_and_size(base_anchors(stride, model))[1].prod(-1).min().item() for stride in strides)
    if np.median(missed[:, 2:].prod(axis=1)) >= finest:
        return None
    aspect = max(max(image.width, image.height) / min(image.width, image.height) for image in dataset.images)
    counts = []
    for factor in ENLARGEMENTS:
        new_resize = round(resize * factor)
        new_max = max(max_size, math.ceil(new_resize * aspect))
        enlarged = found.boxes * _growth(dataset, (resize, max_size), (new_resize, new_max), found)[:, None]
        counts.append(int((best_iou(enlarged, model, strides) < loss.foreground_iou).sum()))
    most = len(missed) - min(counts)
    for factor, count in zip(ENLARGEMENTS, counts, strict=True):
        if most >= found.least_gain and len(missed) - count >= 0.8 * most:
            new_resize = round(resize * factor)
            return new_resize, max(max_size, math.ceil(new_resize * aspect))
    return None


def _growth(dataset: Dataset, old: tuple[int, int], new: tuple[int, int], found: Unlearned) -> np.ndarray:
    """How much larger each box [n] becomes from one (resize, max_size) to another."""
    growth = []
    for image in dataset.images:
        short, long = min(image.width, image.height), max(image.width, image.height)
        growth += [min(new[0] / short, new[1] / long) / min(old[0] / short, old[1] / long)] * len(image.boxes)
    assert len(growth) == len(found.boxes)  # a sample without random changes keeps every box
    return np.array(growth)


def best_iou(boxes: np.ndarray, model: ModelConfig, strides: Sequence[int]) -> np.ndarray:
    """Largest IoU [n] of boxes [n, 4] (x, y, w, h) in pixels of the network's input with any anchor.

    For a given shape the IoU is largest at the cell whose anchor is nearest to the box. Rotated anchors count at angle
    0, as do the boxes.
    """
    best = np.zeros(len(boxes))
    for stride in strides:
        base = base_anchors(stride, dataclasses.replace(model, angles=())).double()
        center, size = (part.numpy() for part in center_and_size(base))  # [A, 2] each
        middle = boxes[:, :2] + boxes[:, 2:] / 2  # [n, 2]
        cells = np.maximum(np.round((middle[:, None] - center) / stride), 0)  # [n, A, 2]
        offset = np.abs(cells * stride + center - middle[:, None])  # [n, A, 2]
        overlap = np.minimum(boxes[:, None, 2:], size)  # along an axis on which one contains the other
        overlap = np.clip(np.minimum(overlap, (boxes[:, None, 2:] + size) / 2 - offset), 0, None)
        shared = overlap.prod(axis=2)  # [n, A]
        union = boxes[:, None, 2:].prod(axis=2) + size.prod(axis=1) - shared
        best = np.maximum(best, (shared / union).max(axis=1, initial=0.0))
    return best


def anchor_flags(old: ModelConfig, new: ModelConfig) -> str:
    """The flags that make the anchors of ``new`` from those of ``old``."""
    flags = []
    if new.scales != old.scales:
        flags.append("--anchor-scales " + " ".join(f"{scale:.3g}" for scale in new.scales))
    if new.ratios != old.ratios:
        flags.append("--anchor-ratios " + " ".join(f"{ratio:.3g}" for ratio in new.ratios))
    return " ".join(flags)
