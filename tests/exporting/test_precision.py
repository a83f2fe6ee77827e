"""INT8: quantized weights, where Q/DQ pairs stand, sensitivity, and what TensorRT for RTX makes of the graphs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto
from torch import Tensor, nn

from odtk.config import ModelConfig, OdtkError
from odtk.evaluation import sensitivity
from odtk.exporting import calibration, calibration_table, precision
from odtk.exporting.graph import producers_of, serialize, trace
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
    scales = calibration.scales_of(precision.scale_groups(model.graph), ranges)
    return dataclasses.replace(calibration_table.CalibrationTable("m", (16, 16), "minmax", (), scales), **changes)


def quantized(model: onnx.ModelProto, table: calibration_table.CalibrationTable) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    precision.insert_qdq(copy, table)
    return copy


def test_weights_are_symmetric_and_nothing_is_clipped() -> None:
    weight = np.random.default_rng(0).standard_normal((16, 4, 3, 3)).astype(np.float32)
    weight[3] *= 1e-4
    weight[5] = 0
    values, scale = precision.quantize_weight(weight)
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
        ["images", "stem/relu", "conv1/relu", "conv2", "conv2/add/relu", "down/relu", "top", "lateral", "lateral/add"]
    )


def test_both_inputs_of_an_addition_share_a_scale(net: onnx.ModelProto) -> None:
    scales = table_of(net).scales
    assert scales["conv2"] == scales["stem/relu"] and scales["top"] == scales["lateral"]
    assert len(set(scales.values())) == len(scales) - 2


def test_a_layer_in_fp16_reads_what_was_not_rounded(net: onnx.ModelProto) -> None:
    model = quantized(net, table_of(net, fp16_layers=("cls_head", "conv2")))
    producers = producers_of(model.graph)
    nodes = {node.name: node for node in model.graph.node}
    assert list(nodes["cls_head"].input) == ["lateral/add", "cls_head.weight", "cls_head.bias"]
    assert producers[nodes["box_head"].input[0]].op_type == "DequantizeLinear"  # beside it, on the same map
    assert list(nodes["conv2/add"].input) == ["conv2", "stem/relu"]
    with pytest.raises(OdtkError, match="no layer nothing"):
        quantized(net, table_of(net, fp16_layers=("nothing",)))


def test_int8_with_an_fp16_remainder_is_the_same_however_optimized(net: onnx.ModelProto) -> None:
    """ONNX Runtime 1.31 spoils float16 Q/DQ nodes: they and what INT8 kernels fuse stay float32, the rest does not."""
    table = table_of(net, fp16_layers=("cls_head",))
    model = quantized(net, table)
    floats = open_session(model).run(None, {"images": noise(1)[0]})
    precision.to_fp16(model)
    onnx.checker.check_model(model, full_check=True)
    types = {v.name: v.type.tensor_type.elem_type for v in onnx.shape_inference.infer_shapes(model).graph.value_info}
    types |= {output.name: output.type.tensor_type.elem_type for output in model.graph.output}
    for node in model.graph.node:
        half = node.output[0] == "logits_0" or (node.op_type == "Cast" and node.output[0].endswith("/fp16"))
        assert (types[node.output[0]] == TensorProto.FLOAT16) == half or node.op_type == "QuantizeLinear", node.name
    expected = open_session(net).run(None, {"images": noise(1)[0]})
    assert 15 < sensitivity.signal_to_noise([expected], [floats]) < 60  # quantized, and not badly
    for level in ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_ALL"):
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
        found = onnxruntime.InferenceSession(model.SerializeToString(), options).run(None, {"images": noise(1)[0]})
        assert sensitivity.signal_to_noise([floats], [found]) > 35, level


def test_sensitivity_finds_the_layer_with_the_wrong_range(net: onnx.ModelProto) -> None:
    table = table_of(net)
    table.scales["down/relu"] *= 60  # read by "top" alone
    found = sensitivity.measure_sensitivity(net, table, noise(2))
    assert set(found) == set(precision.quantizable_layers(net)) and list(found.values()) == sorted(found.values())
    assert list(found)[0] == "top" and found["top"] < 20 < found["stem"]


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


def raw_files(backbone: str, head: str) -> Iterator[tuple[str, bytes, int]]:
    """(precision, ONNX of the raw levels at 128×160, convolutions) in FP16 and INT8, of random weights."""
    torch.manual_seed(0)
    detector = Detector(ModelConfig(backbones=(backbone,), head=head, classes=3))
    detector.initialize()
    folded = detector.fold()
    for parameter in folded.parameters():
        if parameter.ndim == 1:  # biases, which a trained network has and torch.onnx drops where they are zero
            parameter.data = 0.1 * torch.randn_like(parameter)
    model = trace(folded, (128, 160))
    count = sum(node.op_type == "Conv" for node in model.graph.node)
    images = [np.random.default_rng(i).standard_normal((1, 3, 128, 160)).astype(np.float32) for i in range(2)]
    scales = calibration.scales_of(
        precision.scale_groups(model.graph), calibration.activation_ranges(model, images, "minmax", 2)
    )
    int8 = quantized(model, calibration_table.CalibrationTable("m", (128, 160), "minmax", (), scales))
    for kind, graph in (("fp16", model), ("int8", int8)):
        precision.to_fp16(graph)
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
        for capability in ("SM89", "SM120") if kind == "int8" and backbone.startswith("ResNet") else ("SM89",):
            kinds = convolutions(compile_for(content, capability))
            assert set(kinds) == {"Half" if kind == "fp16" else "Int8"}, (kind, capability)
            assert len(kinds) > 0.85 * count  # some 1×1 become part of another kernel
            print(f"{backbone} {head} {kind} {capability}: {len(kinds)} of {count} convolutions, all {kinds[0]}")
