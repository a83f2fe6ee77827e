"""Verification of the written file: the whole path on a small set, the search for FP16 layers, the reports."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from odtk.categories import Category
from odtk.cli import exit_code
from odtk.config import ExportConfig, LoaderConfig, ModelConfig, PostprocessConfig
from odtk.data.dataset import Dataset
from odtk.data.loader import create_loader
from odtk.evaluation import verify
from odtk.evaluation.bootstrap import CategoryMatches, Comparison, Matches, compare
from odtk.evaluation.evaluate import ClassMetrics, Metrics
from odtk.evaluation.report import PICTURES, Run, Verdict, html_figures, html_page, run_rows, summarize
from odtk.exporting import calibration_table, export
from odtk.inference.backends import open_backend
from odtk.inference.detect import detect
from odtk.model import checkpoint
from odtk.model.detector import Detector
from odtk.postprocess import BatchDetections
from tests.random_models import detector_of, save

CONFIG = ModelConfig(backbones=("ResNet18C4",), classes=2)
CATEGORIES = (Category(1, "cat & co"), Category(5, "dog"))
LIMITS = PostprocessConfig(score_threshold=0.3, detections=10)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> tuple[ExportConfig, str, str]:
    """An INT8 export of random weights, and ten images annotated with what PyTorch finds in them."""
    return int8_job(detector_of(CONFIG, bias=0.0), tmp_path_factory.mktemp("job"))


def int8_job(detector: Detector, folder: Path) -> tuple[ExportConfig, str, str]:
    """The export of a detector, written into a folder; annotations of what PyTorch finds; the folder of the images."""
    path = save(detector, folder, CATEGORIES)
    images = folder / "images"
    images.mkdir()
    generator = np.random.default_rng(0)
    for i in range(10):
        pixels = generator.integers(0, 255, (8, 6 + i % 3, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((60 - i, 64), Image.Resampling.NEAREST).save(images / f"{i}.png")
    dataset = Dataset.load(None, images)
    loader = create_loader(dataset, LoaderConfig(images=str(images), size=(64, 64), stride=16))
    backend = open_backend(path, device="cpu", precision="fp32", thresholds=LIMITS)
    found = detect(backend, loader, CATEGORIES)
    assert len(found) > 20
    annotations = folder / "truth.json"
    annotations.write_text(
        json.dumps(
            {
                "images": [
                    {"id": image.id, "file_name": image.path.name, "width": image.width, "height": image.height}
                    for image in dataset.images
                ],
                "categories": [{"id": c.id, "name": c.name} for c in CATEGORIES],
                "annotations": [
                    {
                        "id": i,
                        "iscrowd": 0,
                        "area": entry["bbox"][2] * entry["bbox"][3],
                        **{key: entry[key] for key in ("image_id", "category_id", "bbox")},
                    }
                    for i, entry in enumerate(found, start=1)
                ],
            }
        )
    )
    config = ExportConfig(
        path=path,
        output=str(folder / "model.onnx"),
        size=(64, 64),
        precision="int8",
        postprocess=LIMITS,
        calibration_images=str(images),
        calibration_method="minmax",
    )
    export.export(config)
    return config, str(annotations), str(images)


@pytest.mark.slow
def test_int8_is_verified_and_reported(job, capsys: pytest.CaptureFixture[str]) -> None:
    config, annotations, images = job
    assert verify.verify(config, annotations=annotations, images=images, max_ap_drop=100).passed
    report = json.loads(Path(config.output + ".verify.json").read_text())
    assert [run["name"] for run in report["runs"]] == ["PyTorch fp32", "ONNX fp32", "ONNX fp16", "ONNX int8"]
    ap = [run["stats"]["AP"] for run in report["runs"]]
    assert ap[0] > 0.9 and ap[1] == pytest.approx(ap[0], abs=0.01)
    assert report["passed"] and report["verdict"] == "within" and report["images"] == 10
    low, high = report["drop_interval"]
    assert low < report["drop_points"] < high < 100 and report["runs"][3]["drop_interval"] == [low, high]
    assert report["drop_points"] == pytest.approx(100 * (ap[0] - ap[3]), abs=1e-3)
    assert report["runs"][2]["bytes"] < 0.6 * report["runs"][1]["bytes"]
    assert report["runs"][3]["bytes"] < 0.4 * report["runs"][1]["bytes"]
    table = calibration_table.load_table(calibration_table.table_path(config))
    costs = list(table.layer_costs.values())
    assert report["layer_costs_percent"] == table.layer_costs and len(costs) > 20
    assert costs == sorted(costs, reverse=True) and 0 < costs[0] < 100
    page = Path(config.output + ".verify.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 2 * PICTURES
    assert "cat &amp; co" in page and "http:" not in page and "https:" not in page
    out = capsys.readouterr().out
    assert "Most costly layers in INT8" in out and "within the 100 that it may lose" in out


@pytest.mark.slow
def test_a_wrong_file_is_found_out(job, tmp_path: Path) -> None:
    """The written file is run, not its checkpoint: one with other weights fails."""
    config, annotations, images = job
    torch.manual_seed(1)
    other = Detector(CONFIG)
    other.initialize()
    wrong = dataclasses.replace(
        config, path=str(tmp_path / "other.pth"), output=str(tmp_path / "fp32.onnx"), precision="fp32"
    )
    checkpoint.save(wrong.path, checkpoint.Checkpoint(CONFIG, CATEGORIES, other.state_dict()))
    export.export(wrong)
    mixed = dataclasses.replace(wrong, path=config.path)
    verdict = verify.verify(mixed, annotations=annotations, images=images, max_ap_drop=0.3)
    assert not verdict.passed and verdict.exit_code == 2 and verdict.comparison.verdict == "beyond"


def hard_to_quantize(layer: str) -> Detector:
    """A detector whose ``layer`` loses everything in INT8, although float16 holds it.

    One input of the layer, which is always 0, gets a weight so large that all others round to 0 beside it.
    """
    detector = detector_of(CONFIG, bias=0.0)
    parameters = dict(detector.named_parameters())
    before = f"{layer[: layer.rindex('.')]}.{int(layer.rpartition('.')[2]) - 2}"  # a ReLU stands between the two
    with torch.no_grad():
        parameters[f"{before}.weight"][0] = 0
        parameters[f"{before}.bias"][0] = -1
        parameters[f"{layer}.weight"][:, 0] = 500
    return detector


@pytest.mark.slow
def test_a_layer_of_the_head_that_int8_spoils_is_found_and_put_into_fp16(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It reaches only the scores: the boxes, which stay the same, hid it when decibels were averaged over outputs."""
    layer = "head.cls_head.8"
    config, annotations, images = int8_job(hard_to_quantize(layer), tmp_path)
    verdict = verify.verify(config, annotations=annotations, images=images, max_ap_drop=20)
    assert list(verdict.layer_costs)[0] == layer and verdict.fp16_layers[0] == layer
    costs = list(verdict.layer_costs.values())
    assert costs[0] > 60 and costs[0] > 1.5 * costs[1]
    assert verdict.passed and "Writing it again with " + layer in capsys.readouterr().out
    loaded = onnx.load(config.output)
    types = {tensor.name: tensor.data_type for tensor in loaded.graph.initializer}
    assert any(types.get(f"{layer}.weight{end}") == onnx.TensorProto.FLOAT16 for end in ("", "/fp16"))


class FakeBackend:
    """Finds the square [8, 8, 16, 16] in every image, once as each category."""

    name, precision, size, stride, max_batch = "m.onnx", "fp32", (64, 64), 32, None
    classes, categories, rotated, thresholds = 2, CATEGORIES, False, LIMITS
    mean, std, padding = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "mean"
    input_type = "uint8"

    def __call__(self, images: torch.Tensor) -> BatchDetections:
        n = len(images)
        box = torch.tensor([8.0, 8.0, 23.0, 23.0])
        return BatchDetections(torch.full((n, 2), 0.5), box.expand(n, 2, 4), torch.arange(2).expand(n, 2))


def test_a_set_may_lack_categories_of_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in inference: detections of those are not scored."""
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    (tmp_path / "truth.json").write_text(
        json.dumps(
            {
                "images": [{"id": 1, "file_name": "a.png", "width": 64, "height": 64}],
                "categories": [{"id": 5, "name": "dog"}],
                "annotations": [{"id": 1, "image_id": 1, "category_id": 5, "bbox": [8, 8, 16, 16]}],
            }
        )
    )
    monkeypatch.setattr(verify, "open_backend", lambda *_, **__: FakeBackend())
    config = ExportConfig(path="", output=str(tmp_path / "a.png"))
    run = verify.Evaluator(config, str(tmp_path / "truth.json"), str(tmp_path), "cpu").run(config.output)
    assert run.metrics.ap == pytest.approx(1) and len(run.results) == 2


@pytest.mark.parametrize("stated", [(40, 30), (30, 40)])
def test_pictures_are_turned_only_where_the_boxes_are(tmp_path: Path, stated: tuple[int, int]) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("RGB", (40, 30)).save(tmp_path / "a.jpg", exif=exif)
    entry = {"id": 1, "file_name": "a.jpg", "width": stated[0], "height": stated[1]}
    (tmp_path / "truth.json").write_text(json.dumps({"images": [entry]}))
    images = Dataset.load(tmp_path / "truth.json", tmp_path).images
    (figure,) = html_figures(run_of(0.5), run_of(0.5), images)
    encoded = figure.partition("base64,")[2].partition('"')[0]
    enlarged = (14 * stated[0], 14 * stated[1])  # until the shorter side has at least 400 pixels
    assert Image.open(io.BytesIO(base64.b64decode(encoded))).size == enlarged


def run_of(ap: float) -> Run:
    """A run of this AP, one of 0, 0.1, 0.2 … 1: ten images with one object each, found at so many IoU thresholds."""
    found = np.arange(10)[:, None] < round(10 * ap)
    images, one = np.arange(10), np.ones(10, int)
    category = CategoryMatches(images, np.tile(found, (1, 10)), np.zeros((10, 10), bool), one)
    matches = Matches(10, np.linspace(0, 1, 101), (category,))
    classes = (ClassMetrics(1, "cat", ap, ap, 1, 1),)
    return Run("x", 1, Metrics((ap, ap, *[0.0] * 10), classes), 1.0, [], matches)


class FakeEvaluator:
    """A set on which INT8 is good enough once the given layers are in FP16."""

    def __init__(self, table: str, needed: set[str]) -> None:
        self.table, self.needed = table, needed

    def run(self, path: str) -> Run:
        return run_of(0.5 if self.needed <= set(calibration_table.load_table(self.table).fp16_layers) else 0.4)


@pytest.mark.parametrize(
    ("needed", "kept", "good"),
    [("b", "zab", True), ("", "z", True), ("d", "zabcd", True), ("q", "zabcdef", False)],
)
def test_the_worst_layers_stay_in_fp16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, needed: str, kept: str, good: bool
) -> None:
    path = str(tmp_path / "table.json")
    calibration_table.save_table(path, calibration_table.CalibrationTable("m", (32, 32), "entropy", (), {}, ("z",)))
    written: list[ExportConfig] = []
    monkeypatch.setattr(verify, "export", written.append)
    config = ExportConfig(path="", output=str(tmp_path / "x.onnx"), precision="int8", calibration_table=path)
    evaluator = FakeEvaluator(path, set(needed))
    first = evaluator.run("")
    run, layers = verify.revert_layers_to_fp16(config, evaluator, run_of(0.5), first, list("abcdef"), 0.3)  # type: ignore[arg-type]
    assert "".join(layers) == kept and compare(run_of(0.5).matches, run.matches, 0.3).passed == good
    assert calibration_table.load_table(path).fp16_layers == tuple(kept)
    assert all(config.calibration_table == path for config in written) and bool(written) == (kept != "z")


def verdict_of(found: Comparison) -> Verdict:
    none = Comparison(0, 0, 0, found.images, found.allowed)
    return Verdict((run_of(0.5), run_of(0.1), run_of(0.4)), (none, none, found), {"head": 12.3456}, ("head",))


@pytest.mark.parametrize(
    ("found", "code", "sentence"),
    [
        (
            Comparison(0.12, -0.02, 0.26, 87, 0.3),
            0,
            "x loses 0.12 points of AP (95 % interval of the change: -0.26 to +0.02), within the 0.3 that it may lose.",
        ),
        (
            Comparison(-0.1, -0.4, 0.2, 87, 0.3),
            0,
            "x gains 0.10 points of AP (95 % interval of the change: -0.20 to +0.40), within the 0.3 that it may lose.",
        ),
        (
            Comparison(-0.001, -0.002, 0.0, 87, 0.3),
            0,
            "x keeps its AP (95 % interval of the change: 0.00 to 0.00), within the 0.3 that it may lose.",
        ),
        (
            Comparison(1.4, 0.5, 2.2, 87, 0.3),
            2,
            "x loses 1.40 points of AP (95 % interval of the change: -2.20 to -0.50), beyond the 0.3 that it may lose.",
        ),
        (
            Comparison(0.1, -0.5, 0.7, 87, 0.3),
            0,
            "x loses 0.10 points of AP (95 % interval of the change: -0.70 to +0.50). 87 images cannot tell whether it "
            "loses more than the 0.3 allowed; about 790 would do. It passes, because it does not here.",
        ),
        (
            Comparison(0.31, -0.5, 1.1, 87, 0.3),
            3,
            "x loses 0.31 points of AP (95 % interval of the change: -1.10 to +0.50). 87 images cannot tell whether it "
            "loses more than the 0.3 allowed; many more are needed. It fails, because it does here.",
        ),
    ],
)
def test_a_verdict_says_what_the_images_can_tell(found: Comparison, code: int, sentence: str) -> None:
    """On the terminal, in JSON, on the page and as the exit code."""
    verdict = verdict_of(found)
    assert summarize("x", found) == sentence and sentence in html_page(verdict, "x.onnx", []).replace("&#x27;", "'")
    assert exit_code("export", verdict) == code and verdict.passed == (code == 0)
    values = verdict.to_dict()
    assert (values["verdict"], values["passed"]) == (found.verdict, verdict.passed)
    assert values["drop_points"] == round(found.drop, 3) and values["runs"][2]["drop_interval"] == [
        found.low,
        found.high,
    ]
    assert (values["images_needed"] or 0) == (790 if "790" in sentence else 0)


def test_the_table_shows_changes_with_their_sign() -> None:
    rows = run_rows(verdict_of(Comparison(-0.1, -0.4, 0.2, 87, 0.3)))
    assert [row[3] for row in rows] == ["", "0.00 (0.00 to 0.00)", "+0.10 (-0.20 to +0.40)"]


def test_exit_codes_without_a_verdict() -> None:
    assert [exit_code("export", None), exit_code("check", True), exit_code("check", False)] == [0, 0, 1]
