"""TensorRT 8.6's own ONNX parser, without a GPU: it finds our plugins for their nodes and hands over all attributes."""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
import pytest
import torch
from onnx import ModelProto, TensorProto, helper
from onnx.utils import Extractor

from odtk.box_coder import BOX_CODERS
from odtk.categories import Category
from odtk.config import ExportConfig, ModelConfig
from odtk.exporting.engine import name_or_field
from odtk.exporting.export import export
from odtk.exporting.metadata import Metadata, pack
from odtk.exporting.postprocess_graph import Level, append_plugin_postprocess
from tests.csrc.test_engine_calls import FAKE, defaults
from tests.csrc.test_plugins import compile_host, find_headers
from tests.gpu.stand_ins import main as make_stand_ins
from tests.random_models import detector_of, save

pytestmark = pytest.mark.slow  # compiles

METADATA = Metadata(
    size=(64, 64),
    stride=32,
    classes=1203,
    categories=tuple(Category(i + 1, f"räumliches_Objekt_{i * 7919 % 99991}") for i in range(1203)),
    precision="fp32",
    postprocessing="plugins",
    box_values=4,
    score_threshold=0,  # an int, as from Python
    nms_threshold=0.5,
    detections=100,
    top_n=1000,
    batch=(1, 2, 4),
    model="0123",
)


def plugin_nodes(metadata: Metadata) -> ModelProto:
    """Our two nodes as an export writes them, on inputs of the graph; nothing else that needs a whole TensorRT."""
    names = [("logits", [1, 1203, 2, 2]), ("boxes", [1, 4, 2, 2])]
    heads = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in names]
    model = helper.make_model(
        helper.make_graph([], "plugins", heads, heads), opset_imports=[helper.make_opsetid("", 18)]
    )
    level = Level(("logits", "boxes", 2, 2), torch.tensor([[0.0, 0, 31, 31]]), 32)
    append_plugin_postprocess(model, [level], ModelConfig(classes=1203, ratios=(1.0,), scales=(1.0,)), metadata)
    assert name_or_field(model, metadata, 4090) == ""
    ours = [node for node in model.graph.node if node.op_type.startswith("Odtk")]
    ours[0].input[:] = ["logits", "boxes", "anchors"]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ours[1].output]
    anchors = helper.make_tensor_value_info("anchors", TensorProto.FLOAT, [1, 1, 4])
    graph = helper.make_graph(ours, "plugins", [*heads, anchors], outputs)
    made = helper.make_model(graph, opset_imports=model.opset_import)
    made.ir_version = model.ir_version
    return made


def serialized(*fields: tuple[str, Sequence[float]]) -> str:
    """What PluginBase writes for TensorRT 8: for each field its length and its numbers, in hexadecimal."""
    return b"".join(struct.pack(f"<i{len(values)}{kind}", len(values), *values) for kind, values in fields).hex()


@dataclass(frozen=True)
class Parser:
    """TensorRT 8.6's parser, and the network that prints what it is given."""

    command: list[str]
    first: list[str]  # libraries that are loaded first

    def parse(self, model: Path) -> list[str]:
        result = subprocess.run([*self.command, str(model), *self.first], capture_output=True, text=True, timeout=60)
        assert result.returncode == 0, result.stderr
        return result.stdout.splitlines()


@pytest.fixture(scope="module")
def parser(tmp_path_factory: pytest.TempPathFactory) -> Parser:
    folder = tmp_path_factory.mktemp("parser")
    host = compile_host(8)
    headers, compiler = find_headers(8), shutil.which("g++")
    parser = host.library.with_name("libnvonnxparser.so.8")
    if compiler is None or not parser.is_file() or not (headers / "NvOnnxParser.h").is_file():
        pytest.skip("no g++, libnvonnxparser.so.8 or NvOnnxParser.h")
    (folder / "defaults.h").write_text(defaults(headers))
    flags = ["-std=c++17", "-w", f"-I{FAKE}", f"-I{folder}", "-isystem", str(headers)]
    probe = folder / "probe"
    subprocess.run([compiler, *flags, str(FAKE / "parser_probe.cpp"), "-o", str(probe), "-ldl"], check=True)
    stock = host.library.with_name("libnvinfer_plugin.so.8")
    make_stand_ins(str(folder / "stand-ins"), str(stock))
    first = [*sorted((folder / "stand-ins").glob("lib*.so.*[0-9]")), host.library, stock]
    command = [probe, host.library, host.plugins, parser]
    return Parser(list(map(str, command)), list(map(str, first)))


def test_the_parser_hands_every_attribute_to_our_plugins(parser: Parser, tmp_path: Path) -> None:
    onnx.save(plugin_nodes(METADATA), tmp_path / "model.onnx")
    coder = BOX_CODERS["anchor_deltas"].number
    decode = serialized(("i", [32]), ("i", [1203]), ("i", [coder]), ("f", [0.0]), ("i", [1000]))
    nms = serialized(("i", [4]), ("f", [0.5]), ("i", [100]), ("i", pack(METADATA.to_json())))
    assert parser.parse(tmp_path / "model.onnx") == [f"OdtkDecode 3 {decode}", f"OdtkNms 3 {nms}"]


def test_the_parser_takes_uint8_pixels_and_casts_them_first(parser: Parser, tmp_path: Path) -> None:
    """The start of an exported graph. TensorRT's numbers: 5 is UINT8, 0 is FLOAT; -1 is the size of the batch."""
    pth = save(detector_of(ModelConfig(backbones=("ResNet18C4",), classes=2)), tmp_path)
    export(ExportConfig(pth, str(tmp_path / "model.onnx"), size=(48, 64), precision="fp32"))
    start = Extractor(onnx.load(tmp_path / "model.onnx")).extract_model(["images"], ["images/float32"])
    onnx.save(start, tmp_path / "start.onnx")
    assert parser.parse(tmp_path / "start.onnx") == ["Cast images 5 -1x3x48x64 to 0"]
