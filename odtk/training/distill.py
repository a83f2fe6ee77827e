"""Distillation: a detector learns, beside its boxes, to make the features of a teacher (PKD).

https://arxiv.org/abs/2207.02039: every channel of a level of the feature pyramid is standardized over the batch, and
half of the mean squared error between student and teacher is the loss, which is 1 − r of Pearson's correlation r. So
neither the size of a teacher's features nor their mean matters, and any detector teaches any other: heads, classes and
boxes take no part. A 1×1 convolution brings a student's level to the teacher's width where that differs; it is not part
of the detector, but of the run that a checkpoint resumes.

A detector knows objects at the size that it was trained at. So a teacher that was trained at another size than the
student sees the student's images scaled to its own. Levels are compared whose cells are equally large in the image. A
level of the teacher that is finer than all of the student's is learned by its finest one too: it knows small objects.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import ModelConfig, OdtkError, TrainConfig
from ..model.checkpoint import build_detector, load, weights_hash
from ..model.detector import Detector, Renormalize
from ..text import printable
from .sync_batch_norm import sum_over_ranks

MOST_APART = 1.5  # strides that differ more are those of other levels, which follow each other by a factor of 2
FINEST = 3.0  # by so much a level of the teacher may be finer than the student's finest
LEAST_VARIANCE = 1e-8  # relative to the mean square: what varies less is constant but for rounding
TINY = 1e-12  # a variance below is none


class Teacher(nn.Module):
    """The features of a trained detector, in eval mode and without gradients.

    Args:
        detector: the teacher.
        student: whose images it is given, normalized for the student.
        scale: of these images, to the size of the teacher's.

    Attributes:
        strides: of each level, in pixels of the student's images.
        channels: of every level.
        hash: of its weights.
    """

    def __init__(self, detector: Detector, student: ModelConfig, scale: float = 1.0) -> None:
        super().__init__()
        self.hash, self.scale = weights_hash(detector.state_dict()), scale
        self.strides = tuple(stride / scale for stride in detector.strides)
        self.stride, self.channels = detector.stride, detector.config.pyramid_channels
        self.backbones = detector.fold().requires_grad_(False).backbones
        self.renormalize = Renormalize(student, detector.config)

    def train(self, mode: bool = True) -> Teacher:
        """As nn.Module.train(), but it stays in eval mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> list[Tensor]:
        """Images [N, 3, H, W] as the student takes them → [N, channels, h, w] of each of the teacher's levels."""
        height, width = images.shape[-2:]
        size = [max(1, round(side * self.scale / self.stride)) * self.stride for side in (height, width)]
        if size != [height, width]:
            images = F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=self.scale < 1)
        images = self.renormalize(images).contiguous(memory_format=torch.channels_last)
        return [feature for backbone in self.backbones.values() for feature in backbone(images)]


def load_teacher(config: TrainConfig) -> Teacher:
    """The teacher that a run names, with the weights to detect with, on the run's device.

    Raises:
        OdtkError: the file cannot be read.
    """
    assert config.teacher is not None
    try:
        checkpoint = load(config.teacher)
    except OdtkError as error:
        raise OdtkError(f"--teacher: {error}{config.if_moved('--teacher')}") from error
    scale = config.teacher_scale
    if scale is None:
        scale = (checkpoint.setting("resize") or config.data.resize) / config.data.resize
    teacher = Teacher(build_detector(checkpoint), config.model, scale)
    return teacher.to(config.data.device, memory_format=torch.channels_last)  # type: ignore[call-overload]


class Student(nn.Module):
    """A detector that is taught: it gives its features too, as wide as the teacher's.

    Attributes:
        pairs: (student's level, teacher's level), see pairs_of.
        adapters: 1×1 convolutions, one per pair; none where the widths are the same and each level is in one pair.

    Raises:
        OdtkError: there is no such pair.
    """

    def __init__(self, detector: Detector, teacher: Teacher) -> None:
        super().__init__()
        self.detector = detector
        self.pairs = pairs_of(detector.strides, teacher.strides)
        if not self.pairs:
            own, other = (", ".join(f"{s:g}" for s in strides) for strides in (detector.strides, teacher.strides))
            raise OdtkError(
                f"--teacher: its levels have a cell every {other} pixels of the images and the detector to train every "
                f"{own}: choose another teacher, or a --teacher-scale at which some are about the same."
            )
        width = detector.config.pyramid_channels
        alike = width == teacher.channels and len({own for own, _ in self.pairs}) == len(self.pairs)
        adapters = () if alike else (nn.Conv2d(width, teacher.channels, 1) for _ in self.pairs)
        self.adapters = nn.ModuleList(adapters)

    def line(self, path: str, teacher: Teacher) -> str:
        """What is taught by the teacher of this path, in one line."""
        pairs = [f"{self.detector.strides[own]} by {teacher.strides[other]:.3g}" for own, other in self.pairs]
        alone = [str(s) for i, s in enumerate(self.detector.strides) if i not in {own for own, _ in self.pairs}]
        size = "" if teacher.scale == 1 else f" sees the images {teacher.scale:.3g} times as large and"
        rest = f"; of {', '.join(alone)} pixels by none" if alone else ""
        return f"{printable(path)}{size} teaches, by the pixels between cells, levels of {', '.join(pairs)}{rest}."

    def forward(self, images: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """As Detector.forward, and the features [N, teacher's channels, h, w] of each pair."""
        features = self.detector.features(images)
        logits, boxes = self.detector.head(features)
        paired = [features[own] for own, _ in self.pairs]
        if len(self.adapters):
            paired = [adapt(feature) for adapt, feature in zip(self.adapters, paired, strict=True)]
        return logits, boxes, paired


def pairs_of(strides: Sequence[int], others: Sequence[float]) -> list[tuple[int, int]]:
    """Which levels are compared, by their strides, as pairs of indices.

    For each stride the nearest of the others, if they differ by no more than MOST_APART; and for the finest each of the
    others that is finer still, up to FINEST times.
    """
    apart = [[abs(math.log(other / stride)) for other in others] for stride in strides]
    nearest = [(i, row.index(min(row))) for i, row in enumerate(apart)]
    found = [(i, j) for i, j in nearest if apart[i][j] <= math.log(MOST_APART)]
    finest, taken = min(strides), {j for _, j in found}
    finer = [j for j, other in enumerate(others) if other < finest <= other * FINEST and j not in taken]
    return found + [(strides.index(finest), j) for j in finer]


def feature_loss(features: list[Tensor], taught: list[Tensor], world: int) -> tuple[Tensor, Tensor]:
    """How far features are from a teacher's: of each level the mean of (1 − r) over its channels, summed.

    Channels that are constant, in either of the two, count nothing, and so does a level of such channels. Statistics
    are those of the whole batch, over all ranks.

    Args:
        features, taught: per level [N, C, h, w], any float type; computed in float32. Maps of the teacher that are
            larger or smaller are resized.
        world: number of ranks; all of them must call this.

    Returns:
        (sum, normalizer) as detection_loss has them: over all ranks the normalizers add up to 1.
    """
    total = torch.zeros((), device=features[0].device)
    for own, other in zip(features, taught, strict=True):
        if other.shape[-2:] != own.shape[-2:]:
            other = F.interpolate(other.float(), own.shape[-2:], mode="bilinear", align_corners=False)
        (a, varies), (b, teaches) = standardize(own, world), standardize(other, world)
        cells = own.new_full((1,), own.shape[0] * own.shape[2] * own.shape[3], dtype=torch.float32)
        cells = sum_over_ranks(cells) if world > 1 else cells
        both = (varies & teaches).float()  # [C]
        error = 0.5 * (a - b).square().sum((0, 2, 3))  # [N, C, h, w] → [C]
        total = total + (error * both).sum() / (cells[0] * both.sum().clamp(min=1))
    return total, total.new_full((), 1 / world)


def standardize(feature: Tensor, world: int) -> tuple[Tensor, Tensor]:
    """A feature map with mean 0 and variance 1 of every channel over the batch of all ranks.

    Returns:
        [N, C, h, w] float32, and which channels [C] vary at all; the others are 0.
    """
    values = feature.float()
    cells = values.new_full((1,), values.shape[0] * values.shape[2] * values.shape[3])
    total = torch.cat([values.sum((0, 2, 3)), cells])  # [C + 1]
    total = sum_over_ranks(total) if world > 1 else total
    count = total[-1].detach()
    mean = total[:-1] / count
    centered = values - mean[:, None, None]
    squares = centered.square().sum((0, 2, 3))
    variance = (sum_over_ranks(squares) if world > 1 else squares) / count
    varies = (variance > LEAST_VARIANCE * mean.square() + TINY).detach()
    scale = torch.where(varies, variance, 1).rsqrt() * varies
    return centered * scale[:, None, None], varies
