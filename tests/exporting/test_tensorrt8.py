"""What TensorRT 8 needs of a graph."""

from __future__ import annotations

import copy

import onnx
import onnxruntime
import torch
from onnx import TensorProto

from odtk.config import IMAGENET_MEAN, IMAGENET_STD, ModelConfig
from odtk.exporting import calibration, calibration_table, precision, tensorrt8
from odtk.exporting.graph import take_pixels, trace
from odtk.exporting.precision import to_fp16
from tests.random_models import detector_of


def images_of(batch: int, size: tuple[int, int]) -> torch.Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


def run(content: bytes, feed: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    session = onnxruntime.InferenceSession(content)
    return [torch.from_numpy(value) for value in session.run(None, {k: v.numpy() for k, v in feed.items()})]


def test_group_norms_are_expanded_for_tensorrt_8() -> None:
    """The same levels from plain operators, which stay in float32 in a half-precision graph."""
    detector = detector_of(ModelConfig(backbones=("ResNet18C4",), classes=2, head="fcos")).fold()
    model = trace(detector, (64, 96))
    images = {"images": images_of(3, (64, 96))}
    expected = run(model.SerializeToString(), images)
    expanded = copy.deepcopy(model)
    tensorrt8.expand_instance_norm(expanded)
    assert "InstanceNormalization" not in {node.op_type for node in expanded.graph.node}
    onnx.checker.check_model(expanded, full_check=True)
    for found, wanted in zip(run(expanded.SerializeToString(), images), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert tensorrt8.float32_nodes(expanded) == []  # nothing is in half precision

    to_fp16(model)
    norms = [node for node in model.graph.node if node.op_type == "InstanceNormalization"]
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert norms and all(types[name] == TensorProto.FLOAT for node in norms for name in node.input[1:])
    tensorrt8.expand_instance_norm(model)
    inside = tensorrt8.float32_nodes(model)
    kinds = [node.op_type for node in model.graph.node if node.name in inside]
    assert sorted(set(kinds)) == ["Add", "Div", "GlobalAveragePool", "Mul", "Reshape", "Sqrt", "Sub"]
    assert len(kinds) == 8 * len(norms)
    for found, wanted in zip(run(model.SerializeToString(), images), expected, strict=True):
        torch.testing.assert_close(found.float(), wanted, atol=0.02, rtol=0.02)


def test_float32_nodes_leave_islands_of_int8_out() -> None:
    """Sampling positions of a deformable convolution stay in float32; what INT8 fuses has no type of its own."""
    detector = detector_of(ModelConfig(backbones=("ResNet18C4",), classes=2, dcn=(4,))).fold()
    model = trace(detector, (64, 64))
    images = [image.numpy() for image in images_of(2, (64, 64)).split(1)]
    scales = calibration.scales_of(calibration.activation_ranges(model, images, "minmax", 2))
    precision.insert_qdq(model, calibration_table.CalibrationTable("m", (64, 64), "minmax", (), scales))
    to_fp16(model)
    kinds = {node.op_type for node in model.graph.node if node.name in tensorrt8.float32_nodes(model)}
    assert "GridSample" in kinds and not kinds & {"QuantizeLinear", "DequantizeLinear", "Relu", "Conv"}


def test_the_normalization_stays_in_float32() -> None:
    """TensorRT 8 chooses types by itself, unless it is told the layers by name."""
    detector = detector_of(ModelConfig(backbones=("ResNet18C4",), classes=2)).fold()
    model = trace(detector, (64, 64))
    to_fp16(model)
    take_pixels(model, IMAGENET_MEAN, IMAGENET_STD, "uint8")
    assert tensorrt8.float32_nodes(model)[:2] == ["images/scaled", "images/normalized"]


def test_a_mean_over_a_map_is_a_global_pooling() -> None:
    """GhostNet's squeeze: TensorRT 8 ignores the axes, which are an input of ReduceMean since operator set 18."""
    detector = detector_of(ModelConfig(backbones=("GhostNetFPN",), classes=2)).fold()
    model = trace(detector, (64, 64))
    kinds = [node.op_type for node in model.graph.node]
    assert "ReduceMean" not in kinds and "GlobalAveragePool" in kinds
