"""Anchors against their formulas, written out plainly; layout, prior and scales of the heads."""

import dataclasses
import math

import pytest
import torch

from odtk.config import ROTATED_ANGLES, ModelConfig, OdtkError
from odtk.model.anchors import base_anchors
from odtk.model.heads import DenseHead, FCOSHead, RetinaNetHead, create_head

STRIDES = (8, 16, 32, 64, 128)


def expected_anchor(stride: int, index: int) -> list[float]:
    """Anchor number index = scale·3 + ratio by the formulas of ODTK 0.2."""
    ratio = [1, 2, 0.5][index % 3]
    scale = [4.0, 4 * 2 ** (1 / 3), 4 * 2 ** (2 / 3)][index // 3]
    w = (stride**2 / ratio) ** 0.5
    h = w * ratio
    return [
        0.5 * (stride - w * scale),
        0.5 * (stride - h * scale),
        0.5 * (stride + w * scale),
        0.5 * (stride + h * scale),
    ]


@pytest.mark.parametrize("stride", STRIDES)
def test_anchors_follow_their_formulas(stride: int) -> None:
    anchors = base_anchors(stride, ModelConfig())
    assert anchors.dtype == torch.float32 and anchors.shape == (9, 4)
    expected = [expected_anchor(stride, index) for index in range(9)]
    torch.testing.assert_close(anchors, torch.tensor(expected), atol=1e-4, rtol=0)


def test_first_anchor_by_hand() -> None:
    assert base_anchors(8, ModelConfig())[0].tolist() == [-12, -12, 20, 20]


@pytest.mark.parametrize("stride", STRIDES)
def test_rotated_anchors_repeat_the_upright_ones_angle_outermost(stride: int) -> None:
    anchors = base_anchors(stride, ModelConfig(angles=ROTATED_ANGLES))
    assert anchors.shape == (27, 5)
    for index, row in enumerate(anchors.tolist()):
        expected = [*expected_anchor(stride, index % 9), [-math.pi / 6, 0, math.pi / 6][index // 9]]
        assert row == pytest.approx(expected, abs=1e-4)


def test_rounded_anchors_are_those_of_odtk_0_2() -> None:
    """Stride 8, ratio 2, scale 4: w = round(5.66) = 6, h = round(6·2) = 12; width x2 − x1 + 1 = 6·4 exactly."""
    anchors = base_anchors(8, ModelConfig(angles=ROTATED_ANGLES, rounded_anchors=True))
    assert anchors[1].tolist() == pytest.approx([4 - 12, 4 - 24, 4 + 12 - 1, 4 + 24 - 1, -math.pi / 6])


@pytest.mark.parametrize("head", ["fcos", "dense"])
def test_the_point_of_a_cell_is_its_middle(head: str) -> None:
    config = ModelConfig(head=head)
    anchors = base_anchors(16, config)
    assert config.num_anchors == 1
    x1, y1, x2, y2 = anchors[0].tolist()
    assert anchors.shape == (1, 4)
    assert x1 + 0.5 * (x2 - x1 + 1) == y1 + 0.5 * (y2 - y1 + 1) == 8


@pytest.mark.parametrize(
    ("config", "anchors", "values"),
    [
        (ModelConfig(classes=3), 9, 4),
        (ModelConfig(classes=3, angles=ROTATED_ANGLES), 27, 6),
        (ModelConfig(classes=3, head="fcos"), 1, 5),
        (ModelConfig(classes=3, head="dense"), 1, 4),
    ],
)
def test_channels(config: ModelConfig, anchors: int, values: int) -> None:
    logits, boxes = create_head(config, 2)([torch.randn(2, 256, 4, 6), torch.randn(2, 256, 2, 3)])
    assert [tuple(t.shape) for t in logits] == [(2, anchors * 3, 4, 6), (2, anchors * 3, 2, 3)]
    assert [tuple(t.shape) for t in boxes] == [(2, anchors * values, 4, 6), (2, anchors * values, 2, 3)]


@pytest.mark.parametrize("head", ["retinanet", "fcos", "dense"])
def test_the_widths_and_the_depth_of_a_head_are_settings(head: str) -> None:
    config = ModelConfig(head=head, classes=3, pyramid_channels=24, head_channels=16, head_convs=2)
    module = create_head(config, 1)
    logits, _ = module([torch.randn(2, 24, 4, 6)])
    convs = [m for m in module.cls_head.modules() if isinstance(m, torch.nn.Conv2d)]
    assert [(c.in_channels, c.out_channels) for c in convs] == [(24, 16), (16, 16), (16, logits[0].shape[1])]


@pytest.mark.parametrize("name", ["retinanet", "fcos", "dense"])
def test_every_score_starts_at_the_prior(name: str) -> None:
    head = create_head(ModelConfig(head=name), 1)
    head.initialize()
    logits, _ = head([torch.randn(1, 256, 8, 8)])
    assert float(logits[0].detach().sigmoid().mean()) == pytest.approx(0.01, rel=0.2)


def test_the_towers_pass_the_variance_on_and_the_last_layers_start_small() -> None:
    head = RetinaNetHead(ModelConfig())
    head.initialize()
    x = torch.randn(1, 256, 16, 16)
    for layers, deviation in (head.cls_head, 0.01), (head.box_head, 0.001):
        last = layers[-1]
        assert isinstance(last, torch.nn.Conv2d)
        with torch.no_grad():
            power = float(layers[:-1](x).square().mean())
        assert power == pytest.approx(1.0, rel=0.3)  # 0.0002 with normals of 0.01; zeros at the border cost a little
        assert float(last.weight.detach().std()) == pytest.approx(deviation, rel=0.05)


def test_towers_of_fcos_have_group_norm_of_32_groups() -> None:
    norms = [m for m in FCOSHead(ModelConfig(head="fcos"), 5).modules() if isinstance(m, torch.nn.GroupNorm)]
    assert [norm.num_groups for norm in norms] == [32] * 8


def test_the_scale_of_a_level_multiplies_its_distances_only() -> None:
    head = FCOSHead(ModelConfig(head="fcos"), 2).eval()
    head.initialize()
    x = torch.randn(1, 256, 4, 4)
    with torch.no_grad():
        head.scales.copy_(torch.tensor([1.0, 3.0]))
        _, (plain, scaled) = head([x, x])
    torch.testing.assert_close(scaled[:, :4], 3 * plain[:, :4])
    assert torch.equal(scaled[:, 4], plain[:, 4])


def test_distances_start_positive_so_that_relu_passes_gradients() -> None:
    head = FCOSHead(ModelConfig(head="fcos"), 1)
    head.initialize()
    _, (boxes,) = head([torch.randn(1, 256, 8, 8)])
    assert float(boxes[:, :4].detach().min()) > 0.3
    assert float(boxes[:, 4].detach().abs().max()) < 1


SMALL_DENSE = ModelConfig(head="dense", classes=3, pyramid_channels=16, head_channels=16, head_convs=2)


def trained_dense_head() -> DenseHead:
    """With other statistics at each level."""
    head = DenseHead(SMALL_DENSE, 2)
    head.initialize()
    for module in head.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.running_mean, module.bias):
                torch.nn.init.normal_(tensor, std=0.5)  # type: ignore[arg-type]
            for tensor in (module.running_var, module.weight):
                torch.nn.init.uniform_(tensor, 0.5, 2)  # type: ignore[arg-type]
    return head.eval()


def test_levels_of_the_dense_head_share_convolutions_and_not_norms() -> None:
    head = trained_dense_head()
    sizes = [tuple(p.shape) for p in head.cls_head.parameters() if p.dim() == 4]
    assert sizes == [(16, 16, 3, 3), (16, 16, 3, 3), (3, 16, 3, 3)]
    x = torch.randn(1, 16, 4, 6)
    with torch.no_grad():
        (first, second), _ = head([x, x])
        head.cls_head.norms[1].load_state_dict(head.cls_head.norms[0].state_dict())
        (_, same), _ = head([x, x])
    assert not torch.allclose(first, second, atol=0.1) and torch.equal(first, same)


def test_folding_the_dense_head_leaves_no_norm_and_the_same_numbers() -> None:
    head = trained_dense_head()
    features = [torch.randn(1, 16, 8, 8), torch.randn(1, 16, 4, 4)]
    with torch.no_grad():
        before = head(features)
        for tower in (head.cls_head, head.box_head):
            tower.fold()
        after = head(features)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in head.modules())
    for a, b in zip(before[0] + before[1], after[0] + after[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_one_cell_of_one_image_trains_with_the_running_statistics() -> None:
    head = trained_dense_head()
    x = torch.randn(1, 16, 1, 1)
    with torch.no_grad():
        expected = head([x, x])
        found = head.train()([x, x])
    for a, b in zip(expected[0] + expected[1], found[0] + found[1], strict=True):
        torch.testing.assert_close(a, b)


def test_distances_of_the_dense_head_start_at_four_strides() -> None:
    head = DenseHead(SMALL_DENSE, 1)
    head.initialize()
    _, (boxes,) = head([torch.randn(1, 16, 8, 8)])
    assert float(boxes.detach().mean()) == pytest.approx(4, abs=0.1) and float(boxes.detach().min()) > 3


def test_rotated_boxes_of_the_dense_head_start_upright_and_eight_strides_large() -> None:
    head = create_head(dataclasses.replace(SMALL_DENSE, angles=(0.0,)), 1)
    head.initialize()
    _, (boxes,) = head([torch.randn(1, 16, 8, 8)])
    assert boxes.shape == (1, 6, 8, 8)
    torch.testing.assert_close(boxes.detach().mean((0, 2, 3)), torch.tensor([0.0, 0, 8, 8, 0, 1]), rtol=0, atol=0.1)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (ModelConfig(head="yolo"), "yolo"),
        (ModelConfig(head="fcos", angles=ROTATED_ANGLES), "fcos.*rotated"),
    ],
)
def test_impossible_heads_are_refused(config: ModelConfig, words: str) -> None:
    with pytest.raises(OdtkError, match=words):
        create_head(config, 5)
