"""What the bundle has for DeepStream: nvinfer's configuration, and the parser, compiled and given real outputs."""

from __future__ import annotations

import configparser
import ctypes
import dataclasses
import math
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import odtk
from odtk.deploy.bundle import metadata_of
from odtk.deploy.deepstream import nvinfer_config, write_deepstream
from odtk.exporting.session import open_session

HERE = Path(__file__).parent
SOURCE = Path(odtk.__file__).parent / "deploy" / "deepstream_parser"
HEADERS = os.environ.get("DEEPSTREAM_INCLUDE", str(HERE / "fake"))
INT32, INT64 = 3, 4  # of NvDsInferDataType


def compiled(folder: Path, *flags: str) -> ctypes.CDLL:
    """The parser and the probe as a library."""
    if shutil.which("g++") is None:
        pytest.skip("there is no g++")
    library = folder / "parser.so"
    sources = [SOURCE / "odtk_parser.cpp", HERE / "parser_probe.cpp"]
    options = ["-std=c++14", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    include = "-I" if str(HERE / "fake") == HEADERS else "-isystem"
    subprocess.run(["g++", *options, include, HEADERS, *flags, *sources, "-o", library], check=True)
    return ctypes.CDLL(str(library))


@pytest.fixture(scope="module")
def parser(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compiled(tmp_path_factory.mktemp("parser"))


def parse(
    parser: ctypes.CDLL,
    scores: np.ndarray,
    boxes: np.ndarray,
    classes: np.ndarray,
    thresholds: tuple[float, ...] = (0.0, 0.0),
    size: tuple[int, int] = (64, 64),
    first: bytes = b"scores",
) -> np.ndarray | None:
    """Objects [n, 7]: class, left, top, width, height, score, angle; None where the parser refuses."""
    out = np.zeros((len(scores), 7), np.float32)
    kind = {np.dtype(np.int32): INT32, np.dtype(np.int64): INT64}[classes.dtype]
    pointer = lambda array: array.ctypes.data_as(ctypes.c_void_p)  # noqa: E731
    limits = np.array(thresholds, np.float32)
    scores, boxes = np.ascontiguousarray(scores, np.float32), np.ascontiguousarray(boxes, np.float32)
    found = parser.probe(
        *(pointer(scores), pointer(boxes), pointer(classes), kind, *boxes.shape, size[1], size[0], len(limits)),
        *(pointer(limits), first, pointer(out)),
    )
    return None if found < 0 else out[:found]


def test_boxes_of_the_parser_are_those_of_odtk(bundle: Path, coco: Path, parser: ctypes.CDLL) -> None:
    path = bundle / "deepstream" / "model.onnx"
    photo = coco / "1.jpg"  # 64×48: at scale 1 above 16 black rows
    pixels = np.zeros((1, 3, 64, 64), np.float32)
    pixels[0, :, :48] = np.asarray(Image.open(photo).convert("RGB")).transpose(2, 0, 1)
    scores, boxes, classes = (values[0] for values in open_session(str(path)).run(None, {"images": pixels}))
    found = parse(parser, scores, boxes, classes)
    expected = odtk.load(path, device="cpu").predict(photo)
    assert found is not None
    found = found[found[:, 2] < 48]  # nvinfer's parser does not know where the image ends
    assert len(found) == len(expected.scores) > 5
    corners = np.concatenate([found[:, 1:3], found[:, 1:3] + found[:, 3:5]], axis=1)
    np.testing.assert_allclose(found[:, 5], expected.scores, rtol=1e-6)
    np.testing.assert_allclose(corners, expected.boxes, atol=1e-3)
    assert found[:, 0].astype(int).tolist() == expected.labels.tolist()


def test_its_model_takes_floats_and_finds_what_the_other_finds(bundle: Path, coco: Path) -> None:
    assert metadata_of(str(bundle / "deepstream" / "model.onnx")).input_type == "float32"
    both = (odtk.load(bundle / name, device="cpu") for name in ("model.onnx", "deepstream/model.onnx"))
    uint8, float32 = (model.predict(coco / "1.jpg") for model in both)
    np.testing.assert_allclose(float32.scores, uint8.scores, rtol=1e-5)
    np.testing.assert_allclose(float32.boxes, uint8.boxes, atol=1e-3)


def test_the_configuration_feeds_what_the_model_was_trained_on(bundle: Path) -> None:
    folder = bundle / "deepstream"
    config = configparser.ConfigParser()
    config.read(folder / "config_infer.txt")
    values = dict(config["property"])
    assert {key: values[key] for key in ("net-scale-factor", "model-color-format", "maintain-aspect-ratio")} == {
        "net-scale-factor": "1",
        "model-color-format": "0",
        "maintain-aspect-ratio": "1",
    }
    assert values["symmetric-padding"] == "0" and "offsets" not in values and values["cluster-mode"] == "4"
    assert values["crop-objects-to-roi-boundary"] == "1" and values["num-detected-classes"] == "2"
    assert all((folder / values[key]).is_file() for key in ("onnx-file", "labelfile-path"))
    assert len((folder / values["labelfile-path"]).read_text().splitlines()) == 2
    assert [config[f"class-attrs-{index}"]["pre-cluster-threshold"] for index in (0, 1)] == ["0.05", "0.05"]
    outputs = [output.name for output in open_session(str(folder / "model.onnx")).get_outputs()]
    assert sorted(outputs) == sorted(values["output-blob-names"].split(";"))
    assert f"{values['parse-bbox-func-name']}(" in (folder / "parser" / "odtk_parser.cpp").read_text()


def test_padding_that_nvinfer_cannot_give_is_said(bundle: Path) -> None:
    metadata = metadata_of(str(bundle / "model.onnx"))
    assert "pads with black" not in nvinfer_config(metadata, ["model.onnx"])
    assert "pads with black" in nvinfer_config(dataclasses.replace(metadata, padding="mean"), ["model.onnx"])


def test_each_precision_says_what_tensorrt_8_needs(bundle: Path) -> None:
    metadata = metadata_of(str(bundle / "model.onnx"))
    said = {
        precision: nvinfer_config(dataclasses.replace(metadata, precision=precision), ["model.onnx"])
        for precision in ("fp32", "fp16", "int8")
    }
    assert [kind for kind, text in said.items() if "set network-mode to 2" in text] == ["fp16"]
    assert [kind for kind, text in said.items() if "name an engine as model-engine-file" in text] == ["int8"]
    assert all("\nnetwork-mode=0\nstrongly-typed=1\n" in text for text in said.values())


def test_rotated_boxes_without_an_engine_have_no_nms(bundle: Path, tmp_path: Path) -> None:
    metadata = dataclasses.replace(metadata_of(str(bundle / "model.onnx")), box_values=6)
    config = odtk.config.ExportConfig("none.pth", str(tmp_path))
    assert write_deepstream(config, metadata, ["model.onnx"], "") == [] and not list(tmp_path.iterdir())


def test_rows_that_are_no_objects_are_left_out(parser: ctypes.CDLL) -> None:
    boxes = np.array([[-4, -4, 9, 9], [50, 50, 70, 90], [1, 1, 2, 2], [1, 1, 2, 2], [1, 1, 2, 2], [70, 1, 80, 9]])
    scores = np.array([0.9, 0.8, 0.3, 0.0, 0.7, 0.9])
    classes = np.array([0, 1, 1, 0, 2, 0], np.int32)  # class 2 is not configured; the last box is beyond the input
    found = parse(parser, scores, boxes, classes, thresholds=(0.05, 0.5))
    assert found is not None
    np.testing.assert_allclose(found[:, :6], [[0, 0, 0, 10, 10, 0.9], [1, 50, 50, 14, 14, 0.8]], rtol=1e-6)


def test_other_outputs_are_refused(parser: ctypes.CDLL, capfd) -> None:
    one, classes = np.ones(1), np.zeros(1, np.int64)
    assert parse(parser, one, np.ones((1, 4)), classes, first=b"logits") is None
    assert "no output scores" in capfd.readouterr().err
    assert parse(parser, one, np.ones((1, 5)), classes) is None
    assert "float [D, 4 or 6]" in capfd.readouterr().err


def test_angles_turn_as_the_display_turns(parser: ctypes.CDLL, tmp_path: Path, capfd) -> None:
    angle = 0.3
    rotated = (np.ones(1), np.array([[10, 20, 29, 25, math.sin(angle), math.cos(angle)]]), np.zeros(1, np.int32))
    found = parse(parser, *rotated)
    assert found is not None
    np.testing.assert_allclose(found, np.array([[0, 10, 20, 20, 6, 1, -angle]]), rtol=1e-6)
    if str(HERE / "fake") == HEADERS:
        assert parse(compiled(tmp_path, "-DDEEPSTREAM_8"), *rotated) is None
        assert "need DeepStream 9" in capfd.readouterr().err


@pytest.mark.slow
def test_the_bundle_builds_its_parser(bundle: Path, tmp_path: Path) -> None:
    if shutil.which("cmake") is None:
        pytest.skip("there is no cmake")
    folder = shutil.copytree(bundle / "deepstream", tmp_path / "deepstream")
    where = ["-S", str(folder / "parser"), "-B", str(tmp_path / "build")]
    missing = subprocess.run(["cmake", *where, f"-DDEEPSTREAM_INCLUDE={tmp_path}"], capture_output=True, text=True)
    assert missing.returncode and "pass -DDEEPSTREAM_INCLUDE" in " ".join(missing.stderr.split())
    subprocess.run(["cmake", *where, f"-DDEEPSTREAM_INCLUDE={HEADERS}"], check=True)
    subprocess.run(["cmake", "--build", tmp_path / "build"], check=True)
    assert ctypes.CDLL(str(folder / "libodtk_parser.so")).NvDsInferParseCustomOdtk
