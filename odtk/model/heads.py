"""The two heads, each shared by all levels. They give raw numbers: losses and decoding are elsewhere.

A head takes one feature map [N, 256, h, w] per level and returns two lists, with one map per level in each:
    logits: [N, A·C, h, w], channel a·C + c: the score of class c at anchor a, before the sigmoid.
    boxes:  [N, A·V, h, w], channel a·V + v: number v of the box at anchor a, as the head's docstring states.
A is the number of anchors per cell, C that of classes, V that of box numbers per anchor. All are unbounded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..box_coder import BOX_CODERS
from ..config import ModelConfig, OdtkError
from .layers import GROUPS
from .neck import LEVEL_CHANNELS

PRIOR_PROBABILITY = 0.01  # π, the score of every class before training: https://arxiv.org/abs/1708.02002 §3.3


class RetinaNetHead(nn.Module):
    """https://arxiv.org/abs/1708.02002: scores and deltas of A = config.num_anchors anchors per cell.

    Two separate towers of four 3×3 convolutions of 256 channels with ReLU. The box numbers are relative to the anchor:
        V = 4: dx, dy (center, in widths and heights of the anchor), dw, dh (logarithms of the ratio of the sides).
        V = 6, with rotated boxes: the same, then sin θ and cos θ.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.cls_head = conv_tower(config.num_anchors * config.classes, _no_norm)
        self.box_head = conv_tower(config.num_anchors * BOX_CODERS[config.box_coder].head_values, _no_norm)

    def initialize(self) -> None:
        """Towers that keep the variance (https://arxiv.org/abs/1502.01852 eq. 10), small last layers, the class prior.

        The paper's normal of standard deviation 0.01 everywhere (§4.1) passes on only a seventieth of a tower's input,
        and training from scratch stalls: on the synthetic images the class loss took more than 200 iterations to fall
        to 0.5, which this initialization reaches in 55.
        """
        for layers in (self.cls_head, self.box_head):
            initialize_tower(layers)
            for layer in list(layers.children())[:-1]:
                if isinstance(layer, nn.Conv2d):
                    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        initialize_class_bias(self.cls_head)
        nn.init.normal_(self.box_head[-1].weight, std=0.001)  # type: ignore[arg-type]  # boxes start at their anchors

    def forward(self, features: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        return [self.cls_head(x) for x in features], [self.box_head(x) for x in features]


class FCOSHead(nn.Module):
    """https://arxiv.org/abs/1904.01355: a score, four distances and a center-ness of the one point per cell (A = 1).

    Two separate towers as RetinaNet's, with GroupNorm before each ReLU. V = 5 box numbers:
        l, t, r, b: the tower's output times the level's trainable scale; the point's distance to a side of the box
            is relu(value)·stride pixels.
        center-ness: a logit, from the same tower as the distances; it is not scaled.

    Args:
        levels: how many feature maps it will be given, each with a scale of its own.
    """

    BOX_BIAS = 2.0  # boxes start 4×4 strides large, as the smallest anchor; relu passes gradients from the start

    def __init__(self, config: ModelConfig, levels: int) -> None:
        super().__init__()
        self.cls_head = conv_tower(config.classes, _group_norm)
        self.box_head = conv_tower(BOX_CODERS[config.box_coder].head_values, _group_norm)
        self.scales = nn.Parameter(torch.ones(levels))

    def initialize(self) -> None:
        """Normal of standard deviation 0.01, the class prior, scales of 1, distances of 2 strides."""
        initialize_tower(self.cls_head)
        initialize_tower(self.box_head)
        initialize_class_bias(self.cls_head)
        nn.init.ones_(self.scales)
        with torch.no_grad():
            self.box_head[-1].bias[:4] = self.BOX_BIAS  # type: ignore[index, operator]

    def forward(self, features: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        boxes = []
        for x, scale in zip(features, self.scales, strict=True):
            box = self.box_head(x)
            factor = torch.cat([scale.expand(4), scale.new_ones(1)])  # center-ness is not scaled
            boxes.append(box * factor.to(box.dtype)[:, None, None])
        return [self.cls_head(x) for x in features], boxes


def conv_tower(out_channels: int, norm: Callable[[], list[nn.Module]]) -> nn.Sequential:
    """[N, 256, h, w] → [N, out_channels, h, w]: four 3×3 convolutions with norm and ReLU, then a plain one.

    Args:
        norm: makes the layers between a convolution and its ReLU, anew for each convolution.
    """
    layers: list[nn.Module] = []
    for _ in range(4):
        layers += [nn.Conv2d(LEVEL_CHANNELS, LEVEL_CHANNELS, 3, padding=1), *norm(), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Conv2d(LEVEL_CHANNELS, out_channels, 3, padding=1))


def _no_norm() -> list[nn.Module]:
    return []


def _group_norm() -> list[nn.Module]:
    return [nn.GroupNorm(GROUPS, LEVEL_CHANNELS)]


def initialize_tower(layers: nn.Sequential) -> None:
    """Weights normal with standard deviation 0.01, biases zero, GroupNorm the identity."""
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        elif isinstance(layer, nn.GroupNorm):
            layer.reset_parameters()


def initialize_class_bias(layers: nn.Sequential) -> None:
    """The last convolution's bias b such that sigmoid(b) = π."""
    nn.init.constant_(layers[-1].bias, -math.log((1 - PRIOR_PROBABILITY) / PRIOR_PROBABILITY))  # type: ignore[arg-type]


def create_head(config: ModelConfig, levels: int) -> RetinaNetHead | FCOSHead:
    """The head that ``config.head`` names, for this many feature maps.

    Raises:
        OdtkError: for an unknown name, or FCOS with rotated boxes.
    """
    if config.head == "retinanet":
        return RetinaNetHead(config)
    if config.head == "fcos":
        if config.rotated:
            raise OdtkError("The fcos head cannot predict rotated boxes: use --head retinanet with --rotated-bbox.")
        return FCOSHead(config, levels)
    raise OdtkError(f"The head {config.head!r} does not exist: use retinanet or fcos.")
