"""What the numbers of a box head mean: one named coder for each kind of head.

A head regresses ``head_values`` numbers per anchor. The first ``box_values`` of them make the box. If there is a
center-ness logit, it comes after them and enters the score (ops.decode), not the box.

    name                  the head's numbers               the decoded box
    anchor_deltas         dx, dy, dw, dh                   x1, y1, x2, y2
    rotated_deltas        dx, dy, dw, dh, sin θ, cos θ     x1, y1, x2, y2, sin θ, cos θ
    distances_centerness  l, t, r, b, center-ness logit    x1, y1, x2, y2
    distances             l, t, r, b                       x1, y1, x2, y2
    center_size_angle     dx, dy, w, h, sin 2θ, cos 2θ     x1, y1, x2, y2, sin θ, cos θ

Deltas are relative to an anchor. Distances are in strides of the level from a cell's point to the left, top, right and
bottom of the box, and ReLU is applied to them here. So are dx, dy in strides from the point to the center of a rotated
box, and w, h, its sides before the rotation, to which ReLU is applied.
The exported graph (exporting/postprocess_graph.py) and C++ (csrc/cuda/box_coder.h) use the same names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import boxes as geometry


@dataclass(frozen=True)
class BoxCoder:
    """How the numbers of a head become boxes.

    Attributes:
        name: what ModelConfig.box_coder returns.
        number: the same in C++ (enum class BoxCoder) and in the plugins' field ``coder``. The first three are numbered
            by their head_values, which is what the plugins of earlier engines stored there; later ones count on from 7.
        head_values: V, the numbers that the head regresses per anchor.
        box_values: the numbers of a decoded box: 4, or 6 if it is rotated.
        decode: (numbers [..., V], placed anchors [..., 4 or 5] in px, stride, (width, height) of the level in px) →
            boxes [..., box_values] in px, inclusive corners; never NaN, and clamped to the level, but for
            turned ones of the dense head.
    """

    name: str
    number: int
    head_values: int
    box_values: int
    decode: Callable[[Tensor, Tensor, int, tuple[int, int]], Tensor]

    @property
    def has_centerness(self) -> bool:
        """Whether a center-ness logit follows the numbers of the box."""
        return self.head_values > self.box_values


def _decode_anchor_deltas(numbers: Tensor, anchors: Tensor, stride: int, size: tuple[int, int]) -> Tensor:
    return geometry.decode(numbers, anchors, size)


def _decode_rotated_deltas(numbers: Tensor, anchors: Tensor, stride: int, size: tuple[int, int]) -> Tensor:
    return geometry.decode_rotated(numbers, anchors, size)


def _decode_distances(numbers: Tensor, anchors: Tensor, stride: int, size: tuple[int, int]) -> Tensor:
    """The distances count from the anchors' centers, which are the points of the cells."""
    points = geometry.center_and_size(anchors)[0]
    return geometry.decode_distances(numbers[..., :4].relu() * stride, points, size)


def _decode_center_size_angle(numbers: Tensor, anchors: Tensor, stride: int, size: tuple[int, int]) -> Tensor:
    """The offsets count from the anchors' centers, which are the points of the cells."""
    points = geometry.center_and_size(anchors)[0]
    pixels = torch.cat([numbers[..., :4] * stride, numbers[..., 4:]], -1)
    return geometry.decode_center_size_angle(pixels, points, size)


BOX_CODERS = {
    coder.name: coder
    for coder in (
        BoxCoder("anchor_deltas", number=4, head_values=4, box_values=4, decode=_decode_anchor_deltas),
        BoxCoder("rotated_deltas", number=6, head_values=6, box_values=6, decode=_decode_rotated_deltas),
        BoxCoder("distances_centerness", number=5, head_values=5, box_values=4, decode=_decode_distances),
        BoxCoder("distances", number=7, head_values=4, box_values=4, decode=_decode_distances),
        BoxCoder("center_size_angle", number=8, head_values=6, box_values=6, decode=_decode_center_size_angle),
    )
}
