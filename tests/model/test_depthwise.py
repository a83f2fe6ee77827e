"""Depthwise convolutions that CPUs train fast: torch's own values and gradients, and torch's own graph."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from odtk.model import depthwise
from odtk.model.backbones.efficientnet_lite import SamePadConv2d
from odtk.model.depthwise import DepthwiseConv2d, has_slow_gradients, input_gradient, weight_gradient


def padding(size: int, stride: int, same: bool) -> tuple[int, int]:
    """Rows of zeros before and after: TensorFlow's, or half of the kernel on both sides."""
    before = (size - stride) // 2 if same else size // 2
    return before, size - stride - before if same else before


@pytest.mark.parametrize(
    ("size", "stride", "same", "height", "width"),
    [
        (3, 2, False, 12, 16),
        (3, 2, False, 9, 7),
        (3, 2, True, 12, 16),
        (5, 1, False, 6, 8),
        (5, 1, False, 1, 1),
        (5, 1, False, 2, 3),
        (5, 2, False, 12, 10),
        (5, 2, False, 7, 9),
        (5, 2, True, 12, 16),
        (5, 2, True, 2, 2),
        (7, 2, False, 10, 12),
    ],
)
def test_gradients_are_those_of_the_definition(size: int, stride: int, same: bool, height: int, width: int) -> None:
    before, after = padding(size, stride, same)
    x = torch.randn(2, 6, height, width, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 1, size, size, dtype=torch.float64, requires_grad=True)
    y = F.conv2d(F.pad(x, (before, after, before, after)), weight, None, stride, 0, 1, 6)
    grad = torch.randn_like(y)
    dx, dw = torch.autograd.grad(y, (x, weight), grad)
    torch.testing.assert_close(input_gradient(grad, x.detach(), weight.detach(), stride, before), dx)
    torch.testing.assert_close(weight_gradient(grad, x.detach(), weight.detach(), stride, before), dw)


def outputs_and_gradients(conv: nn.Conv2d, x: Tensor, grad: Tensor | None = None) -> list[Tensor]:
    x = x.detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = conv(x)
    grad = torch.ones_like(y) if grad is None else grad
    parameters = [p for p in conv.parameters() if p.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, (x, *parameters), grad.to(y.dtype))]


@pytest.mark.parametrize(
    "conv",
    [DepthwiseConv2d(8, 5), DepthwiseConv2d(8, 3, 2), SamePadConv2d(8, 8, 5, 2, 8), SamePadConv2d(8, 8, 3, 2, 8)],
)
def test_bfloat16_agrees_with_torch_to_its_rounding(conv: nn.Conv2d, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    conv.bias = nn.Parameter(torch.randn(8))
    x = torch.randn(2, 8, 16, 24)
    grad = torch.randn(2, 8, 16 // conv.stride[0], 24 // conv.stride[0])
    assert has_slow_gradients(conv, x.to(torch.bfloat16))
    ours = outputs_and_gradients(conv, x, grad)
    for name in ("odtk.model.depthwise", "odtk.model.backbones.efficientnet_lite"):
        monkeypatch.setattr(f"{name}.has_slow_gradients", lambda conv, x: False)
    for a, b in zip(ours, outputs_and_gradients(conv, x, grad), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.01 * float(b.abs().max()))


def test_gradients_have_the_strides_of_their_weights() -> None:
    """DistributedDataParallel warns of others, and copies them."""
    conv = DepthwiseConv2d(8, 5).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with torch.autocast("cpu", torch.bfloat16):
        conv(torch.randn(2, 8, 9, 9)).sum().backward()
    assert conv.weight.grad is not None and conv.weight.grad.stride() == conv.weight.stride() == (25, 1, 5, 1)


def test_a_frozen_convolution_passes_its_gradient_on() -> None:
    conv = DepthwiseConv2d(4, 5).requires_grad_(False)
    (_, dx) = outputs_and_gradients(conv, torch.randn(1, 4, 8, 8))
    assert dx.abs().max() > 0


def test_only_training_in_bfloat16_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    conv = DepthwiseConv2d(4, 5)
    x = torch.randn(1, 4, 8, 8)
    assert not has_slow_gradients(conv, x)  # float32
    assert not has_slow_gradients(conv, x.to("meta", torch.bfloat16))  # another device
    with torch.autocast("cpu", torch.bfloat16):
        assert has_slow_gradients(conv, x)
        assert not has_slow_gradients(DepthwiseConv2d(4, 3), x)  # which torch trains fast
        with torch.no_grad():
            assert not has_slow_gradients(conv, x)
        assert not has_slow_gradients(conv.eval(), x)
        monkeypatch.setattr(depthwise, "depthwise_bfloat16", None)
        conv(x)  # does not call it


@pytest.mark.parametrize("conv", [DepthwiseConv2d(8, 5), SamePadConv2d(8, 8, 3, 2, 8)])
def test_exported_it_is_one_convolution(conv: nn.Conv2d) -> None:
    program = torch.onnx.export(conv.eval(), (torch.randn(1, 8, 16, 16),), dynamo=True, verbose=False)
    assert program is not None
    assert [node.op_type for node in program.model_proto.graph.node] == ["Conv"]
