"""What the trunks are built of: the three normalizations, convolution + norm, deformable convolution, checkpointing.

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


BatchNorm: TypeAlias = "FrozenBatchNorm2d | _BatchNorm"  # what a folded convolution can take in


class FrozenBatchNorm2d(nn.Module):
    """BatchNorm2d whose statistics and affine parameters are fixed: y = x·scale + shift, per channel.

    The four tensors are buffers under BatchNorm2d's names, so its weights load and no optimizer sees them.
    After a convolution `convolve` makes scale and shift part of the kernel; calling the module is the slow way.
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
    """The affine map [C], [C] that a batch norm is at inference (https://arxiv.org/abs/1502.03167, algorithm 2)."""
    assert norm.running_mean is not None and norm.running_var is not None
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    return scale, norm.bias - norm.running_mean * scale


def create_norm(kind: str, channels: int) -> nn.Module:
    """A normalization layer: ``frozen``, ``batch`` or ``group`` (32 groups, fewer where they do not divide)."""
    if kind == "frozen":
        return FrozenBatchNorm2d(channels)
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    if kind == "group":
        return nn.GroupNorm(math.gcd(GROUPS, channels), channels)
    raise OdtkError(f"The norm {kind!r} does not exist: use frozen, batch or group.")


def convolve(conv: nn.Conv2d, norm: nn.Module, x: Tensor) -> Tensor:
    """norm(conv(x)). A frozen norm is multiplied into the kernel: a pass over weights, none over activations."""
    if not isinstance(norm, FrozenBatchNorm2d):
        return norm(conv(x))
    scale, shift = scale_and_shift(norm)
    return conv._conv_forward(x, conv.weight * scale[:, None, None, None], shift)


class ConvNorm(nn.Sequential):
    """nn.Sequential (same parameter names) in which a frozen norm costs nothing after its convolution."""

    def forward(self, x: Tensor) -> Tensor:
        layers = list(self)
        while layers:
            layer = layers.pop(0)
            if isinstance(layer, nn.Conv2d) and layers and isinstance(layers[0], FrozenBatchNorm2d):
                x = convolve(layer, layers.pop(0), x)
            else:
                x = layer(x)
        return x


def fold_norms(model: nn.Module) -> None:
    """Write every batch norm into the convolution before it, in place; the norm becomes an identity.

    Relies on the trunks' order of registration: a norm is the child after the convolution (or the Sequential
    that ends in the convolution) whose output it takes. GroupNorm depends on its input and stays.
    """
    for parent in list(model.modules()):
        children = list(parent.named_children())
        for (_, conv), (name, norm) in zip(children, children[1:], strict=False):
            if isinstance(conv, nn.Sequential) and len(conv):
                conv = conv[-1]
            if isinstance(conv, nn.Conv2d) and isinstance(norm, (_BatchNorm, FrozenBatchNorm2d)):
                weight, bias = folded_kernel(conv, norm)
                conv.weight, conv.bias = nn.Parameter(weight), nn.Parameter(bias)
                setattr(parent, name, nn.Identity())


@torch.no_grad()
def folded_kernel(conv: nn.Conv2d, norm: BatchNorm) -> tuple[Tensor, Tensor]:
    """Weight [O, C/groups, k, k] and bias [O] of the one convolution that equals norm(conv(x)) at inference."""
    scale, shift = scale_and_shift(norm)
    bias = shift if conv.bias is None else shift + scale * conv.bias
    return conv.weight * scale[:, None, None, None], bias


class DeformConv2d(nn.Conv2d):
    """Deformable 3×3 convolution, https://arxiv.org/abs/1703.06211 eq. 2; ``modulated`` is v2, 1811.11168 eq. 1.

    Built of GridSample and a 1×1 convolution, so that it exports as standard operators. `offset` predicts for
    each of the nine taps (dy, dx) in pixels of the input, then for v2 nine masks; it starts at zero, as in the
    papers: no displacement, masks of sigmoid(0) = 0.5. Beyond the border the input is zero.
    """

    def __init__(self, channels_in: int, channels: int, stride: int, groups: int, modulated: bool) -> None:
        super().__init__(channels_in, channels, 3, stride, padding=1, groups=groups, bias=False)
        self.modulated = modulated
        self.offset = nn.Conv2d(channels_in, 27 if modulated else 18, 3, stride, padding=1)
        self.initialize()

    def initialize(self) -> None:
        """No displacement at the start."""
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.bias)  # type: ignore[arg-type]

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        fields = self.offset(x).float()  # coordinates need more than the 11 bits of half precision
        grid = sampling_grid(fields[:, :18], self.stride[0], x.shape[2], x.shape[3])
        samples = F.grid_sample(x.float(), grid.flatten(1, 2), align_corners=False)  # [N, C, 9·h, w]
        samples = samples.unflatten(2, (9, fields.shape[2]))  # [N, C, 9, h, w]
        if self.modulated:
            samples = samples * fields[:, 18:].sigmoid()[:, None]
        columns = samples.flatten(1, 2).to(x.dtype)  # [N, C·9, h, w], the order of weight [O, C/groups, 3, 3]
        return F.conv2d(columns, weight.flatten(1)[:, :, None, None], bias, groups=self.groups)


def sampling_grid(offsets: Tensor, stride: int, height: int, width: int) -> Tensor:
    """Where the nine taps of a padded 3×3 convolution look, in grid_sample's [−1, 1] (pixel x is at (2x + 1)/W − 1).

    Args:
        offsets: [N, 18, h, w], (dy, dx) of each tap in pixels.
        height, width: of the sampled map.

    Returns:
        [N, 9, h, w, 2], (x, y) last.
    """
    dy, dx = offsets.unflatten(1, (9, 2)).unbind(2)  # [N, 9, h, w] each
    tap = torch.arange(9, device=offsets.device)
    rows = torch.arange(dy.shape[2], device=offsets.device) * stride + (tap // 3 - 1)[:, None]  # [9, h]
    columns = torch.arange(dy.shape[3], device=offsets.device) * stride + (tap % 3 - 1)[:, None]  # [9, w]
    y = rows[:, :, None] + dy
    x = columns[:, None, :] + dx
    return torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], dim=-1)


def recomputed(block: nn.Module, x: Tensor) -> Tensor:
    """block(x), of which backward recomputes what is inside (https://arxiv.org/abs/1604.06174)."""

    def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
        return nullcontext(), _statistics_kept(block)

    return checkpoint(block, x, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


@contextmanager
def _statistics_kept(block: nn.Module) -> Iterator[None]:
    """Recomputing must not update the running statistics, nor the counter, a second time."""
    norms = [module for module in block.modules() if isinstance(module, _BatchNorm)]
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, counter) in zip(norms, kept, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, counter


def linear_parameters(channels_in: int, channels: int) -> int:
    """Numbers in a linear layer with bias; a 1×1 convolution without bias and a batch norm have ``channels`` more."""
    return channels_in * channels + channels


class Trunk(nn.Module):
    """A classification network without its classifier: images [N, 3, H, W] → feature maps, finest first.

    A stage ends at stride 2^number: stage 1 is the stem, stage 5 gives C5.

    Attributes:
        outputs: the stages whose last feature map is returned.
        channels, strides: of each feature map.
        stride: the input's height and width must be multiples of it.
        grad_checkpoint: backward recomputes the blocks.
    """

    outputs: tuple[int, ...] = (3, 4, 5)
    channels: tuple[int, ...]
    grad_checkpoint: bool

    @property
    def classifier_parameters(self) -> int:
        """Numbers in the published 1000-class classifier that would follow C5: a linear layer of the pooled map."""
        return linear_parameters(self.channels[-1], 1000)

    @property
    def strides(self) -> tuple[int, ...]:
        return tuple(2**number for number in self.outputs)

    @property
    def stride(self) -> int:
        return max(self.strides)

    def stem(self, images: Tensor) -> Tensor:
        """Stage 1, and the pooling after it where there is one."""
        raise NotImplementedError

    def stages(self) -> list[list[nn.Module]]:
        """The modules of stages 1, 2 …; from stage 2 on they run one after another."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> list[Tensor]:
        x = self.stem(images)
        features = []
        for number, blocks in enumerate(self.stages()[1:], start=2):
            for block in blocks:
                x = recomputed(block, x) if self.grad_checkpoint and torch.is_grad_enabled() else block(x)
            if number in self.outputs:
                features.append(x)
        return features

    def freeze(self, stages: int) -> None:
        """No gradient for stages 1…``stages``. Detector.train() keeps their batch norms in eval mode."""
        for stage in self.stages()[:stages]:
            for module in stage:
                module.requires_grad_(False)

    def initialize(self) -> None:
        """Kaiming normal, fan out (https://arxiv.org/abs/1502.01852); norms to identity."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, (_BatchNorm, nn.GroupNorm, FrozenBatchNorm2d)):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, DeformConv2d):
                module.initialize()
