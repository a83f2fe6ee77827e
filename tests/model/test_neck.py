"""The pyramid against its definition, level by level."""

import pytest
import torch
import torch.nn.functional as F

from odtk.config import ModelConfig
from odtk.model.backbones.catalog import FEATURE_EXTRACTORS
from odtk.model.neck import FPN, downsample


def test_levels_follow_the_paper() -> None:
    fpn = FPN(FEATURE_EXTRACTORS["ResNet18"](ModelConfig())).eval()
    fpn.initialize()
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        c3, c4, c5 = fpn.features(images)
        p3, p4, p5, p6, p7 = fpn(images)
        top = fpn.lateral5(c5)
        middle = fpn.lateral4(c4) + top.repeat_interleave(2, 2).repeat_interleave(2, 3)
        bottom = fpn.lateral3(c3) + middle.repeat_interleave(2, 2).repeat_interleave(2, 3)
        torch.testing.assert_close(p5, fpn.smooth5(top))
        torch.testing.assert_close(p4, fpn.smooth4(middle))
        torch.testing.assert_close(p3, fpn.smooth3(bottom))
        assert fpn.pyramid6 is not None and fpn.pyramid7 is not None
        torch.testing.assert_close(p6, fpn.pyramid6(c5))
        torch.testing.assert_close(p7, fpn.pyramid7(F.relu(p6)))
    for level, stride in zip((p3, p4, p5, p6, p7), fpn.strides, strict=True):
        assert level.shape == (1, 256, -(-64 // stride), -(-96 // stride))


def test_starts_from_xavier_without_bias() -> None:
    fpn = FPN(FEATURE_EXTRACTORS["ResNet18"](ModelConfig()))
    fpn.initialize()
    bound = (6 / (2 * 256 * 9)) ** 0.5  # Glorot & Bengio 2010 eq. 16
    assert 0.99 * bound < float(fpn.smooth3.weight.detach().abs().max()) <= bound
    biases = {f"{name}.bias" for name, _ in fpn.named_children() if name != "features"}
    assert len(biases) == 8
    assert all(float(p.detach().abs().max()) == 0 for n, p in fpn.named_parameters() if n in biases)


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (4, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_the_smallest_maps_are_right(size: tuple[int, int], dtype: torch.dtype) -> None:
    """oneDNN's bfloat16 weight gradient of a strided convolution of a 1×1 map was uninitialized memory."""
    conv = torch.nn.Conv2d(16, 16, 3, stride=2, padding=1)
    x = torch.randn(2, 16, *size)
    windows = F.unfold(x, 3, stride=2, padding=1).sum((0, 2)).view(16, 3, 3)  # [C·9, cells] → gradient of the sum
    for _ in range(4):
        conv.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            downsample(conv, x).float().sum().backward()
        assert conv.weight.grad is not None
        torch.testing.assert_close(conv.weight.grad, windows.expand(16, 16, 3, 3), atol=0.05, rtol=0.02)


@pytest.mark.parametrize("last", [5, 6, 7])
def test_the_last_level_and_the_width_are_settings(last: int) -> None:
    fpn = FPN(FEATURE_EXTRACTORS["ResNet18"](ModelConfig()), last, 24).eval()
    fpn.initialize()
    with torch.no_grad():
        levels = fpn(torch.randn(1, 3, 64, 96))
    assert fpn.strides == (8, 16, 32, 64, 128)[: last - 2] and fpn.channels == (24,) * len(levels)
    assert [tuple(level.shape[1:]) for level in levels] == [(24, -(-64 // s), -(-96 // s)) for s in fpn.strides]
