"""INT8: quantized weights, where Q/DQ pairs stand and in which types, and what TensorRT for RTX makes of the graphs."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, numpy_helper
from torch import Tensor, nn

from odtk.config import IMAGENET_MEAN, IMAGENET_STD, ModelConfig, OdtkError
from odtk.exporting import calibration, calibration_table, precision
from odtk.exporting.graph import producers_of, serialize, take_pixels, trace
from odtk.exporting.session import open_session
from odtk.model.detector import Detector


class Net(nn.Module):
    """What a detector has, small: a residual block, a pyramid addition after upsampling, two heads on one map."""

    stem: nn.Conv2d
    conv1: nn.Conv2d
    conv2: nn.Conv2d
    down: nn.Conv2d
    top: nn.Conv2d
    lateral: nn.Conv2d
    cls_head: nn.Conv2d
    box_head: nn.Conv2d

    def __init__(self) -> None:
        super().__init__()
        for name, shape in {
            "stem": (8, 3, 3),
            "conv1": (8, 8, 3),
            "conv2": (8, 8, 3),
            "down": (8, 8, 3),
            "top": (8, 8, 1),
            "lateral": (8, 8, 1),
            "cls_head": (4, 8, 3),
            "box_head": (4, 8, 3),
        }.items():
            out, channels, k = shape
            self.add_module(name, nn.Conv2d(channels, out, k, 2 if name == "down" else 1, k // 2))

    def forward(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        x = F.relu(self.stem(images))
        c3 = F.relu(self.conv2(F.relu(self.conv1(x))) + x)
        c4 = F.relu(self.down(c3))
        p3 = self.lateral(c3) + F.interpolate(self.top(c4), scale_factor=2.0)
        return [self.cls_head(p3)], [self.box_head(p3)]


@pytest.fixture(scope="module")
def net() -> onnx.ModelProto:
    torch.manual_seed(0)
    return trace(Net(), (16, 16))  # type: ignore[arg-type]


def noise(count: int) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.standard_normal((1, 3, 16, 16)).astype(np.float32) for _ in range(count)]


def table_of(model: onnx.ModelProto, **changes) -> calibration_table.CalibrationTable:
    ranges = calibration.activation_ranges(model, noise(4), "minmax", 4)
    table = calibration_table.CalibrationTable("m", (16, 16), "minmax", (), calibration.scales_of(ranges))
    return dataclasses.replace(table, **changes)


def quantized(
    model: onnx.ModelProto, table: calibration_table.CalibrationTable, tensorrt: int | None = None
) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    precision.insert_qdq(copy, table, tensorrt)
    return copy


def signal_to_noise(expected: list[np.ndarray], actual: list[np.ndarray]) -> float:
    """Decibels, over the squares of all outputs together."""
    pairs = list(zip(expected, actual, strict=True))
    return 10 * np.log10(sum(a.var() for a, _ in pairs) / max(sum(np.mean((a - b) ** 2) for a, b in pairs), 1e-20))


def types_of(model: onnx.ModelProto) -> dict[str, int]:
    graph = onnx.shape_inference.infer_shapes(model).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.output)}
    return types | {tensor.name: tensor.data_type for tensor in graph.initializer}


def test_weights_are_symmetric_and_nothing_is_clipped() -> None:
    weight = np.random.default_rng(0).standard_normal((16, 4, 3, 3)).astype(np.float32)
    weight[3] *= 1e-4
    weight[5] = 0
    scale = precision.weight_scale(weight)
    values = precision.quantize_weight(weight, scale)
    assert values.dtype == np.int8 and scale.dtype == np.float32 and (scale > 0).all()
    assert (np.abs(values[[0, 3]]).max((1, 2, 3)) == 127).all() and values.min() >= -127
    error = np.abs(values * scale[:, None, None, None] - weight)
    assert (error <= scale[:, None, None, None] * 0.501).all()


# Placement


def test_qdq_stand_at_convolutions_and_additions_only(net: onnx.ModelProto) -> None:
    model = quantized(net, table_of(net))
    onnx.checker.check_model(model, full_check=True)
    producers = producers_of(model.graph)
    for node in model.graph.node:
        if node.op_type == "Conv":
            assert [producers[name].op_type for name in node.input[:2]] == ["DequantizeLinear"] * 2
        if node.op_type == "Relu":
            assert producers[node.input[0]].op_type in ("Conv", "Add")  # none between convolution and ReLU
        if node.op_type == "Resize":
            assert producers[node.input[0]].op_type == "DequantizeLinear"  # before the upsampling, not after
    pairs = [node.input[0] for node in model.graph.node if node.op_type == "QuantizeLinear"]
    assert sorted(pairs) == sorted(
        ["images", "stem/relu", "conv1/relu", "conv2/add/relu", "down/relu", "top", "top/resize", "lateral/add"]
    )


def test_the_convolution_that_feeds_an_addition_stays_plain(net: onnx.ModelProto) -> None:
    """One kernel computes it with the addition and the ReLU, and reads the other input as int8."""
    model = quantized(net, table_of(net))
    nodes = {node.name: node for node in model.graph.node}
    assert set(nodes["conv2/add"].input) == {"conv2", "stem/relu/dq"}
    assert set(nodes["lateral/add"].input) == {"lateral", "top/resize/dq"}


def test_upsampling_keeps_the_scale(net: onnx.ModelProto) -> None:
    """Its values are those before it, so that int8 is upsampled and the second pair rounds nothing again."""
    table = table_of(net)
    assert "top" in table.scales and "top/resize" not in table.scales
    nodes = {node.name: node for node in quantized(net, table).graph.node}
    assert nodes["top/resize/quantize"].input[1] == nodes["top/quantize"].input[1] == "top/scale"


# Backbone → the layers that feed additions and stay plain, and what makes the inputs that are quantized.
ADDITIONS = {
    "ResNet18FPN": (r"layer\d\.\d\.conv2|lateral\d", {"MaxPool": 1, "Relu": 4, "Conv": 3, "Resize": 2}),
    "ResNet50FPN": (r"layer\d\.\d\.conv3|lateral\d", {"Relu": 12, "Conv": 4, "Resize": 2}),
    "MobileNetV2FPN": (r"\.(3|5|6|8|9|10|12|13|15|16)\.conv\.2|lateral\d", {"Conv": 5, "Add": 5, "Resize": 2}),
    "RepVGGA0FPN": (r"lateral\d", {"Resize": 2}),
    "GhostNetFPN": (r"shortcut\.2|concat|lateral\d", {"Relu": 1, "Concat": 5, "Add": 10, "Resize": 2}),
}


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ADDITIONS)
def test_one_input_of_each_addition_is_quantized(backbone: str) -> None:
    """As by nvidia-modelopt 0.47: the skip, the shortcut's convolution or the upsampled map, never what feeds it."""
    detector = Detector(ModelConfig(backbones=(backbone,), classes=2, head_convs=1))
    model = trace(detector.fold(), (64, 64))
    scales = dict.fromkeys(precision.quantizable_activations(model.graph), 0.1)
    precision.insert_qdq(model, calibration_table.CalibrationTable("m", (64, 64), "minmax", (), scales))
    plain_layers, expected = ADDITIONS[backbone]
    producers = producers_of(model.graph)
    residual: Counter[str] = Counter()
    found = precision.additions(model.graph)
    for node in found:
        plain, pair = sorted((producers[name] for name in node.input), key=lambda made: made.op_type[0] == "D")
        assert re.search(f"({plain_layers})$", plain.name), node.name
        assert pair.op_type == "DequantizeLinear" and producers[pair.input[0]].op_type == "QuantizeLinear"
        residual[producers[producers[pair.input[0]].input[0]].op_type] += 1
    assert residual == expected and len(found) == sum(expected.values())


def test_a_layer_in_fp16_reads_what_was_not_rounded(net: onnx.ModelProto) -> None:
    model = quantized(net, table_of(net, fp16_layers=("cls_head", "conv2")))
    producers = producers_of(model.graph)
    nodes = {node.name: node for node in model.graph.node}
    assert list(nodes["cls_head"].input) == ["lateral/add", "cls_head.weight", "cls_head.bias"]
    assert producers[nodes["box_head"].input[0]].op_type == "DequantizeLinear"  # beside it, on the same map
    assert list(nodes["conv2/add"].input) == ["conv2", "stem/relu"]
    with pytest.raises(OdtkError, match="no layer nothing"):
        quantized(net, table_of(net, fp16_layers=("nothing",)))


def test_an_addition_of_a_layer_in_fp16_is_not_quantized() -> None:
    """Also where its output comes concatenated or upsampled."""
    helper = onnx.helper
    nodes = [
        helper.make_node("Conv", ["images", "a.weight"], ["a"], "a"),
        helper.make_node("Conv", ["images", "b.weight"], ["b"], "b"),
        helper.make_node("Concat", ["a", "b"], ["a/concat"], "a/concat", axis=1),
        helper.make_node("Conv", ["images", "c.weight"], ["c"], "c"),
        helper.make_node("Add", ["a/concat", "c"], ["logits_0"], "add"),
    ]
    shapes = {"a": (2, 3, 1, 1), "b": (2, 3, 1, 1), "c": (4, 3, 1, 1)}
    weights = [numpy_helper.from_array(np.ones(shape, np.float32), f"{name}.weight") for name, shape in shapes.items()]
    ends = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, c, 4, 4]) for n, c in (("images", 3), ("logits_0", 4))
    ]
    graph = helper.make_graph(nodes, "concat", ends[:1], ends[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    table = calibration_table.CalibrationTable("m", (4, 4), "minmax", (), {"images": 0.1, "a/concat": 0.1})
    assert set(precision.quantizable_activations(model.graph)) == set(table.scales)
    for fp16_layers, inputs in (((), ["a/concat/dq", "c"]), (("b",), ["a/concat", "c"])):
        written = quantized(model, dataclasses.replace(table, fp16_layers=fp16_layers))
        assert next(list(node.input) for node in written.graph.node if node.name == "add") == inputs


# Types


def test_int8_with_an_fp16_remainder_is_the_same_however_optimized(net: onnx.ModelProto) -> None:
    """ONNX Runtime 1.31 spoils float16 Q/DQ nodes: they and what INT8 kernels fuse stay float32, the rest does not."""
    table = table_of(net, fp16_layers=("cls_head",))
    model = quantized(net, table)
    floats = open_session(model).run(None, {"images": noise(1)[0]})
    precision.to_fp16(model)
    onnx.checker.check_model(model, full_check=True)
    types = types_of(model)
    for node in model.graph.node:
        half = node.output[0] == "logits_0" or (node.op_type == "Cast" and node.output[0].endswith("/fp16"))
        assert (types[node.output[0]] == TensorProto.FLOAT16) == half or node.op_type == "QuantizeLinear", node.name
    expected = open_session(net).run(None, {"images": noise(1)[0]})
    assert 15 < signal_to_noise(expected, floats) < 60  # quantized, and not badly
    for level in ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_ALL"):
        assert signal_to_noise(floats, run(model, level)) > 35, level


def run(model: onnx.ModelProto, level: str) -> list[np.ndarray]:
    """The outputs of one image at a level of ONNX Runtime's optimizations."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    return [value.astype(np.float32) for value in session.run(None, {"images": noise(1)[0]})]


@pytest.mark.parametrize("tensorrt", [None, 8, 10, 11])
def test_tensorrt_gets_weights_as_floats_through_q_and_dq(net: onnx.ModelProto, tensorrt: int | None) -> None:
    """TensorRT 8 takes no other form; the file for ONNX Runtime holds a quarter of the bytes. Both compute the same."""
    model = quantized(net, table_of(net), tensorrt)
    onnx.checker.check_model(model, full_check=True)
    producers = producers_of(model.graph)
    constants = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Conv":
            pair = [producers[node.input[1]]]
            if tensorrt is not None:
                pair.append(producers[pair[0].input[0]])
                assert pair[1].op_type == "QuantizeLinear" and pair[1].input[1:] == pair[0].input[1:]
            assert all(onnx.helper.get_node_attr_value(each, "axis") == 0 for each in pair)
            kind = TensorProto.INT8 if tensorrt is None else TensorProto.FLOAT
            assert pair[0].op_type == "DequantizeLinear" and constants[pair[-1].input[0]] == kind
    expected = run(quantized(net, table_of(net)), "ORT_DISABLE_ALL")
    for actual, wanted in zip(run(model, "ORT_DISABLE_ALL"), expected, strict=True):
        np.testing.assert_allclose(actual, wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("tensorrt", "opset", "half"), [(10, 19, True), (11, 21, True), (10, 18, False), (8, 19, False), (None, 19, False)]
)
def test_int8_leaves_in_fp16_where_tensorrt_can(
    net: onnx.ModelProto, tensorrt: int | None, opset: int, half: bool
) -> None:
    """Strongly typed, a float32 island would write every output that is not int8 in float32, and cast it."""
    source = onnx.version_converter.convert_version(net, opset) if opset > 18 else net
    table = table_of(net, fp16_layers=("cls_head",))
    model = quantized(source, table, tensorrt)
    precision.to_fp16(model, tensorrt)
    onnx.checker.check_model(model, full_check=True)
    types, producers = types_of(model), producers_of(model.graph)
    casts = [node.input[0] for node in model.graph.node if node.op_type == "Cast"]
    convolutions = {types[node.output[0]] for node in model.graph.node if node.op_type == "Conv"}
    if not half:
        assert types["boxes_0"] == TensorProto.FLOAT and TensorProto.FLOAT in convolutions
        return
    assert casts == ["images"] and convolutions == {TensorProto.FLOAT16}
    assert types["boxes_0"] == types["logits_0"] == TensorProto.FLOAT16
    scales = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear":
            q = producers[node.input[0]]
            assert types[node.output[0]] == TensorProto.FLOAT16
            np.testing.assert_array_equal(scales[node.input[1]].astype(np.float32), scales[q.input[1]])
            if "weight" in node.name:
                assert types[q.input[0]] == types[q.input[1]] == TensorProto.FLOAT  # the form of TensorRT 8
    in_floats = run(quantized(net, table), "ORT_DISABLE_ALL")
    assert signal_to_noise(in_floats, run(model, "ORT_DISABLE_ALL")) > 35


def test_scales_in_fp16_clip_nothing() -> None:
    scales = np.array([1e-12, 3e-8, 1e-5, 0.1, 1 / 3, 0.5, 500], np.float32)
    rounded = precision.round_up_to_fp16(scales)
    assert rounded.dtype == np.float32 and (rounded.astype(np.float16) == rounded).all()
    assert (rounded >= scales).all() and (rounded[3:] <= scales[3:] * 1.001).all() and rounded[5] == 0.5


# TensorRT for RTX, ahead of time and with no GPU


def compile_for(content: bytes, capability: str) -> list[str]:
    """Compiles an ONNX file for a compute capability; the builder's log."""
    trt: Any = pytest.importorskip("tensorrt_rtx_bindings", reason="needs tensorrt-rtx-cu13-{libs,bindings}==1.7.1.116")

    class Log(trt.ILogger):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.lines: list[str] = []

        def log(self, severity, message: str) -> None:
            self.lines.append(message)

    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    assert parser.parse(content), [parser.get_error(i).desc() for i in range(parser.num_errors)]
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, capability), 0)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    profile = builder.create_optimization_profile()
    channels, height, width = list(network.get_input(0).shape)[1:]
    profile.set_shape("images", *((n, channels, height, width) for n in (1, 8, 16)))
    config.add_optimization_profile(profile)
    assert builder.build_serialized_network(network, config) is not None, log.lines[-5:]
    return log.lines


def convolutions(log: list[str]) -> list[str]:
    """Element type of the first input of each convolution in the engine, from the builder's list of layers."""
    listed = next(message for message in log if message.startswith("Layers:\nName:"))
    layers = [line for line in listed.splitlines() if "LayerType: correlation" in line or "LayerType: gemm" in line]
    return [line.split("Datatype: ")[1].split(",")[0] for line in layers]


def level_types(log: list[str]) -> set[str]:
    """Element types in which the engine's layers write the raw levels."""
    listed = next(message for message in log if message.startswith("Layers:\nName:"))
    outputs = "".join(line.partition("Outputs: [")[2].partition("], TacticName")[0] for line in listed.splitlines())
    return set(re.findall(r"Name: (?:logits|boxes)_\d,.*?Datatype: (\w+)", outputs))


def raw_files(backbone: str, head: str) -> Iterator[tuple[str, bytes, int]]:
    """(precision, ONNX from uint8 pixels to raw levels at 128×160, convolutions) in FP16, INT8, of random weights."""
    torch.manual_seed(0)
    detector = Detector(ModelConfig(backbones=(backbone,), head=head, classes=3, head_convs=2))
    detector.initialize()
    folded = detector.fold()
    for parameter in folded.parameters():
        if parameter.ndim == 1:  # biases, which a trained network has and torch.onnx drops where they are zero
            parameter.data = 0.1 * torch.randn_like(parameter)
    model = trace(folded, (128, 160), precision.FP16_QDQ_OPSET)
    count = sum(node.op_type == "Conv" for node in model.graph.node)
    images = [np.random.default_rng(i).standard_normal((1, 3, 128, 160)).astype(np.float32) for i in range(2)]
    scales = calibration.scales_of(calibration.activation_ranges(model, images, "minmax", 2))
    int8 = quantized(model, calibration_table.CalibrationTable("m", (128, 160), "minmax", (), scales), tensorrt=10)
    for kind, graph in (("fp16", model), ("int8", int8)):
        precision.to_fp16(graph, tensorrt=10)
        take_pixels(graph, IMAGENET_MEAN, IMAGENET_STD, "uint8")
        yield kind, serialize(graph), count


@pytest.mark.slow
@pytest.mark.parametrize(
    "backbone, head",
    [
        ("ResNet18FPN", "retinanet"),
        ("ResNet50FPN", "retinanet"),
        ("ResNet18FPN", "fcos"),  # GroupNorm, in float32
        ("GhostNetFPN", "retinanet"),  # means over whole maps
    ],
)
def test_tensorrt_compiles_both_and_runs_every_convolution_in_int8(backbone: str, head: str) -> None:
    pytest.importorskip("tensorrt_rtx_libs", reason="needs tensorrt-rtx-cu13-{libs,bindings}==1.7.1.116")
    for kind, content, count in raw_files(backbone, head):
        both = (kind, backbone, head) == ("int8", "ResNet18FPN", "retinanet")
        for capability in ("SM89", "SM120") if both else ("SM89",):
            log = compile_for(content, capability)
            kinds = convolutions(log)
            assert level_types(log) == {"Half"}, (kind, capability)  # no float32 and cast behind an INT8 kernel
            assert set(kinds) == {"Half" if kind == "fp16" else "Int8"}, (kind, capability)
            assert len(kinds) > 0.85 * count  # some 1×1 become part of another kernel
            print(f"{backbone} {head} {kind} {capability}: {len(kinds)} of {count} convolutions, all {kinds[0]}")
