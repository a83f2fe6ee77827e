"""Pre-training a backbone: it learns, its file is what a detector starts from, and it stops, resumes and is shared out
as the training of a detector is."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import odtk.training.pretrain
from odtk.cli import main
from odtk.config import AugmentConfig, LoaderConfig, ModelConfig, OdtkError, PretrainConfig
from odtk.describe import describe_file
from odtk.launch import launch
from odtk.model import checkpoint as files
from odtk.model.classifier import Classifier
from odtk.model.detector import Detector, normalize
from odtk.model.weights import initialize_weights
from odtk.training.optimizer import learning_rate
from odtk.training.pretrain import Teacher, answer_losses, pretrain

COLORS = {"green": (40, 200, 40), "red": (200, 40, 40)}
SMALL = ("--backbone", "ResNet18C4", "--resnet-width", "0.25", "--size", "32", "--devices", "cpu", "--loader", "torch")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six noisy images of each of two colors, one folder per color."""
    folder, generator = tmp_path_factory.mktemp("classes"), np.random.default_rng(0)
    for name, color in COLORS.items():
        (folder / name).mkdir()
        for i in range(6):
            pixels = np.clip(generator.normal(color, 40, (40, 48, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def settings(path: Path, images: Path, **changes: Any) -> PretrainConfig:
    """A run of four iterations on the smallest classifier, fp32, no validation."""
    data = LoaderConfig(str(images), batch=4, training=True, square=32, loader="torch", workers=1)
    config = PretrainConfig(
        str(path),
        ModelConfig(backbones=("ResNet18C4",), classes=2, resnet_width=0.25),
        data,
        iters=4,
        optimizer="adamw",
        lr=0.001,
        lr_schedule="cosine",
        milestones=(),
        warmup=1,
        ema=0.9,
        precision="fp32",
        logdir=str(path.parent / path.stem),
    )
    return dataclasses.replace(config, **changes)


def with_validation(config: PretrainConfig) -> PretrainConfig:
    return dataclasses.replace(config, val_data=dataclasses.replace(config.data, training=False))


def records(config: PretrainConfig, name: str) -> dict[int, float]:
    """The values of one name in metrics.jsonl by iteration."""
    lines = [json.loads(line) for line in Path(str(config.logdir), "metrics.jsonl").read_text().splitlines()]
    return {line["iteration"]: line[name] for line in lines if name in line}


def test_it_learns_and_a_detector_starts_from_its_file(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ("--images", str(images), "--val-images", str(images), "--batch", "6", "--epochs", "12", "--lr", "0.003")
    more = ("--report", "r.html", "--output", "o.json", "--logdir", "log", "--val-iters", "12")
    assert main(["pretrain", "w.pth", *SMALL, *flags, *more]) == 0
    said = capsys.readouterr().out
    assert "12 images of 2 classes: green 6, red 6." in said and "Wrote o.json" in said and "Wrote r.html" in said
    assert "w.best.pth is the best of the run: top-1 1.000. Next: odtk train" in said
    assert "--backbone ResNet18C4 --resnet-width 0.25 --backbone-weights w.best.pth" in said
    assert "top-1 1.000 of 12 images" in said
    figures = json.loads(Path("o.json").read_text())
    assert figures["top-1"] == 1 and [c["support"] for c in figures["classes"]] == [6, 6]
    assert "Every answer is right." in Path("r.html").read_text()
    assert "F1 of each class" in Path("log/run.html").read_text()
    said = describe_file("w.best.pth")
    assert said["best top-1"] == 1 and said["kind"] == "classifier"
    assert said["model"]["resnet_width"] == 0.25 and "head" not in said["model"]

    trained = files.load("w.best.pth", "classifier").state_dict
    detector = Detector(ModelConfig(backbones=("ResNet18FPN",), classes=3, resnet_width=0.25))
    initialize_weights(detector, fine_tune=None, backbone_weights="w.best.pth")
    assert "Loaded from w.best.pth: all 100 tensors." in capsys.readouterr().out
    (features,) = detector.feature_extractors().values()
    assert all(torch.equal(tensor, trained[f"features.{name}"]) for name, tensor in features.state_dict().items())

    other = Detector(ModelConfig(backbones=("ResNet34FPN",), classes=3, resnet_width=0.25))
    with pytest.raises(
        OdtkError, match="w.best.pth holds a classifier with ResNet18, whose weights do not fit ResNet34"
    ):
        initialize_weights(other, fine_tune=None, backbone_weights="w.best.pth")
    with pytest.raises(
        OdtkError, match="w.best.pth holds a classifier, not a detector: start from .*--backbone-weights"
    ):
        files.load("w.best.pth")
    changes: dict[str, Any]
    for changes, words in (
        ({"norm": "group"}, "leave out --norm group"),
        ({"resnet_width": 0.5}, "pass --resnet-width 0.25"),
        ({"resnet_width": 1.0, "norm": "group"}, "pass --resnet-width 0.25, leave out --norm group"),
        ({"resnet_width": 1.0, "deep_stem": True}, "pass --resnet-width 0.25, leave out --resnet deep-stem"),
    ):
        built = dataclasses.replace(ModelConfig(backbones=("ResNet18FPN",), resnet_width=0.25), **changes)
        with pytest.raises(OdtkError, match=rf"w.best.pth holds a ResNet18 that is built otherwise: {words}\."):
            initialize_weights(Detector(built), fine_tune=None, backbone_weights="w.best.pth")
    Path("o.json").unlink()
    Path("r.html").unlink()
    assert main(["pretrain", "w.pth", *SMALL, *flags]) == 0, "a run that is over says what it is worth"
    assert not Path("o.json").exists() and not Path("r.html").exists(), "files of a command, not of a run"
    said = capsys.readouterr().out
    assert "w.pth is trained: 24 iterations are done" in said and "top-1 1.000 of 12 images" in said


def test_a_stopped_run_is_resumed_exactly(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    whole = settings(tmp_path / "whole.pth", images, accumulate=2)
    strong = AugmentConfig(rotate=True, area=(0.3, 1.0), brightness=0.2, hue=0.1)
    whole = dataclasses.replace(whole, data=dataclasses.replace(whole.data, augment=strong))
    pretrain(whole)
    parts = dataclasses.replace(whole, path=str(tmp_path / "parts.pth"), logdir=str(tmp_path / "parts"))
    calls = 0

    def stopping(*args: Any) -> dict[str, tuple[Tensor, Tensor]]:
        nonlocal calls
        calls += 1
        if calls == 2 * 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return answer_losses(*args)

    with monkeypatch.context() as patch:
        patch.setattr(odtk.training.pretrain, "answer_losses", stopping)
        with pytest.raises(SystemExit):
            pretrain(parts)
    assert list(records(parts, "loss")) == [1, 2]
    torch.rand(7)  # whatever happened in between
    pretrain(parts)
    assert f"Resuming {parts.path} at iteration 2 of 4" in capsys.readouterr().out
    assert records(parts, "loss") == records(whole, "loss"), "to the last bit"
    a, b = (files.load(path, "classifier") for path in (whole.path, parts.path))
    assert files.weights_hash(a.state_dict) == files.weights_hash(b.state_dict)
    assert a.training is not None and b.training is not None
    for name in ("average", "optimizer", "scaler", "rng", "loader"):
        torch.testing.assert_close(a.training[name], b.training[name], rtol=0, atol=0)


def test_what_a_resumed_run_refuses(tmp_path: Path, images: Path, capsys: pytest.CaptureFixture) -> None:
    path, other = str(tmp_path / "w.pth"), tmp_path / "other"
    flags = [path, *SMALL, "--images", str(images), "--batch", "4"]
    assert main(["pretrain", *flags, "--iters", "1"]) == 0

    def refused(*more: str) -> str:
        assert main(["pretrain", *flags, "--iters", "2", *more]) == 1
        return capsys.readouterr().err.splitlines()[-1]

    assert "--label-smoothing 0.1 → 0.2" in refused("--label-smoothing", "0.2")
    assert "--size 32 → 64" in refused("--size", "64")
    assert "a run of another model (--norm batch → group)" in refused("--norm", "group")
    assert "w.pth would overwrite it; give one of the two another name" in refused("--teacher", path)
    teacher = str(shutil.copy(path, tmp_path / "teacher.pth"))
    assert "had no teacher, so it cannot be continued by --teacher" in refused("--teacher", teacher)
    assert "--output w.pth: the name of the figures' file must end in .json" in refused(
        "--val-images", str(images), "--output", "w.pth"
    )
    for name in ("blue", "red"):
        (other / name).mkdir(parents=True)
        (other / name / "1.png").write_bytes((images / "red" / "1.png").read_bytes())
    assert f"was trained on other classes than those of {other} (" in refused("--images", str(other))
    anew = ("--images", str(other), "--override", "--teacher", teacher)
    assert "knows other classes (green, red) than the images to train on have" in refused(*anew)
    (other / "blue").rename(other / "green")
    assert f"was trained on other images or classes than {other} has now" in refused("--images", str(other))
    assert main(["train", path, "--annotations", str(images / "none.json"), "--devices", "cpu"]) == 1
    assert "holds a classifier, not a detector" in capsys.readouterr().err


def test_damage_that_shows_only_while_decoding_counts_nothing(tmp_path: Path, images: Path, capsys) -> None:
    damaged = tmp_path / "images"
    shutil.copytree(images, damaged)
    content = bytearray((damaged / "red" / "2.png").read_bytes())
    content[200:400] = bytes(200)  # its header and its end are whole
    (damaged / "red" / "2.png").write_bytes(content)
    output = str(tmp_path / "o.json")
    pretrain(with_validation(settings(tmp_path / "w.pth", damaged, output=output)))
    assert [c["support"] for c in json.loads(Path(output).read_text())["classes"]] == [6, 5]
    assert "2.png (image 9) is replaced by padding and counts nothing" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_are_one_with_the_whole_batch(tmp_path: Path, images: Path) -> None:
    """The losses and the weights after three steps differ by rounding only, as batch norms see the whole batch."""
    one = settings(tmp_path / "one.pth", images, iters=3, optimizer="sgd", lr=0.01, ema=None)
    one = dataclasses.replace(one, model=dataclasses.replace(one.model, resnet_width=0.5))
    two = with_validation(dataclasses.replace(one, path=str(tmp_path / "two.pth"), logdir=str(tmp_path / "two")))
    two = dataclasses.replace(two, data=dataclasses.replace(two.data, batch=2), output=str(tmp_path / "o.json"))
    assert two.val_data is not None
    two = dataclasses.replace(two, val_data=dataclasses.replace(two.val_data, batch=2))
    pretrain(one)
    launch(pretrain, two, devices="cpu:2")
    assert records(two, "loss") == pytest.approx(records(one, "loss"), rel=1e-4)
    a, b = (files.load(path, "classifier").state_dict for path in (one.path, two.path))
    for name, tensor in a.items():
        torch.testing.assert_close(b[name], tensor, rtol=1e-3, atol=3e-4, msg=name)
    figures = json.loads((tmp_path / "o.json").read_text())
    assert sum(c["support"] for c in figures["classes"]) == 12, "each image once over both processes"


def test_the_losses_of_labels_and_teacher() -> None:
    """DeiT's equations 2 and 3 (arXiv 2012.12877), in NumPy; the third image is damaged and counts nothing."""
    generator = np.random.default_rng(0)
    z, t = (generator.normal(size=(3, 4)).astype(np.float32) for _ in range(2))
    labels = np.array([2, 0, -1])

    def probabilities(logits: np.ndarray) -> np.ndarray:
        e = np.exp(logits - logits.max(1, keepdims=True))
        return e / e.sum(1, keepdims=True)

    def run(**changes: Any) -> dict[str, tuple[float, float]]:
        config = PretrainConfig("", ModelConfig(), LoaderConfig(""), **changes)
        taught = torch.from_numpy(t) if config.teacher else None
        found = answer_losses(torch.from_numpy(z), torch.from_numpy(labels), taught, config)
        return {name: (total.item(), count.item()) for name, (total, count) in found.items()}

    p, q = probabilities(z), probabilities(t)
    smooth = 0.8 * np.eye(4)[labels[:2]] + 0.2 / 4
    of_labels = -(smooth * np.log(p[:2])).sum()
    assert run(label_smoothing=0.2) == {"labels": (pytest.approx(of_labels, rel=1e-5), 2.0)}
    hard = run(label_smoothing=0.2, teacher="t", teacher_weight=0.5)
    answers = -np.log(p[[0, 1], q[:2].argmax(1)]).sum()
    assert hard == {
        "labels": (pytest.approx(0.5 * of_labels, rel=1e-5), 2.0),
        "teacher": (pytest.approx(0.5 * answers, rel=1e-5), 2.0),
    }
    soft = run(teacher="t", teacher_labels="soft", teacher_weight=0.1, teacher_temperature=3.0)
    p3, q3 = probabilities(z / 3)[:2], probabilities(t / 3)[:2]
    kl = 9 * (q3 * np.log(q3 / p3)).sum()
    assert soft["teacher"] == (pytest.approx(0.1 * kl, rel=1e-4), 2.0)


def test_a_teacher_sees_pixels_by_its_own_normalization() -> None:
    """An EfficientNetLite, whose normalization is another than a ResNet's, gives the logits of its own pixels."""
    own = ModelConfig(backbones=("ResNet18FPN",), classes=3, resnet_width=0.25, mean=(0.5,) * 3, std=(0.25,) * 3)
    network = Classifier(own).eval()
    network.initialize()
    student = PretrainConfig("", ModelConfig(backbones=("ResNet18FPN",), classes=3), LoaderConfig(""))
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    teacher = Teacher(network, student).train()
    assert not any(module.training for module in teacher.network.modules())
    with torch.no_grad():
        expected = network(normalize(pixels, own.mean, own.std))
    taught = teacher(normalize(pixels, student.model.mean, student.model.std))
    torch.testing.assert_close(taught, expected, rtol=1e-4, atol=1e-5)
    assert not taught.requires_grad and taught.std() > 1e-3


def test_a_student_learns_of_its_teacher(tmp_path: Path, images: Path) -> None:
    flags = ["--images", str(images), "--batch", "4", "--iters", "2"]
    assert main(["pretrain", str(tmp_path / "t.pth"), *SMALL, *flags]) == 0
    log = tmp_path / "log"
    more = ["--teacher", str(tmp_path / "t.pth"), "--teacher-labels", "soft", "--logdir", str(log)]
    assert main(["pretrain", str(tmp_path / "s.pth"), *SMALL, *flags, *more]) == 0
    (first, *_) = [json.loads(line) for line in (log / "metrics.jsonl").read_text().splitlines()]
    assert first["teacher"] > 0 and first["loss"] == pytest.approx(first["labels"] + first["teacher"])
    found = files.load(tmp_path / "s.pth", "classifier")
    assert found.setting("teacher_weight") == 0.1 and found.setting("teacher_hash")
    assert all(not name.startswith("teacher") for name in found.state_dict)


def test_a_cosine_falls_from_the_warm_up_to_a_twentieth(tmp_path: Path) -> None:
    config = settings(tmp_path / "w.pth", tmp_path, iters=110, warmup=10, lr=0.1)
    rates = [learning_rate(i, config) for i in range(111)]
    assert rates[0] == pytest.approx(0.01) and rates[10] == pytest.approx(0.1) == max(rates)
    assert rates[60] == pytest.approx(0.1 * 1.05 / 2) and rates[110] == pytest.approx(0.005)
    assert all(a > b for a, b in zip(rates[10:], rates[11:], strict=False))
