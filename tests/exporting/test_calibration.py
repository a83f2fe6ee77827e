"""Calibration: the ranges of activations, the choice of images, the calibration table and its rules."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from odtk.config import ExportConfig, LoaderConfig, ModelConfig, OdtkError
from odtk.data.dataset import Dataset
from odtk.data.loader import create_loader
from odtk.exporting import calibration, calibration_table, export
from odtk.exporting.calibration_table import CalibrationTable
from odtk.inference import infer
from odtk.model import checkpoint
from odtk.model.detector import Detector, normalize
from odtk.settings import CALIBRATION_METHODS

C4 = ModelConfig(backbones=("ResNet18C4",), classes=2)


def empty_graph() -> onnx.ModelProto:
    return onnx.helper.make_model(onnx.helper.make_graph([], "empty", [], []))


# Ranges


def test_histogram_is_the_same_in_parts_as_at_once() -> None:
    values = np.random.default_rng(0).exponential(1.0, 20_000).astype(np.float32)
    whole, parts = calibration.Histogram(), calibration.Histogram()
    whole.add(np.concatenate([values[:10], values]))
    for part in np.split(np.concatenate([values[:10], values])[:20_000], 10):
        parts.add(-part)
    parts.add(values[-10:])
    assert parts.counts.sum() == whole.counts.sum() == 20_010
    for method in CALIBRATION_METHODS:
        assert parts.range(method) == pytest.approx(whole.range(method), rel=0.03)
    assert whole.range("minmax") == values.max()
    assert whole.range("percentile") == pytest.approx(np.quantile(values, calibration.PERCENTILE), rel=0.01)


def test_entropy_cuts_a_rare_outlier_and_keeps_a_full_range() -> None:
    generator = np.random.default_rng(0)
    outlier, full = calibration.Histogram(), calibration.Histogram()
    outlier.add(np.append(generator.standard_normal(100_000), 1000).astype(np.float32))
    full.add(generator.uniform(-1, 1, 100_000).astype(np.float32))
    assert 2 < outlier.range("entropy") < 100 < outlier.range("minmax")
    assert full.range("entropy") > 0.95


def test_zeros_say_nothing_of_a_range() -> None:
    histogram = calibration.Histogram()
    histogram.add(np.zeros(1000, np.float32))
    assert histogram.range("entropy") == 1.0
    histogram.add(np.append(np.zeros(10**6), np.arange(1, 101)).astype(np.float32))
    assert histogram.range("percentile") > 99


def test_values_that_are_not_finite_are_refused() -> None:
    with pytest.raises(OdtkError, match="not finite"):
        calibration.Histogram().add(np.array([1, np.nan], np.float32))


# The table and its rules


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    detector = Detector(C4)
    detector.initialize()
    path = tmp_path_factory.mktemp("model") / "model.pth"
    checkpoint.save(path, checkpoint.Checkpoint(C4, None, detector.state_dict()))
    return str(path)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images of different sizes."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for i in range(12):
        pixels = generator.integers(0, 255, (20 + 5 * i, 70 - 3 * i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02}.png")
    return folder


def int8_config(model: str, folder: Path, **changes) -> ExportConfig:
    config = ExportConfig(path=model, output=str(folder / "int8.onnx"), size=(32, 32), precision="int8")
    return dataclasses.replace(config, **changes)


@pytest.mark.parametrize(("head", "method"), [("dense", "percentile"), ("retinanet", "entropy")])
def test_the_method_follows_from_the_head(head: str, method: str, pictures: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(C4, head=head)
    path = tmp_path / "model.pth"
    checkpoint.save(path, checkpoint.Checkpoint(config, None, Detector(config).state_dict()))
    report = export.export(int8_config(str(path), tmp_path, calibration_images=str(pictures)))
    assert report.table and calibration_table.load_table(report.table).method == method


def test_a_table_gives_the_same_bytes_without_images(model_path: str, pictures: Path, tmp_path: Path) -> None:
    config = int8_config(model_path, tmp_path, calibration_images=str(pictures), calibration_method="percentile")
    report = export.export(config)
    assert report.table == str(tmp_path / "int8.calibration.json")
    table = calibration_table.load_table(report.table)
    assert sorted(table.images) == sorted(path.name for path in pictures.iterdir())
    assert table.images != tuple(sorted(table.images)) and table.method == "percentile"
    assert len(table.scales) > 15 and all(scale > 0 for scale in table.scales.values())
    first = Path(config.output).read_bytes()
    weights = {tensor.name: tensor.data_type for tensor in onnx.load_from_string(first).graph.initializer}
    assert weights["head.cls_head.0.weight/int8"] == onnx.TensorProto.INT8
    make_table_of_before(report.table)
    again = int8_config(model_path, tmp_path, calibration_table=report.table, output=str(tmp_path / "again.onnx"))
    export.export(again)
    assert Path(again.output).read_bytes() == first
    refuse_other_tables(config, report.table, tmp_path)


def make_table_of_before(path: str) -> None:
    """Rewrites a table as it was: with decibels by layer, and with a scale for both inputs of an addition."""
    values = json.loads(Path(path).read_text())
    del values["layer_costs"]
    values["sensitivity"] = {"head.cls_head.0": 31.5}
    values["scales"]["backbones.ResNet18C4.features.layer1.0.conv2"] = 0.1
    Path(path).write_text(json.dumps(values))
    table = calibration_table.load_table(path)
    assert table.layer_costs == {} and len(table.scales) == len(values["scales"])


@pytest.mark.parametrize("tensorrt", [8, 10])
def test_the_graph_is_written_for_what_runs_it(model_path: str, pictures: Path, tmp_path: Path, tensorrt: int) -> None:
    config = int8_config(model_path, tmp_path, calibration_images=str(pictures), calibration_method="minmax")
    loaded = checkpoint.load(model_path)
    model, _ = export.raw_graph(checkpoint.build_detector(loaded).fold(), loaded, config, tensorrt)
    assert model.opset_import[0].version == (19 if tensorrt == 10 else 18)
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert types["head.cls_head.0.weight"] == onnx.TensorProto.FLOAT and "head.cls_head.0.weight/int8" not in types
    leaves_in = model.graph.output[0].type.tensor_type.elem_type
    assert leaves_in == (onnx.TensorProto.FLOAT16 if tensorrt == 10 else onnx.TensorProto.FLOAT)


def refuse_other_tables(config: ExportConfig, path: str, folder: Path) -> None:
    """A table of another model or size, and a file that is no table."""
    given = dataclasses.replace(config, calibration_table=path)
    graph = empty_graph()
    with pytest.raises(OdtkError, match="is the calibration table of another model"):
        calibration.load_or_calibrate(graph, given, "another", Detector(C4))
    own = calibration_table.load_table(path)
    with pytest.raises(OdtkError, match="calibrated at 32×32, not 64×64"):
        calibration.load_or_calibrate(graph, dataclasses.replace(given, size=(64, 64)), own.model, Detector(C4))
    other = dataclasses.replace(given, calibration_method={"entropy": "minmax"}.get(own.method, "entropy"))
    with pytest.raises(OdtkError, match=rf"calibrated by {own.method}, not {other.calibration_method}: leave out"):
        calibration.load_or_calibrate(graph, other, own.model, Detector(C4))
    (folder / "no.json").write_text("{}")
    with pytest.raises(OdtkError, match="is not a calibration table"):
        calibration.load_or_calibrate(
            graph, dataclasses.replace(given, calibration_table=str(folder / "no.json")), "", Detector(C4)
        )


@pytest.mark.parametrize("input_type", ["uint8", "float32"])
@pytest.mark.parametrize("padding", ["mean", "black"])
def test_calibration_sees_the_tensors_of_inference(
    padding: str, input_type: str, pictures: Path, tmp_path: Path
) -> None:
    """What the network gets behind the normalization that is in the graph."""
    model = dataclasses.replace(C4, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), padding=padding)
    config = int8_config("", tmp_path, calibration_images=str(pictures), input_type=input_type)
    dataset = calibration.sample_images(str(pictures), 500, seed=0)
    seen = list(calibration.calibration_images(dataset, config, Detector(model)))

    class Asking:
        size, stride, max_batch, rotated, name = (32, 32), 16, None, False, "a model"
        mean, std, padding = model.mean, model.std, model.padding

    Asking.input_type = input_type  # type: ignore[attr-defined]
    data = infer.loader_config(LoaderConfig(images=str(pictures)), Asking())  # type: ignore[arg-type]
    whole = Dataset.load(None, pictures)
    batches = list(create_loader(whole, data))
    assert batches[0].images.dtype == getattr(torch, input_type)
    by_id = {int(batch.ids[0]): normalize(batch.images, model.mean, model.std).numpy() for batch in batches}
    assert len(seen) == len(by_id) == 12
    for image, tensor in zip(dataset.images, seen, strict=True):
        np.testing.assert_array_equal(tensor, by_id[image.id])


def test_the_sample_is_shuffled_before_it_is_cut(pictures: Path) -> None:
    def names(limit: int, seed: int) -> list[str]:
        return [image.path.name for image in calibration.sample_images(str(pictures), limit, seed).images]

    assert names(8, 0) == names(8, 0) == names(12, 0)[:8] != sorted(names(8, 0))
    assert set(names(8, 0)) != set(names(8, 1))


def test_too_few_images_and_empty_folders_are_refused(pictures: Path, tmp_path: Path, capsys) -> None:
    with pytest.raises(OdtkError, match="has no images"):
        calibration.sample_images(str(tmp_path), 500, 0)
    with pytest.raises(OdtkError, match="does not exist"):
        calibration.sample_images(str(tmp_path / "nowhere"), 500, 0)
    for path in sorted(pictures.iterdir())[:7]:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(OdtkError, match="has 7 images: calibration needs at least 8"):
        calibration.sample_images(str(tmp_path), 500, 0)
    calibration.sample_images(str(pictures), 500, 0)
    assert "Warning: calibration on 12 images" in capsys.readouterr().out


def test_int8_without_images_or_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OdtkError, match="needs --calibration-images DIR, or a --calibration-table"):
        calibration.load_or_calibrate(empty_graph(), int8_config("", tmp_path), "m", Detector(C4))
    with pytest.raises(OdtkError, match="method 'best' does not exist"):
        calibration.activation_ranges(empty_graph(), [], "best", 1)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"scales": {"images": float("nan")}}, "its 'scales' has nan for images"),
        ({"scales": {"images": -1}}, "which is not a positive number"),
        ({"scales": {"images": 0}}, "which is not a positive number"),
        ({"scales": {"images": True}}, "which is not a positive number"),
        ({"scales": {"images": "1"}}, "which is not a positive number"),
        ({"scales": [1]}, "its 'scales' is not an object"),
        ({"size": [32]}, "its 'size'"),
        ({"size": [32, -32]}, "its 'size'"),
        ({"size": 32}, "its 'size'"),
        ({"images": "a.jpg"}, "its 'images' is not a list of texts"),
        ({"fp16_layers": [1]}, "its 'fp16_layers' is not a list of texts"),
        ({"method": None}, "its 'method' is not a text"),
        ({"model": 3}, "its 'model' is not a text"),
        ({"layer_costs": {"conv": None}}, "which is not a number"),
        ({"more": 1}, "'more' is unknown"),
    ],
)
def test_tables_that_cannot_be_right_are_refused(tmp_path: Path, changes: dict, fault: str) -> None:
    good = CalibrationTable("m", (32, 64), "minmax", ("a.jpg",), {"images": 0.1})
    path = tmp_path / "t.json"
    path.write_text(good.to_json())
    assert calibration_table.load_table(str(path)) == good
    path.write_text(json.dumps({**json.loads(good.to_json()), **changes}))
    with pytest.raises(OdtkError, match="is not a calibration table") as error:
        calibration_table.load_table(str(path))
    assert fault in str(error.value)
    for text in ("[]", "{", "[" * 100_000, '{"size": ' + "9" * 5000 + "}", '{"model": "m"}'):
        path.write_text(text)
        with pytest.raises(OdtkError):
            calibration_table.load_table(str(path))
