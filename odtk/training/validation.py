"""COCO figures of a detector while it trains."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ..categories import Category
from ..config import OdtkError, TrainConfig
from ..data.coco import load_json
from ..data.dataset import Dataset
from ..data.images import ImageError, decode
from ..data.loader import create_loader
from ..evaluation.evaluate import Metrics, evaluate, prepare_ground_truth
from ..inference.detect import detect
from ..launch import HostGroup
from ..model.detector import Detector
from ..postprocess import Detections, postprocess

PICTURES = 4  # validation images drawn for TensorBoard


class Validation:
    """COCO figures of a detector on the validation set, its images shared out over all ranks."""

    def __init__(self, config: TrainConfig, categories: tuple[Category, ...], stride: int, ranks: HostGroup) -> None:
        assert config.val_data is not None
        train_data, self.config, self.categories, self.ranks = config.data, config, categories, ranks
        data = replace(
            config.val_data,
            training=False,
            stride=stride,
            rank=train_data.rank,
            world=train_data.world,
            device=train_data.device,
        )
        self.dataset = Dataset.load(data.annotations, data.images, rotated=config.model.rotated)
        if not set(categories) <= set(self.dataset.categories):
            raise OdtkError(
                f"{data.annotations} has other categories than {train_data.annotations}: validation needs the same "
                "ids and names."
            )
        path = str(data.annotations)
        # What is wrong is refused now, not after an hour.
        self.ground_truth = prepare_ground_truth(load_json(Path(path)), path)
        self.loader = create_loader(self.dataset, data)

    def run(self, detector: Detector, autocast: torch.autocast) -> tuple[Metrics, list[np.ndarray]] | None:
        """On rank 0 the figures and a few pictures [H, W, 3]; None on the others. The detector is left as it is."""
        folded = detector.fold().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        anchors = [level.to(self.config.data.device) for level in detector.anchors()]

        def backend(images: Tensor) -> Detections:
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
        return metrics, self.pictures(detections) if self.config.logdir else []

    def pictures(self, detections: list[dict[str, Any]]) -> list[np.ndarray]:
        """The first images with the boxes that score above one half; not one that the loader found damaged."""
        drawn = []
        for image in self.dataset.images[:PICTURES]:
            try:
                picture = Image.fromarray(decode(image.path, image.orientation))
            except ImageError:
                continue
            for detection in detections:
                if detection["image_id"] == image.id and detection["score"] > 0.5:
                    x, y, w, h = detection["bbox"][:4]
                    corners = detection.get("segmentation", [[x, y, x + w, y, x + w, y + h, x, y + h]])[0]
                    ImageDraw.Draw(picture).polygon(corners, outline=(255, 0, 0), width=2)
            drawn.append(np.asarray(picture))  # [H, W, 3]
        return drawn
