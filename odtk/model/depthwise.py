"""Depthwise convolutions that CPUs train fast in bfloat16; everywhere else they are torch's own, exports included."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class DepthwiseConv2d(nn.Conv2d):
    """A convolution of each channel with a kernel of its own: [N, C, h, w] → [N, C, ⌈h/stride⌉, ⌈w/stride⌉]."""

    def __init__(self, channels: int, size: int, stride: int = 1) -> None:
        super().__init__(channels, channels, size, stride, padding=size // 2, groups=channels, bias=False)

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if has_slow_gradients(self, x):
            return depthwise_bfloat16(x, weight, bias, self.stride[0], weight.shape[-1] // 2)
        return super()._conv_forward(x, weight, bias)


def has_slow_gradients(conv: nn.Conv2d, x: Tensor) -> bool:
    """Whether torch trains this depthwise convolution slowly: on a CPU, in bfloat16, unless 3×3 of stride 1."""
    if not (conv.training and torch.is_grad_enabled() and x.device.type == "cpu"):
        return False
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    return dtype == torch.bfloat16 and (conv.kernel_size[0] > 3 or conv.stride[0] > 1)


def depthwise_bfloat16(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, before: int) -> Tensor:
    """A depthwise convolution in bfloat16, whatever the types of its arguments, with fast gradients on CPUs.

    Args:
        x: [N, C, h, w].
        weight: [C, 1, k, k], k odd.
        bias: [C] or None.
        stride: 1 or 2.
        before: rows and columns of zeros above and left of x; (k − stride + 1) // 2 at least are below and right.
    """
    x, weight = x.to(torch.bfloat16), weight.to(torch.bfloat16)
    return _Depthwise.apply(x, weight, None if bias is None else bias.to(torch.bfloat16), stride, before)


class _Depthwise(torch.autograd.Function):
    """torch 2.13's oneDNN has no fast bfloat16 kernel for two gradients, which are made of those that it has.

    The input's gradient at stride 2 took ten to forty times as long as float32's: it is a convolution of stride 1 of
    the output's gradient with zeros between its cells. The weights' gradient of kernels above 3×3 took three to five
    times as long as float32's, itself slow: it is put together of 3×3 parts.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, before: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.before = stride, before
        size = weight.shape[-1]
        if before < size // 2:  # a row and a column of zeros before the kernel pad unevenly without a copy of x
            weight, before = F.pad(weight, (1, 0, 1, 0)), before + 1
        return F.conv2d(x, weight, bias, stride, before, 1, len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        dx = input_gradient(grad, x, weight, ctx.stride, ctx.before) if ctx.needs_input_grad[0] else None
        dw = weight_gradient(grad, x, weight, ctx.stride, ctx.before) if ctx.needs_input_grad[1] else None
        db = grad.sum((0, 2, 3)) if ctx.needs_input_grad[2] else None
        return dx, dw, db, None, None


def input_gradient(grad: Tensor, x: Tensor, weight: Tensor, stride: int, before: int) -> Tensor:
    """[N, C, h, w]: the convolution of stride 1 of grad, with zeros between its cells, with the turned kernel."""
    half = weight.shape[-1] // 2
    if stride > 1:
        first = half - before  # where grad's first cell lies in x
        cells = grad
        grad = torch.empty_like(x, memory_format=torch.channels_last).zero_()
        grad[:, :, first::stride, first::stride] = cells
    return F.conv2d(grad, weight.flip(2, 3), None, 1, half, 1, len(weight))


def weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, stride: int, before: int) -> Tensor:
    """[C, 1, k, k], each 3×3 part of it as the gradient of a 3×3 kernel that sees x from the part's corner on."""
    size, channels = weight.shape[-1], len(weight)
    corners = range(0, size, 3)
    seen = [(cells - 1) * stride + 3 for cells in grad.shape[-2:]]  # rows and columns that a 3×3 kernel sees
    after = [max(0, corners[-1] + part - before - side) for part, side in zip(seen, x.shape[-2:], strict=True)]
    x = F.pad(x, (before, after[1], before, after[0]))
    gradient = weight.new_empty(channels, 1, 3 * len(corners), 3 * len(corners))
    for i in corners:
        for j in corners:
            part = x[:, :, i : i + seen[0], j : j + seen[1]].contiguous(memory_format=torch.channels_last)
            _, gradient[:, :, i : i + 3, j : j + 3], _ = torch.ops.aten.convolution_backward(
                grad, part, weight[:, :, :3, :3].contiguous(), None, (stride, stride), (0, 0), (1, 1), False, (0, 0),
                channels, (False, True, False),
            )  # fmt: skip
    # With the weight's own strides, which DistributedDataParallel has memory for.
    return torch.empty_like(weight).copy_(gradient[:, :, :size, :size])
