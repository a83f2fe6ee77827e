"""Every detector from the command line: `odtk train`, `export` to ONNX, `infer` with both files, equal detections."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from odtk.cli import main
from odtk.config import ModelConfig
from odtk.data.synthetic import synthesize
from odtk.exporting.graph import serialize, trace
from odtk.exporting.precision import to_fp16
from odtk.model import checkpoint
from odtk.model.detector import Detector
from odtk.model.layers import DeformConv2d
from tests.exporting.test_precision import compile_for

SIZE = (64, 96)
SCORES, PIXELS = 1e-4, 0.1  # how far apart two fp32 runs may be
NEAR_TIES = 0.01  # share of the detections that so small a difference may move across a threshold

QUICK = ("ResNet18C4",)
WHOLE = ("ResNet18C4", "ResNet18FPN")
# Of the other backbones, the head's towers have one convolution: tracing them takes most of the time.
# Deeper and wider members of a family have the layers of these (tests/model/test_backbones.py runs them all).
BACKBONES = (
    *("ResNet18C4", "ResNet18FPN", "ResNeXt50_32x4dFPN", "RepVGGA0FPN", "EfficientNetLite0FPN"),
    *("MobileNetV2FPN", "GhostNetFPN"),
)
CASES = {name: ["--backbone", name, *([] if name in WHOLE else ["--head-convs", "1"])] for name in BACKBONES} | {
    "fcos": ["--backbone", "ResNet18FPN", "--head", "fcos"],
    "dense": ["--backbone", "ResNet18FPN", "--head", "dense"],
    "dense, C4": ["--backbone", "ResNet18C4", "--head", "dense", "--head-channels", "32"],
    "narrow": ["--backbone", "ResNet18FPN", "--last-level", "6", "--pyramid-channels", "64", "--head-convs", "1"],
    "fcos C4": ["--backbone", "ResNet18C4", "--head", "fcos"],
    "rotated": ["--backbone", "ResNet18C4", "--rotated-bbox"],
    "dense, rotated": ["--backbone", "ResNet18C4", "--head", "dense", "--head-channels", "32", "--rotated-bbox"],
    "two backbones": ["--backbone", "ResNet18C4", "RepVGGA0FPN"],
    "DCN v2": ["--backbone", "ResNet18C4", "--dcn", "3", "4"],
    "DCN v1": ["--backbone", "ResNet18C4", "--dcn", "4", "--dcn-v1"],
    "ResNet-D, group": ["--backbone", "ResNet18C4", "--norm", "group", "--resnet", "deep-stem", "avg-down"],
    "ResNet50, caffe": [
        *("--backbone", "ResNet50FPN", "--head-convs", "1"),
        *("--resnet", "caffe-stride", "zero-init", "--freeze-at", "2"),
    ],
}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders upright/ and rotated/ of ten images each, eight of them to train on."""
    folder = tmp_path_factory.mktemp("drawn")
    for name in ("upright", "rotated"):
        synthesize(folder / name, images=10, size=SIZE, classes=2, rotated=name == "rotated")
    return folder


def odtk(*argv: object) -> None:
    assert main([str(a) for a in argv]) == 0


@torch.no_grad()
def spread_predictions(path: Path) -> None:
    """Scales up the last layers and moves the taps of deformable convolutions, so that detections differ.

    After two iterations every score is still at the prior, and every tap at its place.
    """
    trained = checkpoint.load(path)
    detector = checkpoint.build_detector(trained).eval()
    for module in detector.modules():
        if isinstance(module, DeformConv2d):
            torch.nn.init.uniform_(module.offset.bias, -2, 2)  # type: ignore[arg-type]
    logits, boxes = detector(torch.randn(2, 3, *SIZE))
    for tower, maps, deviation in ((detector.head.cls_head, logits, 2.0), (detector.head.box_head, boxes, 0.2)):
        last = list(tower.children())[-1]
        assert isinstance(last, torch.nn.Conv2d) and last.bias is not None
        last.weight *= deviation / max((level - last.bias[:, None, None]).std() for level in maps)
        if trained.model.head == "dense":  # its scores have no square root, and its boxes start large
            torch.nn.init.constant_(last.bias, 0.5 if maps is boxes else -3)
            if maps is boxes and trained.model.rotated:
                last.bias[2:4] = 2.0  # sides
    checkpoint.save(path, checkpoint.Checkpoint(trained.model, trained.categories, detector.state_dict()))


def detections(model: Path, images: Path, *flags: object) -> list[dict[str, Any]]:
    output = model.with_suffix(model.suffix + ".json")
    odtk("infer", model, "--images", images, "--output", output, "--loader", "torch", "--devices", "cpu", *flags)
    return json.loads(output.read_text())


def missing(these: list[dict[str, Any]], those: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The detections of `these` without an equal in `those`; boxes are compared by their corners, rotated or not."""

    def key(entry: dict[str, Any]) -> list[float]:
        x, y, w, h = entry["bbox"][:4]
        corners = entry.get("segmentation", [[x, y, x + w, y, x + w, y + h, x, y + h]])[0]
        return [
            entry["image_id"] / 1e-9,
            entry["category_id"] / 1e-9,
            entry["score"] / SCORES,
            *(c / PIXELS for c in corners),
        ]

    ours, theirs = (torch.tensor([key(d) for d in side], dtype=torch.float64) for side in (these, those))
    distance = torch.cdist(ours, theirs, p=float("inf"))  # [these, those]
    return [d for d, nearest in zip(these, distance.amin(1).tolist(), strict=True) if nearest >= 1]


@pytest.mark.parametrize(
    "flags", [pytest.param(f, id=n, marks=() if n in QUICK else pytest.mark.slow) for n, f in CASES.items()]
)
def test_train_export_infer(flags: list[str], drawn: Path, tmp_path: Path) -> None:
    data = drawn / ("rotated" if "--rotated-bbox" in flags else "upright")
    trained, exported = tmp_path / "model.pth", tmp_path / "model.onnx"
    limits = ("--score-threshold", 0.02, "--nms-threshold", 0.8)
    odtk(
        "train",
        trained,
        "--annotations",
        data / "train.json",
        "--images",
        data / "train",
        *(flags if "--head" in flags else ["--head", "retinanet", *flags]),
        "--backbone-weights",
        "none",
        "--iters",
        2,
        "--batch",
        4,
        "--jitter",
        64,
        64,
        "--max-size",
        96,
        "--full-precision",
        "--loader",
        "torch",
        "--devices",
        "cpu",
    )
    spread_predictions(trained)
    odtk("export", trained, exported, "--size", *SIZE, "--full-precision", *limits)
    by_torch = detections(trained, data / "val", "--size", *SIZE, "--full-precision", *limits)
    by_onnx = detections(exported, data / "val")
    assert len(by_torch) > 20 and len({d["score"] for d in by_torch}) > 15
    for these, those in ((by_torch, by_onnx), (by_onnx, by_torch)):
        assert len(missing(these, those)) <= NEAR_TIES * len(these), missing(these, those)[:5]


@pytest.mark.slow
@pytest.mark.parametrize("modulated", [True, False], ids=["v2", "v1"])
def test_tensorrt_compiles_deformable_convolution(modulated: bool) -> None:
    pytest.importorskip("tensorrt_rtx_libs", reason="needs tensorrt-rtx-cu13-{libs,bindings}==1.7.1.116")
    config = ModelConfig(backbones=("ResNet18C4",), classes=3, head_convs=1, dcn=(3, 4), dcn_modulated=modulated)
    detector = Detector(config)
    detector.initialize()
    graph = trace(detector.fold(), SIZE)
    assert sum(node.op_type == "GridSample" for node in graph.graph.node) == 4  # two blocks in each stage
    compile_for(serialize(graph), "SM89")
    to_fp16(graph)
    compile_for(serialize(graph), "SM89")
