"""RepVGG: https://arxiv.org/abs/2101.03697. Three branches in training, a single 3×3 convolution after folding.

Parameter names are the authors' (stage1.0.rbr_dense.conv …).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...config import ModelConfig, OdtkError
from ..layers import BatchNorm, ConvNorm, create_norm, folded_conv_bn, scale_and_shift
from .feature_extractor import FeatureExtractor


@dataclass(frozen=True)
class RepVGGDesign:
    """One member of the family (table 2): blocks in stages 2 to 5, and width factors: b of the last stage, a before."""

    depths: tuple[int, int, int, int]
    a: float
    b: float = 2.5

    @property
    def widths(self) -> tuple[int, int, int, int, int]:
        """Channels of stages 1 to 5."""
        early = [int(64 * 2**i * self.a) for i in range(3)]
        return (min(64, early[0]), *early, int(512 * self.b))  # type: ignore[return-value]


REPVGG_DESIGNS = {
    "RepVGGA0": RepVGGDesign((2, 4, 14, 1), a=0.75),
    "RepVGGA1": RepVGGDesign((2, 4, 14, 1), a=1.0),
    "RepVGGB0": RepVGGDesign((4, 6, 16, 1), a=1.0),
}


class Branch(ConvNorm):
    """A convolution and its norm.

    A strided 1×1 convolution takes every second pixel first and then convolves without a stride: a strided one of three
    channels, channels-last on the CPU, writes its weight gradient past its buffer (uxlfoundation/oneDNN 6035).
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int, norm: str) -> None:
        super().__init__()
        self.step = stride if kernel_size == 1 else 1
        padding = kernel_size // 2
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride // self.step, padding, bias=False)
        self.bn = create_norm(norm, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:, :, :: self.step, :: self.step])

    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight [O, C, k, k] and bias [O] of the single convolution that equals both."""
        return folded_conv_bn(self.conv, cast(BatchNorm, self.bn))


class RepVGGBlock(nn.Module):
    """relu(norm(3×3) + norm(1×1) + norm(x)), the last only if the shape stays the same; after `fold`, relu(3×3)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, norm: str) -> None:
        super().__init__()
        keeps_shape = stride == 1 and in_channels == out_channels
        self.rbr_identity = create_norm(norm, out_channels) if keeps_shape else None
        self.rbr_dense = Branch(in_channels, out_channels, 3, stride, norm)
        self.rbr_1x1 = Branch(in_channels, out_channels, 1, stride, norm)
        self.rbr_reparam: nn.Conv2d | None = None

    @property
    def norms(self) -> list[nn.Module]:
        """The last layer of each branch."""
        return [self.rbr_dense.bn, self.rbr_1x1.bn, *([] if self.rbr_identity is None else [self.rbr_identity])]

    def forward(self, x: Tensor) -> Tensor:
        if self.rbr_reparam is not None:
            return F.relu_(self.rbr_reparam(x))
        out = self.rbr_dense(x) + self.rbr_1x1(x)
        if self.rbr_identity is not None:
            out = out + self.rbr_identity(x)
        return F.relu_(out)

    @torch.no_grad()
    def fold(self) -> None:
        """Replaces the branches by one convolution, in place (§3.3).

        A 1×1 kernel is a 3×3 one with nothing but its center, and the identity is a 1×1 one.
        """
        dense = self.rbr_dense.conv
        weight, bias = self.rbr_dense.folded()
        pointwise_weight, pointwise_bias = self.rbr_1x1.folded()
        weight[:, :, 1, 1] += pointwise_weight[:, :, 0, 0]
        bias += pointwise_bias
        if self.rbr_identity is not None:
            scale, shift = scale_and_shift(cast(BatchNorm, self.rbr_identity))
            weight[:, :, 1, 1] += torch.diag(scale)
            bias += shift
        self.rbr_reparam = nn.Conv2d(dense.in_channels, dense.out_channels, 3, dense.stride[0], padding=1)
        self.rbr_reparam.weight, self.rbr_reparam.bias = nn.Parameter(weight), nn.Parameter(bias)
        del self.rbr_dense, self.rbr_1x1, self.rbr_identity


class RepVGG(FeatureExtractor):
    """images [N, 3, H, W] → the maps of the authors' stages 2, 3 and 4 (counted from 0), of strides 8, 16 and 32."""

    def __init__(self, design: RepVGGDesign, config: ModelConfig) -> None:
        super().__init__()
        if config.norm == "group":
            raise OdtkError("RepVGG cannot be folded with GroupNorm: use --norm batch or frozen.")
        self.grad_checkpoint = config.grad_checkpoint
        self.channels = design.widths[2:]
        self.stage0 = RepVGGBlock(3, design.widths[0], 2, config.norm)
        for index, (depth, channels) in enumerate(zip(design.depths, design.widths[1:], strict=True)):
            inputs = [design.widths[index]] + [channels] * (depth - 1)
            blocks = [RepVGGBlock(c, channels, 2 if i == 0 else 1, config.norm) for i, c in enumerate(inputs)]
            setattr(self, f"stage{index + 1}", nn.Sequential(*blocks))
        self.freeze(config.freeze_at)

    def initialize(self) -> None:
        """As every feature extractor; the norms of a block's branches are scaled so that their sum has variance 1."""
        super().initialize()
        for block in self.modules():
            if isinstance(block, RepVGGBlock):
                for norm in block.norms:
                    nn.init.constant_(cast(Tensor, norm.weight), len(block.norms) ** -0.5)

    def stem(self, images: Tensor) -> Tensor:
        """[N, 3, H, W] → [N, C, H/2, W/2]"""
        return self.stage0(images)

    def stages(self) -> list[list[nn.Module]]:
        return [[self.stage0], *(list(getattr(self, f"stage{index}")) for index in range(1, 5))]
