"""Learning from images without boxes: losses, burn-in, resuming, several processes."""

import dataclasses
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import odtk
import odtk.training.train
import odtk.training.unlabeled
from odtk.config import ROTATED_ANGLES, LossConfig, ModelConfig, OdtkError, TrainConfig
from odtk.data.dataset import Dataset
from odtk.launch import launch
from odtk.model import checkpoint as files
from odtk.model.detector import Detector
from odtk.training.loss import detection_loss, quality_focal_loss
from odtk.training.start import trial
from odtk.training.train import train
from odtk.training.training_set import TrainingSet
from odtk.training.unlabeled import entropy_loss, foreground_share, pseudo_label_loss, region, soft_focal_loss
from tests.training.test_train import (
    SMALL,
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

HEADS = ("retinanet", "fcos", "dense")


def model_of(head: str, **more: Any) -> ModelConfig:
    return ModelConfig(**{**SMALL, "norm": "frozen", "head": head, "head_channels": 32, "head_convs": 1, **more})


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six labeled images, and in the folder more/ five others."""
    folder = tmp_path_factory.mktemp("data") / "shapes"
    draw_dataset(folder, 6)
    (folder / "more").mkdir()
    generator = np.random.default_rng(3)
    for number in range(5):
        pixels = generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "more" / f"{number}.png")
    return folder


def unlabeled(path: Path, dataset: Path, **changes: Any) -> TrainConfig:
    """A run of four iterations of which the first has labeled images alone."""
    config = settings(path, dataset, model=model_of("dense"), ema=0.5, burn_in=1, lr=0.001)
    more: dict[str, Any] = {"unlabeled": (str(dataset / "more"),), "unlabeled_loss": "pseudo-labels"}
    more |= {"unlabeled_batch": 2, "unlabeled_weight": 1.5}
    return dataclasses.replace(config, **{**more, **changes})


def raw_logits(model: ModelConfig, seed: int, images: int = 2) -> list[Tensor]:
    """Random levels of 4×4 and 2×2 cells and two classes."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(images, model.num_anchors * 2, *size, generator=generator) for size in ((4, 4), (2, 2))]


# ---------------------------------------------------------------------------------------------------------------------
# Losses


def test_soft_targets_of_one_class_are_the_quality_focal_loss() -> None:
    logits, quality = torch.randn(3, 5, 4), torch.rand(3, 5)
    labels = torch.randint(-1, 4, (3, 5))
    target = torch.zeros(3, 5, 4)
    target.scatter_(-1, labels.clamp(min=0)[..., None], torch.where(labels >= 0, quality, 0)[..., None])
    expected = quality_focal_loss(logits, labels, quality).item()
    assert soft_focal_loss(logits, target).item() == pytest.approx(expected, rel=1e-5)


def test_the_region_has_the_highest_scores_of_each_image() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.7], [0.2, 0.2, 0.2, 0.2], [0.0, 0.01, 0.02, 0.03]])
    found = region(scores, 0.5)
    assert found[0].tolist() == pytest.approx([0, 0.9, 0, 0.7]) and found[2].tolist() == pytest.approx(
        [0, 0, 0.02, 0.03]
    )
    assert (found[1] > 0).sum() == 2
    assert (region(scores, 0.0) > 0).sum(1).tolist() == [1, 1, 1] and torch.equal(region(scores, 1.0), scores)


@pytest.mark.parametrize("angles", [(), ROTATED_ANGLES])
@pytest.mark.parametrize("head", HEADS)
def test_a_detector_that_agrees_with_its_teacher_has_nothing_to_learn_in_the_region(
    head: str, angles: tuple[float, ...]
) -> None:
    if head == "fcos" and angles:
        pytest.skip("the fcos head has no angle")
    model = model_of(head, angles=angles)
    taught = raw_logits(model, 0)

    def gradients(share: float) -> Tensor:
        own = [level.clone().requires_grad_() for level in taught]
        terms = pseudo_label_loss(own, taught, share, model)
        assert set(terms) == {"cls"}, "boxes are learned from labeled images alone"
        terms["cls"][0].backward()
        return torch.cat([level.grad.flatten(1) for level in own], 1)  # type: ignore[union-attr]

    assert gradients(1.0).abs().max() < 1e-6
    share = 0.25
    points = sum(level.shape[2] * level.shape[3] for level in taught) * model.num_anchors
    found = gradients(share)
    unmoved = (found.abs() < 1e-6).sum(1)
    assert unmoved.tolist() == [2 * round(share * points)] * 2, "both classes of the points of the region"
    assert found.min() > -1e-6, "all others are to become background"


def test_the_loss_is_divided_by_the_best_scores_of_the_region() -> None:
    model = model_of("dense")
    taught, own = raw_logits(model, 0, images=1), raw_logits(model, 1, images=1)
    scores = [level.sigmoid() for level in taught]
    best = torch.cat([level.amax(1).flatten() for level in scores]).topk(5).values  # of a quarter of the 20 points
    term, count = pseudo_label_loss(own, taught, 0.25, model)["cls"]
    assert count.item() == pytest.approx(best.sum().item(), rel=1e-6)
    targets = [level * (level.amax(1) >= best.min()) for level in scores]
    expected = sum(soft_focal_loss(a, b).item() for a, b in zip(own, targets, strict=True))
    assert term.item() == pytest.approx(expected, rel=1e-5)


def test_entropy_moves_scores_away_from_a_half() -> None:
    model = model_of("dense")
    total, points = entropy_loss([torch.zeros(2, 2, 4, 4)], 0.25, model)["entropy"]
    assert (total.item(), points.item()) == (pytest.approx(2 * 2 * 16), 0.25 * 2 * 16), "a bit per score"
    logits = torch.tensor([-20.0, -1.0, 0.0, 1.0, 20.0]).view(1, 1, 1, 5).requires_grad_()
    loss = entropy_loss([logits], 1.0, dataclasses.replace(model, classes=1))["entropy"][0]
    loss.backward()
    p = 1 / (1 + np.exp(-1))
    assert loss.item() == pytest.approx(1 - 2 * (p * np.log2(p) + (1 - p) * np.log2(1 - p)), rel=1e-5)
    assert logits.grad is not None
    steps = logits.grad.flatten().tolist()
    assert steps[1] > 0 > steps[3] and steps[2] == 0 and abs(steps[0]) < 1e-6 > abs(steps[4])


@pytest.mark.parametrize("head", HEADS)
def test_the_region_is_as_large_as_what_boxes_take(tmp_path: Path, dataset: Path, head: str) -> None:
    config = settings(tmp_path / "m.pth", dataset, model=model_of(head, scales=(1.5, 2.0, 2.5)))
    detector = Detector(config.model)
    data = dataclasses.replace(config.data, batch=6, augment=dataclasses.replace(config.data.augment, crop=0.0))
    labeled = Dataset.load(data.annotations, data.images, training=True)
    loader = odtk.training.train.create_loader(labeled, dataclasses.replace(data, stride=16))
    batch = loader.batch(0)  # all six images
    logits, boxes = detector(batch.images)
    terms = detection_loss(
        logits,
        boxes,
        batch.boxes,
        batch.labels,
        anchors=detector.anchors(),
        strides=detector.strides,
        model=config.model,
        loss=config.loss,
    )
    points = 6 * 4 * 4 * config.model.num_anchors
    share = foreground_share(labeled, dataclasses.replace(data, stride=16), detector, LossConfig())
    assert terms["cls"][1] > 0 and share == pytest.approx(terms["cls"][1].item() / points)
    halves = dataclasses.replace(data, stride=16, batch=3, world=2, rank=1)
    assert foreground_share(labeled, halves, detector, LossConfig()) == share

    first, *rest = labeled.images
    empty = [dataclasses.replace(image, boxes=image.boxes[:0], labels=image.labels[:0]) for image in rest]
    small = dataclasses.replace(data, stride=16, batch=1)
    alone, sparse = (
        foreground_share(dataclasses.replace(labeled, images=images), small, detector, LossConfig())
        for images in ([first], [*empty, first])
    )
    assert alone == sparse > 0


# ---------------------------------------------------------------------------------------------------------------------
# Runs


def test_the_average_sees_the_weak_view_and_the_detector_the_strong_one(
    tmp_path: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    config = unlabeled(tmp_path / "m.pth", dataset)
    weak: list[Tensor] = []
    firsts: list[int] = []
    seen: list[tuple[bool, Tensor]] = []

    def marked(images: Tensor, data: object, first: int) -> Tensor:
        weak.append(images)
        firsts.append(first)
        return images + 100

    forward = Detector.forward

    def noted(self: Detector, images: Tensor) -> Any:
        seen.append((self.training, images))
        return forward(self, images)

    monkeypatch.setattr(odtk.training.train, "strong_view", marked)
    monkeypatch.setattr(Detector, "forward", noted)
    train(config)
    assert firsts == [2, 4, 6], "the first two lend colors alone"
    assert [mode for mode, _ in seen] == [True] + [False, True, True] * 3
    for i, images in enumerate(weak):
        average, student = seen[1 + 3 * i][1], seen[2 + 3 * i][1]
        assert torch.equal(average, images) and torch.equal(student, images + 100)
    said = capsys.readouterr().out
    assert "5 unlabeled images, 2 per batch, from iteration 2 on, by pseudo-labels for the best " in said
    assert "take; 50 % of the labeled images take on their colors." in said
    log = records(config)
    assert log[1]["unlabeled"] == 0 and all(log[i]["unlabeled"] > 0 for i in (2, 3, 4))
    assert all(v["loss"] == pytest.approx(v["cls"] + v["box"] + v["unlabeled"], rel=1e-5) for v in log.values())
    found = files.load(config.path)
    assert found.state_dict.keys() == Detector(config.model).state_dict().keys()
    odtk.export(config.path, str(tmp_path / "m.onnx"), size=64, full_precision=True, devices="cpu")


def test_labeled_and_validated_images_are_left_out(
    tmp_path: Path, dataset: Path, capsys: pytest.CaptureFixture
) -> None:
    """All eleven images of the folder are named: four are labeled, two set aside, five neither."""
    config = unlabeled(tmp_path / "m.pth", dataset, unlabeled=(str(dataset),), iters=1, burn_in=1)
    train(with_validation(config, held_out=(2, 5), unlabeled_loss="none", val_iters=1000))
    said = capsys.readouterr().out
    assert "5 unlabeled images (6 more are left out: they are labeled or validated on), 2 per batch" in said


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("loss", ["pseudo-labels", "entropy"])
def test_every_head_learns_from_them(tmp_path: Path, dataset: Path, head: str, loss: str) -> None:
    weights = []
    for name, images in (("a", (str(dataset / "more"),)), ("b", ())):
        path = tmp_path / f"{name}.pth"
        more = {"model": model_of(head), "unlabeled_loss": loss, "iters": 2, "clip_grad": None}
        train(unlabeled(path, dataset, unlabeled=images, unlabeled_colors=0.0, **more))
        weights.append(training_of(path)["average"])
    assert all(torch.isfinite(tensor).all() for tensor in weights[0].values())
    moved = {name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])}
    heads = {part for part in ("cls_head", "box_head") if any(part in name and "norms" not in name for name in moved)}
    # The labeled batches are the same: what differs is what the unlabeled ones have taught.
    assert heads == {"cls_head"}


def test_labeled_images_take_on_their_colors_from_the_first_iteration(
    tmp_path: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lent: list[tuple[Tensor, int]] = []
    seen: list[Tensor] = []
    forward = Detector.forward

    def marked(images: Tensor, others: Tensor, data: object, share: float, first: int) -> Tensor:
        assert share == 0.25 and images.shape == others.shape and not torch.equal(images, others)
        lent.append((images, first))
        return images + 100

    def noted(self: Detector, images: Tensor) -> Any:
        seen.append(images)
        return forward(self, images)

    monkeypatch.setattr(odtk.training.unlabeled, "transfer_colors", marked)
    monkeypatch.setattr(Detector, "forward", noted)
    train(unlabeled(tmp_path / "m.pth", dataset, unlabeled_colors=0.25, iters=2))
    assert [first for _, first in lent] == [0, 2]
    assert torch.equal(seen[0], lent[0][0] + 100), "in burn-in"
    assert torch.equal(seen[3], lent[1][0] + 100), "after the average and the detector have seen the unlabeled ones"
    assert all((images < 50).all() for images in seen[1:3]), "which keep their own colors"


def test_a_stopped_run_with_unlabeled_images_is_resumed_exactly(
    tmp_path: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = pretrained(tmp_path / "teacher.pth", model_of("fcos"))
    more: dict[str, Any] = {"accumulate": 2, "clip_grad": 5.0, "optimizer": "adamw", "teacher": teacher, "iters": 5}
    whole = unlabeled(tmp_path / "whole.pth", dataset, logdir=str(tmp_path / "a"), **more)
    train(whole)
    parts = dataclasses.replace(whole, path=str(tmp_path / "parts.pth"), logdir=str(tmp_path / "b"))
    with monkeypatch.context() as patch:
        stop_at(patch, 3 * 2, signal.SIGTERM)
        with pytest.raises(SystemExit):
            train(parts)
    assert list(losses(parts)) == [1, 2, 3] and training_of(parts.path)["unlabeled"]["seen"] == 3 * 2 * 2
    torch.rand(7)
    train(parts)
    for i, line in records(whole).items():
        same = {n: v for n, v in line.items() if n not in ("time", "images_per_second")}
        assert {n: records(parts)[i][n] for n in same} == same
    a, b = training_of(whole.path), training_of(parts.path)
    for name in ("average", "adapters", "optimizer", "scaler", "rng", "loader", "unlabeled"):
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=0)


def test_the_trial_steps_of_a_timed_run_include_them(
    tmp_path: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[object] = []
    original = odtk.training.train.pseudo_label_loss

    def counted(*given: Any) -> Any:
        calls.append(given)
        return original(*given)

    monkeypatch.setattr(odtk.training.train, "pseudo_label_loss", counted)
    config = unlabeled(tmp_path / "m.pth", dataset, burn_in=1000)
    trial(config, TrainingSet.of(config), 0, 1, steps=2, untimed=1)
    assert len(calls) == 3


def test_what_a_run_with_unlabeled_images_refuses(tmp_path: Path, dataset: Path) -> None:
    given = small_run(dataset, iters=2)
    path, more = str(tmp_path / "m.pth"), str(dataset / "more")
    learned = {"unlabeled": more, "unlabeled_loss": "pseudo-labels"}
    for wrong, said in (
        ({"burn_in": 3}, "--burn-in needs --unlabeled PATH"),
        ({"unlabeled_loss": "entropy"}, "--unlabeled-loss needs --unlabeled PATH"),
        ({**learned, "burn_in": 2}, "--burn-in 2 leaves none of the 2 iterations"),
        ({"unlabeled": more, "unlabeled_colors": 0.0}, "--unlabeled-colors 0 leaves nothing to --unlabeled"),
        ({"unlabeled": more, "burn_in": 1}, "--burn-in needs --unlabeled-loss pseudo-labels or entropy"),
        ({**learned, "ema": 0}, "The pseudo-labels come from the average of the weights"),
        ({"unlabeled": str(tmp_path / "none")}, "--unlabeled: The image or folder .*none does not exist"),
        ({"unlabeled": str(dataset / "1.png")}, "--unlabeled: all of its images are labeled or validated on"),
    ):
        with pytest.raises(OdtkError, match=said):
            odtk.train(path, **{**given, **wrong})
    with pytest.raises(OdtkError, match="--unlabeled-batch 3 does not divide by the 2 devices: 2 does"):
        odtk.train(path, **{**given, "devices": "cpu:2"}, unlabeled=more, unlabeled_batch=3)
    assert not Path(path).exists()

    odtk.train(path, **given, **learned)
    assert files.load(path).setting("ema") == 0.99 and files.load(path).setting("burn_in") == 0
    before = Path(path).read_bytes()
    fewer = [f"{more}/{i}.png" for i in range(4)]
    with pytest.raises(OdtkError, match="was trained with other unlabeled images: leave --unlabeled as it was"):
        odtk.train(path, **{**given, "iters": 3}, unlabeled=fewer)
    assert Path(path).read_bytes() == before
    odtk.train(path, **{**given, "iters": 3}, unlabeled=fewer, override_settings=True)
    assert training_of(path)["iteration"] == 3
    begun = {"unlabeled": fewer, "unlabeled_loss": "pseudo-labels", "burn_in": 1, "override_settings": True}
    odtk.train(path, **{**given, "iters": 4}, **begun)
    plain = {"unlabeled": fewer, "unlabeled_loss": "none", "override_settings": True}
    odtk.train(path, **{**given, "iters": 5}, **plain)
    assert training_of(path)["iteration"] == 5 and files.load(path).setting("unlabeled_loss") == "none"
    with pytest.raises(OdtkError, match=f"gone does not exist.* If it has moved since {path} began, pass --unlabeled"):
        odtk.train(path, **{**given, "iters": 6}, **{**plain, "unlabeled": str(tmp_path / "gone")})


def test_colors_alone_are_learned_by_default(tmp_path: Path, dataset: Path, capsys: pytest.CaptureFixture) -> None:
    given = small_run(dataset, iters=3)
    path, plain = (str(tmp_path / name) for name in ("m.pth", "plain.pth"))
    odtk.train(path, **given, unlabeled=str(dataset / "more"))
    said = capsys.readouterr().out
    assert "per batch; 50 % of the labeled images take on their colors." in said and "unlabeled 0" not in said
    assert files.load(path).setting("ema") is None, "which pseudo-labels alone need"
    odtk.train(plain, **given)
    a, b = (files.load(name).state_dict for name in (path, plain))
    assert any(not torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["pseudo-labels", "entropy", "none"])
def test_two_processes_with_unlabeled_images_are_one(tmp_path: Path, dataset: Path, loss: str) -> None:
    model = model_of("dense")
    start = pretrained(tmp_path / "start.pth", model)
    more: dict[str, Any] = {"iters": 3, "fine_tune": start, "unlabeled_loss": loss, "accumulate": 2}
    one = unlabeled(tmp_path / "one.pth", dataset, logdir=str(tmp_path / "a"), unlabeled_batch=4, **more)
    one = dataclasses.replace(one, data=dataclasses.replace(one.data, batch=4))
    two = dataclasses.replace(one, path=str(tmp_path / "two.pth"), logdir=str(tmp_path / "b"), unlabeled_batch=2)
    two = with_validation(dataclasses.replace(two, data=dataclasses.replace(two.data, batch=2)))
    begun = start_weights(dataclasses.replace(one, path=str(tmp_path / "begun.pth")))
    train(one)
    launch(train, two, devices="cpu:2")
    for i, line in records(one).items():
        for name in ("loss", *(["unlabeled"] if loss != "none" else [])):
            assert records(two)[i][name] == pytest.approx(line[name], rel=1e-4)
    a, b = training_of(one.path)["average"], training_of(two.path)["average"]
    for name, before in begun.items():
        step, apart = (a[name] - before).double().norm(), (a[name] - b[name]).double().norm()
        assert apart <= 2e-3 * step + 1e-9, name
