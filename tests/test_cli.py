"""The command line: every flag with its default, and one sentence for whatever goes wrong."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, save
from PIL import Image as PILImage

from odtk.categories import Category
from odtk.cli import build_parser, main, settings_of
from odtk.commands import export_config, infer_config
from odtk.config import ModelConfig, OdtkError, TrainConfig
from odtk.model import checkpoint
from odtk.model.detector import Detector
from odtk.settings import TrainSettings
from odtk.training.plan import plan
from odtk.training.rules import Machine

torch.set_num_threads(1)
COMMANDS = ("train", "infer", "export", "evaluate", "check", "benchmark", "info", "visualize", "synth")


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the annotations of the tiny dataset."""
    path = folder / "truth.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def train_args(folder: Path, *more: str, model: str = "m.pth") -> list[str]:
    return ["train", model, "--annotations", str(folder / "truth.json"), "--images", str(folder), *more]


def configured(folder: Path, *more: str, world: int = 1) -> TrainConfig:
    """The settings that these flags of `odtk train` make, for the head of NVIDIA's ODTK unless another is named."""
    head = [] if "--head" in more else ["--head", "retinanet"]
    settings = settings_of(build_parser().parse_args(train_args(folder, *head, *more)))
    assert isinstance(settings, TrainSettings)
    return plan(settings, Machine("cpu", world, cores=1, memory=8 << 30)).config


def fails(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """The one sentence on stderr of a command that must fail."""
    assert main([str(a) for a in argv]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("Warning: ")]
    assert len(lines) == 1 and lines[0].startswith("odtk: ") and lines[0].endswith("."), lines
    assert "Traceback" not in lines[0]
    return lines[0]


@pytest.mark.parametrize(
    "argv",
    [
        "train OUT/m.pth --annotations truth.json",
        "plan --annotations truth.json --output OUT/plan.yaml",
        "export broken.pth OUT/m.onnx",
        "export broken.pth m.onnx --int8 --calibration-images . --calibration-table OUT/table.json",
        "infer broken.pth --images . --output OUT/found.json",
        "benchmark broken.pth --output OUT/times.json --devices cpu",
        "evaluate none.json --annotations truth.json --output OUT/figures.json",
        "evaluate none.json --annotations truth.json --report OUT/page.html",
        "convert truth.json OUT/other.json --to coco",
    ],
)
def test_an_output_in_no_folder_is_refused_before_anything_else(argv: str, coco: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(coco)
    (coco / "broken.pth").write_bytes(b"no model")
    said = fails(capsys, *argv.split())
    assert said.startswith("odtk: Cannot write OUT/") and said.endswith(
        "/OUT does not exist; make it, or give another path."
    )
    assert not (coco / "OUT").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Flags and defaults


def test_help_is_quick_and_light() -> None:
    start = time.monotonic()
    run = subprocess.run([sys.executable, "-X", "importtime", "-m", "odtk", "--help"], capture_output=True, text=True)
    seconds = time.monotonic() - start
    assert run.returncode == 0 and all(command in run.stdout for command in COMMANDS)
    heavy = {"torch", "numpy", "onnx", "onnxruntime", "PIL", "rich", "pycocotools", "requests"}
    assert not heavy & {line.split("|")[-1].strip() for line in run.stderr.splitlines()}
    assert seconds < 5  # 0.1 s on a machine that does nothing else


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_has_a_help_text(command: str, capsys) -> None:
    subcommands = next(a.choices for a in build_parser()._actions if isinstance(a.choices, dict))
    parser = subcommands[command]
    for action in parser._actions:
        assert action.help, f"{command} {action.option_strings} has no help"
        if action.option_strings and action.dest not in ("help", "loader", "head", "json"):
            said = action.required or "(" in action.help or any(t in action.help for t in ("--", "for ", "draw"))
            assert said, f"{command} {action.option_strings}: which default?"
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0


def test_defaults_of_the_dense_head(coco: Path) -> None:
    model = configured(coco, "--head", "dense").model
    assert (model.last_level, model.pyramid_channels, model.head_channels, model.head_convs) == (5, 96, 96, 2)
    assert model.padding == "black" and configured(coco, "--head", "fcos").model.padding == "mean"
    narrow = configured(coco, "--last-level", "6", "--pyramid-channels", "64", "--head-channels", "32").model
    assert (narrow.last_level, narrow.pyramid_channels, narrow.head_channels, narrow.head_convs) == (6, 64, 32, 4)


def test_defaults_of_train(coco: Path) -> None:
    config = configured(coco)
    assert config.model == ModelConfig(backbones=("ResNet50FPN",), classes=2, norm="frozen")
    data = config.data
    assert (data.batch, data.resize, data.max_size, data.jitter) == (2, 800, 1333, (640, 1024))
    assert (data.training, data.rotated, data.absolute_angle, data.loader) == (True, False, False, "dali")
    augment = data.augment
    assert (augment.brightness, augment.contrast, augment.hue, augment.saturation) == (0.002, 0.002, 0.0002, 0.002)
    assert (augment.rotate, augment.free_rotate) == (False, (0, 0))
    assert (config.iters, config.milestones, config.schedule) == (90000, (60000, 80000), 1.0)
    assert (config.warmup, config.gamma, config.weight_decay, config.val_iters) == (1000, 0.1, 0.0001, 8000)
    assert (config.loss.background_iou, config.loss.foreground_iou) == (0.4, 0.5)
    assert config.precision == "mixed" and config.val_data is None and not config.override
    assert config.lr == pytest.approx(0.01 * 2 / 16)
    assert config.clip_grad == 5.0 and configured(coco, "--clip-grad", "0").clip_grad is None


def test_the_learning_rate_follows_the_batch_of_one_iteration(coco: Path) -> None:
    assert configured(coco, "--batch", "16").lr == pytest.approx(0.01)
    assert configured(coco, "--batch", "8", world=4).lr == pytest.approx(0.005)
    assert configured(coco, "--batch", "8", "--accumulate", "4").lr == pytest.approx(0.02)
    assert configured(coco, "--batch", "64", "--lr", "0.003").lr == 0.003
    assert configured(coco, "--batch", "8", world=4).data.batch == 2
    assert configured(coco, world=4).lr == pytest.approx(0.005)


def test_flags_of_train_arrive(coco: Path) -> None:
    config = configured(
        coco,
        "--backbone",
        "ResNet18FPN",
        "ResNet34FPN",
        "--classes",
        "7",
        "--jitter",
        "100",
        "200",
        "--resize",
        "150",
        "--max-size",
        "300",
        "--iters",
        "9",
        "--milestones",
        "3",
        "5",
        "--schedule",
        "0.5",
        "--warmup",
        "0",
        "--gamma",
        "0.2",
        "--regularization-l2",
        "0",
        "--full-precision",
        "--fine-tune",
        "a.pth",
        "--override",
        "--augment-rotate",
        "--augment-free-rotate",
        "-10",
        "10",
        "--augment-hue",
        "0.1",
        "--rotated-bbox",
        "--absolute-angle",
        "--anchor-ious",
        "0.3",
        "0.6",
        "--norm",
        "group",
        "--freeze-at",
        "2",
        "--grad-checkpoint",
        "--dcn",
        "5",
        "3",
        "--dcn-v1",
        "--resnet",
        "deep-stem",
        "norm-eval",
        "--backbone-weights",
        "none",
        "--with-dali",
        "--logdir",
        "log",
        "--post-metrics",
        "http://x",
        "--seed",
        "4",
        "--clip-grad",
        "5",
        "--ema",
        "0.99",
        "--val-annotations",
        "v.json",
        "--val-images",
        "v",
        "--val-iters",
        "6",
    )
    model, data = config.model, config.data
    assert (model.backbones, model.classes) == (("ResNet18FPN", "ResNet34FPN"), 7)
    assert (model.norm, model.freeze_at) == ("group", 2)
    assert model.dcn == (3, 5) and not model.dcn_modulated and model.deep_stem and model.norm_eval
    assert not (model.caffe_stride or model.avg_down or model.zero_init)
    assert model.grad_checkpoint and model.rotated and data.rotated and data.absolute_angle
    assert (data.jitter, data.resize, data.max_size, data.seed) == ((100, 200), 150, 300, 4)
    assert data.augment.rotate and data.augment.free_rotate == (-10, 10) and data.augment.hue == 0.1
    assert (config.iters, config.milestones, config.schedule, config.warmup) == (9, (3, 5), 0.5, 0)
    assert (config.gamma, config.weight_decay, config.precision) == (0.2, 0, "fp32")
    assert (config.fine_tune, config.override, config.backbone_weights) == ("a.pth", True, "none")
    assert (config.loss.background_iou, config.loss.foreground_iou) == (0.3, 0.6)
    assert (config.logdir, config.post_metrics, config.clip_grad, config.ema) == ("log", "http://x", 5, 0.99)
    assert config.val_data is not None and config.val_iters == 6
    val = config.val_data
    assert (val.annotations, val.images, val.training, val.rotated) == ("v.json", "v", False, True)


def test_every_option_of_a_resnet_has_its_flag(coco: Path) -> None:
    default = configured(coco).model
    assert configured(coco, "--dcn", "4").model.dcn_modulated  # version 2 unless told
    for option in ("caffe-stride", "deep-stem", "avg-down", "zero-init", "norm-eval"):
        model = configured(coco, "--resnet", option).model
        changed: dict[str, Any] = {option.replace("-", "_"): True}
        assert model == dataclasses.replace(default, **changed)


@pytest.mark.parametrize(
    ("flags", "norm"), [((), "frozen"), (("--backbone-weights", "none"), "batch"), (("--norm", "batch"), "batch")]
)
def test_the_norm_is_frozen_when_pretrained(coco: Path, flags: tuple[str, ...], norm: str) -> None:
    assert configured(coco, *flags).model.norm == norm


def test_flags_of_infer_and_export_arrive() -> None:
    flags = ["--output", "a.json", "b.json", "--size", "240", "320", "--batch", "6", "--detections", "50"]
    config = infer_config(settings_of(build_parser().parse_args(["infer", "m.onnx", *flags])), 3)  # type: ignore[arg-type]
    assert (config.output, config.data.size, config.data.batch) == (("a.json", "b.json"), (240, 320), 2)
    assert config.postprocess.detections == 50 and config.explicit == ("detections",) and config.precision == "mixed"
    export = export_config(settings_of(build_parser().parse_args(["export", "m.pth", "m.onnx"])))  # type: ignore[arg-type]
    assert (export.size, export.batch, export.precision) == (None, (1, 8, 16), "fp16")
    flags = ["export", "m.pth", "m.plan", "--size", "800", "--dynamic-batch-opts", "2", "4", "8", "--int8"]
    export = export_config(settings_of(build_parser().parse_args([*flags, "--calibration-images", "x"])))  # type: ignore[arg-type]
    assert (export.size, export.batch, export.precision) == ((800, 800), (2, 4, 8), "int8")


def test_a_benchmark_takes_one_image_per_device(tmp_path: Path, monkeypatch) -> None:
    batches = []
    monkeypatch.setattr("odtk.launch.launch", lambda job, config, **_: batches.append(config.data.batch))
    for flags in (["cpu"], ["cpu:2"], ["cpu:2", "--batch", "8"]):
        assert main(["benchmark", str(tiny_model(tmp_path / "m.pth")), "--devices", *flags]) == 0
    assert batches == [1, 1, 4]


# ---------------------------------------------------------------------------------------------------------------------
# Wrong flags


@pytest.mark.parametrize(
    ("flags", "world", "sentence"),
    [
        (("--batch", "3"), 2, "--batch 3 does not divide by the 2 devices: 2 does"),
        (("--batch", "1"), 4, "4 does"),
        (("--full-precision", "--precision", "bf16"), 1, "contradicts"),
        (("--head", "fcos", "--rotated-bbox"), 1, "no angle"),
        (("--absolute-angle",), 1, "--absolute-angle requires --rotated-bbox"),
        (("--head", "dense", "--rotated-bbox", "--absolute-angle"), 1, "--absolute-angle needs --head retinanet"),
        (("--jitter", "900", "600"), 1, "--jitter 900 600"),
        (("--anchor-ious", "0.6", "0.5"), 1, "--anchor-ious"),
        (("--milestones", "80", "60"), 1, "rise"),
        (("--lr", "-1"), 1, "'-1' is not a positive number"),
        (("--dcn-v1",), 1, "name its stages with --dcn"),
        (("--resnet", "deep-root"), 1, "'deep-root' is not one of"),
        (("--seed", str(2**64)), 1, "from 0 to 2^64 - 1"),
        (("--lr", "fast"), 1, "'fast' is not a positive number"),
        (("--iters", "0"), 1, "positive whole number"),
        (("--anchor-ious", "0.4", "1.5"), 1, "from 0 to 1"),
        (("--precision", "fp8"), 1, "'fp8' is not one of mixed, fp16, bf16, fp32"),
        (("--nonsense",), 1, "--nonsense"),
        (("--devices", "all"), 1, "number of GPUs, cpu or cpu:N"),
    ],
)
def test_wrong_flags_of_train(coco: Path, flags: tuple[str, ...], world: int, sentence: str) -> None:
    with pytest.raises(OdtkError) as error:
        configured(coco, *flags, world=world)
    assert sentence in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["export", "m.pth", "m.trt"], "must end in .onnx"),
        (["export", "m.pth", "m.onnx", "--int8"], "--calibration-images"),
        (["export", "m.pth", "m.onnx", "--int8", "--full-precision"], "contradicts"),
        (["export", "m.pth", "m.onnx", "--verify"], "--annotations"),
        (["export", "m.pth", "m.plan", "--devices", "cpu"], "an .onnx needs none"),
        (["export", "m.pth", "m.onnx", "--batch", "4", "2", "8"], "rising"),
        (["export", "m.pth", "m.onnx", "--size", "1", "2", "3"], "--size takes"),
        (["infer", "m.pth", "--score-threshold", "5"], "from 0 to 1"),
        (["visualize", "--images", "x"], "Nothing to draw"),
        (["visualize", "--features", "layer1"], "need MODEL.pth"),
        (["evaluate", "x.json"], "--annotations"),
        (["fly"], "invalid choice"),
        ([], "COMMAND"),
    ],
)
def test_wrong_flags_end_with_one_sentence(argv: list[str], sentence: str, capsys) -> None:
    assert sentence in fails(capsys, *argv)


# ---------------------------------------------------------------------------------------------------------------------
# Bad input: one clear sentence, exit code 1, no traceback


def tiny_model(path: Path) -> Path:
    """An untrained checkpoint whose categories are those of the tiny dataset."""
    config = ModelConfig(backbones=("ResNet18FPN",), classes=2)
    detector = Detector(config)
    detector.initialize()
    categories = (Category(3, "cell"), Category(8, "plate"))
    checkpoint.save(path, checkpoint.Checkpoint(config, categories, detector.state_dict()))
    return path


def short_training(folder: Path, model: Path) -> list[str]:
    """A training run of one iteration on the CPU."""
    flags = ["--head", "retinanet", "--backbone", "ResNet18FPN", "--backbone-weights", "none", "--iters", "1"]
    flags += ["--batch", "1", "--resnet-width", "0.25", "--pyramid-channels", "64", "--head-channels", "64"]
    flags += ["--head-convs", "1"]
    flags += ["--resize", "64", "--jitter", "64", "64", "--loader", "torch", "--devices", "cpu"]
    return train_args(folder, *flags, model=str(model))


def test_missing_files(coco: Path, tmp_path: Path, capsys) -> None:
    nowhere = tmp_path / "nowhere"
    truth = coco / "truth.json"
    assert "nowhere" in fails(capsys, "train", tmp_path / "m.pth", "--annotations", nowhere, "--images", coco)
    assert "nowhere" in fails(capsys, "train", tmp_path / "m.pth", "--annotations", truth, "--images", nowhere)
    assert "no model" in fails(capsys, "infer", nowhere, "--images", coco)
    assert "no model" in fails(capsys, "export", nowhere, tmp_path / "m.onnx")
    assert "no model" in fails(capsys, "benchmark", nowhere)
    assert "nowhere" in fails(capsys, "evaluate", nowhere, "--annotations", truth)
    assert "nowhere" in fails(capsys, "check", "--annotations", nowhere, "--images", coco)
    (coco / "2.jpg").unlink()
    assert "2.jpg: image 2: the file is missing" in fails(capsys, *short_training(coco, tmp_path / "m.pth"))


def test_broken_json(coco: Path, tmp_path: Path, capsys) -> None:
    truth = coco / "truth.json"
    (tmp_path / "found.json").write_text("[{")
    assert "found.json is not valid JSON" in fails(capsys, "evaluate", tmp_path / "found.json", "--annotations", truth)
    truth.write_text(truth.read_text()[:100])
    for argv in (short_training(coco, tmp_path / "m.pth"), ["check", "--annotations", truth, "--images", coco]):
        sentence = fails(capsys, *argv)
        assert "truth.json is not valid JSON" in sentence and "line 1" in sentence


def test_faults_of_a_dataset(coco: Path, tmp_path: Path, capsys) -> None:
    model = tmp_path / "m.pth"
    edit(coco, lambda c: c["annotations"].append({"id": 7, "image_id": 99, "category_id": 3, "bbox": [1, 1, 9, 9]}))
    assert "annotation 7: its image_id 99" in fails(capsys, *short_training(coco, model))
    edit(coco, lambda c: c["annotations"].pop())
    file = coco / "1.jpg"
    file.write_bytes(file.read_bytes()[:-400])
    sentence = fails(capsys, *short_training(coco, model))
    assert "1.jpg (the file is truncated" in sentence and "--skip-damaged" in sentence
    assert not model.exists()


def test_damaged_images_are_left_out_of_training_and_resuming_is_exact(coco: Path, tmp_path: Path, capsys) -> None:
    PILImage.effect_noise((64, 48), 60).convert("RGB").save(coco / "3.jpg")
    edit(coco, lambda c: c["images"].append({"id": 3, "file_name": "3.jpg", "width": 64, "height": 48}))
    file = coco / "1.jpg"
    file.write_bytes(file.read_bytes()[:-400])
    whole, halves = tmp_path / "whole.pth", tmp_path / "halves.pth"

    def train(model: Path, iters: str) -> None:
        flags = ["--iters", iters, "--milestones", "9", "--warmup", "0", "--val-iters", "1", "--skip-damaged"]
        flags += ["--val-annotations", str(coco / "truth.json")]  # has the same damaged image
        assert main([*short_training(coco, model), *flags]) == 0

    train(whole, "2")
    shown = capsys.readouterr().err
    assert "left out, 1 damaged image: " in shown and "1.jpg (the file is truncated" in shown
    assert "category without annotations" not in shown  # the annotations of category 3 are there
    train(halves, "1")
    train(halves, "2")
    one, other = checkpoint.load(str(whole)), checkpoint.load(str(halves))
    assert one.training is not None and one.training["loader"]["images"] == 2
    assert all(torch.equal(one.state_dict[name], other.state_dict[name]) for name in one.state_dict)
    assert main(short_training(coco, halves)) == 0, "a resumed run keeps the setting"
    capsys.readouterr()
    assert "--skip-damaged" in fails(capsys, *short_training(coco, halves), "--no-skip-damaged")


def test_training_goes_on_with_a_category_without_annotations(coco: Path, tmp_path: Path, capsys) -> None:
    model = tmp_path / "m.pth"
    edit(coco, lambda c: c["categories"].insert(0, {"id": 1, "name": "unseen"}))
    assert main(short_training(coco, model)) == 0
    assert "category without annotations: it keeps its place and its id (1 ×" in capsys.readouterr().err
    assert [c.id for c in checkpoint.load(str(model)).categories or ()] == [1, 3, 8]
    argv = ["check", "--annotations", str(coco / "truth.json"), "--backbone", "ResNet18FPN", "--headers-only"]
    assert main(argv) == 0  # as training does
    assert "fixed" in capsys.readouterr().out


def test_check_and_training_refuse_boxes_in_another_format(coco: Path, tmp_path: Path, capsys) -> None:
    boxes = [[x, y, x + 20, y + 16] for x in range(8, 40, 4) for y in range(8, 30, 4)]
    change = {"annotations": [{"id": i, "image_id": 1, "category_id": 3, "bbox": b} for i, b in enumerate(boxes)]}
    edit(coco, lambda c: c.update(change))
    sentence = fails(capsys, *short_training(coco, tmp_path / "m.pth"))
    assert "look like x1 y1 x2 y2, not x y w h" in sentence
    assert f"`odtk convert {coco}/truth.json {coco}/truth-xywh.json --to coco --from xyxy`" in sentence
    assert main(["check", "--annotations", str(coco / "truth.json"), "--backbone", "ResNet18FPN"]) == 1
    shown = capsys.readouterr().out
    assert "1 fault would stop training, 0 would be fixed" in shown and "--from xyxy" in shown


def test_check_of_a_folder_without_annotations(coco: Path, capsys) -> None:
    assert main(["check", "--images", str(coco)]) == 0
    shown = capsys.readouterr().out
    assert "2 usable images\n" in shown and shown.endswith(f"0 damaged images in {coco}\n")
    (coco / "1.jpg").write_bytes(b"no image")
    assert main(["check", "--images", str(coco)]) == 1
    shown = capsys.readouterr().out
    assert f"damaged {coco / '1.jpg'}: image 1: " in shown and shown.endswith(f"1 damaged image in {coco}\n")
    data = bytearray((coco / "2.jpg").read_bytes())
    data[20:60] = bytes(40)
    (coco / "2.jpg").write_bytes(data)  # found only while it is decoded
    assert main(["check", "--images", str(coco)]) == 1
    assert f"damaged 2 × damaged image, first {coco / '1.jpg'}" in capsys.readouterr().out
    assert "--images DIR is required" in fails(capsys, "check")


def test_check_says_nothing_of_anchors_where_there_are_none(coco: Path, capsys) -> None:
    argv = ["check", "--annotations", str(coco / "truth.json"), "--backbone", "ResNet18FPN"]
    assert main(argv) == 0 and "anchor" in capsys.readouterr().out
    assert main([*argv, "--head", "dense"]) == 0 and "anchor" not in capsys.readouterr().out
    assert main([*argv, "--head", "fcos"]) == 0 and "anchor" not in capsys.readouterr().out
    for name in ("1.jpg", "2.jpg"):
        (coco / name).rename(coco / f"other-{name}")
    assert main(argv) == 1
    shown = capsys.readouterr().out
    assert "none of 2 images found under" in shown and "anchor" not in shown and "1 fault would stop" in shown


def test_check_lists_every_fault_and_its_exit_code_says_whether_training_would_stop(coco: Path, capsys) -> None:
    argv = ["check", "--annotations", str(coco / "truth.json"), "--images", str(coco), "--backbone", "ResNet18FPN"]
    assert main([*argv, "--resize", "48"]) == 0
    shown = capsys.readouterr().out
    assert "2 usable images" in shown and "category 8 plate: 1 box\n" in shown and "0 faults would stop" in shown
    edit(coco, lambda c: c["annotations"].append({"id": 7, "image_id": 1, "category_id": 3, "bbox": [1, 1, 3, 3]}))
    assert main([*argv, "--resize", "48"]) == 0
    assert "1 of 3 boxes without a matching anchor at IoU 0.5" in capsys.readouterr().out
    edit(coco, lambda c: c["annotations"].append({"id": 8, "image_id": 99, "category_id": 3, "bbox": [1, 1, 9, 9]}))
    edit(coco, lambda c: c["annotations"].append({"id": 9, "image_id": 1, "category_id": 3, "bbox": [1, 1, 0, 9]}))
    assert main(argv) == 1
    shown = capsys.readouterr().out
    assert "REFUSED" in shown and "annotation 8" in shown and "fixed" in shown and "annotation 9" in shown
    assert "1 fault would stop training, 1 would be fixed" in shown


def test_files_that_are_not_models(coco: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "text.pth").write_text("hello")
    torch.save({"epoch": 3, "net": {}}, tmp_path / "other.pth")
    whole = tiny_model(tmp_path / "tiny.pth").read_bytes()
    (tmp_path / "half.pth").write_bytes(whole[: len(whole) // 2])
    node = helper.make_node("Identity", ["a"], ["b"])
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "ab"]
    graph = helper.make_graph([node], "g", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    save(model, str(tmp_path / "other.onnx"))
    (tmp_path / "text.onnx").write_text("hello")
    (tmp_path / "text.bin").write_text("hello")
    for name, sentence in (
        ("text.pth", "is not a checkpoint"),
        ("other.pth", "another program"),
        ("half.pth", "truncated"),
        ("other.onnx", "was not exported by odtk"),
        ("text.onnx", "is not a model that ONNX Runtime can run"),
        ("text.bin", "must end in"),
    ):
        argv = ["infer", tmp_path / name, "--images", coco, "--devices", "cpu", "--output", tmp_path / "o.json"]
        assert sentence in fails(capsys, *argv)
    assert not (tmp_path / "o.json").exists()
    assert "is a folder, not a model: of a bundle, pass" in fails(capsys, "export", coco, tmp_path / "o.onnx")


@pytest.mark.parametrize("devices", ["cpu", pytest.param("cpu:2", marks=pytest.mark.slow)])
def test_batch_norm_of_a_single_value(coco: Path, tmp_path: Path, capsys, devices: str) -> None:
    flags = ["--norm", "batch", "--max-size", "32", "--batch", devices[4:] or "1", "--devices", devices]
    assert "--norm batch cannot train on one value" in fails(capsys, *short_training(coco, tmp_path / "m.pth"), *flags)


def test_an_export_that_needs_more_memory_than_there_is(tmp_path: Path, capsys) -> None:
    argv = ["export", tiny_model(tmp_path / "m.pth"), tmp_path / "m.onnx", "--size", "10000000"]
    assert "Out of memory" in fails(capsys, *argv)


def test_exporting_boxes_without_an_angle_as_rotated(tmp_path: Path, capsys) -> None:
    argv = ["export", tiny_model(tmp_path / "m.pth"), tmp_path / "m.onnx", "--rotated-bbox"]
    assert "was not trained with rotated boxes" in fails(capsys, *argv)


def test_a_model_of_other_categories(coco: Path, tmp_path: Path, capsys) -> None:
    edit(coco, lambda c: c["categories"][0].update(name="cow"))
    argv = ["infer", tiny_model(tmp_path / "m.pth"), "--images", coco, "--annotations", coco / "truth.json"]
    argv += ["--devices", "cpu", "--output", tmp_path / "o.json"]
    assert "Category 3 is 'cell' in the model and 'cow' in the annotations" in fails(capsys, *argv)


def test_a_category_that_is_a_list(coco: Path, tmp_path: Path, capsys) -> None:
    edit(coco, lambda c: (c.pop("categories"), c["annotations"][0].update(category_id=[3])))
    assert "category_id [3] is not among the categories" in fails(capsys, *short_training(coco, tmp_path / "m.pth"))


def test_places_that_cannot_be_written(coco: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "file").write_text("")  # where a folder should be: tests may run as root, whom permissions do not stop
    inside = tmp_path / "file" / "x"
    model = tiny_model(tmp_path / "m.pth")
    assert "file" in fails(capsys, "infer", model, "--images", coco, "--output", f"{inside}.json")
    assert "file" in fails(capsys, "synth", inside, "--images", "2", "--size", "64")
    assert "file" in fails(capsys, *short_training(coco, Path(f"{inside}.pth")))
    assert "file" in fails(
        capsys, "visualize", "--annotations", coco / "truth.json", "--images", coco, "--output", inside
    )


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
def test_a_full_disk(coco: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "found.json").write_text("[]")
    argv = ["evaluate", tmp_path / "found.json", "--annotations", coco / "truth.json", "--output", "/dev/full"]
    assert "No space left on device" in fails(capsys, *argv)


# ---------------------------------------------------------------------------------------------------------------------
# Errors of all kinds


def numpy_error() -> Exception:
    with pytest.raises(MemoryError) as error:
        np.zeros(1 << 60, np.uint8)
    return error.value


def torch_error() -> Exception:
    with pytest.raises(RuntimeError) as error:
        torch.zeros(1 << 60, dtype=torch.uint8)
    return error.value


def test_interruption_system_errors_and_debugging(monkeypatch, capsys) -> None:
    import odtk.describe

    for error, sentence in (
        (KeyboardInterrupt(), "Interrupted."),
        (OSError(28, "No space left on device", "x.bin"), "No space left on device: x.bin."),
        (OSError("odd"), "odd."),
        (MemoryError(), "Out of memory"),
        (numpy_error(), "Out of memory"),
        (torch_error(), "Out of memory: try a smaller --batch, or smaller images."),
        (torch.OutOfMemoryError("CUDA out of memory. Tried …"), "Out of GPU memory"),
    ):

        def fail(error=error) -> None:
            raise error

        monkeypatch.setattr(odtk.describe, "environment", fail)
        assert sentence in fails(capsys, "info")
    monkeypatch.setenv("ODTK_DEBUG", "1")
    assert main(["info"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_closed_pipe_is_no_error() -> None:
    run = subprocess.run(
        f'{sys.executable} -c "import sys; from odtk.cli import main; '
        "import odtk.cli as c; c.COMMANDS['info'] = (c.InfoSettings, lambda s: print('x' * 10**6), 'x'); "
        "sys.exit(main(['info']))\" | head -c 5",
        shell=True,
        capture_output=True,
        text=True,
    )
    assert run.stdout == "xxxxx" and run.stderr == ""


# ---------------------------------------------------------------------------------------------------------------------
# Small runs


def test_synth_then_visualize_then_evaluate(tmp_path: Path, capsys) -> None:
    folder = tmp_path / "set"
    assert main(["synth", str(folder), "--images", "5", "--size", "96", "128", "--classes", "2", "--seed", "3"]) == 0
    argv = ["--annotations", str(folder / "val.json"), "--images", str(folder / "val")]
    assert main(["visualize", *argv, "--output", str(tmp_path / "pictures")]) == 0
    assert len(list((tmp_path / "pictures").iterdir())) == 1
    truth = json.loads((folder / "val.json").read_text())
    found = [{k: a[k] for k in ("image_id", "category_id", "bbox")} | {"score": 0.9} for a in truth["annotations"]]
    (tmp_path / "found.json").write_text(json.dumps(found))
    assert (
        main(["visualize", *argv, "--detections", str(tmp_path / "found.json"), "--output", str(tmp_path / "p")]) == 0
    )
    assert "detections that score above 0.3." in capsys.readouterr().out
    figures = str(tmp_path / "figures.json")
    assert main(["evaluate", str(tmp_path / "found.json"), *argv[:2], "--output", figures]) == 0
    assert json.loads(Path(figures).read_text())["stats"]["AP"] == pytest.approx(1)
    assert "1.000" in capsys.readouterr().out


def test_infer_evaluates_and_draws(coco: Path, tmp_path: Path, capsys) -> None:
    model = tiny_model(tmp_path / "m.pth")
    argv = ["infer", str(model), "--images", str(coco), "--annotations", str(coco / "truth.json")]
    argv += ["--resize", "64", "--loader", "torch", "--devices", "cpu"]
    assert main([*argv, "--output", str(tmp_path / "o.json"), "--draw", str(tmp_path / "d")]) == 0
    assert len(list((tmp_path / "d").iterdir())) == 2
    assert isinstance(json.loads((tmp_path / "o.json").read_text()), list)
    said = capsys.readouterr().out
    assert "AP50" in said and f"The pictures in {tmp_path / 'd'} show" in said and "--draw-threshold" in said
    assert {PILImage.open(path).size for path in (tmp_path / "d").iterdir()} == {(64, 48)}, "the image's own size"


def test_infer_takes_files_and_patterns_and_a_threshold_for_pictures(coco: Path, tmp_path: Path, capsys) -> None:
    model, output = str(tiny_model(tmp_path / "m.pth")), tmp_path / "o.json"
    argv = ["infer", model, "--resize", "64", "--loader", "torch", "--devices", "cpu", "--output", str(output)]
    assert main([*argv, "--images", str(coco / "2.jpg"), "--draw", str(tmp_path / "d"), "--draw-threshold", "0.9"]) == 0
    said = capsys.readouterr().out
    assert "of 1 image" in said and "show detections that score above 0.9;" in said
    assert [path.name for path in (tmp_path / "d").iterdir()] == ["2_1.jpg"]
    assert main([*argv, "--images", str(coco / "2.jpg"), str(coco / "1.jpg")]) == 0
    assert "of 2 images" in capsys.readouterr().out
    assert main([*argv, "--images", str(coco / "*.jpg"), "--draw", str(tmp_path / "e")]) == 0
    said = capsys.readouterr().out
    assert "of 2 images" in said and "show the best 20 detections of each image" in said
    assert "No image matches" in fails(capsys, *argv, "--images", coco / "*.bmp")
    two = [coco, coco / "1.jpg"]
    assert "takes one folder" in fails(capsys, *argv, "--annotations", coco / "truth.json", "--images", *two)
    assert "--draw-threshold needs --draw" in fails(capsys, *argv, "--draw-threshold", "0.5")


def test_a_file_that_arrives_during_inference_is_not_drawn_on(coco: Path, tmp_path: Path, monkeypatch) -> None:
    """Without annotations an image's id is its place in the folder, which must be read before the detections."""

    def infer(*_args) -> list:
        (coco / "0.jpg").write_bytes((coco / "1.jpg").read_bytes())
        return []

    monkeypatch.setattr("odtk.inference.infer.infer", infer)
    argv = ["infer", str(tiny_model(tmp_path / "m.pth")), "--images", str(coco), "--devices", "cpu"]
    assert main([*argv, "--draw", str(tmp_path / "d")]) == 0
    assert sorted(path.name for path in (tmp_path / "d").iterdir()) == ["1_1.jpg", "2_2.jpg"]


def test_drawing_among_the_images_is_refused_before_the_work(coco: Path, tmp_path: Path, capsys) -> None:
    argv = ["infer", tiny_model(tmp_path / "m.pth"), "--images", coco, "--output", tmp_path / "o.json"]
    argv += ["--devices", "cpu"]
    assert "another folder" in fails(capsys, *argv, "--draw", coco / "pictures")
    assert not (tmp_path / "o.json").exists()


def test_info_as_json(capsys) -> None:
    assert main(["info", "--json"]) == 0
    assert "torch" in json.loads(capsys.readouterr().out)["versions"]


# ---------------------------------------------------------------------------------------------------------------------
# Settings that travel in the checkpoint


@pytest.fixture
def trained(coco: Path, tmp_path: Path) -> Path:
    """A checkpoint of one iteration at 64 pixels, of images of 48×64."""
    model = tmp_path / "m.pth"
    assert main(short_training(coco, model)) == 0
    return model


def test_a_model_is_used_at_the_size_it_was_trained_at(trained: Path, coco: Path, capsys) -> None:
    infer = ["infer", str(trained), "--images", str(coco), "--output", str(coco.parent / "d.json"), "--devices", "cpu"]
    infer += ["--loader", "torch"]
    capsys.readouterr()
    assert main(infer) == 0
    out = capsys.readouterr().out
    assert "shorter side 64, longer at most 1333" in out and "the model was trained" not in out
    assert main([*infer, "--resize", "96"]) == 0
    out = capsys.readouterr().out
    assert "--resize 96 --max-size 1333: the model was trained with --resize 64 --max-size 1333." in out
    assert "shorter side 96" in out
    assert main([*infer, "--size", "128"]) == 0
    assert "--size 128 128: the model was trained at 64×96." in capsys.readouterr().out

    onnx = trained.with_suffix(".onnx")
    assert main(["export", str(trained), str(onnx)]) == 0
    assert "64×96" in capsys.readouterr().out  # 64×85.3, rounded up to the stride
    assert main(["export", str(trained), str(onnx), "--size", "32", "64"]) == 0
    assert "--size 32 64: the model was trained at 64×96." in capsys.readouterr().out


def test_a_checkpoint_tells_its_settings(trained: Path, capsys) -> None:
    assert main(["info", str(trained)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["lr", "0.000625"] for line in lines), lines
    assert any(line.split() == ["precision", "mixed"] for line in lines), lines
    assert any(line.split() == ["input_size", "64", "96"] for line in lines)
    assert any(line.split()[:1] == ["odtk"] for line in lines)
    assert main(["info", str(trained), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert 0 <= found["settings"]["padding_share"] < 0.9 and len(found["settings"]["aspects"]) == 20
    assert found["settings"]["resize"] == 64 and found["iteration"] == 1
    assert found["categories"] == [[3, "cell"], [8, "plate"]]


def test_a_run_is_resumed_with_its_settings(trained: Path, coco: Path, capsys) -> None:
    again = [*short_training(coco, trained), "--iters", "2"]
    sentence = fails(capsys, *again, "--lr", "0.1", "--augment-hue", "0.5")
    assert "(--lr 0.000625 → 0.1, --augment-hue 0.0002 → 0.5)" in sentence
    assert "--override-settings" in sentence
    assert main([*again, "--lr", "0.1", "--augment-hue", "0.5", "--override-settings"]) == 0
    assert checkpoint.load(trained).setting("lr") == 0.1
    more = [*short_training(coco, trained), "--iters", "3", "--logdir", str(trained.parent / "log"), "--lr", "0.1"]
    assert main([*more, "--augment-hue", "0.5"]) == 0, "a longer run, and logs, are no other settings"


def test_a_file_older_than_a_setting_is_resumed_with_what_was_done_then(trained: Path, coco: Path, capsys) -> None:
    content = torch.load(trained, weights_only=True)
    for name in ("optimizer", "lr_schedule"):
        del content["settings"][name]
    del content["training"]["schedule"]["optimizer"]
    torch.save(content, trained)
    again = [*short_training(coco, trained), "--iters", "2", "--lr-schedule", "milestones"]
    assert "trained by --optimizer sgd" in fails(capsys, *again, "--optimizer", "adamw", "--override-settings")
    assert main([*again, "--optimizer", "sgd"]) == 0


def test_the_length_in_epochs(coco: Path) -> None:
    config = configured(coco, "--epochs", "3", "--batch", "4", "--accumulate", "2")
    assert (config.iters, config.warmup) == (1, 0)  # 2 images
    assert configured(coco, "--epochs", "25", "--batch", "2").iters == 25
    assert configured(coco, "--epochs", "0.5", "--batch", "1").iters == 1


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["train", "m.pth", "--max-sise", "3"], "`odtk train` takes no --max-sise: did you mean --max-size?"),
        (["infer", "m.pth", "--nonsense=1"], "`odtk infer --help` lists the flags"),
        (["evaluate", "d.json", "more.json"], "`odtk evaluate` takes no more.json"),
    ],
)
def test_an_unknown_argument_is_named_with_the_nearest_flag(argv: list[str], sentence: str, capsys) -> None:
    assert main(argv) == 1
    assert sentence in capsys.readouterr().err


def test_what_is_not_given_again_is_resumed_as_it_was(trained: Path, coco: Path, capsys) -> None:
    alone = ["train", str(trained), "--annotations", str(coco / "truth.json"), "--iters", "2", "--devices", "cpu"]
    assert main(alone) == 0, "backbone, size, weights and batch come from the checkpoint"
    assert checkpoint.load(trained).setting("resize") == 64
    capsys.readouterr()
    assert "(--resize 64 → 800)" in fails(capsys, *alone, "--resize", "800")
    sentence = fails(capsys, *alone, "--anchor-scales", "3", "4", "--norm", "group")
    assert "--anchor-scales 4 5.03968 6.3496 → 3 4" in sentence and "--norm batch → group" in sentence


def test_annotations_are_compared_by_what_is_in_them(trained: Path, coco: Path, capsys) -> None:
    moved = coco / "elsewhere.json"
    moved.write_text((coco / "truth.json").read_text())
    again = ["train", str(trained), "--annotations", str(moved), "--images", str(coco), "--devices", "cpu"]
    assert main([*again, "--iters", "2"]) == 0
    content = json.loads(moved.read_text())
    content["annotations"][0]["bbox"][2] -= 5
    moved.write_text(json.dumps(content))
    capsys.readouterr()
    assert "trained on other images or boxes" in fails(capsys, *again, "--iters", "3")
    assert main([*again, "--iters", "3", "--override-settings"]) == 0
