"""Every backbone: shapes, gradients, parameter names, published sizes, and the options of the ResNets."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from odtk.config import ModelConfig, OdtkError
from odtk.model.backbones.catalog import BACKBONES, FEATURE_EXTRACTORS
from odtk.model.backbones.repvgg import RepVGGBlock
from odtk.model.backbones.resnet import RESNET_DESIGNS, Block, ResNet, stage_table
from odtk.model.detector import Detector
from odtk.model.layers import DeformConv2d, FrozenBatchNorm2d
from odtk.model.weights import TORCHVISION_URLS

QUICK = ("ResNet18FPN", "ResNet18C4", "MobileNetV2FPN", "RepVGGA0FPN", "GhostNetFPN")
NAMES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in BACKBONES]
slow = pytest.mark.slow
OTHERS = ("MobileNetV2", "RepVGGA0", "GhostNet")
NORM_SUFFIXES = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


@pytest.mark.parametrize("name", NAMES)
def test_levels_and_gradients(name: str) -> None:
    backbone = BACKBONES[name](ModelConfig())
    backbone.initialize()
    levels = backbone(torch.randn(2, 3, 64, 96))
    assert [tuple(level.shape) for level in levels] == [
        (2, channels, -(-64 // stride), -(-96 // stride))
        for channels, stride in zip(backbone.channels, backbone.strides, strict=True)
    ]
    assert set(backbone.channels) == {256} and backbone.stride == min(32, max(backbone.strides))
    sum(level.square().sum() for level in levels).backward()
    assert [n for n, p in backbone.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@pytest.mark.parametrize("norm", ["frozen", "group"])
@pytest.mark.parametrize("name", ["ResNet18", *(pytest.param(n, marks=slow) for n in ("ResNet50", *OTHERS[::2]))])
def test_other_norms(name: str, norm: str) -> None:
    network = FEATURE_EXTRACTORS[name](ModelConfig(norm=norm))
    network.initialize()
    maps = network(torch.randn(1, 3, 64, 64))
    sum(x.square().sum() for x in maps).backward()
    assert all(x.isfinite().all() for x in maps)
    assert all(p.grad is not None for p in network.parameters())
    norms = {type(m) for m in network.modules() if "Norm2d" in type(m).__name__ or isinstance(m, nn.GroupNorm)}
    assert norms == {FrozenBatchNorm2d if norm == "frozen" else nn.GroupNorm}


def resnet_names(depths: tuple[int, ...], bottleneck: bool) -> set[str]:
    """The names in torchvision's file, without fc."""
    names = {"conv1.weight", *(f"bn1.{s}" for s in NORM_SUFFIXES)}
    for layer, depth in enumerate(depths, start=1):
        for block in range(depth):
            prefix = f"layer{layer}.{block}"
            for k in range(1, 4 if bottleneck else 3):
                names |= {f"{prefix}.conv{k}.weight", *(f"{prefix}.bn{k}.{s}" for s in NORM_SUFFIXES)}
            if block == 0 and (layer > 1 or bottleneck):
                names |= {f"{prefix}.downsample.0.weight", *(f"{prefix}.downsample.1.{s}" for s in NORM_SUFFIXES)}
    return names


@pytest.mark.parametrize("name", RESNET_DESIGNS)
@pytest.mark.parametrize("avg_down", [False, True])
def test_resnets_have_the_names_of_torchvision(name: str, avg_down: bool) -> None:
    with torch.device("meta"):
        network = FEATURE_EXTRACTORS[name](ModelConfig(avg_down=avg_down))
    assert network.state_dict().keys() == resnet_names(RESNET_DESIGNS[name].depths, RESNET_DESIGNS[name].bottleneck)


def test_mobilenet_has_the_names_of_torchvision() -> None:
    def norm(prefix: str) -> set[str]:
        return {f"{prefix}.{s}" for s in NORM_SUFFIXES}

    names = {"features.0.0.weight", *norm("features.0.1")}
    for block in range(1, 18):
        prefix = f"features.{block}.conv"
        units = 1 if block == 1 else 2  # the first block does not expand
        for unit in range(units):
            names |= {f"{prefix}.{unit}.0.weight", *norm(f"{prefix}.{unit}.1")}
        names |= {f"{prefix}.{units}.weight", *norm(f"{prefix}.{units + 1}")}
    with torch.device("meta"):
        assert FEATURE_EXTRACTORS["MobileNetV2"](ModelConfig()).state_dict().keys() == names


@pytest.mark.parametrize(
    ("name", "key", "shape"),
    [
        ("ResNet50", "layer2.0.conv2.weight", (128, 128, 3, 3)),
        ("ResNeXt50_32x4d", "layer2.0.conv2.weight", (256, 8, 3, 3)),
        ("ResNeXt101_32x8d", "layer4.0.conv1.weight", (2048, 1024, 1, 1)),
        ("RepVGGA0", "stage1.0.rbr_dense.conv.weight", (48, 48, 3, 3)),
        ("RepVGGA1", "stage4.0.rbr_1x1.bn.weight", (1280,)),
        ("GhostNet", "blocks.3.0.se.conv_reduce.weight", (20, 72, 1, 1)),
        ("GhostNet", "blocks.6.0.ghost1.cheap_operation.0.weight", (100, 1, 3, 3)),
        ("GhostNet", "blocks.7.0.shortcut.2.weight", (160, 112, 1, 1)),
    ],
)
def test_shapes_of_published_weights(name: str, key: str, shape: tuple[int, ...]) -> None:
    with torch.device("meta"):
        assert FEATURE_EXTRACTORS[name](ModelConfig()).state_dict()[key].shape == shape


def test_weights_are_published_for_feature_extractors_only() -> None:
    assert set(FEATURE_EXTRACTORS) >= set(TORCHVISION_URLS)
    assert all(url.startswith("https://download.pytorch.org/models/") for url in TORCHVISION_URLS.values())


def test_c4_has_no_last_stage_and_its_map_is_that_of_the_whole_network() -> None:
    config = ModelConfig()
    c4, whole = BACKBONES["ResNet18C4"](config).eval(), FEATURE_EXTRACTORS["ResNet18"](config).eval()
    whole.load_state_dict(c4.state_dict(), strict=False)
    assert not any(key.startswith("layer4") for key in c4.state_dict())
    images = torch.randn(1, 3, 64, 64)
    (map_,) = c4(images)
    assert torch.equal(map_, whole(images)[1])


def resnet(name: str = "ResNet50", **options: object) -> ResNet:
    network = ResNet(RESNET_DESIGNS[name], replace(ModelConfig(), **options))  # type: ignore[arg-type]
    network.initialize()
    return network


def blocks_of(network: ResNet, layer: int) -> list[Block]:
    return [block for block in network.get_submodule(f"layer{layer}").children() if isinstance(block, Block)]


@pytest.mark.parametrize(
    ("name", "caffe_stride", "strides"),
    [("ResNet50", False, (1, 2)), ("ResNet50", True, (2, 1)), ("ResNet18", False, (2, 1)), ("ResNet18", True, (2, 1))],
)
def test_where_the_stride_is(name: str, caffe_stride: bool, strides: tuple[int, int]) -> None:
    network = resnet(name, caffe_stride=caffe_stride)
    for layer in (2, 3, 4):
        first, second = blocks_of(network, layer)[:2]
        assert (first.conv1.stride[0], first.conv2.stride[0]) == strides
        assert second.conv1.stride[0] == second.conv2.stride[0] == 1
    first = blocks_of(network, 1)[0]
    assert first.conv1.stride[0] == first.conv2.stride[0] == 1


@pytest.mark.parametrize(
    ("name", "width", "channels"),
    [
        ("ResNet18", 0.5, (64, 128, 256)),
        ("ResNet18", 0.75, (96, 192, 384)),
        ("ResNet50", 0.5, (256, 512, 1024)),
        ("ResNeXt50_32x4d", 0.5, (256, 512, 1024)),
    ],
)
@pytest.mark.parametrize("deep_stem", [False, True])
def test_the_width_scales_every_stage(name: str, width: float, channels: tuple[int, ...], deep_stem: bool) -> None:
    config = ModelConfig(resnet_width=width, deep_stem=deep_stem)
    features = FEATURE_EXTRACTORS[name](config).eval()
    with torch.no_grad():
        maps = features(torch.randn(1, 3, 32, 64))
    assert features.channels == channels == tuple(m.shape[1] for m in maps)
    assert isinstance(features.bn1, nn.BatchNorm2d) and features.bn1.num_features == 64 * width
    whole = FEATURE_EXTRACTORS[name](replace(config, resnet_width=1.0))
    ratio = sum(p.numel() for p in features.parameters()) / sum(p.numel() for p in whole.parameters())
    assert ratio == pytest.approx(width**2, rel=0.08)


def test_resnet_d_has_three_small_convolutions_and_no_strided_shortcut() -> None:
    network = resnet("ResNet50", deep_stem=True, avg_down=True)
    stem = [m for m in network.conv1.children() if isinstance(m, nn.Conv2d)]
    assert [(c.in_channels, c.out_channels, c.kernel_size[0], c.stride[0]) for c in stem] == [
        (3, 32, 3, 2),
        (32, 32, 3, 1),
        (32, 64, 3, 1),
    ]
    shortcuts = [b for b in network.modules() if isinstance(b, Block) and not isinstance(b.downsample, nn.Identity)]
    assert [isinstance(b.pool, nn.AvgPool2d) for b in shortcuts] == [False, True, True, True]
    assert all(b.downsample[0].stride == (1, 1) for b in shortcuts)  # type: ignore[index]
    maps = network(torch.randn(1, 3, 64, 64))
    assert [tuple(m.shape[1:]) for m in maps] == [(512, 8, 8), (1024, 4, 4), (2048, 2, 2)]


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_zero_init_makes_every_block_its_shortcut(norm: str) -> None:
    block = blocks_of(resnet("ResNet18", zero_init=True, norm=norm), 1)[1]
    x = torch.rand(2, 64, 8, 8)
    assert torch.equal(block(x), x)


def test_zero_init_leaves_frozen_norms_alone() -> None:
    """Training could never change their zeros."""
    block = blocks_of(resnet("ResNet18", zero_init=True, norm="frozen"), 1)[1]
    x = torch.rand(2, 64, 8, 8)
    assert not torch.equal(block(x), x)


@pytest.mark.parametrize(("modulated", "fields"), [(False, 18), (True, 27)])
def test_deformable_stages(modulated: bool, fields: int) -> None:
    network = resnet("ResNet18", dcn=(4, 5), dcn_modulated=modulated)
    deformable = {name for name, m in network.named_modules() if isinstance(m, DeformConv2d)}
    assert deformable == {f"layer{i}.{j}.conv2" for i in (3, 4) for j in (0, 1)}
    conv = blocks_of(network, 3)[0].conv2
    assert isinstance(conv, DeformConv2d) and conv.offset.out_channels == fields
    sum(m.square().sum() for m in network(torch.randn(2, 3, 64, 64))).backward()
    assert conv.offset.weight.grad is not None and float(conv.offset.weight.grad.abs().sum()) > 0


def test_deformable_start_equals_the_plain_network() -> None:
    plain, deformable = resnet("ResNet18").eval(), resnet("ResNet18", dcn=(3, 4, 5), dcn_modulated=False).eval()
    deformable.load_state_dict(plain.state_dict(), strict=False)
    images = torch.randn(1, 3, 64, 64)
    for ours, reference in zip(deformable(images), plain(images), strict=True):
        torch.testing.assert_close(ours, reference, atol=1e-4, rtol=1e-4)


def test_stage_table_of_resnext() -> None:
    table = stage_table(RESNET_DESIGNS["ResNeXt50_32x4d"], ModelConfig(dcn=(5,)))
    assert [(s.blocks, s.width, s.channels, s.stride, s.groups, s.deformable) for s in table] == [
        (3, 128, 256, 1, 32, None),
        (4, 256, 512, 2, 32, None),
        (6, 512, 1024, 2, 32, None),
        (3, 1024, 2048, 2, 32, True),
    ]


@pytest.mark.parametrize("name", ["ResNet18FPN", *(pytest.param(n, marks=slow) for n in QUICK[2:])])
def test_freezing_stops_gradients_and_statistics_of_the_first_stages(name: str) -> None:
    detector = Detector(ModelConfig(backbones=(name,), classes=1, freeze_at=2))
    detector.initialize()
    detector.train()
    network = detector.feature_extractors()[name]
    frozen = {id(p) for stage in network.stages()[:2] for module in stage for p in module.parameters()}
    assert 0 < len(frozen) < len(list(network.parameters()))
    before = {k: v.clone() for k, v in network.state_dict().items()}
    sum(level.sum() for level in detector(torch.randn(2, 3, 64, 64))[0]).backward()
    assert all((p.grad is None) == (id(p) in frozen) for p in network.parameters())
    changed = {k for k, v in network.state_dict().items() if not torch.equal(v, before[k])}
    norms = {n: m for n, m in network.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert changed == {f"{n}.{s}" for n, m in norms.items() for s in NORM_SUFFIXES[2:] if id(m.weight) not in frozen}


def test_norm_eval_keeps_statistics_and_trains_the_affine_parameters() -> None:
    detector = Detector(ModelConfig(backbones=("ResNet18FPN",), classes=1, norm_eval=True))
    detector.initialize()
    detector.train()
    norm = detector.feature_extractors()["ResNet18FPN"].get_submodule("bn1")
    assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None
    sum(level.sum() for level in detector(torch.randn(2, 3, 64, 64))[0]).backward()
    assert float(norm.running_mean.abs().sum()) == 0 and norm.weight.grad is not None


@pytest.mark.parametrize("name", ["ResNet18", *(pytest.param(n, marks=slow) for n in OTHERS)])
def test_checkpointed_gradients_and_statistics_are_equal(name: str) -> None:
    plain, checkpointed = (FEATURE_EXTRACTORS[name](ModelConfig(grad_checkpoint=flag)) for flag in (False, True))
    plain.initialize()
    checkpointed.load_state_dict(plain.state_dict())
    images = torch.randn(2, 3, 64, 64)
    for network in (plain, checkpointed):
        sum(x.square().sum() for x in network(images)).backward()
    for (key, ours), reference in zip(checkpointed.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, reference.grad, msg=key)
    for key, reference in plain.state_dict().items():
        torch.testing.assert_close(checkpointed.state_dict()[key], reference, msg=key)


@pytest.mark.parametrize(("channels_in", "channels", "stride"), [(8, 8, 1), (8, 16, 1), (8, 8, 2)])
def test_a_folded_block_is_one_convolution_with_the_same_output(channels_in: int, channels: int, stride: int) -> None:
    block = RepVGGBlock(channels_in, channels, stride, "batch").eval()
    for norm in block.norms:
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            nn.init.uniform_(tensor, 0.5, 1.5)  # type: ignore[arg-type]
    x = torch.randn(2, channels_in, 8, 8)
    with torch.no_grad():
        before = block(x)
        block.fold()
        torch.testing.assert_close(block(x), before, atol=1e-4, rtol=1e-5)
    assert [type(m) for m in block.modules()] == [RepVGGBlock, nn.Conv2d]


def test_repvgg_refuses_group_norm() -> None:
    with pytest.raises(OdtkError, match="RepVGG"):
        BACKBONES["RepVGGA0FPN"](ModelConfig(norm="group"))


@pytest.mark.parametrize("name", BACKBONES)
def test_no_strided_pointwise_convolution_has_few_channels(name: str) -> None:
    """Its weight gradient writes past its buffer, channels-last on the CPU (uxlfoundation/oneDNN 6035)."""
    with torch.device("meta"):
        backbone = BACKBONES[name](ModelConfig())
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.stride != (1, 1):
            assert module.in_channels >= 16


def test_a_strided_pointwise_branch_is_that_convolution() -> None:
    branch = RepVGGBlock(3, 8, 2, "batch").eval().rbr_1x1
    x = torch.randn(2, 3, 7, 8)
    expected = branch.bn(torch.nn.functional.conv2d(x, branch.conv.weight, stride=2))
    torch.testing.assert_close(branch(x), expected)
