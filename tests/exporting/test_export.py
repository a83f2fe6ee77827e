"""The ONNX file against PyTorch: postprocessing in standard operators, FP32 and FP16, metadata, refusals."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor

from odtk import ops
from odtk.box_coder import BOX_CODERS
from odtk.categories import Category
from odtk.config import ROTATED_ANGLES, ExportConfig, ModelConfig, OdtkError, PostprocessConfig
from odtk.exporting import export
from odtk.exporting.graph import OPSET, serialize, take_pixels, trace
from odtk.exporting.metadata import Metadata
from odtk.exporting.precision import to_fp16
from odtk.model import checkpoint
from odtk.model.detector import Detector, normalize
from odtk.postprocess import postprocess
from tests.random_models import detector_of, pixels_of, save

SMALL = ModelConfig(backbones=("ResNet18FPN",), classes=3)
C4 = ModelConfig(backbones=("ResNet18C4",), classes=2)
SIZE = (96, 64)


def images_of(batch: int, size: tuple[int, int] = SIZE) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


def with_postprocess(
    graph: onnx.ModelProto, detector: Detector, limits: PostprocessConfig, postprocessing: str = ""
) -> bytes:
    """The content of a file: a raw graph with the postprocessing named, or else with that of its kind of boxes."""
    config = ExportConfig(path="", output="", size=SIZE, postprocess=limits)
    source = checkpoint.Checkpoint(detector.config, None, {})
    postprocessing = postprocessing or ("candidates" if detector.config.rotated else "detections")
    return serialize(
        export.append_postprocess(graph, detector, export.metadata_of(detector, source, config, postprocessing))
    )


def run(content: bytes, feed: dict[str, Tensor]) -> list[Tensor]:
    session = onnxruntime.InferenceSession(content)
    return [torch.from_numpy(value) for value in session.run(None, {k: v.numpy() for k, v in feed.items()})]


def by_torch(
    detector: Detector, logits: Sequence[Tensor], boxes: Sequence[Tensor], limits: PostprocessConfig
) -> list[Tensor]:
    anchors, strides = detector.anchors(), detector.strides
    found = postprocess(logits, boxes, anchors=anchors, strides=strides, model=detector.config, config=limits)
    return [found.scores, found.boxes, found.classes]


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    torch.testing.assert_close(actual[0], expected[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(actual[1], expected[1], atol=0.1, rtol=0)
    torch.testing.assert_close(actual[2], expected[2])


# The whole network


@pytest.fixture(scope="module")
def detector() -> Detector:
    return detector_of(SMALL).fold()


@pytest.fixture(scope="module")
def traced(detector: Detector) -> onnx.ModelProto:
    return trace(detector, SIZE)


def test_detections_are_those_of_pytorch_for_any_batch(detector: Detector, traced: onnx.ModelProto) -> None:
    limits = PostprocessConfig()
    content = with_postprocess(copy.deepcopy(traced), detector, limits)
    onnx.checker.check_model(onnx.load_from_string(content), full_check=True)
    for batch in (1, 3):
        images = images_of(batch)
        with torch.no_grad():
            logits, boxes = detector(images)
        expected = by_torch(detector, logits, boxes, limits)
        assert (expected[0] > 0).sum() > 50
        assert_same(run(content, {"images": images}), expected)


def test_values_are_named_by_their_layers(traced: onnx.ModelProto) -> None:
    names = {name for node in traced.graph.node for name in node.output}
    backbone = "backbones.ResNet18FPN"
    assert {f"{backbone}.features.layer1.0.conv1/relu", f"{backbone}.lateral4/add", "head.cls_head.0:4/relu"} <= names
    assert [output.name for output in traced.graph.output][::5] == ["logits_0", "boxes_0"]
    assert len(names) == len(traced.graph.node)


class Reshaped(torch.nn.Module):
    """A weight that is reshaped and sliced on its way to two convolutions, as in deformable and 1×1 levels."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(64, 3, 9, 9))

    def forward(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        middle = torch.nn.functional.conv2d(images, self.weight[:, :, 4:5, 4:5])
        corner = torch.nn.functional.conv2d(images, self.weight.flatten(2)[:, :, None, :1])
        return [middle], [corner]


def test_what_depends_on_constants_alone_is_worked_out() -> None:
    module = Reshaped()
    model = trace(module, (8, 8))  # type: ignore[arg-type]
    constants = {tensor.name for tensor in model.graph.initializer}
    assert [node.op_type for node in model.graph.node] == ["Conv", "Conv"] and "weight" in constants
    assert all(node.input[1] in constants for node in model.graph.node) and len(constants) == 2
    images = images_of(1, (8, 8))
    found = run(serialize(model), {"images": images})
    for actual, (expected,) in zip(found, module(images), strict=True):
        torch.testing.assert_close(actual, expected.detach(), atol=1e-4, rtol=1e-4)


def test_raw_postprocessing_has_the_levels_as_outputs(detector: Detector, traced: onnx.ModelProto) -> None:
    content = with_postprocess(copy.deepcopy(traced), detector, PostprocessConfig(), "raw")
    images = images_of(2)
    with torch.no_grad():
        logits, boxes = detector(images)
    for actual, expected in zip(run(content, {"images": images}), [*logits, *boxes], strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-3)


def test_fp16_is_close_and_keeps_box_arithmetic_in_fp32(detector: Detector, traced: onnx.ModelProto) -> None:
    graph = copy.deepcopy(traced)
    to_fp16(graph)
    content = with_postprocess(graph, detector, PostprocessConfig())
    model = onnx.load_from_string(content)
    assert model.graph.input[0].type.tensor_type.elem_type == TensorProto.FLOAT
    weights = [t for t in model.graph.initializer if t.name.startswith(("head", "backbones"))]
    assert weights and all(t.data_type == TensorProto.FLOAT16 for t in weights)
    types = {v.name: v.type.tensor_type.elem_type for v in onnx.shape_inference.infer_shapes(model).graph.value_info}
    for node in model.graph.node:
        if node.op_type == "Conv":
            assert types[node.output[0]] == TensorProto.FLOAT16
        moves = node.op_type in ("Reshape", "GatherElements")  # of boxes before they are cast
        if node.name.startswith("postprocess/") and types.get(node.output[0]) == TensorProto.FLOAT16 and not moves:
            raise AssertionError(f"{node.name} is in half precision")
    with torch.no_grad():
        logits, boxes = detector(images_of(1))
    expected = by_torch(detector, logits, boxes, PostprocessConfig())
    np.testing.assert_allclose(run(content, {"images": images_of(1)})[0], expected[0], atol=2e-2)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("input_type", ["uint8", "float32"])
def test_pixels_are_normalized_in_float32_inside(
    detector: Detector, traced: onnx.ModelProto, input_type: str, precision: str
) -> None:
    """TensorRT lets a UINT8 input feed nothing but a Cast; scale and shift come before the cast of the precision."""
    graph = copy.deepcopy(traced)
    if precision == "fp16":
        to_fp16(graph)
    raw = run(serialize(graph), {"images": normalize(pixels_of(2, SIZE), SMALL.mean, SMALL.std)})
    take_pixels(graph, SMALL.mean, SMALL.std, input_type)
    onnx.checker.check_model(graph, full_check=True)
    readers = [node for node in graph.graph.node if "images" in node.input]
    assert [node.op_type for node in readers] == [{"uint8": "Cast", "float32": "Mul"}[input_type]]
    types = {v.name: v.type.tensor_type.elem_type for v in graph.graph.value_info}
    assert types["images/scaled"] == types["images/normalized"] == TensorProto.FLOAT
    if input_type == "uint8":
        assert graph.graph.node[0] == readers[0] and types[readers[0].output[0]] == TensorProto.FLOAT
    pixels = pixels_of(2, SIZE)
    found = run(serialize(graph), {"images": pixels if input_type == "uint8" else pixels.float()})
    for actual, expected in zip(found, raw, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-3)


def test_a_constant_beyond_fp16_is_refused(traced: onnx.ModelProto) -> None:
    graph = copy.deepcopy(traced)
    bias = next(t for t in graph.graph.initializer if t.name == "head.cls_head.8.bias")
    bias.CopyFrom(onnx.numpy_helper.from_array(np.full(27, 7e4, np.float32), bias.name))
    with pytest.raises(OdtkError, match=r"head.cls_head.8.bias holds 7e\+04"):
        to_fp16(graph)


# The postprocessing alone, on planted levels


def detector_with_coder(config: ModelConfig) -> Detector:
    """Anchors and strides of any head. The network is never run here, so it is always that of RetinaNet."""
    detector = Detector(dataclasses.replace(config, head="retinanet"))
    detector.config = config
    return detector


def on_levels(
    config: ModelConfig, cells: Sequence[tuple[int, int]], limits: PostprocessConfig, postprocessing: str = ""
) -> bytes:
    """The postprocessing of a graph whose inputs are the raw levels themselves."""
    detector = detector_with_coder(config)
    shapes = [
        (f"{kind}_{i}", [None, config.num_anchors * channels, *cell])
        for kind, channels in (("logits", config.classes), ("boxes", BOX_CODERS[config.box_coder].head_values))
        for i, cell in enumerate(cells)
    ]
    inputs = [helper.make_tensor_value_info(f"in_{name}", TensorProto.FLOAT, shape) for name, shape in shapes]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes]
    nodes = [helper.make_node("Identity", [f"in_{name}"], [name]) for name, _ in shapes]
    model = helper.make_model(
        helper.make_graph(nodes, "levels", inputs, outputs),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=10,
    )
    return with_postprocess(model, detector, limits, postprocessing)


def feed_of(logits: Sequence[Tensor], boxes: Sequence[Tensor]) -> dict[str, Tensor]:
    feed = {f"in_logits_{i}": level for i, level in enumerate(logits)}
    return feed | {f"in_boxes_{i}": level for i, level in enumerate(boxes)}


def random_levels(config: ModelConfig, cells: Sequence[tuple[int, int]], batch: int) -> tuple[list[Tensor], ...]:
    logits = [torch.randn(batch, config.num_anchors * config.classes, h, w) - 2 for h, w in cells]
    return logits, [
        torch.randn(batch, config.num_anchors * BOX_CODERS[config.box_coder].head_values, h, w) * 0.5 for h, w in cells
    ]


PYRAMID = ((12, 8), (6, 4), (3, 2), (2, 1), (1, 1))


@pytest.mark.parametrize("head", ["retinanet", "fcos", "dense"])
@pytest.mark.parametrize("batch", [1, 4])
def test_postprocessing_is_the_reference(head: str, batch: int) -> None:
    config = dataclasses.replace(SMALL, head=head)
    limits = PostprocessConfig(score_threshold=0.1, nms_threshold=0.4, detections=60, top_n=50)
    logits, boxes = random_levels(config, PYRAMID, batch)
    expected = by_torch(detector_with_coder(config), logits, boxes, limits)
    assert (expected[0] > 0).sum() > 40 * batch
    assert_same(run(on_levels(config, PYRAMID, limits), feed_of(logits, boxes)), expected)


@pytest.mark.parametrize("head", ["retinanet", "dense"])
def test_rotated_postprocessing_stops_at_the_candidates_of_decode(head: str) -> None:
    config = dataclasses.replace(SMALL, head=head, angles=ROTATED_ANGLES)
    logits, boxes = random_levels(config, PYRAMID, 2)
    detector, coder = Detector(config), config.box_coder
    expected = ops.decode(
        logits, boxes, detector.anchors(), detector.strides, score_threshold=0.3, top_n=40, coder=coder
    )
    content = on_levels(config, PYRAMID, PostprocessConfig(score_threshold=0.3, top_n=40))
    assert '"postprocessing":"candidates"' in onnx.load_from_string(content).metadata_props[0].value
    assert (expected[0] > 0).any() and expected[1].shape == (2, sum(min(40, t[0].numel()) for t in logits), 6)
    assert_same(run(content, feed_of(logits, boxes)), list(expected))


def test_images_without_detections_give_zeros() -> None:
    logits, boxes = random_levels(C4, [(4, 4)], 3)
    logits[0][::2] = -20.0
    limits = PostprocessConfig()
    found = run(on_levels(C4, [(4, 4)], limits), feed_of(logits, boxes))
    assert_same(found, by_torch(Detector(C4), logits, boxes, limits))
    assert all((value[::2] == 0).all() for value in found) and (found[0][1] > 0).any()
    logits[0][:] = -20.0
    assert all((value == 0).all() for value in run(on_levels(C4, [(4, 4)], limits), feed_of(logits, boxes)))


def test_fewer_candidates_than_rows() -> None:
    logits, boxes = random_levels(C4, [(2, 1)], 2)  # 36 candidates
    limits = PostprocessConfig(detections=50)
    found = run(on_levels(C4, [(2, 1)], limits), feed_of(logits, boxes))
    assert_same(found, by_torch(Detector(C4), logits, boxes, limits))
    assert found[0].shape == (2, 50) and (found[0][:, 36:] == 0).all()


def test_rotated_boxes_that_are_no_numbers_are_those_of_the_reference() -> None:
    """Six numbers per point: dx, dy, w, h, sin 2θ, cos 2θ; every box is finite, whatever they are."""
    config = dataclasses.replace(SMALL, head="dense", angles=(0.0,))
    logits, boxes = random_levels(config, PYRAMID, 2)
    for level in boxes:
        level.flatten()[::5] = torch.nan
        level.flatten()[1::7] = torch.inf
        level.flatten()[2::11] = -torch.inf
    detector = Detector(config)
    expected = ops.decode(
        logits, boxes, detector.anchors(), detector.strides, score_threshold=0.1, top_n=90, coder="center_size_angle"
    )
    found = run(on_levels(config, PYRAMID, PostprocessConfig(score_threshold=0.1, top_n=90)), feed_of(logits, boxes))
    assert (expected[0] > 0).sum() > 100 and expected[1].isfinite().all() and found[1].isfinite().all()
    assert (expected[1][..., 4] > 0).any() and (expected[1][..., 5] < 0).any()
    assert_same(found, list(expected))


def test_distances_that_are_no_numbers_are_those_of_the_reference() -> None:
    """Four numbers per point: left, top, right, bottom; what is negative, NaN or infinite ends inside the level."""
    config = dataclasses.replace(SMALL, head="dense")
    logits, boxes = random_levels(config, PYRAMID, 2)
    for level in boxes:
        level.flatten()[::5] = torch.nan
        level.flatten()[1::7] = torch.inf
        level.flatten()[2::9] = -torch.inf
    limits = PostprocessConfig(nms_threshold=1.0, detections=200)
    expected = by_torch(detector_with_coder(config), logits, boxes, limits)
    found = run(on_levels(config, PYRAMID, limits), feed_of(logits, boxes))
    used = expected[0] > 0
    assert used.sum() > 100 and expected[1].isfinite().all()
    assert (expected[1][used][:, 2:] < expected[1][used][:, :2]).any()  # both distances 0: a box without area
    assert_same(found, expected)


def test_ties_thresholds_and_not_a_number_are_those_of_the_reference() -> None:
    logits = torch.full((1, 18, 4, 4), -5.0)
    logits[torch.rand(logits.shape) < 0.6] = 1.5  # many ties
    logits[0, :7, 0, 0] = torch.tensor([1.5, 1.5, 0.5, ops.to_logit(0.05), -np.inf, np.nan, np.inf])
    boxes = torch.randn(1, 36, 4, 4)
    boxes[0, 24:28, 0, 0] = torch.tensor([np.nan, 0, np.inf, -np.inf])
    expected = by_torch(Detector(C4), [logits], [boxes], PostprocessConfig())
    assert (expected[0] > 0).sum() > 50
    assert_same(run(on_levels(C4, [(4, 4)], PostprocessConfig()), feed_of([logits], [boxes])), expected)


@pytest.mark.parametrize(
    ("config", "coder"),
    [
        (SMALL, 4),
        (dataclasses.replace(SMALL, angles=ROTATED_ANGLES), 6),
        (dataclasses.replace(SMALL, head="fcos"), 5),
        (dataclasses.replace(SMALL, head="dense"), 7),
        (dataclasses.replace(SMALL, head="dense", angles=(0.0,)), 8),
    ],
    ids=["anchor_deltas", "rotated_deltas", "distances_centerness", "distances", "center_size_angle"],
)
def test_plugin_postprocessing_has_the_nodes_that_the_plugins_parse(config: ModelConfig, coder: int) -> None:
    """csrc/plugins: a missing, extra or mistyped attribute is refused there."""
    model = onnx.load_from_string(on_levels(config, PYRAMID, PostprocessConfig(), "plugins"))
    decode, nms = (node for node in model.graph.node if node.domain == "odtk")
    assert decode.op_type == "OdtkDecode" and nms.op_type == "OdtkNms"
    assert list(decode.input[:10]) == [f"{kind}_{i}" for kind in ("logits", "boxes") for i in range(5)]
    anchors = next(t for t in model.graph.initializer if t.name == decode.input[10])
    assert anchors.data_type == TensorProto.FLOAT and list(anchors.dims) == [5, config.num_anchors, 4]
    shared = {"plugin_version": b"1", "plugin_namespace": b""}
    found = {attribute.name: helper.get_attribute_value(attribute) for attribute in decode.attribute}
    assert found == shared | {
        "strides": [8, 16, 32, 64, 128],
        "classes": 3,
        "coder": coder,
        "score_threshold": pytest.approx(0.05),
        "top_n": 1000,
    }
    found = {attribute.name: helper.get_attribute_value(attribute) for attribute in nms.attribute}
    values = 6 if config.rotated else 4
    assert found == shared | {"box_values": values, "threshold": 0.5, "detections": 100}
    shapes = {
        o.name: (o.type.tensor_type.elem_type, [d.dim_value or d.dim_param for d in o.type.tensor_type.shape.dim])
        for o in model.graph.output
    }
    assert shapes == {
        "scores": (TensorProto.FLOAT, ["batch", 100]),
        "classes": (TensorProto.INT32, ["batch", 100]),
        "boxes": (TensorProto.FLOAT, ["batch", 100, values]),
    }


@pytest.mark.parametrize(("precision", "kind"), [("fp32", TensorProto.FLOAT), ("fp16", TensorProto.FLOAT16)])
def test_decode_reads_the_type_that_the_head_writes(
    detector: Detector, traced: onnx.ModelProto, precision: str, kind: int
) -> None:
    """A Cast would write a whole level again."""
    graph = copy.deepcopy(traced)
    if precision == "fp16":
        to_fp16(graph)
    model = onnx.load_from_string(with_postprocess(graph, detector, PostprocessConfig(), "plugins"))
    decode = next(node for node in model.graph.node if node.op_type == "OdtkDecode")
    producers = {name: node for node in model.graph.node for name in node.output}
    types = {v.name: v.type.tensor_type.elem_type for v in onnx.shape_inference.infer_shapes(model).graph.value_info}
    assert {producers[name].op_type for name in decode.input[:-1]} == {"Conv"}
    assert {types[name] for name in decode.input[:-1]} == {kind}


def test_levels_of_two_types_are_made_one() -> None:
    """The plugin takes one type of logits and one of boxes."""
    model = onnx.load_from_string(on_levels(SMALL, PYRAMID, PostprocessConfig(), "raw"))
    for output in model.graph.output:
        half = output.name.startswith("logits") or output.name == "boxes_2"
        output.type.tensor_type.elem_type = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    content = with_postprocess(model, detector_with_coder(SMALL), PostprocessConfig(), "plugins")
    nodes = onnx.load_from_string(content).graph.node
    casts = {node.output[0]: node.input[0] for node in nodes if node.op_type == "Cast"}
    decode = next(node for node in nodes if node.op_type == "OdtkDecode")
    assert list(decode.input[:5]) == [f"logits_{i}" for i in range(5)] and decode.input[7] == "boxes_2"
    assert sorted(casts.values()) == ["boxes_0", "boxes_1", "boxes_3", "boxes_4"]
    assert {decode.input[i] for i in (5, 6, 8, 9)} == casts.keys()


def test_boxes_in_half_precision_are_cast_when_they_are_few(detector: Detector, traced: onnx.ModelProto) -> None:
    graph = copy.deepcopy(traced)
    to_fp16(graph)
    nodes = onnx.load_from_string(with_postprocess(graph, detector, PostprocessConfig())).graph.node
    cast = {node.input[0] for node in nodes if node.op_type == "Cast"}
    assert not cast & {f"boxes_{i}" for i in range(5)} and cast >= {f"logits_{i}" for i in range(5)}


# The command


def test_file_carries_its_metadata(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = ExportConfig(
        path=save(detector_of(C4), tmp_path),
        output=str(tmp_path / "model.onnx"),
        size=(30, 32),
        precision="fp32",
        postprocess=PostprocessConfig(score_threshold=0.2),
    )
    report = export.export(config)
    assert "becomes 32 32" in capsys.readouterr().out
    content = Path(config.output).read_bytes()
    assert report.bytes == len(content)
    metadata = Metadata.from_json(onnx.load_from_string(content).metadata_props[0].value, config.output)
    assert metadata.size == (32, 32) and metadata.stride == 16 and metadata.precision == "fp32"
    assert metadata.categories == (Category(0, "thing 0"), Category(10, "thing 1"))
    assert metadata.thresholds == config.postprocess and metadata.input_type == "uint8"
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".tmp")] == []


def test_padding_of_zero_after_normalization_is_rounded_and_the_difference_is_said(tmp_path: Path, capsys) -> None:
    """255 · 0.485 = 123.675, 0.325 / (255 · 0.229) away from 124, 0.12 / (255 · 0.224) and 0.47 / (255 · 0.225)."""
    config = ExportConfig(save(detector_of(C4), tmp_path), str(tmp_path / "m.onnx"), size=(32, 32), precision="fp32")
    export.export(config)
    assert "becomes the pixel (124, 116, 104), off by up to 0.0082 after" in capsys.readouterr().out
    export.export(dataclasses.replace(config, input_type="float32"))
    assert "pixel" not in capsys.readouterr().out
    black = save(detector_of(dataclasses.replace(C4, padding="black")), tmp_path)
    export.export(dataclasses.replace(config, path=black))
    assert "pixel" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"output": "model.onnx", "opset": 99}, "--opset 99 is unknown to this onnx, which wrote 18: use 18"),
        ({"output": "model.trt"}, "must end in"),
        ({"output": "model.plan"}, "needs a GPU"),
        ({"output": "model.onnx", "opset": 11}, "--opset 11"),
        ({"output": "nowhere/model.onnx"}, "does not exist; make it"),
    ],
)
def test_refusals_are_sentences(tmp_path: Path, changes: dict, sentence: str, caplog) -> None:
    if torch.cuda.is_available() and "plan" in changes["output"]:
        pytest.skip("this machine has a GPU")
    output = str(tmp_path / changes["output"])
    config = ExportConfig(path=save(detector_of(C4), tmp_path), output=output, size=(32, 32), precision="fp32")
    with pytest.raises(OdtkError, match=sentence):
        export.export(dataclasses.replace(config, **(changes | {"output": output})))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING] and not Path(output).exists()
