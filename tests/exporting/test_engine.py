"""What is handed to TensorRT's build, and the metadata of a plan; the build itself needs a GPU (tests/gpu)."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from onnx import AttributeProto, ModelProto, TensorProto, helper

from odtk.categories import Category
from odtk.config import ExportConfig, ModelConfig, OdtkError
from odtk.exporting import engine
from odtk.exporting.metadata import Metadata, pack, unpack
from odtk.exporting.postprocess_graph import Level, append_plugin_postprocess
from odtk.settings import ExportSettings

LONGEST = 4090  # odtk._C.LONGEST_METADATA
SHORT = Metadata(
    size=(64, 64),
    stride=32,
    classes=2,
    categories=(Category(1, "cat"), Category(2, "dog")),
    precision="fp32",
    postprocessing="plugins",
    box_values=4,
    score_threshold=0.05,
    nms_threshold=0.5,
    detections=100,
    top_n=1000,
    batch=(1, 2, 4),
    model="0123",
)


def many_classes(classes: int = 1203) -> Metadata:
    """Of LVIS's number of classes, with names of its kind."""
    names = [f"{i * 7919 % 99991:05d}_(räumliches_Objekt)" for i in range(classes)]
    categories = tuple(Category(i + 1, name) for i, name in enumerate(names))
    return dataclasses.replace(SHORT, classes=classes, categories=categories)


def plugin_graph(metadata: Metadata) -> ModelProto:
    """Two head tensors of one level and the plugins behind them."""
    names = ("logits", "boxes")
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", c, 2, 2]) for n, c in zip(names, (2, 4))]  # noqa: B905
    model = helper.make_model(helper.make_graph([], "heads", values, values))
    level = Level(("logits", "boxes", 2, 2), torch.tensor([[0.0, 0, 31, 31]]), 32)
    append_plugin_postprocess(model, [level], ModelConfig(classes=2, ratios=(1.0,), scales=(1.0,)), metadata)
    return model


def attributes(model: ModelProto, kind: str) -> dict[str, AttributeProto]:
    (node,) = [node for node in model.graph.node if node.op_type == kind]
    return {attribute.name: attribute for attribute in node.attribute}


def test_short_metadata_is_the_engines_name() -> None:
    model = plugin_graph(SHORT)
    assert engine.name_or_field(model, SHORT, LONGEST) == SHORT.to_json()
    assert "metadata" not in attributes(model, "OdtkNms")


def test_metadata_of_1203_classes_goes_into_the_plugin_and_comes_back() -> None:
    metadata = many_classes()
    model = plugin_graph(metadata)
    assert len(metadata.to_json().encode()) > 30_000
    assert engine.name_or_field(model, metadata, LONGEST) == ""
    numbers = list(attributes(model, "OdtkNms")["metadata"].ints)
    assert all(-(2**31) <= number < 2**31 for number in numbers), "the parser makes int32 of them"
    data = b"".join(number.to_bytes(4, "little", signed=True) for number in numbers)  # as csrc/plugins/library.cpp
    assert Metadata.from_json(unpack(data, "model.plan"), "model.plan") == metadata
    assert len(data) < len(metadata.to_json()) / 2


@pytest.mark.parametrize("text", ["", "{}", "a", "ab", "abc", "ä" * 5000])
def test_any_text_is_unpacked_as_it_was(text: str) -> None:
    data = b"".join(number.to_bytes(4, "little", signed=True) for number in pack(text))
    assert unpack(data, "model.plan") == text
    assert unpack(text.encode(), "model.plan") == text


@pytest.mark.parametrize("data", [b"\x78\xda broken", b"\xff\xfe"])
def test_damaged_metadata_is_refused(data: bytes) -> None:
    with pytest.raises(OdtkError, match=r"The metadata in model\.plan is damaged: export the model again\."):
        unpack(data, "model.plan")


def test_whole_numbers_as_thresholds_become_float_attributes() -> None:
    """The parser hands an INT attribute over as int32, which the plugins refuse."""
    model = plugin_graph(dataclasses.replace(SHORT, score_threshold=0, nms_threshold=1))
    assert attributes(model, "OdtkDecode")["score_threshold"].type == AttributeProto.FLOAT
    assert attributes(model, "OdtkNms")["threshold"].type == AttributeProto.FLOAT


@pytest.fixture
def extension(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """odtk._C on a machine with a GPU and TensorRT, as far as Python sees it; `built` holds what it was told."""
    made = SimpleNamespace(Engine=object, CAN_BUILD=True, LONGEST_METADATA=LONGEST, built={})
    made.tensorrt_version = lambda: "11.1.0"
    made.set_logger = lambda _: None

    def build(onnx: bytes, **options: Any) -> bytes:
        made.built |= options
        return b"plan"

    made.engine_build = build
    monkeypatch.setattr(engine.importlib, "import_module", lambda _: made)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    return made


def test_an_extension_without_the_parser_runs_engines_but_does_not_build_them(extension: SimpleNamespace) -> None:
    assert engine.require_tensorrt(build=True) is extension
    extension.CAN_BUILD = False
    assert engine.require_tensorrt() is extension
    with pytest.raises(OdtkError, match=r"NvOnnxParser\.h"):
        engine.require_tensorrt(build=True)


@pytest.mark.parametrize("headers", ["11.1.0", "10.13.3"])
def test_without_tensorrts_library_the_extra_that_fits_is_named(extension: SimpleNamespace, headers: str) -> None:
    def missing() -> str:
        raise RuntimeError("TensorRT was not found on this machine")

    extension.tensorrt_version, extension.TENSORRT_HEADERS = missing, headers
    with pytest.raises(OdtkError, match="not found") as raised:
        engine.require_tensorrt()
    assert ("pip install 'odtk[tensorrt-cu13]'" in str(raised.value)) is headers.startswith("11")


@pytest.mark.parametrize(("precision", "tf32"), [("fp32", False), ("fp16", True), ("int8", True)])
def test_full_precision_is_true_float32(extension: SimpleNamespace, precision: str, tf32: bool) -> None:
    config = ExportConfig(path="model.pth", output="model.plan", precision=precision)
    metadata = dataclasses.replace(SHORT, precision=precision)
    assert engine.build_engine(plugin_graph(metadata), metadata, config) == b"plan"
    assert extension.built["tf32"] is tf32
    assert json.loads(extension.built["metadata"])["precision"] == precision


@pytest.mark.parametrize("name", ["hardware_compatible", "version_compatible"])
def test_compatibility_reaches_the_build_and_is_refused_for_onnx(extension: SimpleNamespace, name: str) -> None:
    from odtk.commands import export_config

    for on in (False, True):
        settings = ExportSettings(model="model.pth", output="model.plan", full_precision=True, **{name: on})  # type: ignore[arg-type]
        engine.build_engine(plugin_graph(SHORT), SHORT, export_config(settings))
        assert extension.built[name] is on
    with pytest.raises(OdtkError, match=f"--{name.replace('_', '-')} is for a .plan or .engine"):
        ExportSettings(model="model.pth", output="model.onnx", **{name: True})  # type: ignore[arg-type]
