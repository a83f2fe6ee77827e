"""Layers that several backbones share: norms and their folding, deformable convolution, gradient checkpointing.

Feature maps are [N, C, h, w] throughout, in either memory format.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from ..config import OdtkError

GROUPS = 32  # of GroupNorm, https://arxiv.org/abs/1803.08494

BatchNorm: TypeAlias = "FrozenBatchNorm2d | _BatchNorm"  # the norms that can be folded into a convolution


class FrozenBatchNorm2d(nn.Module):
    """BatchNorm2d whose statistics and affine parameters are fixed: y = x·scale + shift, per channel.

    The four tensors are buffers with BatchNorm2d's names: its weights can be loaded, and no optimizer sees them.
    Call it through `apply_conv_norm`, which makes scale and shift part of the convolution before it; calling the
    module itself costs a pass over the feature map.
    """

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_features, self.eps = channels, eps
        self.weight: Tensor
        self.bias: Tensor
        self.running_mean: Tensor
        self.running_var: Tensor
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = scale_and_shift(self)
        return x * scale.to(x.dtype)[:, None, None] + shift.to(x.dtype)[:, None, None]

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}"


def scale_and_shift(norm: BatchNorm) -> tuple[Tensor, Tensor]:
    """A batch norm at inference as x·scale + shift, both [C] (https://arxiv.org/abs/1502.03167, algorithm 2)."""
    assert norm.running_mean is not None and norm.running_var is not None
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    return scale, norm.bias - norm.running_mean * scale


def create_norm(kind: str, channels: int, eps: float = 1e-5) -> nn.Module:
    """A normalization layer of ``kind`` frozen, batch or group (32 groups, or fewer where 32 does not divide).

    Raises:
        OdtkError: for any other kind.
    """
    if kind == "frozen":
        return FrozenBatchNorm2d(channels, eps)
    if kind == "batch":
        return nn.BatchNorm2d(channels, eps)
    if kind == "group":
        return nn.GroupNorm(math.gcd(GROUPS, channels), channels, eps)
    raise OdtkError(f"The norm {kind!r} does not exist: use frozen, batch or group.")


def apply_conv_norm(conv: nn.Conv2d, norm: nn.Module, x: Tensor) -> Tensor:
    """norm(conv(x)). A frozen norm is multiplied into the kernel, which is cheaper than a pass over the output."""
    if not isinstance(norm, FrozenBatchNorm2d):
        return norm(conv(x))
    scale, shift = scale_and_shift(norm)
    return conv._conv_forward(x, conv.weight * scale[:, None, None, None], shift)


class ConvNorm(nn.Sequential):
    """nn.Sequential, with the same parameter names, that applies a frozen norm inside the convolution before it."""

    def forward(self, x: Tensor) -> Tensor:
        layers = list(self)
        while layers:
            layer = layers.pop(0)
            if isinstance(layer, nn.Conv2d) and layers and isinstance(layers[0], FrozenBatchNorm2d):
                x = apply_conv_norm(layer, layers.pop(0), x)
            else:
                x = layer(x)
        return x


def fold_batch_norms(model: nn.Module) -> None:
    """Write every batch norm into the convolution before it, in place; the norm becomes an identity.

    It relies on the order in which modules are registered: a norm comes right after the convolution whose output it
    takes, or after a Sequential that ends in that convolution. GroupNorm depends on its input and stays.
    """
    for parent in list(model.modules()):
        children = list(parent.named_children())
        for (_, conv), (name, norm) in zip(children, children[1:], strict=False):
            if isinstance(conv, nn.Sequential) and len(conv):
                conv = conv[-1]
            if isinstance(conv, nn.Conv2d) and isinstance(norm, (_BatchNorm, FrozenBatchNorm2d)):
                weight, bias = folded_conv_bn(conv, norm)
                conv.weight, conv.bias = nn.Parameter(weight), nn.Parameter(bias)
                setattr(parent, name, nn.Identity())


@torch.no_grad()
def folded_conv_bn(conv: nn.Conv2d, norm: BatchNorm) -> tuple[Tensor, Tensor]:
    """Weight [O, C/groups, k, k] and bias [O] of the single convolution that equals norm(conv(x)) at inference."""
    scale, shift = scale_and_shift(norm)
    bias = shift if conv.bias is None else shift + scale * conv.bias
    return conv.weight * scale[:, None, None, None], bias


class DeformConv2d(nn.Conv2d):
    """Deformable 3×3 convolution: https://arxiv.org/abs/1703.06211 eq. 2; ``modulated`` is v2, 1811.11168 eq. 1.

    [N, C, H, W] → [N, O, ⌈H/stride⌉, ⌈W/stride⌉]. It is made of GridSample and a 1×1 convolution, so that it exports
    as standard operators. `offset` predicts (dy, dx) for each of the nine taps, in pixels of the input map, and for
    v2 also nine mask logits. It starts at zero, as in the papers: no displacement, masks of sigmoid(0) = 0.5.
    Outside its border the input is zero.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, groups: int, modulated: bool) -> None:
        super().__init__(in_channels, out_channels, 3, stride, padding=1, groups=groups, bias=False)
        self.modulated = modulated
        self.offset = nn.Conv2d(in_channels, 27 if modulated else 18, 3, stride, padding=1)
        self.initialize()

    def initialize(self) -> None:
        """Offsets and mask logits of zero. The kernel itself is initialized like any other."""
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.bias)  # type: ignore[arg-type]

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        fields = self.offset(x).float()  # coordinates need more than the 11 significant bits of fp16
        grid = sampling_grid(fields[:, :18], self.stride[0], x.shape[2], x.shape[3])
        samples = F.grid_sample(x.float(), grid.flatten(1, 2), align_corners=False)  # [N, C, 9·h, w]
        samples = samples.unflatten(2, (9, fields.shape[2]))  # [N, C, 9, h, w]
        if self.modulated:
            samples = samples * fields[:, 18:].sigmoid()[:, None]
        columns = samples.flatten(1, 2).to(x.dtype)  # [N, C·9, h, w], the order of weight [O, C/groups, 3, 3]
        return F.conv2d(columns, weight.flatten(1)[:, :, None, None], bias, groups=self.groups)


def sampling_grid(offsets: Tensor, stride: int, height: int, width: int) -> Tensor:
    """Where the nine taps of a 3×3 convolution with padding 1 sample the input.

    Args:
        offsets: [N, 18, h, w], (dy, dx) of each tap in pixels of the input map.
        stride: of the convolution.
        height, width: of the input map.

    Returns:
        [N, 9, h, w, 2], (x, y) last, as grid_sample takes them: the center of pixel x is (2x + 1)/width − 1, so that
        the map reaches from −1 to 1.
    """
    dy, dx = offsets.unflatten(1, (9, 2)).unbind(2)  # [N, 9, h, w] each
    tap = torch.arange(9, device=offsets.device)
    rows = torch.arange(dy.shape[2], device=offsets.device) * stride + (tap // 3 - 1)[:, None]  # [9, h]
    columns = torch.arange(dy.shape[3], device=offsets.device) * stride + (tap % 3 - 1)[:, None]  # [9, w]
    y = rows[:, :, None] + dy
    x = columns[:, None, :] + dx
    return torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], dim=-1)


def run_checkpointed(block: nn.Module, x: Tensor) -> Tensor:
    """block(x), whose inner feature maps backward computes again instead of keeping (https://arxiv.org/abs/1604.06174)."""

    def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
        return nullcontext(), _frozen_statistics(block)  # around forward, around its repetition

    return checkpoint(block, x, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


@contextmanager
def _frozen_statistics(block: nn.Module) -> Iterator[None]:
    """Inside, batch norms do not update their running statistics and counters: that must happen once, not twice."""
    norms = [module for module in block.modules() if isinstance(module, _BatchNorm)]
    saved = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, counter) in zip(norms, saved, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, counter
