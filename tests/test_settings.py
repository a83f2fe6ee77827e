"""Settings: one truth for flags, settings files and the Python API; checks, presets, and what follows from what."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from odtk.cli import COMMANDS, build_parser, settings_of
from odtk.config import OdtkError
from odtk.model.detector import Detector
from odtk.model.sizes import count_parameters
from odtk.settings import (
    ANGLE,
    DEVICES,
    DURATION,
    FRACTION,
    PART,
    PRESETS,
    SHARE,
    SIDE,
    SQUARE,
    SWITCH,
    TEXT,
    VARIANTS,
    ExportSettings,
    InferSettings,
    Option,
    Settings,
    TrainSettings,
    flag,
    options,
    seconds_of,
)
from odtk.training.plan import train_config

EVERY = [(command, name) for command, (cls, _, _) in COMMANDS.items() for name in options(cls)]
REQUIRED: dict[str, dict[str, Any]] = {
    "train": {"model": "m.pth", "annotations": "a.json"},
    "plan": {"annotations": "a.json"},
    "infer": {"model": "m.pth"},
    "export": {"model": "m.pth", "output": "m.onnx"},
    "evaluate": {"detections": "d.json", "annotations": "a.json"},
    "check": {"annotations": "a.json"},
    "pretrain": {"model": "m.pth", "images": "i", "val_images": "v"},
    "convert": {"source": "a.json", "target": "b", "to": "voc"},
    "benchmark": {"model": "m.pth"},
    "info": {},
    "visualize": {},
    "synth": {"folder": "d"},
}
NEEDS: dict[str, dict[str, Any]] = {
    "bundle": {"output": "folder"},  # what else must be given for an option to make sense
    "dcn_v1": {"dcn": [4]},
    "absolute_angle": {"rotated_bbox": True},
    "unlabeled_loss": {"unlabeled": ["u"]},
    "unlabeled_batch": {"unlabeled": ["u"]},
    "unlabeled_weight": {"unlabeled": ["u"], "unlabeled_loss": "entropy"},
    "unlabeled_colors": {"unlabeled": ["u"]},
    "burn_in": {"unlabeled": ["u"], "unlabeled_loss": "entropy"},
    "teacher_weight": {"teacher": "t.pth"},
    "teacher_labels": {"teacher": "t.pth"},
    "teacher_temperature": {"teacher": "t.pth", "teacher_labels": "soft"},
    "teacher_scale": {"teacher": "t.pth"},
    "verify": {"annotations": "v.json"},
    "fed_as": {"bundle": True, "output": "served", "verify": True, "annotations": "v.json"},
    "int8": {"calibration_images": "c"},
    "features": {"model": "m.pth"},
    "draw_threshold": {"draw": "pictures"},
    "overlap": {"tiles": [64]},
    "every": {"video": "v.mp4"},
    "realtime": {"video": "v.mp4"},
    "log_to": {"logdir": "log"},
    "track": {"video": "v.mp4"},
    "track_threshold": {"video": "v.mp4", "track": True},
    "rtsp_transport": {"video": "rtsp://v"},
    "hardware_compatible": {"output": "m.plan"},
    "version_compatible": {"output": "m.plan"},
    "anchors": {"model": "m.pth", "annotations": "a.json"},
}


def sample(name: str, one: Option, default: Any) -> Any:
    """A good value of an option that is not its default."""
    if name == "output":
        return "other.plan" if one.positional else "other.json"
    if name == "report":
        return "other.html"
    if one.check is SWITCH:
        return True
    if one.choices is not None:
        single: Any = next(c for c in one.choices if c != default)
    elif one.check is TEXT:
        single = "other"
    elif one.check is DEVICES:
        single = "cpu"
    elif one.check is DURATION:
        single = "8m"
    elif one.check is SQUARE:
        single = 64
    elif one.check in (FRACTION, PART, SHARE, SIDE):
        single = 0.25
    elif one.check is ANGLE:
        single = -3.5
    else:
        single = 7
    if one.count is None:
        return single
    return [single] * (one.count if isinstance(one.count, int) else 1)


def argv_of(command: str, cls: type[Settings], values: dict[str, Any]) -> list[str]:
    """Values as a command line."""
    known = options(cls)
    line = [command] + [str(values[name]) for name, one in known.items() if one.positional and name in values]
    for name, value in values.items():
        if known[name].positional:
            continue
        if known[name].check is SWITCH:
            line += [flag(name)] if value else []
        else:
            line += [flag(name), *map(str, value if isinstance(value, list) else [value])]
    return line


def from_flags(*argv: str | Path) -> Settings:
    return settings_of(build_parser().parse_args([str(a) for a in argv]))


def default(cls: type[Settings], name: str) -> Any:
    return next(f for f in dataclasses.fields(cls) if f.name == name).default


@pytest.mark.parametrize(("command", "name"), EVERY)
def test_flags_file_and_python_fill_the_same_settings(command: str, name: str, tmp_path: Path) -> None:
    cls = COMMANDS[command][0]
    value = sample(name, options(cls)[name], default(cls, name))
    values = {**REQUIRED[command], **NEEDS.get(name, {}), name: value}
    if command == "export" and name == "devices":
        values["output"] = "m.onnx"
    python = cls.of(values)
    assert getattr(python, name) != default(cls, name)
    assert from_flags(*argv_of(command, cls, values)) == python

    path = tmp_path / "settings.yaml"
    for key in (name, name.replace("_", "-")):  # either spelling
        path.write_text(yaml.safe_dump({**values, **({key: values[name]} if key == name else {})}))
        assert from_flags(command, "--settings", path) == python
    assert cls.of(python.to_dict()) == python, "what a checkpoint keeps gives the same settings again"
    json.dumps(python.to_dict())


@pytest.mark.parametrize("command", COMMANDS)
def test_the_defaults_are_one(command: str) -> None:
    cls = COMMANDS[command][0]
    assert (
        from_flags(*argv_of(command, cls, REQUIRED[command])) == cls.of(REQUIRED[command]) == cls(**REQUIRED[command])
    )


def test_flags_stand_over_the_file_and_the_file_over_the_preset(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text("iters: 50\nresize: 320\nlr: 1e-3  # which YAML 1.1 takes for a text\n")
    found = from_flags(
        "train", "m.pth", "--annotations", "a", "--preset", "odtk", "--settings", path, "--resize", "200"
    )
    assert isinstance(found, TrainSettings)
    assert (found.iters, found.resize, found.lr, found.jitter) == (50, 200, 0.001, None)
    assert found.milestones is None and found.warmup is None, "the preset's are those of another length"
    assert found.gamma == 0.1 and found.norm == "frozen"


def test_a_variant_lies_below_the_flags_beside_it_and_above_what_was_said_before(tmp_path: Path) -> None:
    base = {"model": "m.pth", "annotations": "a.json"}
    found = TrainSettings.of({**base, "variant": "nano", "head_channels": 72})
    for name, value in VARIANTS["nano"].items():
        assert getattr(found, name) == (72 if name == "head_channels" else value), name
    path = tmp_path / "settings.yaml"
    path.write_text("variant: small\nbackbone: GhostNetFPN\njitter: [100, 200]\n")
    assert TrainSettings.of({**base, "settings": path}).backbone == ("GhostNetFPN",)
    over = TrainSettings.of({**base, "settings": path, "variant": "medium"})
    assert over.backbone == VARIANTS["medium"]["backbone"] and over.jitter is None
    again = TrainSettings.of({**base, "settings": path, "variant": "small"})
    assert again.backbone == ("GhostNetFPN",), "the same word again changes nothing"
    assert {"variant", "backbone", "resize"} <= set(found.given())


def test_variants_can_be_built_and_grow() -> None:
    sizes = []
    for name in VARIANTS:
        settings = TrainSettings.of({"model": "m.pth", "annotations": "a.json", "variant": name})
        model = train_config(settings.resolved(batch=8, iters=10, classes=3), 1, "images").model
        with torch.device("meta"):
            sizes.append(count_parameters(Detector(model)))
    assert sizes == sorted(sizes) and len(set(sizes)) == len(sizes)


def test_the_preset_is_odtk_whole() -> None:
    found = TrainSettings.of({"model": "m", "annotations": "a", **PRESETS["odtk"]})
    run = found.resolved(batch=16, iters=found.iters or 0, classes=80)
    assert (run.iters, run.milestones, run.warmup, run.val_iters, run.lr) == (90000, (60000, 80000), 1000, 8000, 0.01)
    assert (run.resize, run.max_size, run.jitter, run.backbone) == (800, 1333, (640, 1024), ("ResNet50FPN",))
    assert len(run.anchor_scales) * len(run.anchor_ratios) == 9 and run.anchor_ious == (0.4, 0.5)


def test_what_follows_from_other_settings() -> None:
    def run(**given: Any) -> TrainSettings:
        found = TrainSettings.of({"model": "m", "annotations": "a", **given})
        return found.resolved(batch=found.batch or 2, iters=found.iters or 90000, classes=3)

    assert (
        run().jitter == (640, 1024)
        and run(resize=240).jitter == (192, 307)
        and run(resize=240, jitter=[9, 9]).jitter == (9, 9)
    )
    assert (run(iters=60).warmup, run(iters=60).milestones, run(iters=60).val_iters) == (6, (40, 53), 12)
    assert (run().warmup, run().milestones, run().val_iters) == (1000, (60000, 80000), 8000)
    assert run(iters=60, warmup=0).warmup == 0 and run(iters=1).warmup == 0
    assert run(batch=16).lr == 0.01 and run(batch=8, accumulate=4).lr == 0.02 and run(batch=64, lr=0.003).lr == 0.003
    assert (run().norm, run(backbone_weights="none").norm) == ("frozen", "batch")
    assert run(backbone_weights="none", fine_tune="a.pth").norm == "frozen" and run(norm="group").norm == "group"
    assert run(full_precision=True).precision == "fp32"
    assert run(lr_schedule="flat-cosine").milestones == ()

    def recipe(**given: Any) -> tuple:
        found = run(**given)
        return found.optimizer, found.lr, found.regularization_l2, found.lr_schedule, found.ema

    assert recipe(batch=8) == recipe(batch=8, head="fcos") == ("sgd", 0.005, 0.0001, "milestones", None)
    assert recipe(batch=8, head="dense") == ("adamw", 0.001, 0.05, "flat-cosine", 0.99)
    assert recipe(batch=32, head="dense")[1] == 0.002, "the root of the batch"
    assert recipe(batch=8, head="dense", backbone_weights="none") == recipe(batch=8, head="dense")
    assert recipe(batch=8, head="dense", optimizer="sgd") == ("sgd", 0.02, 0.0001, "flat-cosine", 0.99)
    assert recipe(batch=8, optimizer="adamw") == ("adamw", 0.001, 0.05, "milestones", None)
    assert (run(head="dense").augment_scale, run(head="dense").augment_crop) == ((0.75, 4 / 3), 0)
    assert (run(head="fcos").augment_scale, run(head="fcos").augment_crop) == ((1, 1), 1)

    def color(**given: Any) -> tuple:
        found = run(**given)
        return found.augment_brightness, found.augment_contrast, found.augment_hue, found.augment_saturation

    assert color() == color(head="fcos") == (0.002, 0.002, 0.0002, 0.002)
    assert color(head="dense") == (0.1, 0.1, 0.01, 0.1) and color(head="dense", augment_hue=0)[2] == 0
    assert run(head="dense", resize=240).jitter == run(augment_scale=(0.5, 2), resize=240).jitter == (240, 240)
    assert run(head="dense", resize=240, augment_scale=(1, 1)).jitter == (192, 307)
    given = {"optimizer": "sgd", "lr": 0.3, "regularization_l2": 0.2, "lr_schedule": "milestones", "ema": 0.5}
    assert recipe(batch=8, head="dense", **given) == tuple(given.values())
    assert recipe(head="dense", milestones=(5,))[3] == "milestones"

    def shape(**given: Any) -> tuple:
        found = run(**given)
        return found.last_level, found.pyramid_channels, found.head_channels, found.head_convs

    assert shape() == shape(head="fcos") == (7, 256, 256, 4) and shape(head="dense") == (5, 96, 96, 2)
    assert shape(head="dense", head_channels=64, last_level=6) == (6, 96, 64, 2)
    assert shape(head="dense", backbone="ResNet18C4") == (5, 256, 96, 2)
    assert run().resolved(batch=2, iters=90000, classes=3) == run(), "what is resolved stays as it is"


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"lr": -1}, "--lr: -1 is not a positive number"),
        ({"lr": True}, "--lr: True is not a positive number"),
        ({"iters": 1.5}, "--iters: 1.5 is not a positive whole number"),
        ({"jitter": [1]}, "--jitter takes 2 values, not 1"),
        ({"jitter": {"a": 1}}, "is not a list"),
        ({"override": "yes"}, "--override: 'yes' is not true or false"),
        ({"annotations": 5}, "--annotations: 5 is not a text"),
        ({"head": "yolo"}, "--head: 'yolo' is not one of retinanet, fcos, dense"),
        ({"learning_rate": 1}, "There is no setting 'learning_rate'"),
        ({"mile_stones": [1]}, "did you mean 'milestones'?"),
        ({"max-sise": 3}, "There is no setting 'max-sise': did you mean 'max_size'?"),
        ({"iters": 5, "epochs": 2}, "--iters and --epochs both give the length"),
        ({"epochs": 2, "time": "8m"}, "--epochs and --time both give the length"),
        ({"time": "8 minutes"}, "--time: '8 minutes' is not a time such as 8m, 1h30m or 90s"),
        ({"time": "1.2.3m"}, "is not a time"),
        ({"time": "0s"}, "is not a time"),
        ({"val_share": 1}, "--val-share: 1 is not a number from 0 to below 1"),
        ({"milestones": [5], "lr_schedule": "flat-cosine"}, "--milestones and --lr-schedule flat-cosine both"),
        ({"lr": float("nan")}, "is not a positive number"),
        ({"augment_scale": [0, 1]}, "--augment-scale: 0 is not a positive number"),
        ({"batch": 10**400}, None),
        ({"lr": 10**400}, "is not a positive number"),
        ({"annotations": None}, "--annotations PATH is required"),
        ({"resize": None}, "--resize needs a value"),
    ],
)
def test_wrong_values_are_refused_alike(values: dict[str, Any], sentence: str | None, tmp_path: Path) -> None:
    whole = {"model": "m.pth", "annotations": "a", **values}
    if sentence is None:
        TrainSettings.of(whole)
        return
    with pytest.raises(OdtkError) as python:
        TrainSettings.of(whole)
    assert sentence in str(python.value)
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in whole.items() if not isinstance(v, int) or abs(v) < 10**300}))
    if 10**400 in values.values():
        return
    with pytest.raises(OdtkError) as file:
        from_flags("train", "--settings", path)
    assert sentence in str(file.value)
    if "required" not in sentence and "both" not in str(file.value):
        assert str(path) in str(file.value) or "needs a value" in sentence


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("- a\n- b\n", "holds no settings"),
        ("a: [1", "is not valid YAML"),
        ("!!python/object:os.system {}\n", "is not valid YAML"),
    ],
)
def test_files_that_are_no_settings(text: str, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(text)
    with pytest.raises(OdtkError, match=sentence):
        from_flags("train", "m.pth", "--annotations", "a", "--settings", path)
    with pytest.raises(OdtkError, match="Cannot read"):
        from_flags("train", "m.pth", "--annotations", "a", "--settings", tmp_path / "none.yaml")


def test_a_range_must_rise() -> None:
    with pytest.raises(OdtkError, match=r"--augment-scale 2 0.5: the first number must not be above the second"):
        TrainSettings.of({"model": "m.pth", "annotations": "a", "augment_scale": [2, 0.5]})


def test_settings_of_other_commands() -> None:
    after = from_flags("infer", "--images", "photos", "m.onnx")
    assert (
        after
        == from_flags("infer", "m.onnx", "--images", "photos")
        == InferSettings(model="m.onnx", images=("photos",))
    )
    with pytest.raises(OdtkError, match=r"MODEL\..* is required"):
        from_flags("infer", "--images", "photos", "a.jpg")
    assert InferSettings(model="m.onnx", detections=50).thresholds == {"detections": 50}
    assert ExportSettings(model="m.pth", output="m.onnx", size=(800,)).height_width == (800, 800)
    assert ExportSettings(model="m.pth", output="m.onnx").height_width is None


def test_one_word_on_the_length_stands_over_a_lower_layers(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text("preset: odtk\niters: 100\nskip_damaged: true\n")
    base = ["train", "m.pth", "--annotations", "a"]
    for found in (
        from_flags(*base, "--preset", "odtk", "--epochs", "2"),
        from_flags(*base, "--settings", path, "--epochs", "2"),
        TrainSettings.of({"model": "m.pth", "annotations": "a", "settings": path, "epochs": 2}),
        TrainSettings.of({"model": "m.pth", "annotations": "a", "preset": "odtk", "epochs": 2}),
    ):
        assert isinstance(found, TrainSettings)
        assert (found.iters, found.epochs, found.milestones, found.norm) == (None, 2, None, "frozen")
    found = from_flags(*base, "--settings", path)
    assert isinstance(found, TrainSettings) and found.iters == 100 and found.skip_damaged
    found = from_flags(*base, "--settings", path, "--no-skip-damaged")
    assert isinstance(found, TrainSettings) and not found.skip_damaged
    with pytest.raises(OdtkError, match="There is no preset 'yolo': there is odtk"):
        TrainSettings.of({"model": "m", "annotations": "a", "preset": "yolo"})
    with pytest.raises(OdtkError, match="none for this command"):
        InferSettings.of({"model": "m", "preset": "odtk"})


def test_given_are_those_that_were_named_even_with_their_default() -> None:
    found = TrainSettings.of({"model": "m", "annotations": "a", "resize": 800})
    assert set(found.given()) == {"model", "annotations", "resize"}
    assert set(TrainSettings(model="m", annotations="a", iters=5).given()) == {"model", "annotations", "iters"}


def test_times_are_read() -> None:
    assert [seconds_of(t) for t in ("8m", "1.5h", "1h30m10s", "90s")] == [480, 5400, 5410, 90]
    assert [seconds_of(t) for t in ("", "m", "8", "8 m", "-8m", "8m1h")] == [0] * 6
