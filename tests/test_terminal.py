"""Names from a user's files on the terminal: nothing in them is markup, and no control character gets through."""

import json
from pathlib import Path

import pytest
import torch

from odtk.categories import Category
from odtk.cli import main
from odtk.config import ModelConfig
from odtk.evaluation.benchmark import print_report
from odtk.evaluation.bootstrap import Comparison
from odtk.evaluation.evaluate import ClassMetrics, Metrics, print_metrics
from odtk.evaluation.report import Run, Verdict, print_verdict
from odtk.model import checkpoint
from odtk.model.detector import Detector

NAMES = ["[/] cell", "[red]pl:car:ate\x1b[31m\u202e"]
SHOWN = ["[/] cell", r"[red]pl:car:ate\x1b[31m\u202e"]
FILE = "[bold]\x1b[2J\r.jpg"
FILE_SHOWN = r"[bold]\x1b[2J\r.jpg"


def clean(text: str) -> str:
    """The text, once it holds no control character but line ends."""
    assert all(c.isprintable() or c == "\n" for c in text), repr(text)
    return text


@pytest.fixture
def hostile(coco: Path) -> Path:
    """The tiny dataset with NAMES as categories, FILE as an image, and a model of these categories, m.pth."""
    path = coco / "truth.json"
    content = json.loads(path.read_text())
    for category, name in zip(content["categories"], NAMES, strict=True):
        category["name"] = name
    (coco / "1.jpg").rename(coco / FILE)
    content["images"][0]["file_name"] = FILE
    content["annotations"].append({"id": 9, "image_id": 1, "category_id": 3, "bbox": [4, 4, 0, 40]})  # a fault to name
    path.write_text(json.dumps(content))
    model = ModelConfig(backbones=("ResNet18C4",), classes=2, norm="batch")
    detector = Detector(model)
    detector.initialize()
    categories = tuple(Category(id, name) for id, name in zip((3, 8), NAMES, strict=True))
    checkpoint.save(coco / "m.pth", checkpoint.Checkpoint(model, categories, detector.state_dict()))
    return coco


def run(capsys: pytest.CaptureFixture[str], *argv: object, code: int = 0) -> str:
    assert main([str(part) for part in argv]) == code
    captured = capsys.readouterr()
    return clean(captured.out + captured.err)


def test_commands(hostile: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truth = hostile / "truth.json"
    said = run(capsys, "check", "--annotations", truth, "--verbose")
    assert all(name in said for name in SHOWN)
    found = [{"image_id": i, "category_id": 3, "bbox": [4, 4, 40, 40], "score": 0.5} for i in (1, 2)]
    results = hostile / FILE.replace(".jpg", ".json")
    results.write_text(json.dumps(found))
    said = run(capsys, "evaluate", results, "--annotations", truth)
    assert all(name in said for name in SHOWN)
    output = hostile / "[red]\x1b.json"
    said = run(capsys, "infer", hostile / "m.pth", "--annotations", truth, "--output", output, "--size", 64, 64)
    assert all(name in said for name in SHOWN) and r"[red]\x1b.json" in said and output.exists()
    said = run(capsys, "info", hostile / "m.pth")
    assert all(name in said for name in SHOWN)
    (hostile / FILE).write_bytes(b"\xff\xd8\xff")
    assert FILE_SHOWN in run(capsys, "check", "--annotations", truth, code=1)
    assert FILE_SHOWN in run(capsys, "evaluate", hostile / FILE, "--annotations", truth, code=1)


def test_tables(capsys: pytest.CaptureFixture[str]) -> None:
    """Those of `evaluate`, of `export --verify`, which came after minutes of work, and of `benchmark`."""
    classes = tuple(ClassMetrics(id, name, 0.5, 0.5, 1, 1) for id, name in enumerate(NAMES))
    metrics = Metrics((0.5,) * 12, classes)
    print_metrics(metrics)
    said = clean(capsys.readouterr().out)
    assert all(name in said for name in SHOWN)

    one = Run(f"ONNX {NAMES[0]}", 1, metrics, 1.0, [], None)  # type: ignore[arg-type]
    none = Comparison(0, 0, 0, 1, 0.3)
    print_verdict(Verdict((one, one), (none, none), {NAMES[1]: 1.0}, (NAMES[1],)), FILE)
    said = clean(capsys.readouterr().out)
    assert all(name in said for name in (*SHOWN, "[bold]", r"\x1b[2J\r.jpg"))

    runs = {NAMES[0]: {"images per second": 1.0, "latency ms": dict.fromkeys((50, 90, 99), 1.0)}}
    figures = {
        "model": FILE,
        "backend": "[red]",
        "precision": "fp32",
        "input": (1, 3, 2, 2),
        "input type": "uint8",
        "machine": "[/]",
    }
    print_report({**figures, "runs": runs, "memory": {}})
    said = clean(capsys.readouterr().out)
    assert all(name in said for name in (SHOWN[0], "[red]", "On [/]", r"\x1b[2J\r"))


def test_training(hostile: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    truth, model = hostile / "truth.json", hostile / "[b]\x1b[31m.pth"
    sizes = ["--jitter", 64, 64, "--max-size", 64, "--resize", 64, "--backbone-weights", "none", "--loader", "torch"]
    run_settings = ["--annotations", truth, "--backbone", "ResNet18C4", "--iters", 1, "--batch", 2, "--devices", "cpu"]
    said = run(capsys, "train", model, *run_settings, *sizes)
    assert r"[b]\x1b[31m.pth" in said and model.exists()
