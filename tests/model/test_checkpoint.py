"""Checkpoints: written whole or not at all, refused in one sentence; files of ODTK 0.2 give equal detections."""

import math
import os
import pickle
import resource
import stat
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from odtk.categories import Category
from odtk.config import ModelConfig, OdtkError, PostprocessConfig
from odtk.model import checkpoint as files
from odtk.model.checkpoint import Checkpoint
from odtk.model.detector import Detector
from odtk.postprocess import postprocess

MODEL = ModelConfig(backbones=("ResNet18FPN",), classes=2)
CATEGORIES = (Category(3, "red"), Category(7, "green"))


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return Detector(MODEL).state_dict()


@pytest.fixture
def saved(tmp_path: Path, weights: dict[str, Tensor]) -> Path:
    path = tmp_path / "model.pth"
    files.save(path, Checkpoint(MODEL, CATEGORIES, weights, {"iteration": 5, "best": 0.25}))
    return path


def test_what_is_saved_is_loaded(saved: Path, weights: dict[str, Tensor]) -> None:
    found = files.load(saved)
    assert (found.model, found.categories, found.training) == (MODEL, CATEGORIES, {"iteration": 5, "best": 0.25})
    assert files.weights_hash(files.build_detector(found).state_dict()) == files.weights_hash(weights)


def test_saving_leaves_nothing_beside_and_goes_through_links(saved: Path, weights: dict[str, Tensor]) -> None:
    link = saved.with_name("link.pth")
    link.symlink_to(saved)
    files.save(link, Checkpoint(MODEL, None, weights))
    assert link.is_symlink() and files.load(saved).categories is None
    assert sorted(os.listdir(saved.parent)) == ["link.pth", "model.pth"]
    assert stat.S_IMODE(saved.stat().st_mode) == 0o666 & ~umask()


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_full_disk_leaves_the_old_file(saved: Path, weights: dict[str, Tensor]) -> None:
    before = saved.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))  # no file may grow beyond a mebibyte
    try:
        with pytest.raises(OdtkError, match=r"model\.pth could not be written \(File too large\)"):
            files.save(saved, Checkpoint(MODEL, None, weights))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert saved.read_bytes() == before and os.listdir(saved.parent) == ["model.pth"]


def test_an_interrupt_leaves_the_old_file(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()

    def interrupted(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        files.save(saved, Checkpoint(MODEL, None, {}))
    assert saved.read_bytes() == before and os.listdir(saved.parent) == ["model.pth"]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(OdtkError, match="No such file or directory"):
        files.save(tmp_path / "no" / "model.pth", Checkpoint(MODEL, None, {}))


class Evil:
    """What a pickle may do: run any code when it is loaded."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("evil",)


def test_files_that_are_refused(saved: Path, tmp_path: Path, weights: dict[str, Tensor], monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    whole = saved.read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.pth").touch()
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "onnx.pth").write_bytes(b"\x08\x0a\x12\x07pytorch" * 50)
    torch.save({"format": "odtk", "version": 99}, tmp_path / "newer.pth")
    torch.save({"epoch": 3, "net": {}}, tmp_path / "other.pth")
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "bare.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"format": "odtk", "state_dict": Evil()}, tmp_path / "evil.pth")
    (tmp_path / "evil-pickle.pth").write_bytes(pickle.dumps(Evil(), protocol=2))
    for name, message in {
        "missing.pth": "There is no checkpoint",
        "cut.pth": "truncated",
        "empty.pth": "is empty",
        "text.pth": "is not a checkpoint",
        "onnx.pth": "is not a checkpoint",
        "newer.pth": "newer odtk",
        "other.pth": "another program",
        "bare.pth": "--backbone-weights",
        "list.pth": "holds a list",
        "evil.pth": "not plain weights",
        "evil-pickle.pth": "is not a checkpoint",
    }.items():
        with pytest.raises(OdtkError, match=message) as error:
            files.load(tmp_path / name)
        assert name in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "evil").exists()


def test_weights_of_another_model_are_refused(weights: dict[str, Tensor]) -> None:
    with pytest.raises(OdtkError, match=r"another model: head\.cls_head\.8\.weight has shape \(18, .*, not \(27, "):
        files.build_detector(Checkpoint(ModelConfig(backbones=("ResNet18FPN",), classes=3), None, weights))
    with pytest.raises(OdtkError, match="another model: it lacks backbones"):
        files.build_detector(Checkpoint(ModelConfig(backbones=("ResNet34FPN",), classes=2), None, weights))


def test_the_hash_is_of_the_values(weights: dict[str, Tensor]) -> None:
    first = files.weights_hash(weights)
    same = {name: tensor.clone() for name, tensor in reversed(weights.items())}
    for name, tensor in same.items():
        if tensor.ndim == 4:
            same[name] = tensor.contiguous(memory_format=torch.channels_last)
    assert files.weights_hash(same) == first
    same["head.box_head.8.bias"][3] += 1e-7
    assert files.weights_hash(same) != first


# ---------------------------------------------------------------------------------------------------------------------
# ODTK 0.2.x: its model, decoding and NMS written again in plain torch and loops, from the formulas of its documentation


class FixedNorm(nn.Module):
    """Four buffers and no parameter, as its checkpoints hold them."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.rand(channels) + 0.5)
        self.register_buffer("bias", torch.randn(channels) * 0.1)
        self.register_buffer("running_mean", torch.randn(channels) * 0.1)
        self.register_buffer("running_var", torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)


class BasicBlock(nn.Module):
    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False), FixedNorm(outside)
        self.conv2, self.bn2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False), FixedNorm(outside)
        if stride > 1:
            self.downsample = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), FixedNorm(outside))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + (self.downsample(x) if hasattr(self, "downsample") else x))


class Bottleneck(nn.Module):
    def __init__(self, inside: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inside, width, 1, bias=False), FixedNorm(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), FixedNorm(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), FixedNorm(4 * width)
        if inside != 4 * width:
            shortcut = nn.Conv2d(inside, 4 * width, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, FixedNorm(4 * width))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        y = self.bn3(self.conv3(y))
        return F.relu(y + (self.downsample(x) if hasattr(self, "downsample") else x))


class OldResNet(nn.Module):
    def __init__(self, depths: tuple[int, ...], bottleneck: bool, last: int = 5) -> None:
        super().__init__()
        self.last = last
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), FixedNorm(64)
        inside = 64
        for i, depth in enumerate(depths):
            width, stride = 64 * 2**i, 1 if i == 0 else 2
            outside = width * (4 if bottleneck else 1)
            make = (
                (lambda a, s, w=width: Bottleneck(a, w, s))
                if bottleneck
                else (lambda a, s, w=width: BasicBlock(a, w, s))
            )
            blocks = [make(inside, stride)] + [make(outside, 1) for _ in range(depth - 1)]
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
            inside = outside
        self.fc = nn.Linear(inside, 1000)  # never used, always saved

    def forward(self, x: Tensor) -> list[Tensor]:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        outputs = []
        for level in range(2, self.last + 1):
            x = getattr(self, f"layer{level - 1}")(x)
            outputs.append(x)
        return outputs[1:] if self.last == 5 else [outputs[-1]]


class OldFPN(nn.Module):
    lateral3: nn.Conv2d
    lateral4: nn.Conv2d
    lateral5: nn.Conv2d
    smooth3: nn.Conv2d
    smooth4: nn.Conv2d
    smooth5: nn.Conv2d

    def __init__(self, features: OldResNet, channels: tuple[int, int, int]) -> None:
        super().__init__()
        self.features = features
        for level, c in zip((3, 4, 5), channels, strict=True):
            setattr(self, f"lateral{level}", nn.Conv2d(c, 256, 1))
            setattr(self, f"smooth{level}", nn.Conv2d(256, 256, 3, padding=1))
        self.pyramid6 = nn.Conv2d(channels[2], 256, 3, 2, 1)
        self.pyramid7 = nn.Conv2d(256, 256, 3, 2, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        c3, c4, c5 = self.features(x)
        p5 = self.lateral5(c5)
        p4 = self.lateral4(c4) + p5.repeat_interleave(2, 2).repeat_interleave(2, 3)
        p3 = self.lateral3(c3) + p4.repeat_interleave(2, 2).repeat_interleave(2, 3)
        p6 = self.pyramid6(c5)
        return [self.smooth3(p3), self.smooth4(p4), self.smooth5(p5), p6, self.pyramid7(F.relu(p6))]


RATIOS, SCALES = [1.0, 2.0, 0.5], [4 * 2 ** (i / 3) for i in range(3)]


class OldModel(nn.Module):
    def __init__(self, backbones: dict[str, nn.Module], classes: int) -> None:
        super().__init__()
        self.backbones, self.classes = nn.ModuleDict(backbones), classes
        self.cls_head, self.box_head = self.tower(classes * 9), self.tower(4 * 9)

    def tower(self, channels: int) -> nn.Sequential:
        layers = [layer for _ in range(4) for layer in (nn.Conv2d(256, 256, 3, padding=1), nn.ReLU())]
        return nn.Sequential(*layers, nn.Conv2d(256, channels, 3, padding=1))

    def forward(self, x: Tensor) -> list[list[tuple[float, list[float], int]]]:
        """For each image its detections (score, corners, class), best first."""
        features = [f for backbone in self.backbones.values() for f in backbone(x)]
        candidates: list[list[tuple[float, list[float], int]]] = [[] for _ in x]
        for feature in features:
            stride = x.shape[-1] // feature.shape[-1]
            scores, deltas = self.cls_head(feature).sigmoid(), self.box_head(feature)
            for i in range(len(x)):
                candidates[i] += decode_level(scores[i], deltas[i], stride, self.classes)
        return [suppress(found) for found in candidates]

    def file(self) -> dict[str, object]:
        return {
            "backbone": list(self.backbones),
            "classes": self.classes,
            "state_dict": self.state_dict(),
            "ratios": RATIOS,
            "scales": SCALES,
            "iteration": 90000,
            "optimizer": torch.optim.SGD(self.parameters(), 0.01).state_dict(),
            "scheduler": {"last_epoch": 90000, "lr_lambdas": [None]},
        }


def decode_level(scores: Tensor, deltas: Tensor, stride: int, classes: int) -> list[tuple[float, list[float], int]]:
    """scores [9·C, h, w], deltas [9·4, h, w]: the thousand best above 0.05, as (score, x1 y1 x2 y2, class)."""
    height, width = scores.shape[-2:]
    flat = scores.reshape(-1)
    order = flat.argsort(descending=True, stable=True)[:1000]
    found = []
    for index in order[flat[order] > 0.05].tolist():
        channel, y, x = index // (height * width), index // width % height, index % width
        anchor, label = divmod(channel, classes)
        side = math.sqrt(stride * stride / RATIOS[anchor % 3])
        w, h = side * SCALES[anchor // 3], side * RATIOS[anchor % 3] * SCALES[anchor // 3]
        x1, y1 = x * stride + 0.5 * (stride - w), y * stride + 0.5 * (stride - h)
        w, h = w + 1, h + 1  # inclusive corners: x2 − x1 + 1
        dx, dy, dw, dh = deltas[4 * anchor : 4 * anchor + 4, y, x].tolist()
        cx, cy = x1 + 0.5 * w + dx * w, y1 + 0.5 * h + dy * h
        w, h = math.exp(dw) * w, math.exp(dh) * h
        corners = [cx - 0.5 * w, cy - 0.5 * h, cx + 0.5 * w - 1, cy + 0.5 * h - 1]
        limits = [stride * width - 1, stride * height - 1] * 2
        box = [min(max(value, 0.0), float(limit)) for value, limit in zip(corners, limits, strict=True)]
        found.append((flat[index].item(), box, label))
    return found


def suppress(found: list[tuple[float, list[float], int]]) -> list[tuple[float, list[float], int]]:
    """Greedy NMS per class at IoU 0.5, the hundred best."""
    kept: list[tuple[float, list[float], int]] = []
    for score, box, label in sorted(found, key=lambda entry: -entry[0]):
        if len(kept) == 100:
            break
        if all(label != other or overlap(box, theirs) <= 0.5 for _, theirs, other in kept):
            kept.append((score, box, label))
    return kept


def overlap(a: list[float], b: list[float]) -> float:
    w = min(a[2], b[2]) - max(a[0], b[0]) + 1
    h = min(a[3], b[3]) - max(a[1], b[1]) + 1
    area = [(box[2] - box[0] + 1) * (box[3] - box[1] + 1) for box in (a, b)]
    inter = max(w, 0) * max(h, 0)
    return inter / (area[0] + area[1] - inter)


def old_resnet18() -> nn.Module:
    return OldFPN(OldResNet((2, 2, 2, 2), bottleneck=False), (128, 256, 512))


def old_resnet18_c4() -> nn.Module:
    return OldResNet((2, 2, 2, 2), bottleneck=False, last=4)


def old_resnet50() -> nn.Module:
    return OldFPN(OldResNet((3, 4, 6, 3), bottleneck=True), (512, 1024, 2048))


def randomized(model: OldModel, images: Tensor) -> OldModel:
    """Weights that give scores on both sides of the threshold and boxes that overlap."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    with torch.no_grad():
        features = [f for backbone in model.backbones.values() for f in backbone(images)]
        for tower, deviation in ((model.cls_head, 1.0), (model.box_head, 0.3)):
            outputs = torch.cat([tower(f).flatten() for f in features])
            tower.get_parameter("8.weight").mul_(deviation / outputs.std())
        model.cls_head.get_parameter("8.bias").fill_(-4.5)
    return model


CASES = {
    "R18-FPN": ["ResNet18FPN"],
    "R18-C4": ["ResNet18C4"],
    "two backbones": ["ResNet18FPN", "ResNet18C4"],
    "R50-FPN": ["ResNet50FPN"],
}
OLD = {"ResNet18FPN": old_resnet18, "ResNet18C4": old_resnet18_c4, "ResNet50FPN": old_resnet50}


@pytest.mark.parametrize(
    "case",
    [
        "R18-FPN",
        "R18-C4",
        pytest.param("two backbones", marks=pytest.mark.slow),
        pytest.param("R50-FPN", marks=pytest.mark.slow),
    ],
)
def test_odtk_02_files_give_the_same_detections(case: str, tmp_path: Path) -> None:
    images = torch.randn(2, 3, 128, 128)
    old = randomized(OldModel({name: OLD[name]() for name in CASES[case]}, classes=3), images).eval()
    torch.save(old.file(), tmp_path / "old.pth")

    found = files.load(tmp_path / "old.pth")
    assert found.model.backbones == tuple(CASES[case]) and found.model.norm == "frozen"
    assert found.categories is None and found.training is None
    detector = files.build_detector(found).eval()
    with torch.no_grad():
        expected = old(images)
        actual = postprocess(
            *detector(images),
            anchors=detector.anchors(),
            strides=detector.strides,
            model=found.model,
            config=PostprocessConfig(),
        )
    for i, rows in enumerate(expected):
        assert len(rows) > 20
        assert int((actual.scores[i] > 0).sum()) == len(rows)
        scores, boxes, labels = zip(*rows, strict=True)
        torch.testing.assert_close(actual.scores[i, : len(rows)], torch.tensor(scores), atol=1e-5, rtol=0)
        torch.testing.assert_close(actual.boxes[i, : len(rows)], torch.tensor(boxes), atol=0.01, rtol=0)
        assert actual.classes[i, : len(rows)].tolist() == list(labels)


def test_odtk_02_files_in_half_precision_and_with_one_backbone_by_name(tmp_path: Path) -> None:
    old = OldModel({"ResNet18C4": old_resnet18_c4()}, classes=2).half()
    torch.save({**old.file(), "backbone": "ResNet18C4"}, tmp_path / "old.pth")
    found = files.load(tmp_path / "old.pth")
    assert found.model.backbones == ("ResNet18C4",)
    assert {tensor.dtype for tensor in found.state_dict.values()} == {torch.float32}
    assert not any(".fc." in name or ".layer4." in name for name in found.state_dict)
