"""Distillation: a detector that learns a teacher's features beside its boxes."""

import dataclasses
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import odtk
from odtk.config import ModelConfig, OdtkError, TrainConfig
from odtk.launch import launch
from odtk.model import checkpoint as files
from odtk.model.detector import Detector, normalize
from odtk.training.distill import Student, Teacher, feature_loss, load_teacher, pairs_of
from odtk.training.train import train
from tests.training.test_train import (
    draw_dataset,
    losses,
    pretrained,
    records,
    settings,
    small_run,
    start_weights,
    stop_at,
    training_of,
    with_validation,
)

SMALL = ModelConfig(backbones=("ResNet18C4",), classes=2, norm="batch", resnet_width=0.25, pyramid_channels=64)
WIDE = ModelConfig(  # another width, head, number of classes and normalization than SMALL
    backbones=("ResNet18C4",),
    classes=5,
    norm="frozen",
    resnet_width=0.5,
    pyramid_channels=128,
    head="fcos",
    mean=(0.5, 0.4, 0.3),
    std=(0.2, 0.3, 0.4),
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shapes"
    draw_dataset(folder, 6)
    return folder


def taught(path: Path, dataset: Path, teacher: ModelConfig = WIDE, **changes: Any) -> TrainConfig:
    """A run of four iterations of a small detector with a teacher that has random weights."""
    found = path.parent / "teacher.pth"
    if not found.exists():
        pretrained(found, teacher)
    return settings(path, dataset, **{"model": SMALL, "teacher": str(found), **changes})


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


def test_the_loss_is_one_minus_the_correlation() -> None:
    generator = torch.Generator().manual_seed(1)
    sizes = [(2, 3, 4, 6), (2, 3, 2, 3)]
    own = [torch.randn(size, generator=generator) for size in sizes]
    other = [torch.randn(size, generator=generator) for size in sizes]
    expected = sum(
        np.mean([1 - correlation(a[:, c].numpy(), b[:, c].numpy()) for c in range(3)])
        for a, b in zip(own, other, strict=True)
    )
    loss, normalizer = feature_loss(own, other, 1)
    assert loss.item() == pytest.approx(expected, rel=1e-5) and normalizer.item() == 1
    scaled = [50 * level - 7 for level in other]
    assert feature_loss(own, scaled, 1)[0].item() == pytest.approx(expected, rel=1e-4)
    assert feature_loss(own, own, 1)[0].item() == pytest.approx(0, abs=1e-6)
    assert feature_loss(own, [-level for level in own], 1)[0].item() == pytest.approx(2 * len(sizes))


def test_what_is_constant_counts_nothing() -> None:
    own, other = torch.randn(2, 4, 3, 3, requires_grad=True), torch.randn(2, 4, 3, 3)
    alone = feature_loss([own[:, 1:]], [other[:, 1:]], 1)[0]
    for constant in (0.0, 0.1, 1234.567):  # none of which float32 sums exactly
        still = other.clone()
        still[:, 0] = constant
        loss = feature_loss([own], [still], 1)[0]
        assert loss.item() == pytest.approx(alone.item(), rel=1e-6)
        (gradient,) = torch.autograd.grad(loss, own)
        assert gradient[:, 0].abs().max() == 0 and gradient[:, 1:].abs().max() > 0

        level = torch.full((2, 4, 3, 3), constant)
        loss = feature_loss([own, own], [other, level], 1)[0]
        assert loss.item() == pytest.approx(feature_loss([own], [other], 1)[0].item(), rel=1e-6)
        flat = level.clone().requires_grad_()
        nothing = feature_loss([flat], [other], 1)[0]
        assert nothing.item() == 0 and torch.autograd.grad(nothing, flat)[0].abs().max() == 0


def test_larger_maps_of_the_teacher_are_resized() -> None:
    own = torch.randn(1, 2, 4, 4)
    larger = own.repeat_interleave(2, 2).repeat_interleave(2, 3)  # whose bilinear half is the same again
    assert feature_loss([own], [larger], 1)[0].item() == pytest.approx(0, abs=1e-6)


def test_a_teacher_sees_the_same_pixels_by_its_own_normalization() -> None:
    detector = Detector(WIDE)
    detector.initialize()
    teacher = Teacher(detector, SMALL).train()
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    pixels = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    (own,) = detector.eval().features(normalize(pixels, WIDE.mean, WIDE.std))
    (given,) = teacher(normalize(pixels, SMALL.mean, SMALL.std))
    torch.testing.assert_close(given, own, rtol=1e-3, atol=1e-4)
    (other,) = teacher(normalize(pixels, WIDE.mean, WIDE.std))
    assert (other - own).abs().max() > 1e-2
    assert teacher.hash == files.weights_hash(detector.state_dict())


def test_a_teacher_sees_images_at_the_size_that_it_was_trained_at(tmp_path: Path, dataset: Path) -> None:
    detector = Detector(WIDE)
    detector.initialize()
    path = tmp_path / "teacher.pth"
    files.save(path, files.Checkpoint(WIDE, None, detector.state_dict(), settings={"resize": 128}))
    config = settings(tmp_path / "m.pth", dataset, model=SMALL, teacher=str(path))  # trained at 64
    teacher = load_teacher(config)
    assert teacher.scale == 2 and teacher.strides == (8,)
    assert [level.shape for level in teacher(torch.zeros(1, 3, 64, 80))] == [(1, 128, 8, 10)]
    assert load_teacher(dataclasses.replace(config, teacher_scale=1.0)).strides == (16,)


def test_levels_are_paired_by_the_size_of_their_cells() -> None:
    assert pairs_of((8, 16, 32), (8, 16, 32, 64)) == [(0, 0), (1, 1), (2, 2)]
    assert pairs_of((16,), (16, 32)) == [(0, 0)]
    assert pairs_of((16,), (4, 40)) == []


def test_a_finer_level_of_the_teacher_is_learned_too() -> None:
    assert pairs_of((8, 16, 32), (8 / 1.875, 16 / 1.875, 32 / 1.875)) == [(0, 1), (1, 2), (0, 0)]
    assert pairs_of((16,), (8, 16, 32)) == [(0, 1), (0, 0)]
    assert pairs_of((16,), (8, 32)) == [(0, 0)]
    assert pairs_of((16, 32), (4, 8, 16, 32)) == [(0, 2), (1, 3), (0, 1)], "4 is too fine"

    own = dataclasses.replace(SMALL, resnet_width=0.5, pyramid_channels=128)
    teacher = Teacher(Detector(dataclasses.replace(WIDE, backbones=("ResNet18FPN",))), own)
    student = Student(Detector(own), teacher)
    assert len(student.adapters) == 2, "the widths are the same, but one level cannot be two maps"
    features = student(torch.rand(1, 3, 64, 64))[2]
    assert [f.shape for f in features] == [(1, 128, 4, 4)] * 2 and not torch.equal(*features)


@pytest.mark.parametrize("width", [64, 128])
def test_adapters_only_where_widths_differ(width: int) -> None:
    own = dataclasses.replace(SMALL, resnet_width=width / 256, pyramid_channels=width)
    student = Student(Detector(own), Teacher(Detector(WIDE), own))
    assert len(student.adapters) == (0 if width == 128 else 1)
    logits, boxes, features = student(torch.rand(1, 3, 64, 64))
    assert [f.shape for f in features] == [(1, 128, 4, 4)] and len(logits) == len(boxes) == 1


def test_a_taught_run_learns_its_teachers_features_and_is_an_ordinary_checkpoint(tmp_path: Path, dataset: Path) -> None:
    config = taught(tmp_path / "m.pth", dataset, iters=30, milestones=(30,), lr=0.01, clip_grad=5.0)
    train(config)
    log = records(config)
    terms = {"cls", "box", "teacher"}
    assert all(line["loss"] == pytest.approx(sum(line[name] for name in terms), rel=1e-6) for line in log.values())
    first, last = (np.mean([log[i]["teacher"] for i in span]) for span in (range(1, 4), range(28, 31)))
    assert last < 0.7 * first, "6 × (1 − r) begins at about 6"
    found = files.load(config.path)
    assert found.state_dict.keys() == Detector(SMALL).state_dict().keys()
    assert set(training_of(config.path)["adapters"]) == {"0.weight", "0.bias"}
    odtk.export(config.path, str(tmp_path / "m.onnx"), size=64, full_precision=True, devices="cpu")


def test_a_stopped_taught_run_is_resumed_exactly(
    tmp_path: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more: dict[str, Any] = {"ema": 0.9, "clip_grad": 5.0, "accumulate": 2, "optimizer": "adamw", "lr": 0.001}
    whole = taught(tmp_path / "whole.pth", dataset, logdir=str(tmp_path / "a"), **more)
    train(whole)
    parts = dataclasses.replace(whole, path=str(tmp_path / "parts.pth"), logdir=str(tmp_path / "b"))
    with monkeypatch.context() as patch:
        stop_at(patch, 2 * 2, signal.SIGTERM)
        with pytest.raises(SystemExit):
            train(parts)
    assert list(losses(parts)) == [1, 2]
    torch.rand(7)
    train(parts)
    assert records(parts).keys() == records(whole).keys()
    for i, line in records(whole).items():
        assert {n: records(parts)[i][n] for n in ("loss", "teacher")} == {n: line[n] for n in ("loss", "teacher")}
    a, b = training_of(whole.path), training_of(parts.path)
    for name in ("average", "adapters", "optimizer", "scaler", "rng", "loader"):
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=0)


def test_what_a_taught_run_refuses(tmp_path: Path, dataset: Path, capsys: pytest.CaptureFixture) -> None:
    given = small_run(dataset, iters=1)
    for name, model in (("one", WIDE), ("two", WIDE), ("fpn", dataclasses.replace(WIDE, backbones=("ResNet18FPN",)))):
        pretrained(tmp_path / f"{name}.pth", model)
    path = str(tmp_path / "m.pth")
    with pytest.raises(OdtkError, match="There is no checkpoint .*missing.pth"):
        odtk.train(path, **given, teacher=str(tmp_path / "missing.pth"))
    for own in (path, str(tmp_path / "m.best.pth")):
        with pytest.raises(OdtkError, match=f"--teacher {own}: training to {path} would overwrite it"):
            odtk.train(path, **given, teacher=own)
    with pytest.raises(OdtkError, match=r"every 80, .* pixels of the images and the detector to train every 16: "):
        odtk.train(path, **given, teacher=str(tmp_path / "fpn.pth"), teacher_scale=0.1)
    with pytest.raises(OdtkError, match="--teacher-weight needs --teacher PATH"):
        odtk.train(path, **given, teacher_weight=2)
    assert not Path(path).exists()

    odtk.train(path, **given, teacher=str(tmp_path / "one.pth"))
    assert "one.pth teaches, by the pixels between cells, levels of 16 by 16." in capsys.readouterr().out
    before = Path(path).read_bytes()
    with pytest.raises(OdtkError, match=f"{path} was taught by other weights, so it cannot be continued by --teacher"):
        odtk.train(path, **given, teacher=str(tmp_path / "two.pth"))
    assert Path(path).read_bytes() == before
    (tmp_path / "one.pth").rename(tmp_path / "moved.pth")
    with pytest.raises(
        OdtkError, match="--teacher: There is no checkpoint .*one.pth.* pass --teacher with its new place"
    ):
        odtk.train(path, **{**given, "iters": 2})
    odtk.train(path, **{**given, "iters": 2}, teacher=str(tmp_path / "moved.pth"))  # the same weights elsewhere
    assert training_of(path)["iteration"] == 2

    plain = str(tmp_path / "plain.pth")
    odtk.train(plain, **given)
    with pytest.raises(OdtkError, match=f"{plain} had no teacher, so it cannot be continued by --teacher"):
        odtk.train(plain, **given, teacher=str(tmp_path / "moved.pth"))


def test_damaged_adapters_are_refused(tmp_path: Path, dataset: Path) -> None:
    config = taught(tmp_path / "m.pth", dataset, iters=1)
    train(config)
    content = torch.load(config.path, weights_only=True)
    good = content["training"]["adapters"]
    for bad in ({}, {**good, "0.bias": torch.full((128,), float("nan"))}, {**good, "0.weight": torch.ones(2)}, "x"):
        torch.save({**content, "training": {**content["training"], "adapters": bad}}, config.path)
        with pytest.raises(OdtkError, match="cannot be resumed"):
            train(dataclasses.replace(config, iters=2))


@pytest.mark.slow
def test_two_taught_processes_are_one_with_the_whole_batch(tmp_path: Path, dataset: Path) -> None:
    """The statistics of the features are those of both processes; so are the adapters of rank 0."""
    model = dataclasses.replace(SMALL, norm="frozen", head="dense")
    start = pretrained(tmp_path / "start.pth", model)
    one = taught(tmp_path / "one.pth", dataset, iters=2, logdir=str(tmp_path / "a"), model=model, fine_tune=start)
    one = dataclasses.replace(one, data=dataclasses.replace(one.data, batch=4))
    two = dataclasses.replace(one, path=str(tmp_path / "two.pth"), logdir=str(tmp_path / "b"))
    two = with_validation(dataclasses.replace(two, data=dataclasses.replace(two.data, batch=2)))
    begun = start_weights(dataclasses.replace(one, path=str(tmp_path / "begun.pth")))
    train(one)
    launch(train, two, devices="cpu:2")
    for i, line in records(one).items():
        for name in ("loss", "teacher"):
            assert records(two)[i][name] == pytest.approx(line[name], rel=1e-5)
    a, b = files.load(one.path).state_dict, files.load(two.path).state_dict
    for name, before in begun.items():
        step, apart = (a[name] - before).double().norm(), (a[name] - b[name]).double().norm()
        assert apart <= 1e-3 * step, name
    for name, weight in training_of(one.path)["adapters"].items():
        torch.testing.assert_close(training_of(two.path)["adapters"][name], weight, rtol=1e-4, atol=1e-6)
