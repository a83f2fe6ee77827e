"""The composition: several backbones, folding, partial weights, what is refused, export."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from odtk.config import ROTATED_ANGLES, ModelConfig, OdtkError
from odtk.model.detector import Detector
from odtk.model.weights import initialize_weights, load_matching

SMALL = ModelConfig(backbones=("ResNet18FPN",), classes=2)


def detector(**changes: object) -> Detector:
    """A small detector whose norms are not at their start, in eval mode."""
    model = Detector(replace(SMALL, **changes))  # type: ignore[arg-type]
    model.initialize()
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            nn.init.uniform_(tensor, 0.8, 1.2)
        elif name.endswith("running_mean"):
            nn.init.normal_(tensor, std=0.1)
    return model.eval()


def outputs(model: Detector, images: torch.Tensor) -> list[torch.Tensor]:
    with torch.no_grad():
        logits, boxes = model(images)
    return [*logits, *boxes]


def test_levels_of_several_backbones_follow_each_other() -> None:
    model = detector(backbones=("ResNet18FPN", "ResNet34C4"))
    assert model.strides == (8, 16, 32, 64, 128, 16) and model.stride == 32
    logits, boxes = model(torch.randn(1, 3, 64, 96))
    assert [tuple(t.shape[1:]) for t in logits] == [
        (18, 8, 12),
        (18, 4, 6),
        (18, 2, 3),
        (18, 1, 2),
        (18, 1, 1),
        (18, 4, 6),
    ]
    assert [t.shape[1] for t in boxes] == [36] * 6
    assert [len(a) for a in model.anchors()] == [9] * 6
    sum(t.sum() for t in [*logits, *boxes]).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_the_names_that_odtk_0_2_used() -> None:
    names = set(detector().state_dict())
    for name in ("features.conv1.weight", "lateral3.weight", "pyramid6.bias", "smooth5.weight"):
        assert f"backbones.ResNet18FPN.{name}" in names
    for index in (0, 2, 4, 6, 8):
        assert {f"head.cls_head.{index}.weight", f"head.box_head.{index}.bias"} <= names


@pytest.mark.parametrize(
    "changes",
    [
        {"backbones": ("ResNet18C4",), "deep_stem": True, "avg_down": True, "dcn": (3, 4)},
        {"backbones": ("RepVGGA0FPN",)},
        {"backbones": ("ResNet18FPN",), "norm": "frozen"},
        {"backbones": ("ResNet18FPN",), "norm": "group"},
        {"backbones": ("MobileNetV2FPN",), "head": "fcos"},
        {"backbones": ("RepVGGB0FPN",), "norm": "frozen"},
        {"backbones": ("GhostNetFPN",)},
    ],
    ids=str,
)
def test_folding_keeps_the_outputs(changes: dict) -> None:
    model = detector(**changes)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    folded = model.train().fold()
    images = torch.randn(2, 3, 64, 64)
    for ours, reference in zip(outputs(folded, images), outputs(model.eval(), images), strict=True):
        torch.testing.assert_close(ours, reference, atol=1e-4, rtol=1e-4)
    assert not folded.training
    norms = [m for m in folded.backbones.modules() if "BatchNorm" in type(m).__name__]
    assert norms == []
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_folded_repvgg_has_only_plain_3x3_convolutions() -> None:
    features = detector(backbones=("RepVGGA0FPN",)).fold().feature_extractors()["RepVGGA0FPN"]
    convolutions = [m for m in features.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 22 and {c.kernel_size for c in convolutions} == {(3, 3)}


def test_channels_last_goes_through() -> None:
    model = detector(norm="frozen")
    images = torch.randn(2, 3, 64, 64)
    reference = outputs(model, images)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    ours = outputs(model, images.to(memory_format=torch.channels_last))
    for a, b in zip(ours, reference, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
        assert a.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("changes", [{"norm": "frozen", "dcn": (5,)}, {"head": "fcos"}], ids=str)
def test_bf16_autocast_trains(changes: dict) -> None:
    model = detector(**changes).train()
    with torch.autocast("cpu", torch.bfloat16):
        logits, boxes = model(torch.randn(2, 3, 64, 64))
    assert {t.dtype for t in [*logits, *boxes]} == {torch.bfloat16}
    sum(t.float().sum() for t in [*logits, *boxes]).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_two_runs_from_one_seed_start_alike() -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        model = Detector(SMALL)
        model.initialize()
        states.append(model.state_dict())
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_initialize_leaves_nothing_as_it_was() -> None:
    model = Detector(replace(SMALL, head="fcos", dcn=(5,)))
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.fill_(7.0)
    model.initialize()
    statistics = ("running_mean", "running_var")  # of the data, not ours to draw
    left = [k for k, v in model.state_dict().items() if v.is_floating_point() and (v == 7).all()]
    assert [k for k in left if not k.endswith(statistics)] == []


def test_matching_tensors_are_loaded_and_the_rest_is_named() -> None:
    source, target = detector(), Detector(replace(SMALL, classes=5))
    kept = target.state_dict()["head.cls_head.8.weight"].clone()
    loaded, unmatched = load_matching(target, source.state_dict())
    assert unmatched == ["head.cls_head.8.weight", "head.cls_head.8.bias"]
    assert torch.equal(target.state_dict()["head.cls_head.8.weight"], kept)
    assert all(torch.equal(target.state_dict()[name], source.state_dict()[name]) for name in loaded)
    everything = {n for n in target.state_dict() if not n.endswith("num_batches_tracked")}
    assert {*loaded, *unmatched} == everything


@pytest.mark.parametrize("norm", ["frozen", "batch"])
def test_a_file_of_torchvision_fits_a_feature_extractor(norm: str) -> None:
    """The classifier in it matches nothing, and a frozen norm takes its statistics too."""
    source = detector().feature_extractors()["ResNet18FPN"].state_dict()
    features = Detector(replace(SMALL, norm=norm)).feature_extractors()["ResNet18FPN"]
    loaded, unmatched = load_matching(
        features, {**source, "fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}
    )
    assert unmatched == [] and "bn1.running_var" in loaded
    assert torch.equal(features.state_dict()["bn1.running_var"], source["bn1.running_var"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"backbones": ("ResNet19FPN",)}, "ResNet19FPN.*ResNet18FPN"),
        ({"backbones": ()}, "one or more"),
        ({"backbones": ("ResNet18FPN", "ResNet18FPN")}, "only once"),
        ({"classes": 0}, "at least one class"),
        ({"dcn": (1,)}, "2 to 5"),
        ({"freeze_at": 6}, "freeze-at"),
        ({"norm": "layer"}, "layer"),
        ({"head": "yolo"}, "yolo"),
        ({"padding": "white"}, "padding 'white'.*mean or black"),
        ({"std": (0.2, 0.0, 0.2)}, "std.*positive"),
        ({"backbones": ("ResNet18C4",), "pyramid_channels": 96}, "ResNet18C4 has levels of 256.*pyramid-channels 256"),
        ({"resnet_width": 0.1}, "resnet-width takes a factor from 0.25"),
        ({"backbones": ("GhostNetFPN",), "resnet_width": 0.5}, "resnet-width.*GhostNetFPN"),
        ({"backbones": ("ResNet18C4",), "resnet_width": 0.5}, "ResNet18C4 has levels of 128.*pyramid-channels 128"),
        ({"backbones": ("GhostNetFPN",), "dcn": (4,)}, "dcn.*GhostNetFPN"),
    ],
    ids=str,
)
def test_what_cannot_be_built_is_refused_in_words(changes: dict, words: str) -> None:
    with pytest.raises(OdtkError, match=words):
        Detector(replace(SMALL, **changes))


DENSE = {"head": "dense", "last_level": 5, "pyramid_channels": 32, "head_channels": 24, "head_convs": 2}


def test_nothing_in_a_folded_dense_detector_takes_statistics_over_the_map() -> None:
    """What lies beyond the image, padding for one, cannot change what is found far from it."""
    model = detector(**DENSE)
    folded = model.fold()
    kinds = {type(module) for module in folded.modules() if not list(module.children())}
    assert kinds <= {nn.Conv2d, nn.ReLU, nn.MaxPool2d, nn.Identity}, kinds
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(outputs(folded, images), outputs(model, images), atol=1e-3, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"angles": ROTATED_ANGLES},
        {"head": "fcos"},
        DENSE,
        {"dcn": (4, 5), "deep_stem": True, "avg_down": True, "head_convs": 1},
        {"dcn": (5,), "dcn_modulated": False, "norm": "group", "head_convs": 1},
        {"backbones": ("RepVGGA0FPN",), "head_convs": 1},
        {"backbones": ("GhostNetFPN",), "head_convs": 1},
        {"backbones": ("MobileNetV2FPN", "ResNet18C4"), "head_convs": 1},
    ],
    ids=str,
)
def test_onnx_runtime_gives_the_same_levels_for_any_batch(changes: dict, tmp_path: Path) -> None:
    ort = pytest.importorskip("onnxruntime")
    model = detector(**changes).fold()
    path = tmp_path / "levels.onnx"
    torch.onnx.export(
        model,
        (torch.randn(2, 3, 64, 96),),
        path,
        dynamo=True,
        opset_version=18,
        verbose=False,
        input_names=["images"],
        dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=16)},),
    )
    session = ort.InferenceSession(path)
    for batch in (1, 3):
        images = torch.randn(batch, 3, 64, 96)
        for ours, reference in zip(session.run(None, {"images": images.numpy()}), outputs(model, images), strict=True):
            torch.testing.assert_close(torch.from_numpy(ours), reference, atol=1e-4, rtol=1e-4)


def test_frozen_norms_are_never_left_without_statistics(tmp_path: Path) -> None:
    frozen = Detector(replace(SMALL, norm="frozen"))
    (features,) = frozen.feature_extractors().values()
    weights = {name: value for name, value in features.state_dict().items() if "running" not in name}
    torch.save(weights, tmp_path / "w.pth")
    with pytest.raises(OdtkError, match=r"has no statistics for \d+ norms of .*--norm frozen would keep at 0 and 1"):
        initialize_weights(frozen, fine_tune=None, backbone_weights=str(tmp_path / "w.pth"))
    initialize_weights(Detector(replace(SMALL, norm="group")), fine_tune=None, backbone_weights=str(tmp_path / "w.pth"))


def test_a_narrow_resnet_has_no_weights_of_imagenet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("odtk.model.weights.imagenet_weights", lambda name: pytest.fail("it looks for some"))
    narrow = Detector(replace(SMALL, resnet_width=0.5))
    with pytest.raises(OdtkError, match=r"FPN of --resnet-width 0\.5: pass --backbone-weights none"):
        initialize_weights(narrow, fine_tune=None, backbone_weights=None)
    initialize_weights(narrow, fine_tune=None, backbone_weights="none")
