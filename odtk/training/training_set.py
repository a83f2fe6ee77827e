"""What a run trains on: read once for plan, trial steps and loop, and for the images of it that are validated on."""

from __future__ import annotations

from collections.abc import Collection
from functools import cached_property
from typing import Any

from ..config import TrainConfig
from ..data.dataset import Dataset
from ..data.layouts import Annotations, load_annotations
from ..data.table import AnnotationTable
from ..settings import TrainSettings


class TrainingSet:
    """Annotations and their images; each is read when it is first asked for, and kept. Every process has its own.

    Args:
        annotations: of any format, PATH or PATH:SPLIT.
        images: their folder; None looks for it.
        rotated: boxes are (x, y, w, h, theta).
        skip_damaged: damaged images are left out instead of refused.
    """

    def __init__(self, annotations: str, images: str | None, *, rotated: bool, skip_damaged: bool) -> None:
        self.path, self.images, self.rotated, self.skip_damaged = annotations, images, rotated, skip_damaged

    @classmethod
    def of(cls, asked: TrainSettings | TrainConfig) -> TrainingSet:
        """That of a run."""
        if isinstance(asked, TrainConfig):
            data = asked.data
            rotated, skip_damaged = asked.model.rotated, data.skip_damaged
            return cls(str(data.annotations), str(data.images), rotated=rotated, skip_damaged=skip_damaged)
        return cls(asked.annotations, asked.images, rotated=asked.rotated_bbox, skip_damaged=asked.skip_damaged)

    @cached_property
    def annotations(self) -> Annotations:
        """As they are in the file.

        Raises:
            OdtkError: they cannot be read.
        """
        return load_annotations(self.path, self.images, rotated=self.rotated, boxes_only=True)

    @cached_property
    def dataset(self) -> Dataset:
        """Checked, with the header of every image.

        Raises:
            OdtkError: as Dataset.load.
        """
        return Dataset.of(self.annotations, rotated=self.rotated, training=True, skip_damaged=self.skip_damaged)

    def content_of(self, ids: Collection[int]) -> dict[str, Any]:
        """The annotations of these images of the dataset, crowds too, as the content of a COCO file."""
        content, chosen = self.annotations.content, set(ids)
        rows = content.get("annotations", [])
        if isinstance(rows, AnnotationTable):
            rows = rows.of_images(chosen)
        else:
            rows = [row for row in rows if row["image_id"] in chosen]
        images = [image for image in content["images"] if image["id"] in chosen]
        return {**content, "images": images, "annotations": rows}

    def forget(self) -> None:
        """Frees the annotations; the dataset stays."""
        self.__dict__.pop("annotations", None)
