"""Normalization, folding, deformable convolution and checkpointing against their definitions."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from odtk.config import OdtkError
from odtk.model.layers import (
    ConvNorm,
    DeformConv2d,
    FrozenBatchNorm2d,
    apply_conv_norm,
    create_norm,
    fold_batch_norms,
    run_checkpointed,
    sampling_grid,
)


def randomize(module: nn.Module) -> nn.Module:
    """Affine parameters and statistics that are not those of the start."""
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if name.endswith(("running_var", "bn.weight", "norm.weight")):
            nn.init.uniform_(tensor, 0.5, 1.5)
        elif name.endswith(("bias", "running_mean")):
            nn.init.normal_(tensor, std=0.3)
    return module


def frozen_and_batch(channels: int) -> tuple[FrozenBatchNorm2d, nn.BatchNorm2d]:
    batch = nn.BatchNorm2d(channels).eval()
    assert batch.running_mean is not None and batch.running_var is not None
    for tensor in (batch.weight, batch.bias, batch.running_mean, batch.running_var):
        nn.init.uniform_(tensor, 0.5, 1.5)
    frozen = FrozenBatchNorm2d(channels)
    values = {k: v for k, v in batch.state_dict().items() if k != "num_batches_tracked"}
    frozen.load_state_dict(values)
    return frozen, batch


def test_frozen_norm_is_batch_norm_at_inference_with_nothing_to_train() -> None:
    frozen, batch = frozen_and_batch(5)
    x = torch.randn(2, 5, 3, 4)
    torch.testing.assert_close(frozen.train()(x), batch(x))
    assert list(frozen.parameters()) == []


def test_frozen_norm_in_the_kernel_gives_the_same_output_and_gradients() -> None:
    frozen, batch = frozen_and_batch(6)
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, bias=False)
    x = torch.randn(2, 4, 9, 9, requires_grad=True)
    fused, apart = apply_conv_norm(conv, frozen, x), batch(conv(x))
    torch.testing.assert_close(fused, apart)
    weights = torch.randn_like(fused)
    for ours, reference in zip(
        torch.autograd.grad((fused * weights).sum(), [x, conv.weight]),
        torch.autograd.grad((apart * weights).sum(), [x, conv.weight]),
        strict=True,
    ):
        torch.testing.assert_close(ours, reference)


def test_conv_norm_is_a_sequential() -> None:
    frozen, _ = frozen_and_batch(6)
    layers = [nn.Conv2d(3, 6, 1), frozen, nn.ReLU(), nn.Conv2d(6, 2, 3)]
    layers[0] = nn.Conv2d(3, 6, 1, bias=False)
    x = torch.randn(1, 3, 8, 8)
    torch.testing.assert_close(ConvNorm(*layers)(x), nn.Sequential(*layers)(x))
    assert ConvNorm(*layers).state_dict().keys() == nn.Sequential(*layers).state_dict().keys()


@pytest.mark.parametrize(("channels", "groups"), [(64, 32), (2048, 32), (24, 8), (20, 4)])
def test_group_norm_has_32_groups_where_they_divide(channels: int, groups: int) -> None:
    norm = create_norm("group", channels)
    assert isinstance(norm, nn.GroupNorm) and norm.num_groups == groups


def test_an_unknown_norm_is_refused() -> None:
    with pytest.raises(OdtkError, match="layer.*frozen, batch or group"):
        create_norm("layer", 8)


@pytest.mark.parametrize("kind", ["batch", "frozen"])
def test_folding_keeps_the_output_and_removes_the_norms(kind: str) -> None:
    convolutions = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 3, bias=kind == "batch"))
    model = nn.Sequential(convolutions, create_norm(kind, 8), create_norm("group", 8))
    randomize(model).eval()
    x = torch.randn(2, 3, 8, 8)
    before = model(x)
    fold_batch_norms(model)
    assert isinstance(model[1], nn.Identity) and isinstance(model[2], nn.GroupNorm)
    torch.testing.assert_close(model(x), before)


def bilinear(plane: Tensor, y: float, x: float) -> float:
    """Value of [H, W] between its pixels, zero outside (1703.06211 eq. 3 and 4)."""
    height, width = plane.shape
    total = 0.0
    for qy in (math.floor(y), math.floor(y) + 1):
        for qx in (math.floor(x), math.floor(x) + 1):
            if 0 <= qy < height and 0 <= qx < width:
                total += max(0.0, 1 - abs(y - qy)) * max(0.0, 1 - abs(x - qx)) * float(plane[qy, qx])
    return total


def deformable_reference(x: Tensor, weight: Tensor, offsets: Tensor, masks: Tensor, stride: int, groups: int) -> Tensor:
    """1811.11168 eq. 1 by loops: y(p) = Σ_k w_k · x(p + p_k + Δp_k) · Δm_k."""
    n, channels = x.shape[:2]
    out_channels, per_group = weight.shape[:2]
    h, w = offsets.shape[2:]
    out = torch.zeros(n, out_channels, h, w)
    for b in range(n):
        for row in range(h):
            for column in range(w):
                samples = torch.zeros(channels, 9)
                for k in range(9):
                    y = row * stride + k // 3 - 1 + float(offsets[b, 2 * k, row, column])
                    x_ = column * stride + k % 3 - 1 + float(offsets[b, 2 * k + 1, row, column])
                    for c in range(channels):
                        samples[c, k] = bilinear(x[b, c], y, x_) * float(masks[b, k, row, column])
                for o in range(out_channels):
                    first = o // (out_channels // groups) * per_group
                    out[b, o, row, column] = (samples[first : first + per_group] * weight[o].flatten(1)).sum()
    return out


@pytest.mark.parametrize(("modulated", "stride", "groups"), [(False, 1, 1), (True, 1, 2), (True, 2, 1)])
def test_deformable_convolution_equals_direct_sampling(modulated: bool, stride: int, groups: int) -> None:
    layer = DeformConv2d(4, 4, stride, groups, modulated)
    nn.init.normal_(layer.offset.weight, std=0.3)
    assert layer.offset.bias is not None
    nn.init.normal_(layer.offset.bias, std=1.5)  # far enough to leave the map
    x = torch.randn(2, 4, 6, 5)
    with torch.no_grad():
        fields = layer.offset(x)
        masks = fields[:, 18:].sigmoid() if modulated else torch.ones(2, 9, *fields.shape[2:])
        expected = deformable_reference(x, layer.weight, fields[:, :18], masks, stride, groups)
        torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("modulated", "factor"), [(False, 1.0), (True, 0.5)])
def test_deformable_convolution_starts_without_displacement(modulated: bool, factor: float) -> None:
    layer = DeformConv2d(4, 6, 2, 2, modulated)
    x = torch.randn(2, 4, 7, 9)
    plain = F.conv2d(x, layer.weight, stride=2, padding=1, groups=2)
    torch.testing.assert_close(layer(x), factor * plain, atol=1e-5, rtol=1e-5)


def test_offsets_learn() -> None:
    layer = DeformConv2d(2, 2, 1, 1, True)
    layer(torch.randn(1, 2, 6, 6)).square().sum().backward()
    assert layer.offset.weight.grad is not None and layer.offset.weight.grad[:18].abs().sum() > 0
    assert layer.offset.weight.grad[18:].abs().sum() > 0


def test_sampling_grid_without_offsets_looks_at_the_pixels_of_a_convolution() -> None:
    grid = sampling_grid(torch.zeros(1, 18, 2, 3), stride=2, height=4, width=6)
    x = (grid[0, 5, 1, 2, 0] + 1) * 6 / 2 - 0.5  # tap 5 is one right of the center, which is at (4, 2)
    y = (grid[0, 5, 1, 2, 1] + 1) * 4 / 2 - 0.5
    assert (round(float(x), 4), round(float(y), 4)) == (5.0, 2.0)


def test_recomputing_gives_the_same_gradients_and_counts_statistics_once() -> None:
    norm = nn.BatchNorm2d(4)
    block = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU())
    x = torch.randn(2, 3, 6, 6, requires_grad=True)
    results = []
    start = {k: v.clone() for k, v in block.state_dict().items()}
    for run in (lambda: block(x), lambda: run_checkpointed(block, x)):
        block.load_state_dict(start)
        block.zero_grad()
        run().square().sum().backward()
        gradients = [p.grad.clone() for p in block.parameters() if p.grad is not None]
        results.append([*gradients, *(v.clone() for v in block.state_dict().values())])
    assert norm.num_batches_tracked is not None and int(norm.num_batches_tracked) == 1 and norm.momentum == 0.1
    for plain, checkpointed in zip(*results, strict=True):
        assert torch.equal(plain, checkpointed)
