"""The three heads, each shared by all levels. They give raw numbers: losses and decoding are elsewhere.

A head takes one feature map [N, config.pyramid_channels, h, w] per level and returns two lists, with one map per level
in each:
    logits: [N, A·C, h, w], channel a·C + c: the score of class c at anchor a, before the sigmoid.
    boxes:  [N, A·V, h, w], channel a·V + v: number v of the box at anchor a, as the head's docstring states.
A is the number of anchors per cell, C that of classes, V that of box numbers per anchor. All are unbounded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..box_coder import BOX_CODERS
from ..config import ModelConfig, OdtkError
from .layers import GROUPS, folded_conv_bn

PRIOR_PROBABILITY = 0.01  # π, the score of every class before training: https://arxiv.org/abs/1708.02002 §3.3


class RetinaNetHead(nn.Module):
    """https://arxiv.org/abs/1708.02002: scores and deltas of A = config.num_anchors anchors per cell.

    Two separate towers of 3×3 convolutions with ReLU (conv_tower). The box numbers are relative to the anchor:
        V = 4: dx, dy (center, in widths and heights of the anchor), dw, dh (logarithms of the ratio of the sides).
        V = 6, with rotated boxes: the same, then sin θ and cos θ.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.cls_head = conv_tower(config, config.num_anchors * config.classes, _no_norm)
        self.box_head = conv_tower(config, config.num_anchors * BOX_CODERS[config.box_coder].head_values, _no_norm)

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
        initialize_class_bias(self.cls_head[-1])  # type: ignore[arg-type]
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
        self.cls_head = conv_tower(config, config.classes, _group_norm)
        self.box_head = conv_tower(config, BOX_CODERS[config.box_coder].head_values, _group_norm)
        self.scales = nn.Parameter(torch.ones(levels))

    def initialize(self) -> None:
        """Normal of standard deviation 0.01, the class prior, scales of 1, distances of 2 strides."""
        initialize_tower(self.cls_head)
        initialize_tower(self.box_head)
        initialize_class_bias(self.cls_head[-1])  # type: ignore[arg-type]
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


class DenseHead(nn.Module):
    """A score and a box of the one point per cell (A = 1), from two towers with BatchNorm per level.

    The convolutions are shared by all levels and the norms are not, as in RTMDet (https://arxiv.org/abs/2212.07784
    §3.2): the levels' statistics differ. Unlike GroupNorm, a batch norm takes no statistics over the map at inference,
    so that padding cannot change what is found far from it, and it is folded into its convolution. The box numbers:
        V = 4: l, t, r, b: the point's distance to a side of the box is relu(value)·stride pixels.
        V = 6, with rotated boxes: dx, dy from the point to the box's center, in strides; the sides w, h before the
            rotation, relu(value)·stride pixels each; sin 2θ, cos 2θ, of any length.

    Args:
        levels: how many feature maps it will be given.
    """

    BOX_BIAS = 4.0  # boxes start 8×8 strides large, which is the side of the anchors that choose their points

    def __init__(self, config: ModelConfig, levels: int) -> None:
        super().__init__()
        self.rotated = config.rotated
        self.cls_head = SharedTower(config, config.classes, levels)
        self.box_head = SharedTower(config, BOX_CODERS[config.box_coder].head_values, levels)

    def initialize(self) -> None:
        """Towers that keep the variance, small last layers, the class prior, boxes 8×8 strides large, unrotated."""
        self.cls_head.initialize()
        self.box_head.initialize()
        initialize_class_bias(self.cls_head.last)
        side = 2 * self.BOX_BIAS
        start = (0.0, 0.0, side, side, 0.0, 1.0) if self.rotated else (self.BOX_BIAS,) * 4
        with torch.no_grad():
            self.box_head.last.bias.copy_(torch.tensor(start))  # type: ignore[union-attr]

    def forward(self, features: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        return (
            [self.cls_head(x, level) for level, x in enumerate(features)],
            [self.box_head(x, level) for level, x in enumerate(features)],
        )


class SharedTower(nn.Module):
    """[N, C, h, w] of one level → [N, out_channels, h, w]: 3×3 convolutions with norm and ReLU, then a plain one.

    All levels share the convolutions, and each level has BatchNorms of its own.
    """

    def __init__(self, config: ModelConfig, out_channels: int, levels: int) -> None:
        super().__init__()
        width = config.head_channels
        sizes = [config.pyramid_channels, *[width] * config.head_convs]
        self.convs = nn.ModuleList(
            nn.Conv2d(before, after, 3, padding=1, bias=False) for before, after in zip(sizes, sizes[1:], strict=False)
        )
        self.norms = nn.ModuleList(nn.ModuleList(nn.BatchNorm2d(width) for _ in self.convs) for _ in range(levels))
        self.folded: nn.ModuleList | None = None  # after `fold`, the convolutions of each level
        self.last = nn.Conv2d(width, out_channels, 3, padding=1)

    def initialize(self) -> None:
        """Kaiming normal (https://arxiv.org/abs/1502.01852), a small last layer, norms the identity."""
        for conv in self.convs:
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")  # type: ignore[arg-type]
        for module in self.norms.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()
        nn.init.normal_(self.last.weight, std=0.01)
        nn.init.zeros_(self.last.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, level: int) -> Tensor:
        if self.folded is not None:
            for conv in self.folded[level].children():
                x = F.relu_(conv(x))
            return self.last(x)
        for conv, norm in self._layers(level):
            x = F.relu_(_apply_norm(norm, conv(x)))
        return self.last(x)

    def _layers(self, level: int) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
        """The convolutions and the level's norms after them."""
        return list(zip(self.convs.children(), self.norms[level].children(), strict=True))  # type: ignore[arg-type]

    def fold(self) -> None:
        """Replaces convolutions and norms by convolutions of each level, in place; the same in eval mode."""
        self.folded = nn.ModuleList(
            nn.ModuleList(_fold(conv, norm) for conv, norm in self._layers(level)) for level in range(len(self.norms))
        )
        del self.convs, self.norms


def _apply_norm(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """norm(x). One cell of one image has no statistics to train with: there the running ones are used.

    Not by a norm over several processes: each of them must take part in its statistics.
    """
    if type(norm) is nn.BatchNorm2d and norm.training and len(x) * x.shape[2] * x.shape[3] == 1:
        return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
    return norm(x)


def _fold(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    """The convolution that equals norm(conv(x)) at inference."""
    folded = nn.Conv2d(conv.in_channels, conv.out_channels, 3, padding=1)
    weight, bias = folded_conv_bn(conv, norm)
    folded.weight, folded.bias = nn.Parameter(weight), nn.Parameter(bias)
    return folded


def conv_tower(config: ModelConfig, out_channels: int, norm: Callable[[int], list[nn.Module]]) -> nn.Sequential:
    """[N, C, h, w] → [N, out_channels, h, w]: 3×3 convolutions with norm and ReLU, then a plain one.

    C is config.pyramid_channels; there are config.head_convs convolutions with ReLU, of config.head_channels.

    Args:
        norm: makes the layers between a convolution of that many channels and its ReLU, anew for each convolution.
    """
    layers: list[nn.Module] = []
    channels = config.pyramid_channels
    for _ in range(config.head_convs):
        width = config.head_channels
        layers += [nn.Conv2d(channels, width, 3, padding=1), *norm(width), nn.ReLU(inplace=True)]
        channels = width
    return nn.Sequential(*layers, nn.Conv2d(channels, out_channels, 3, padding=1))


def _no_norm(channels: int) -> list[nn.Module]:
    return []


def _group_norm(channels: int) -> list[nn.Module]:
    return [nn.GroupNorm(math.gcd(GROUPS, channels), channels)]


def initialize_tower(layers: nn.Sequential) -> None:
    """Weights normal with standard deviation 0.01, biases zero, GroupNorm the identity."""
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        elif isinstance(layer, nn.GroupNorm):
            layer.reset_parameters()


def initialize_class_bias(last: nn.Conv2d) -> None:
    """The last convolution's bias b such that sigmoid(b) = π."""
    nn.init.constant_(last.bias, -math.log((1 - PRIOR_PROBABILITY) / PRIOR_PROBABILITY))  # type: ignore[arg-type]


def create_head(config: ModelConfig, levels: int) -> RetinaNetHead | FCOSHead | DenseHead:
    """The head that ``config.head`` names, for this many feature maps.

    Raises:
        OdtkError: for an unknown name, or rotated boxes with FCOS.
    """
    if config.head == "retinanet":
        return RetinaNetHead(config)
    if config.head not in ("fcos", "dense"):
        raise OdtkError(f"The head {config.head!r} does not exist: use retinanet, fcos or dense.")
    if config.head == "dense":
        return DenseHead(config, levels)
    if config.rotated:
        raise OdtkError(
            "The fcos head cannot predict rotated boxes: use --head dense or retinanet with --rotated-bbox."
        )
    return FCOSHead(config, levels)
