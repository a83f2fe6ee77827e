"""COCO metrics of a detector while it trains."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image as PILImage
from torch import Tensor, nn

from ..config import OdtkError, TrainConfig
from ..data.coco import prepare_ground_truth
from ..data.dataset import Dataset
from ..data.images import ImageError
from ..data.layouts import load_annotations
from ..data.loader import create_loader
from ..evaluation.evaluate import STATS, Metrics, evaluate
from ..inference.detect import detect
from ..inference.drawing import LEGIBLE, annotate, coco_to_shapes
from ..model.detector import Detector
from ..postprocess import BatchDetections, postprocess
from ..ranks import CpuGroup
from .log import Validated, classes_line
from .training_set import TrainingSet

PICTURES = 4  # validation images drawn for TensorBoard
PICTURE_SCORE = 0.5  # detections with a higher score are drawn


class Validation:
    """Computes the COCO metrics of a detector on the validation set, whose images are divided among all ranks.

    Raises:
        OdtkError: the validation set cannot be read, has other categories, or has annotations that cannot be evaluated.
    """

    def __init__(self, config: TrainConfig, source: TrainingSet, stride: int, ranks: CpuGroup) -> None:
        assert config.val_data is not None
        categories = source.dataset.categories
        train_data, self.config, self.categories, self.ranks = config.data, config, categories, ranks
        data = replace(
            config.val_data,
            training=False,
            stride=stride,
            **config.model.pixels,
            rank=train_data.rank,
            world=train_data.world,
            device=train_data.device,
        )
        path = str(data.annotations)
        if config.held_out:
            self.dataset, truth = source.dataset.part(config.held_out), source.content_of(config.held_out)
        else:
            rotated = config.model.rotated
            read = load_annotations(path, data.images, rotated=rotated, boxes_only=True)
            self.dataset = Dataset.of(read, rotated=rotated, training=False, skip_damaged=data.skip_damaged)
            truth = {**read.content, "annotations": list(read.content.get("annotations", []))}
        if not set(categories) <= set(self.dataset.categories):
            raise OdtkError(
                f"{data.annotations} has other categories than {train_data.annotations}: validation needs the same "
                "ids and names."
            )
        # Faulty annotations are refused now, not at the first validation an hour later.
        self.ground_truth = prepare_ground_truth(truth, path)
        self.loader = create_loader(self.dataset, data)

    def run(self, detector: nn.Module, autocast: torch.autocast) -> Validated | None:
        """Validates a detector, which is not changed. All ranks must call this.

        Returns:
            On rank 0 what was found, with a few pictures for the log; None on the other ranks.
        """
        assert isinstance(detector, Detector)
        folded = detector.fold().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        anchors = [level.to(self.config.data.device) for level in detector.anchors()]

        def backend(images: Tensor) -> BatchDetections:
            with autocast:
                logits, boxes = folded(images.contiguous(memory_format=torch.channels_last))
            return postprocess(
                logits,
                boxes,
                anchors=anchors,
                strides=detector.strides,
                model=self.config.model,
                config=self.config.postprocess,
            )

        detections = detect(backend, self.loader, self.categories, group=self.ranks.group)
        if self.config.data.rank != 0:
            return None
        metrics = evaluate(detections, self.ground_truth, rotated=self.config.model.rotated)
        return validated(metrics, self.pictures(detections) if self.config.logdir else [])

    def pictures(self, detections: list[dict[str, Any]]) -> list[np.ndarray]:
        """The first images with their detections above PICTURE_SCORE; damaged images are left out."""
        drawn = []
        for image in self.dataset.images[:PICTURES]:
            try:
                picture = PILImage.fromarray(image.decode())
            except ImageError:
                continue
            shown = [d for d in detections if d["image_id"] == image.id and d["score"] > PICTURE_SCORE]
            drawn.append(np.asarray(annotate(picture, coco_to_shapes(shown), min_side=LEGIBLE)))  # [H, W, 3]
        return drawn


def validated(metrics: Metrics, pictures: list[np.ndarray]) -> Validated:
    """COCO metrics as the log takes them: evaluate.STATS, and ``AP/NAME`` of every class that has objects."""
    text = f"AP {metrics.ap:.3f}  AP50 {metrics.ap50:.3f}"
    text += f"  ({classes})" if (classes := classes_line(metrics)) else ""
    values = dict(zip(STATS, metrics.stats, strict=True))
    return Validated(
        metrics.ap, text, {**values, **{f"AP/{c.name}": c.ap for c in metrics.classes if c.ap >= 0}}, pictures
    )
