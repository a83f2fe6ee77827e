"""What becomes of the detections while a run finds them: kept in memory here, or written as it goes (shards.py)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import torch.distributed as dist

from ..ranks import gather
from .detect import Rows, all_rows, order_of


@dataclass
class Part:
    """The detections of one unit of a rank's work: of a batch, or with tiles of one image.

    Attributes:
        ids: of its images.
        rows: of these images, as detect.detection_rows gives them.
        damaged: ids of those that could not be decoded.
    """

    ids: list[int]
    rows: Rows
    damaged: list[int] = field(default_factory=list)


class Total(NamedTuple):
    """What all ranks have found.

    Attributes:
        detections: their number.
        found: images with at least one detection.
        damaged: ids of the images that could not be decoded, in order.
    """

    detections: int
    found: int
    damaged: list[int]


class Collector(Protocol):
    """Takes the parts of this rank in their order.

    Attributes:
        units: parts that an earlier run has done; the first one to add is that of this number.
        images: images in them.
    """

    units: int
    images: int

    def add(self, part: Part) -> None: ...

    def finish(self) -> Total | None:
        """Every rank calls this after its last part; rank 0 gets the total. Raises RuntimeError where an image came
        twice, or not at all."""

    def windows(self) -> Iterator[Rows]:
        """On rank 0, after finish: the rows of all images by ascending id, and in an image by descending score; an
        image is in one window."""

    def remove(self) -> None:
        """On rank 0, when the detections are where they belong: removes what lies on the disk."""


class Memory:
    """Keeps detections in memory, and gathers them on rank 0 at the end.

    Args:
        total: images of all ranks.
        group: of all ranks.
    """

    units = images = 0

    def __init__(self, total: int, group: dist.ProcessGroup | None) -> None:
        self.total, self.group = total, group
        self.parts: list[Part] = []
        self.all: list[Rows] = []

    def add(self, part: Part) -> None:
        self.parts.append(part)

    def finish(self) -> Total | None:
        ids = [id for part in self.parts for id in part.ids]
        damaged = gather([id for part in self.parts for id in part.damaged], self.group)
        found = all_rows(ids, [part.rows for part in self.parts], self.group, self.total)
        self.parts.clear()
        if not damaged:  # not rank 0
            return None
        self.all = [] if found is None else [found]
        image_ids = np.zeros(0) if found is None else found[0]
        return Total(len(image_ids), len(np.unique(image_ids)), sorted(id for of in damaged for id in of))

    def windows(self) -> Iterator[Rows]:
        for ids, rows in self.all:
            order = order_of(ids, rows)
            yield ids[order], rows[order]

    def remove(self) -> None:
        pass


def select(rows: Rows, chosen: np.ndarray) -> Rows:
    """Some of the rows: positions or bool [n]."""
    return rows[0][chosen], rows[1][chosen]
