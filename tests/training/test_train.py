"""The training loop: what it writes, how it stops and resumes, and that several processes make one run."""

import dataclasses
import http.server
import json
import os
import pickle
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor

import odtk.training.train
from odtk.config import AugmentConfig, LoaderConfig, ModelConfig, OdtkError, TrainConfig
from odtk.data.batch import Loader
from odtk.data.dataset import Dataset
from odtk.data.images import ImageError
from odtk.data.loader import create_loader
from odtk.data.records import Image as DatasetImage
from odtk.launch import launch
from odtk.model import checkpoint as files
from odtk.model.detector import Detector
from odtk.training.log import Background, MetricsPoster, closing_line
from odtk.training.loss import detection_loss, normalize
from odtk.training.optimizer import EMA, create_optimizer, learning_rate
from odtk.training.train import train

# Narrow, so that most of a test's time is not convolutions.
SMALL: dict[str, Any] = {
    "backbones": ("ResNet18C4",),
    "classes": 2,
    "resnet_width": 0.25,
    "pyramid_channels": 64,
    "head_channels": 64,
}
COLORS = {3: ("red", (220, 40, 40)), 7: ("green", (40, 220, 40))}


def draw_dataset(folder: Path, count: int) -> None:
    """64×64 images with one or two filled rectangles, whose color is their class, and folder/data.json."""
    generator = np.random.default_rng(0)
    folder.mkdir()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(1, count + 1):
        picture = Image.new("RGB", (64, 64), (60, 60, 60))
        for category in (3, 7)[: 1 + number % 2]:
            w, h = (int(v) for v in generator.integers(24, 40, 2))
            x, y = int(generator.integers(0, 64 - w)), int(generator.integers(0, 64 - h))
            ImageDraw.Draw(picture).rectangle((x, y, x + w - 1, y + h - 1), COLORS[category][1])
            box = {"bbox": [x, y, w, h], "area": w * h, "iscrowd": 0}
            annotations.append({"id": len(annotations) + 1, "image_id": number, "category_id": category, **box})
        picture.save(folder / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": 64, "height": 64})
    categories = [{"id": id, "name": name} for id, (name, _) in COLORS.items()]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "data.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shapes"
    draw_dataset(folder, 6)
    return folder


def small_run(dataset: Path, *, iters: int) -> dict[str, Any]:
    """A run on a small model as keywords of odtk.train."""
    return {
        "annotations": str(dataset / "data.json"),
        "images": str(dataset),
        "backbone": "ResNet18C4",
        "resnet_width": 0.25,
        "head": "retinanet",
        "backbone_weights": "none",
        "loader": "torch",
        "devices": "cpu",
        "resize": 64,
        "max_size": 64,
        "iters": iters,
        "batch": 2,
    }


def settings(path: Path, dataset: Path, **changes: Any) -> TrainConfig:
    """A run of four iterations on the smallest model, fp32, no validation."""
    data = LoaderConfig(
        images=str(dataset),
        annotations=str(dataset / "data.json"),
        batch=2,
        training=True,
        resize=64,
        max_size=64,
        jitter=(64, 64),
        loader="torch",
        workers=1,
    )
    model = ModelConfig(**SMALL, norm="batch")
    config = TrainConfig(
        path=str(path),
        model=model,
        data=data,
        iters=4,
        milestones=(3,),
        warmup=2,
        backbone_weights="none",
        precision="fp32",
        logdir=str(path.parent / "log"),
    )
    return dataclasses.replace(config, **changes)


def with_validation(config: TrainConfig, **changes: Any) -> TrainConfig:
    return dataclasses.replace(config, val_data=dataclasses.replace(config.data, training=False), **changes)


def records(config: TrainConfig, kind: str = "loss") -> dict[int, dict[str, float]]:
    """The lines of metrics.jsonl by iteration: those with losses, or with ``AP`` those of the validation."""
    lines = [json.loads(line) for line in Path(str(config.logdir), "metrics.jsonl").read_text().splitlines()]
    return {line["iteration"]: line for line in lines if kind in line}


def losses(config: TrainConfig) -> dict[int, float]:
    return {iteration: line["loss"] for iteration, line in records(config).items()}


def training_of(path: str | Path) -> dict[str, Any]:
    """What a checkpoint holds of its run (see odtk/training/run.py)."""
    found = files.load(path).training
    assert found is not None
    return found


def test_learning_rate(tmp_path: Path) -> None:
    config = settings(tmp_path / "m.pth", tmp_path, lr=0.02, warmup=10, milestones=(60, 80), gamma=0.1, schedule=0.5)
    expected = {0: 0.002, 5: 0.011, 10: 0.02, 29: 0.02, 30: 0.002, 39: 0.002, 40: 0.0002}
    assert {i: round(learning_rate(i, config), 10) for i in expected} == expected


def test_a_flat_cosine_falls_in_the_second_half_to_a_twentieth(tmp_path: Path) -> None:
    config = dataclasses.replace(
        settings(tmp_path / "m.pth", tmp_path), lr_schedule="flat-cosine", iters=50, schedule=2.0, warmup=10, lr=0.1
    )
    rates = [learning_rate(i, config) for i in range(101)]
    assert rates[0] == pytest.approx(0.01) and rates[10:51] == [pytest.approx(0.1)] * 41
    assert rates[75] == pytest.approx(0.1 * 1.05 / 2) and rates[100] == pytest.approx(0.005)
    assert all(a > b for a, b in zip(rates[50:], rates[51:], strict=False))


def test_a_loss_is_its_sum_divided_by_the_foreground() -> None:
    sums = torch.tensor([6.0, 3.0], requires_grad=True)
    terms = {"cls": (sums[0], torch.tensor(4.0)), "box": (sums[1], torch.tensor(0.0))}
    loss, values = normalize(terms, world=1)
    loss.backward()
    assert (loss.item(), values.tolist()) == (4.5, [1.5, 3.0])
    assert sums.grad is not None and sums.grad.tolist() == [0.25, 1.0]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_first_step_that_overflows_leaves_no_momentum(
    tmp_path: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    """fp16's scaler skips that step; the momentum of the fused update must not be uninitialized memory then."""

    class Scaler(torch.amp.GradScaler):
        def scale(self, outputs: Any) -> Any:
            first = self._scale is None
            return super().scale(outputs) * (float("inf") if first else 1.0)

    monkeypatch.setattr(torch.amp, "GradScaler", Scaler)
    torch.use_deterministic_algorithms(True)  # new memory is NaN
    try:
        train(settings(tmp_path / "m.pth", dataset, iters=2, optimizer=optimizer, lr=0.001))
    finally:
        torch.use_deterministic_algorithms(False)
    saved = files.load(str(tmp_path / "m.pth"))
    assert saved.training is not None and saved.training["scaler"]["scale"] == 0.5
    steps = {int(state["step"]) for state in saved.training["optimizer"]["state"].values() if "step" in state}
    assert steps == ({1} if optimizer == "adamw" else set()), "a skipped step is none of AdamW's"
    assert all(tensor.isfinite().all() for tensor in saved.state_dict.values())


def test_norms_and_biases_do_not_decay_under_adamw(tmp_path: Path, dataset: Path) -> None:
    model = ModelConfig(**SMALL, norm="batch")
    config = settings(tmp_path / "m.pth", dataset, weight_decay=0.5, lr=0.1, optimizer="adamw", model=model)
    detector = Detector(model)
    before = {name: tensor.detach().clone() for name, tensor in detector.named_parameters()}
    optimizer = create_optimizer(detector, config)
    for name, parameter in detector.named_parameters():
        parameter.grad = torch.zeros_like(parameter)
        if name == "backbones.ResNet18C4.conv1.weight":
            parameter.grad[0, 0, 0, 0] = 3.0
    optimizer.step()
    for name, parameter in detector.named_parameters():
        # Without a gradient the moments are 0, and what remains of AdamW's step is w ← w − lr · decay · w.
        decays = not (name.endswith("bias") or ".bn" in name or "downsample.1" in name)
        expected = before[name] * (1 - 0.1 * 0.5 * decays)
        if name == "backbones.ResNet18C4.conv1.weight":
            expected[0, 0, 0, 0] -= 0.1  # the first step is lr · m̂ / √v̂ = lr · sign(gradient)
        torch.testing.assert_close(parameter.detach(), expected, msg=name)


@pytest.mark.parametrize(
    ("head", "optimizer", "sizes"),
    [
        ("retinanet", "sgd", 1),
        ("fcos", "sgd", 1),
        ("retinanet", "adamw", 2),
        ("dense", "sgd", 2),
        ("dense", "adamw", 2),
    ],
)
def test_groups_of_an_optimizer(tmp_path: Path, dataset: Path, head: str, optimizer: str, sizes: int) -> None:
    model = ModelConfig(backbones=("ResNet18FPN",), head=head, classes=2, norm="batch", last_level=5, head_convs=1)
    detector = Detector(model)
    config = settings(tmp_path / "m.pth", dataset, model=model, optimizer=optimizer, weight_decay=0.25)
    groups = create_optimizer(detector, config).param_groups
    assert [group["weight_decay"] for group in groups] == [0.25, 0.0][:sizes]
    assert sum(len(group["params"]) for group in groups) == len(list(detector.parameters()))
    if sizes == 1:
        assert [id(p) for p in groups[0]["params"]] == [id(p) for p in detector.parameters()]
    else:
        assert min(p.dim() for p in groups[0]["params"]) == 4 and max(p.dim() for p in groups[1]["params"]) == 1


def test_a_run_resumed_in_another_precision_gets_a_new_scaler(tmp_path: Path, dataset: Path) -> None:
    config = settings(tmp_path / "m.pth", dataset, iters=1)
    train(config)
    saved = files.load(config.path)
    assert saved.training is not None
    saved.training["scaler"] |= {"scale": 4096.0, "growth_interval": 2000}  # as in the file of a run in fp16
    files.save(config.path, saved)
    train(dataclasses.replace(config, iters=2))
    resumed = files.load(config.path)
    assert resumed.training is not None and resumed.training["scaler"]["scale"] == 1


def test_ema() -> None:
    detector = Detector(ModelConfig(**SMALL | {"classes": 1}, norm="batch"))
    ema = EMA(detector, 0.5)
    before = {name: tensor.clone() for name, tensor in detector.state_dict().items()}
    with torch.no_grad():
        for tensor in detector.state_dict().values():
            tensor.add_(1)
    ema.update(0)  # decay (1 + 0) / (10 + 0): nine tenths of the way
    ema.update(100)  # decay 0.5
    for name, tensor in ema.network.state_dict().items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, before[name] + 0.95)


def test_a_run_from_start_to_end(tmp_path: Path, dataset: Path, capsys: pytest.CaptureFixture) -> None:
    config = with_validation(settings(tmp_path / "m.pth", dataset, val_iters=2, precision="mixed"))
    train(config)
    said = capsys.readouterr().out
    assert "2 classes, 4 iterations, batch 2 on 1 × cpu, bfloat16, SGD, learning rate 0.01, warm-up 2." in said
    assert re.search(r"\[4/4\]  loss \d\.\d+  cls \d\.\d+  box \d\.\d+  lr 1\.00e-03  [\d.]+ im/s  0:00:00 left", said)
    assert re.search(r"\[4/4\]  validation: AP 0\.\d+  AP50 0\.\d+  \(red 0\.\d+, green 0\.\d+\)", said)
    line = records(config, "AP")[4]
    assert line["AP"] == pytest.approx((line["AP/red"] + line["AP/green"]) / 2)
    best, exported = tmp_path / "m.best.pth", tmp_path / "m.onnx"
    ap = training_of(best)["best"]
    assert f"{best} is the best: AP {ap:.3f}" in said and said.endswith(f". Next: odtk export {best} {exported}\n")

    found = files.load(config.path)
    assert found.training is not None and found.training["iteration"] == 4
    assert [(c.id, c.name) for c in found.categories or ()] == [(3, "red"), (7, "green")]
    assert training_of(tmp_path / "m.best.pth")["best"] == max(r["AP"] for r in records(config, "AP").values())
    assert list(records(config)) == [1, 2, 3, 4] and list(records(config, "AP")) == [2, 4]
    assert [round(line["lr"], 6) for line in records(config).values()] == [0.001, 0.0055, 0.01, 0.001]
    events = b"".join(path.read_bytes() for path in (tmp_path / "log").glob("events.*"))
    assert all(tag in events for tag in (b"loss", b"images_per_second", b"AP50", b"validation/0", b"validation/3"))

    train(config)  # once more: there is nothing left to do
    said = capsys.readouterr().out
    assert "is trained: 4 iterations are done" in said and f"Next: odtk export {best} {exported}" in said
    best.unlink()  # by its owner
    train(config)
    assert f"{config.path} is trained. Next: odtk export {config.path}" in capsys.readouterr().out
    best.touch()
    assert closing_line("a b.pth", None, -1) == (
        "a b.pth is trained; --val-annotations, or --val-share 0.2, would say its AP. "
        "Next: odtk export 'a b.pth' 'a b.onnx'"
    )
    assert sorted(os.listdir(tmp_path)) == ["log", "m.best.pth", "m.pth"]


def stop_at(monkeypatch: pytest.MonkeyPatch, iteration: int, number: int) -> None:
    """Sends this process a signal in the middle of an iteration (from 1)."""
    calls = 0

    def interrupted(*args: Any, **kwargs: Any) -> dict[str, tuple[Tensor, Tensor]]:
        nonlocal calls
        calls += 1
        if calls == iteration:
            os.kill(os.getpid(), number)
        return detection_loss(*args, **kwargs)

    monkeypatch.setattr(odtk.training.train, "detection_loss", interrupted)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_an_interrupted_run_is_saved(
    number: signal.Signals, tmp_path: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """SIGHUP is what a closed terminal or SSH connection sends."""
    config = settings(tmp_path / "m.pth", dataset, logdir=None)
    former = signal.getsignal(number)  # either may be ignored, as where a shell started the tests in the background
    signal.signal(number, signal.SIG_DFL)
    stop_at(monkeypatch, 1, number)
    try:
        with pytest.raises(SystemExit) as stop:
            train(config)
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, former)
    assert stop.value.code == 128 + number
    assert training_of(config.path)["iteration"] == 1 and os.listdir(tmp_path) == ["m.pth"]
    assert f"{number.name}: saved {config.path} at iteration 1." in capsys.readouterr().out


def test_a_second_run_on_the_same_file_is_refused(
    tmp_path: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of the first, which ends as if there had been no other."""
    config = settings(tmp_path / "m.pth", dataset, iters=2, logdir=None)
    refusals: list[str] = []

    def second(*args: Any, **kwargs: Any) -> Any:
        if not refusals:
            with pytest.raises(OdtkError) as error:
                train(dataclasses.replace(config, override=True))
            refusals.append(str(error.value))
        return detection_loss(*args, **kwargs)

    monkeypatch.setattr(odtk.training.train, "detection_loss", second)
    train(config)
    assert f"m.pth is in use by process {os.getpid()}" in refusals[0]
    assert training_of(config.path)["iteration"] == 2 and os.listdir(tmp_path) == ["m.pth"]


def test_images_are_prepared_as_the_model_says(tmp_path: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In training and validation, and its checkpoint says it to all that comes after."""
    made: list[LoaderConfig] = []

    def recorded(images: Dataset, data: LoaderConfig) -> Loader:
        made.append(data)
        return create_loader(images, data)

    for module in ("train", "validation"):
        monkeypatch.setattr(f"odtk.training.{module}.create_loader", recorded)
    config = with_validation(settings(tmp_path / "m.pth", dataset), iters=1, val_iters=1)
    model = dataclasses.replace(
        config.model, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), padding="black", head="dense", head_channels=8
    )
    train(dataclasses.replace(config, model=model))
    assert sorted(data.training for data in made) == [False, True]
    assert all((data.mean, data.std, data.padding) == (model.mean, model.std, "black") for data in made)
    assert files.load(config.path).model == model


def test_a_stop_before_the_first_iteration_leaves_no_lock(
    tmp_path: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        assert (tmp_path / "m.pth.lock").exists()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    monkeypatch.setattr(odtk.training.train, "create_loader", interrupted)
    with pytest.raises(SystemExit) as stop:
        train(settings(tmp_path / "m.pth", dataset, logdir=None))
    assert stop.value.code == 143 and os.listdir(tmp_path) == []


def test_a_stop_in_the_last_iteration_comes_after_the_last_validation(
    tmp_path: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    stop_at(monkeypatch, 2, signal.SIGTERM)
    train(with_validation(settings(tmp_path / "m.pth", dataset), iters=2, val_iters=2))
    assert (tmp_path / "m.best.pth").exists() and "odtk export" in capsys.readouterr().out


def test_a_run_removes_what_killed_ones_left(tmp_path: Path, dataset: Path) -> None:
    left = [".m.pth.123.tmp", ".m.pth.0123abcd-123-89abcdef.tmp", ".m.best.pth.0123abcd-123-89abcdef.tmp"]
    for name in (*left, ".other.pth.123.tmp"):
        (tmp_path / name).touch()
    train(settings(tmp_path / "m.pth", dataset, iters=1, logdir=None))
    assert sorted(os.listdir(tmp_path)) == [".other.pth.123.tmp", "m.pth"]


def test_a_slow_save_is_said(
    tmp_path: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def slow(path: str, checkpoint: files.Checkpoint) -> None:
        time.sleep(0.5)
        files.save(path, checkpoint)

    config = settings(tmp_path / "m.pth", dataset, iters=1, logdir=None)
    train(config)
    assert "does the storage answer" not in capsys.readouterr().err
    monkeypatch.setattr("odtk.training.log.SLOW_SECONDS", 0.1)
    monkeypatch.setattr(odtk.training.train, "save", slow)
    train(dataclasses.replace(config, iters=2))
    said = capsys.readouterr().err
    assert said == f"Warning: saving {config.path} takes more than 0.1 s: does the storage answer?\n"


DAMAGE: dict[str, Any] = {
    "iteration": "5",
    "best": None,
    "optimizer": {"state": {0: {"momentum_buffer": "x"}}},
    "optimizer of another model": {"state": {0: {"momentum_buffer": torch.ones(2)}}},
    "optimizer not finite": {"state": {0: {"momentum_buffer": torch.tensor([float("nan")])}}},
    "optimizer without momentum": {"state": {}},
    "scaler": {"scale": "x"},
    "scaler without interval": {},
    "average": {"a": 1},
    "average of another model": {"a": torch.ones(1)},
    "rng": torch.ones(3),
    "rng short": torch.ones(3, dtype=torch.uint8),
    "loader": {"seen": -1},
    "loader without position": {},
    "missing": None,
}


def test_a_damaged_run_is_refused_and_stays_as_it_is(tmp_path: Path, dataset: Path) -> None:
    config = settings(tmp_path / "m.pth", dataset, iters=1, logdir=None, ema=None)
    train(config)
    whole = torch.load(config.path, weights_only=True)
    for name, value in DAMAGE.items():
        training = dict(whole["training"])
        if name == "missing":
            del training["rng"]
        else:
            training[name.split()[0]] = value
        torch.save({**whole, "training": training}, config.path)
        before = Path(config.path).read_bytes()
        with pytest.raises(OdtkError, match=r"m\.pth cannot be (resumed|used)") as error:
            train(dataclasses.replace(config, iters=2))
        assert "\n" not in str(error.value), name
        assert Path(config.path).read_bytes() == before and os.listdir(tmp_path) == ["m.pth"]


@pytest.mark.parametrize(
    ("optimizer", "precision"), [("sgd", "fp32"), ("adamw", "fp32"), ("adamw", "fp16"), ("adamw, repeats", "fp32")]
)
def test_a_stopped_run_is_resumed_exactly(
    tmp_path: Path,
    dataset: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    optimizer: str,
    precision: str,
) -> None:
    logdir = str(tmp_path / "a")
    whole = settings(tmp_path / "whole.pth", dataset, ema=0.9, clip_grad=5.0, accumulate=2, logdir=logdir)
    optimizer, _, repeats = optimizer.partition(", ")
    whole = dataclasses.replace(whole, optimizer=optimizer, precision=precision, lr=0.001)
    if precision == "fp16":  # some CPUs have no fast convolution in it
        whole = dataclasses.replace(
            whole, data=dataclasses.replace(whole.data, resize=32, max_size=32, jitter=(32, 32), batch=1)
        )
    if repeats:
        augment = dataclasses.replace(whole.data.augment, scale=(0.5, 2.0), rotate=True)
        whole = dataclasses.replace(
            whole, data=dataclasses.replace(whole.data, repeat_threshold=0.9, augment=augment), ema=0.9
        )
    train(whole)
    parts = dataclasses.replace(whole, path=str(tmp_path / "parts.pth"), logdir=str(tmp_path / "b"))
    with monkeypatch.context() as patch:
        stop_at(patch, 2 * 2, signal.SIGTERM)
        with pytest.raises(SystemExit) as stop:
            train(parts)
    assert stop.value.code == 143 and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert f"saved {parts.path} at iteration 2." in capsys.readouterr().out
    assert list(losses(parts)) == [1, 2]
    torch.rand(7)  # whatever happened in between
    train(parts)
    assert f"Resuming {parts.path} at iteration 2 of 4" in capsys.readouterr().out
    assert losses(parts) == losses(whole)  # to the last bit

    a, b = files.load(whole.path), files.load(parts.path)
    assert files.weights_hash(a.state_dict) == files.weights_hash(b.state_dict)
    assert a.training is not None and b.training is not None
    assert a.training["schedule"]["optimizer"] == optimizer
    for name in ("average", "optimizer", "scaler", "rng", "loader"):
        torch.testing.assert_close(a.training[name], b.training[name], rtol=0, atol=0)
    assert files.weights_hash(a.state_dict) != files.weights_hash(a.training["average"])


def test_a_resumed_run_may_unfreeze_weights_and_change_the_weight_decay(tmp_path: Path, dataset: Path) -> None:
    config = settings(tmp_path / "m.pth", dataset, iters=1, lr=0.1)
    frozen = dataclasses.replace(config, model=dataclasses.replace(config.model, freeze_at=2))
    train(frozen)
    before = files.load(config.path).state_dict
    train(dataclasses.replace(config, iters=2, weight_decay=0.5))
    after = files.load(config.path)
    for name in ("conv1.weight", "layer1.0.conv1.weight", "layer2.0.conv1.weight"):
        name = f"backbones.ResNet18C4.{name}"
        assert not torch.equal(after.state_dict[name], before[name])
    assert after.training is not None and after.training["optimizer"]["param_groups"][0]["weight_decay"] == 0.5


def test_a_validation_that_fails_loses_no_iteration(
    tmp_path: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OdtkError("Out of memory.")

    config = with_validation(settings(tmp_path / "m.pth", dataset, val_iters=2))
    with monkeypatch.context() as patch, pytest.raises(OdtkError, match="Out of memory"):
        patch.setattr(odtk.training.train.Validation, "run", fail)
        train(config)
    assert training_of(config.path)["iteration"] == 2
    train(config)
    last, best = (training_of(path)["best"] for path in (config.path, tmp_path / "m.best.pth"))
    assert last == best


def test_a_damaged_validation_image_is_not_drawn(
    tmp_path: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = DatasetImage.decode

    def damaged_where_drawn(image: DatasetImage) -> np.ndarray:
        drawing = sys._getframe(1).f_globals["__name__"] == "odtk.training.validation"
        if drawing and image.path.name == "1.png":
            raise ImageError("broken data stream")
        return decode(image)

    monkeypatch.setattr(DatasetImage, "decode", damaged_where_drawn)
    train(with_validation(settings(tmp_path / "m.pth", dataset, iters=1)))
    events = b"".join(path.read_bytes() for path in (tmp_path / "log").glob("events.*"))
    assert b"validation/2" in events and b"validation/3" not in events


def test_a_new_run_keeps_the_log_of_another(tmp_path: Path, dataset: Path) -> None:
    config = settings(tmp_path / "m.pth", dataset, iters=1)
    for _ in range(3):
        train(dataclasses.replace(config, override=True))
    assert sorted(path.name for path in (tmp_path / "log").glob("metrics*")) == [
        "metrics.1.jsonl",
        "metrics.2.jsonl",
        "metrics.jsonl",
    ]
    assert list(losses(config)) == [1]


def test_saving_by_the_clock(tmp_path: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(tmp_path / "m.pth", dataset, save_seconds=0.0)
    saved: list[int] = []
    monkeypatch.setattr(
        odtk.training.train, "save", lambda path, checkpoint: saved.append(checkpoint.training["iteration"])
    )
    train(config)
    assert saved == [1, 2, 3, 4]


def test_a_loss_that_is_not_finite_stops_the_run(
    tmp_path: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is noticed only at the fourth iteration, as on a GPU; until then the weights must stay finite."""
    config = settings(tmp_path / "m.pth", dataset, iters=8, val_iters=2)
    calls = 0
    built: list[Detector] = []

    def poisoned(*args: Any, **kwargs: Any) -> dict[str, tuple[Tensor, Tensor]]:
        nonlocal calls
        calls += 1
        terms = detection_loss(*args, **kwargs)
        total, normalizer = terms["cls"]
        return {**terms, "cls": (total * (float("nan") if calls == 3 else 1), normalizer)}

    def recorded(model: ModelConfig) -> Detector:
        built.append(Detector(model))
        return built[-1]

    monkeypatch.setattr(odtk.training.train, "READ_EVERY", {"cpu": 100})
    monkeypatch.setattr(odtk.training.train, "detection_loss", poisoned)
    monkeypatch.setattr(odtk.training.train, "Detector", recorded)
    with pytest.raises(
        OdtkError, match="not finite at iteration 3 .*: lower --lr, lengthen --warmup.*holds iteration 2"
    ):
        train(config)
    assert calls == 4
    assert training_of(config.path)["iteration"] == 2
    assert all(torch.isfinite(p).all() for p in built[0].parameters())


def test_a_full_disk_ends_the_run_and_keeps_the_checkpoint(tmp_path: Path, dataset: Path) -> None:
    config = settings(tmp_path / "m.pth", dataset, iters=1, logdir=None)
    train(config)
    before = Path(config.path).read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(OdtkError, match=r"m\.pth could not be written \(File too large\)"):
            train(dataclasses.replace(config, iters=2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert Path(config.path).read_bytes() == before and os.listdir(tmp_path) == ["m.pth"]


def test_what_a_run_refuses(tmp_path: Path, dataset: Path) -> None:
    path = tmp_path / "m.pth"
    config = settings(path, dataset, iters=1, logdir=None)
    refused = {
        "does not exist": settings(tmp_path / "no" / "m.pth", dataset),
        "--classes 3: .* has 2 categories": dataclasses.replace(
            config, model=dataclasses.replace(config.model, classes=3)
        ),
        "no checkpoint .*/x.pth": dataclasses.replace(config, fine_tune=str(tmp_path / "x.pth")),
        "no checkpoint .*/y.pth": dataclasses.replace(config, backbone_weights=str(tmp_path / "y.pth")),
    }
    train(config)
    group = dataclasses.replace(config.model, norm="group")
    refused |= {
        r"another model \(--norm batch → group\): resume it as it was, pass --override": dataclasses.replace(
            config, model=group
        ),
        "trained without --ema": dataclasses.replace(config, ema=0.9),
        "trained by --optimizer sgd, whose state --optimizer adamw cannot": dataclasses.replace(
            config, optimizer="adamw"
        ),
        "is not a checkpoint": settings(dataset / "data.json", dataset),
        "other categories": other_categories(config, tmp_path / "other.json"),
    }
    for message, wrong in refused.items():
        if "no checkpoint" in message:
            wrong = dataclasses.replace(wrong, override=True)
        with pytest.raises(OdtkError, match=message):
            train(wrong)
    assert training_of(path)["iteration"] == 1
    train(dataclasses.replace(config, model=group, override=True))
    assert files.load(path).model.norm == "group"


def other_categories(config: TrainConfig, path: Path) -> TrainConfig:
    content = json.loads(Path(str(config.data.annotations)).read_text())
    content["categories"][0]["name"] = "blue"
    path.write_text(json.dumps(content))
    return dataclasses.replace(config, data=dataclasses.replace(config.data, annotations=str(path)))


def test_validation_needs_the_same_categories(tmp_path: Path, dataset: Path) -> None:
    config = with_validation(settings(tmp_path / "m.pth", dataset))
    assert config.val_data is not None
    other = other_categories(config, tmp_path / "other.json").data.annotations
    with pytest.raises(OdtkError, match="validation needs the same"):
        train(dataclasses.replace(config, val_data=dataclasses.replace(config.val_data, annotations=other)))


def test_unusable_annotations_are_refused_before_training(tmp_path: Path, dataset: Path) -> None:
    config = with_validation(settings(tmp_path / "m.pth", dataset))
    content = json.loads((dataset / "data.json").read_text())
    content["annotations"][0]["bbox"] = "none"
    (tmp_path / "val.json").write_text(json.dumps(content))
    assert config.val_data is not None
    val_data = dataclasses.replace(config.val_data, annotations=str(tmp_path / "val.json"))
    with pytest.raises(OdtkError, match="box"):
        train(dataclasses.replace(config, val_data=val_data))
    assert not (tmp_path / "m.pth").exists()


def start_weights(config: TrainConfig) -> dict[str, Tensor]:
    """The weights that a run begins with: those after one iteration with learning rate zero."""
    train(dataclasses.replace(config, iters=1, lr=0.0, logdir=None))
    return files.load(config.path).state_dict


def test_fine_tuning_loads_what_fits_and_says_so(tmp_path: Path, dataset: Path, capsys: pytest.CaptureFixture) -> None:
    model = ModelConfig(**SMALL | {"classes": 5}, norm="frozen")
    source = Detector(model)
    files.save(tmp_path / "source.pth", files.Checkpoint(model, None, source.state_dict()))
    config = settings(tmp_path / "m.pth", dataset, fine_tune=str(tmp_path / "source.pth"))
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, norm="frozen"))
    begun = start_weights(config)
    said = capsys.readouterr().out
    assert re.search(r"Loaded from .*source\.pth \(\d+ tensors\): .*ResNet18C4\.conv1,.*head\.box_head\.8", said)
    assert "Initialized at random (2 tensors): head.cls_head.8.\n" in said
    for name, tensor in source.state_dict().items():
        assert torch.equal(begun[name], tensor) == (not name.startswith("head.cls_head.8."))


def test_backbone_weights(
    tmp_path: Path, dataset: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ModelConfig(backbones=("ResNet18C4",), classes=2, norm="frozen")  # of a width that has weights
    extractor = Detector(model).feature_extractors()["ResNet18C4"].state_dict()
    weights = {**extractor, "fc.weight": torch.zeros(1000, 512), "layer4.0.conv1.weight": torch.zeros(512, 256, 3, 3)}
    torch.save(weights, tmp_path / "resnet18.pth")
    config = settings(tmp_path / "m.pth", dataset, backbone_weights=str(tmp_path / "resnet18.pth"), model=model)
    begun = start_weights(config)
    assert torch.equal(begun["backbones.ResNet18C4.layer3.1.conv2.weight"], extractor["layer3.1.conv2.weight"])
    assert "Loaded from" in capsys.readouterr().out

    torch.save({"other": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(OdtkError, match=r"other\.pth has no tensor that fits ResNet18C4"):
        train(dataclasses.replace(config, override=True, backbone_weights=str(tmp_path / "other.pth")))

    def unreachable(url: str, **_: Any) -> None:
        raise OSError(f"no route to {url}")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", unreachable)
    with pytest.raises(OdtkError, match=r"resnet18-f37072fd\.pth could not be downloaded .*--backbone-weights PATH"):
        train(dataclasses.replace(config, override=True, backbone_weights=None))
    assert socket.getdefaulttimeout() is None


class Posts(http.server.BaseHTTPRequestHandler):
    """A server that keeps what is posted to it."""

    bodies: list[dict[str, float]] = []

    def do_POST(self) -> None:
        self.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


def test_metrics_are_posted() -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), Posts) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        poster = Background(MetricsPoster(f"http://127.0.0.1:{server.server_port}/metrics"), "x")
        for iteration in range(3):
            poster.send(({"iteration": iteration, "loss": 0.5}, []))
        began = time.monotonic()
        poster.end(began)
        poster.wait(began)
        server.shutdown()
        thread.join()
    assert Posts.bodies == [{"iteration": iteration, "loss": 0.5} for iteration in range(3)]


def test_a_failing_server_never_stops_a_run(
    tmp_path: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("odtk.training.log.POST_TIMEOUT", 0.2)
    said = ""
    with socket.create_server(("127.0.0.1", 0)) as server:  # it accepts the connection and never answers
        port = server.getsockname()[1]
        url = f"http://127.0.0.1:{port}"
        poster = Background(MetricsPoster(url), f"--post-metrics {url}")
        start = time.monotonic()
        for iteration in range(1000):  # more than the queue holds
            poster.send(({"iteration": iteration}, []))
        assert time.monotonic() - start < 1
        while "fails" not in said and time.monotonic() - start < 60:
            time.sleep(0.05)
            said += capsys.readouterr().err
        start = time.monotonic()
        poster.end(start)
        poster.wait(start)
        assert time.monotonic() - start < 5
    label = f"Warning: --post-metrics http://127.0.0.1:{port}"
    assert sorted(said.splitlines()) == [
        f"{label} fails (ReadTimeout); training goes on.",
        f"{label} takes no more entries, which are lost until it does again; training goes on.",
    ]
    config = settings(tmp_path / "m.pth", dataset, post_metrics=f"http://127.0.0.1:{port}", iters=2, logdir=None)
    train(config)
    assert training_of(config.path)["iteration"] == 2
    assert capsys.readouterr().err.count("fails (ConnectionError)") == 1


# ---------------------------------------------------------------------------------------------------------------------
# Several processes


def poison_rank_1(config: TrainConfig, rank: int, world: int) -> None:
    """A job: the loss of rank 1 is not finite at the second iteration."""
    calls = 0

    def poisoned(*args: Any, **kwargs: Any) -> dict[str, tuple[Tensor, Tensor]]:
        nonlocal calls
        calls += 1
        terms = detection_loss(*args, **kwargs)
        scale = float("inf") if rank == 1 and calls == 2 else 1.0
        return {name: (total * scale, normalizer) for name, (total, normalizer) in terms.items()}

    odtk.training.train.detection_loss = poisoned
    train(config, rank, world)


def pretrained(path: Path, model: ModelConfig) -> str:
    """A checkpoint whose normalization statistics differ from their initial values."""
    detector = Detector(model)
    detector.initialize()
    for name, buffer in detector.named_buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5) if name.endswith(("var", "weight")) else buffer.normal_(0, 0.1)
    files.save(path, files.Checkpoint(model, None, detector.state_dict()))
    return str(path)


@pytest.mark.slow
@pytest.mark.parametrize(("norm", "head"), [("group", "retinanet"), ("frozen", "retinanet"), ("frozen", "dense")])
def test_two_processes_are_one_with_the_whole_batch(tmp_path: Path, dataset: Path, norm: str, head: str) -> None:
    """The losses and the weights after two steps differ by rounding only; the file that rank 0 read counts for both.

    The dense head's batch norms take their statistics over both processes.
    """
    model = ModelConfig(**SMALL, norm=norm, head=head)
    one = settings(
        tmp_path / "one.pth",
        dataset,
        iters=2,
        logdir=str(tmp_path / "a"),
        model=model,
        fine_tune=pretrained(tmp_path / "start.pth", model),
    )
    one = dataclasses.replace(one, data=dataclasses.replace(one.data, batch=4))
    two = dataclasses.replace(one, path=str(tmp_path / "two.pth"), logdir=str(tmp_path / "b"))
    two = with_validation(dataclasses.replace(two, data=dataclasses.replace(two.data, batch=2)))
    begun = start_weights(dataclasses.replace(one, path=str(tmp_path / "begun.pth")))
    train(one)
    launch(train, two, devices="cpu:2")
    for iteration, loss in losses(one).items():
        assert losses(two)[iteration] == pytest.approx(loss, rel=1e-5)
    a, b = files.load(one.path).state_dict, files.load(two.path).state_dict
    trained = dict(Detector(model).named_parameters()).keys()
    for name, start in begun.items():
        step, apart = (a[name] - start).double().norm(), (a[name] - b[name]).double().norm()
        assert (step > 0) == (name in trained or ".norms." in name) and apart <= 1e-3 * step, name
    assert list(records(two, "AP")) == [2]


def note_statistics(config: TrainConfig, rank: int, world: int) -> None:
    """A job: each rank writes the sum of the buffers of the model that it validates."""

    def note(self: odtk.training.train.Validation, detector: Detector, autocast: object) -> None:
        total = sum(b.double().sum().item() for b in detector.buffers())
        Path(config.path).with_name(f"rank{rank}").write_text(str(total))

    odtk.training.train.Validation.run = note  # type: ignore[assignment, method-assign]
    train(config, rank, world)


@pytest.mark.slow
def test_all_ranks_validate_the_ema_of_rank_0(tmp_path: Path, dataset: Path) -> None:
    config = with_validation(settings(tmp_path / "m.pth", dataset, iters=2, ema=0.5, logdir=None))
    data = dataclasses.replace(config.data, batch=1)
    launch(note_statistics, dataclasses.replace(config, data=data), devices="cpu:2")
    assert (tmp_path / "rank0").read_text() == (tmp_path / "rank1").read_text()


@pytest.mark.slow
def test_all_ranks_stop_at_a_loss_that_is_not_finite(tmp_path: Path, dataset: Path) -> None:
    start = time.monotonic()
    with pytest.raises(OdtkError, match="^The loss is not finite at iteration 2 .* nothing was saved yet"):
        launch(poison_rank_1, settings(tmp_path / "m.pth", dataset), devices="cpu:2")
    assert time.monotonic() - start < 60
    assert not (tmp_path / "m.pth").exists()


RUN = """
import pickle, sys
from odtk.launch import launch
from odtk.training.train import train
if __name__ == "__main__":
    launch(train, pickle.load(open(sys.argv[1], "rb")), devices=sys.argv[2])
"""


def start(config: TrainConfig, devices: str, folder: Path) -> subprocess.Popen[str]:
    """Starts a run in its own process, with pipes for its output."""
    (folder / "config.pickle").write_bytes(pickle.dumps(config))
    (folder / "run.py").write_text(RUN)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(folder / "run.py"), str(folder / "config.pickle"), devices]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_run_outlives_the_reader_of_its_output(tmp_path: Path, dataset: Path) -> None:
    """Such as the tee in `odtk train … | tee log`, which Ctrl-C ends too."""
    config = with_validation(settings(tmp_path / "m.pth", dataset))
    process = start(config, "cpu", tmp_path)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    said = process.stderr.read()
    assert process.wait(120) == 0, said
    assert training_of(config.path)["iteration"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("devices", ["cpu", "cpu:2"])
def test_sigterm_saves_and_exits(devices: str, tmp_path: Path, dataset: Path) -> None:
    config = settings(tmp_path / "m.pth", dataset, iters=10000, milestones=())
    process = start(config, devices, tmp_path)
    try:
        deadline = time.monotonic() + 120
        log = tmp_path / "log" / "metrics.jsonl"
        while not (log.exists() and log.read_text().count("\n") >= 2):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 143
    iteration = training_of(config.path)["iteration"]
    assert iteration == max(losses(config)) and f"saved {config.path} at iteration {iteration}." in said


@pytest.mark.slow
def test_it_learns(tmp_path: Path, dataset: Path) -> None:
    """It learns six images by heart, with the whole pyramid and in bfloat16."""
    model = ModelConfig(
        backbones=("ResNet18FPN",), classes=2, norm="batch", resnet_width=0.5, pyramid_channels=64, head_channels=64
    )
    config = settings(
        tmp_path / "m.pth", dataset, model=model, precision="mixed", iters=60, milestones=(45,), warmup=5, clip_grad=5.0
    )  # unclipped, the class tower dies near iteration 20 and AP50 stays 0
    data = dataclasses.replace(config.data, batch=6, augment=AugmentConfig(crop=0))
    config = with_validation(dataclasses.replace(config, data=data))
    train(config)
    assert records(config, "AP")[60]["AP50"] > 0.5
