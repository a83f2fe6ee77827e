"""What is learned from images without boxes: their colors, and one of two losses if it is asked for.

Colors: labeled images take on those of unlabeled ones (data/color_transfer.py).

pseudo-labels (Dense Teacher, https://arxiv.org/abs/2207.02541): the EMA of the weights looks at an image, and what it
says of every point is what the detector has to say of the same image with other colors, blurred and partly erased. No
NMS and no threshold stand between. The points of the highest scores are the region that is learned: there the scores
are soft targets; everywhere else the target is background. Boxes are learned from labeled images alone.

entropy (ADVENT, https://arxiv.org/abs/1811.12833 §3.1): each score is to move away from 0.5, to either side.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..box_coder import BOX_CODERS
from ..config import LoaderConfig, LossConfig, ModelConfig, OdtkError, TrainConfig
from ..data.batch import Batch, Loader
from ..data.color_transfer import transfer_colors
from ..data.dataset import Dataset
from ..data.loader import create_loader
from ..data.sampler import Sampler
from ..model.detector import Detector
from ..text import plural
from .loss import detection_loss

COUNTED_IMAGES = 32  # labeled ones that say how many points boxes take


@dataclass
class Unlabeled:
    """The unlabeled images of a run.

    Attributes:
        loader: of these images, without end.
        share: of all points, the part that the labeled images' boxes take: the size of the region to learn.
        left_out: how many of the files given are not among them, as they are labeled or validated on.
        images: the latest ones [N, 3, H, W], normalized.
        first: the position of the first of them in training, over all processes.
    """

    loader: Loader
    share: float
    left_out: int = 0
    images: Tensor | None = None
    first: int = 0
    batches: Iterator[Batch] | None = None

    def next_images(self) -> Tensor:
        """The next images [N, 3, H, W], which ``images`` then are."""
        config = self.loader.config
        self.first = self.loader.state()["seen"] + config.rank * config.batch
        self.batches = self.batches or iter(self.loader)
        self.images = next(self.batches).images
        return self.images

    def lend_colors(self, images: Tensor, share: float) -> Tensor:
        """Labeled images [N, 3, H, W] of which a share has the colors of the latest unlabeled ones."""
        if self.images is None:
            return images
        return transfer_colors(images, self.images, self.loader.config, share, self.first)

    def line(self, config: TrainConfig) -> str:
        """What is about to happen with them, in one line."""
        batch = config.unlabeled_batch * self.loader.config.world
        said = plural(len(self.loader.sampler.dataset.images), "unlabeled image")
        if self.left_out:
            said += f" ({self.left_out} more are left out: they are labeled or validated on)"
        said += f", {batch} per batch"
        if config.unlabeled_loss != "none":
            said += f", from iteration {config.burn_in + 1} on, by {config.unlabeled_loss}"
        if config.unlabeled_loss == "pseudo-labels":
            said += (
                f" for the best {100 * self.share:.2g} % of the points, as many as the boxes of a labeled image take"
            )
        if config.unlabeled_colors:
            said += f"; {100 * config.unlabeled_colors:g} % of the labeled images take on their colors"
        return f"{said}."

    def close(self) -> None:
        """Ends the loader's threads."""
        if self.batches is not None:
            self.batches.close()  # type: ignore[attr-defined]


def open_unlabeled(
    config: TrainConfig, data: LoaderConfig, labeled: Dataset, validated: Dataset | None, detector: Detector
) -> Unlabeled:
    """The unlabeled images of a run, read as the labeled ones are, but whole.

    Damaged ones are left out, and files that are labeled or validated on too.

    Args:
        data: of the labeled images, as training reads them.

    Raises:
        OdtkError: there are none, or they cannot be read.
    """
    own = replace(
        data,
        images=config.unlabeled,
        annotations=None,
        skip_damaged=True,
        batch=config.unlabeled_batch,
        repeat_threshold=0.0,
        augment=replace(data.augment, crop=0.0),  # which goes by boxes
    )
    try:
        given = Dataset.load(None, own.images, rotated=config.model.rotated, skip_damaged=True)
    except OdtkError as error:
        raise OdtkError(f"--unlabeled: {error}{config.if_moved('--unlabeled')}") from error
    known = {os.path.realpath(image.path) for part in (labeled, validated) if part is not None for image in part.images}
    dataset = given.part([image.id for image in given.images if os.path.realpath(image.path) in known], rest=True)
    if not dataset.images:
        raise OdtkError("--unlabeled: all of its images are labeled or validated on; give others.")
    share = foreground_share(labeled, data, detector, config.loss)
    return Unlabeled(create_loader(dataset, own), share, len(given.images) - len(dataset.images))


def foreground_share(dataset: Dataset, data: LoaderConfig, detector: Detector, loss: LossConfig) -> float:
    """The part of a detector's points that boxes take where there are some, by its head's rule. No image is read."""
    whole = replace(data, batch=data.batch * data.world, rank=0, world=1)  # the same for any number of processes
    sampler, model = Sampler(dataset, whole), replace(detector.config, classes=1)
    anchors = [level.cpu() for level in detector.anchors()]
    taken = points = images = 0.0
    for number in range(math.ceil(len(dataset.images) / whole.batch)):
        plan = sampler.plan(number)
        shapes = [(math.ceil(plan.height / s), math.ceil(plan.width / s)) for s in detector.strides]
        for sample in plan.samples:
            if len(sample.boxes):  # of empty images, which may be many, nothing is to be learned here
                images += 1
                points += model.num_anchors * sum(h * w for h, w in shapes)
                taken += foreground(sample.boxes, shapes, anchors, detector.strides, model, loss)
        if images >= COUNTED_IMAGES:
            break
    return taken / points if points else 0.0


def foreground(
    boxes: np.ndarray,
    shapes: Sequence[tuple[int, int]],
    anchors: Sequence[Tensor],
    strides: Sequence[int],
    model: ModelConfig,
    loss: LossConfig,
) -> float:
    """How many anchors or points the boxes [n, 4 or 5] of one image take on levels of these shapes (h, w)."""
    values = model.num_anchors * BOX_CODERS[model.box_coder].head_values
    terms = detection_loss(
        [torch.zeros(1, model.num_anchors * model.classes, *shape) for shape in shapes],
        [torch.zeros(1, values, *shape) for shape in shapes],
        torch.from_numpy(boxes)[None],  # [n, 4 or 5] → [1, n, 4 or 5]
        torch.zeros(1, len(boxes), dtype=torch.int64),
        anchors=anchors,
        strides=strides,
        model=model,
        loss=loss,
    )
    return float(terms["cls"][1])


# ---------------------------------------------------------------------------------------------------------------------
# Losses


Levels = Sequence[Tensor]
Terms = dict[str, tuple[Tensor, Tensor]]


def pseudo_label_loss(logits: Levels, taught: Levels, share: float, model: ModelConfig) -> Terms:
    """The loss between a detector's raw scores and those of a teacher for the same images, as detection_loss has it.

    Quality focal loss (https://arxiv.org/abs/2006.04388 eq. 2, β = 2) of all points, whose target is the teacher's
    score in the region of its highest scores, and 0 elsewhere; normalized by the sum of the region's scores, each
    point's highest. The teacher's boxes are not learned: that cost up to 4 points of AP (docs/unlabeled.md).

    Args:
        logits: raw levels [N, A·C, h, w] of any float type; computed in float32.
        taught: those of the teacher, without gradients.
        share: part of an image's anchors or points that the region has.
    """
    scores = [by_anchor(level, model).float().sigmoid() for level in taught]  # [N, h·w·A, C] each
    weights = region(torch.cat([level.amax(-1) for level in scores], 1), share).split([s.shape[1] for s in scores], 1)
    total = count = torch.zeros((), device=scores[0].device)
    for own, score, weight in zip(logits, scores, weights, strict=True):
        total = total + soft_focal_loss(by_anchor(own, model).float(), score * (weight > 0)[..., None])
        count = count + weight.sum()
    return {"cls": (total, count)}


def by_anchor(level: Tensor, model: ModelConfig) -> Tensor:
    """A raw level [N, A·X, h, w] as [N, h·w·A, X]."""
    return level.unflatten(1, (model.num_anchors, -1)).permute(0, 3, 4, 1, 2).flatten(1, 3)


def region(scores: Tensor, share: float) -> Tensor:
    """Scores [N, P] of all points, and 0 outside the region of each image's highest ones.

    Args:
        share: part of P; the region has one point at least, and of equal scores not all may be in it.
    """
    count = max(1, min(scores.shape[1], round(share * scores.shape[1])))
    best = scores.topk(count, dim=1)
    return torch.zeros_like(scores).scatter(1, best.indices, best.values)


def soft_focal_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Sum of |y − p|²·cross entropy of p = sigmoid(logits) and y, both of any shape, y in [0, 1]."""
    entropy = F.softplus(logits) - target * logits
    return ((target - logits.sigmoid()).square() * entropy).sum()


def entropy_loss(logits: Levels, share: float, model: ModelConfig) -> Terms:
    """The entropy of every score as that of a yes or no, in bits, normalized by the number of points that boxes take.

    Args:
        logits: raw levels [N, A·C, h, w] of any float type; computed in float32.
        share: part of the anchors or points that boxes take.
    """
    total = torch.zeros((), device=logits[0].device)
    points = 0
    for level in logits:
        x = level.float()
        total = total + (F.softplus(x) - x * x.sigmoid()).sum() / math.log(2)
        points += x.numel() // model.classes
    return {"entropy": (total, total.new_full((), share * points))}
