"""Trace and surgery: from a Detector to one ONNX graph of raw levels, and what any change of a graph needs."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence

import numpy as np
import onnx
import torch
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from .. import __version__
from ..config import OdtkError, scale_and_shift
from ..model.detector import Detector

OPSET = 18  # the operator set that torch.onnx writes without conversion, and the lowest that is accepted


def trace(detector: Detector, size: tuple[int, int], opset: int = OPSET) -> ModelProto:
    """The raw graph of a folded detector: images [N, 3, H, W] → logits_0 …, boxes_0 … of the levels, all float32.

    The batch size is dynamic; H and W are fixed. Values are named after the layers that they come from, whatever names
    this version of torch gives them, so that a calibration table is readable and stays valid.

    Args:
        detector: with its norms folded (Detector.fold).
        size: (H, W) of the images in pixels, multiples of the detector's stride. The images are normalized.
        opset: ONNX operator set.

    Raises:
        OdtkError: the operator set is one that torch.onnx cannot write.
    """
    if opset < OPSET:
        raise OdtkError(f"--opset {opset}: {OPSET} is the lowest operator set that can be written.")
    example = torch.zeros(2, 3, *size)  # torch.export would treat a batch of 1 as a constant
    batch = torch.export.Dim("batch", min=1, max=65536)
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)  # "no torchvision"
    logging.getLogger("onnxscript.version_converter").setLevel(logging.CRITICAL)  # a traceback when it fails
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside torch.onnx
        program = torch.onnx.export(
            detector.cpu().float().eval(),
            (example,),
            dynamo=True,
            optimize=True,
            opset_version=opset,
            verbose=False,
            input_names=["images"],
            dynamic_shapes=({0: batch},),
        )
    assert program is not None
    model = program.model_proto
    written = next(entry.version for entry in model.opset_import if not entry.domain)
    if written != opset:
        raise OdtkError(f"--opset {opset} is unknown to this onnx, which wrote {written}: use {OPSET}, or update onnx.")
    for node in model.graph.node:  # its place in the Python source: long, and different on each machine
        del node.metadata_props[:]
        node.doc_string = ""
    del model.graph.metadata_props[:], model.metadata_props[:], model.graph.value_info[:]
    model.producer_name, model.producer_version = "odtk", __version__
    for output in model.graph.output:
        del output.metadata_props[:]
    fold_constants(model)
    replace_spatial_means(model)
    name_values_by_layer(model)
    return onnx.shape_inference.infer_shapes(model)


def fold_constants(model: ModelProto) -> None:
    """Evaluates what depends on constants alone, such as reshaped weights; the result keeps the weight's name.

    torch.onnx does not fold large ones, and INT8 needs the weights to be constants.
    """
    graph = model.graph
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    origin = {name: name for name in values}
    nodes = []
    for node in graph.node:
        if all(name in values for name in node.input if name):
            feed = {name: values[name] for name in node.input if name}
            results = ReferenceEvaluator(node).run(None, feed)
            values |= dict(zip(node.output, results, strict=True))
            origin |= {name: origin.get(node.input[0], name) if node.input else name for name in node.output}
        else:
            nodes.append(node)
    used = list(dict.fromkeys(name for node in nodes for name in node.input if name in values))
    taken = {name for name in used if origin[name] == name}
    names = {}
    for name in used:
        names[name] = origin[name] if name in taken or origin[name] not in taken else name
        taken.add(names[name])
    for node in nodes:
        node.input[:] = [names.get(name, name) for name in node.input]
    constants = [numpy_helper.from_array(np.asarray(values[name]), names[name]) for name in used]
    for field, content in ((graph.node, nodes), (graph.initializer, constants)):
        copies = [type(item).FromString(item.SerializeToString()) for item in content]
        del field[:]
        field.extend(copies)


def replace_spatial_means(model: ModelProto) -> None:
    """Replaces a ReduceMean over H and W by GlobalAveragePool: TensorRT 8 ignores the axes, an input since opset 18."""
    values = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type != "ReduceMean" or len(node.input) < 2:
            continue
        axes = sorted(numpy_helper.to_array(values[node.input[1]]).tolist())
        kept = next((a.i for a in node.attribute if a.name == "keepdims"), 1)
        if axes in ([2, 3], [-2, -1]) and kept:
            node.CopyFrom(helper.make_node("GlobalAveragePool", [node.input[0]], list(node.output)))


def name_values_by_layer(model: ModelProto) -> None:
    """Names each value after its operators: ``layer1.0.conv1``, ``layer1.0.conv1/relu``; outputs ``logits_0`` …

    A convolution is named after its weight; where a layer runs on several levels, ``:1``, ``:2`` … are appended.
    """
    graph = model.graph
    outputs = [output.name for output in graph.output]
    half = len(outputs) // 2
    final = dict(zip(outputs, [f"{kind}_{i}" for kind in ("logits", "boxes") for i in range(half)], strict=True))
    names: dict[str, str] = {}
    used: dict[str, int] = {}
    for node in graph.node:
        if node.op_type == "Conv":
            stem = node.input[1].removesuffix(".weight")
        else:
            stem = "/".join(filter(None, [names.get(node.input[0] if node.input else ""), node.op_type.lower()]))
        used[stem] = used.get(stem, -1) + 1
        node.name = f"{stem}:{used[stem]}" if used[stem] else stem
        for i, output in enumerate(node.output):
            names[output] = node.name if i == 0 else f"{node.name}.{i}"
    names |= final
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    for output in graph.output:
        output.name = names[output.name]


def take_pixels(
    model: ModelProto, mean: tuple[float, float, float], std: tuple[float, float, float], input_type: str
) -> None:
    """Puts the normalization in front of a raw graph, in place, so that ``images`` are RGB pixels from 0 to 255.

    It computes in float32, whatever the precision of the graph behind it.

    Args:
        mean, std: as in config.ModelConfig.
        input_type: of the pixels, one of config.INPUT_TYPES.
    """
    graph = model.graph
    for node in graph.node:
        node.input[:] = ["images/normalized" if name == "images" else name for name in node.input]
    constants = [
        numpy_helper.from_array(np.array(values, np.float32).reshape(1, 3, 1, 1), f"images/pixel_{name}")
        for name, values in zip(("scale", "shift"), scale_and_shift(mean, std), strict=True)
    ]
    pixels, nodes = "images", []
    if input_type == "uint8":  # TensorRT lets such an input feed nothing but a Cast
        graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8
        pixels = "images/float32"
        nodes.append(helper.make_node("Cast", ["images"], [pixels], pixels, to=TensorProto.FLOAT))
    nodes += [
        helper.make_node("Mul", [pixels, "images/pixel_scale"], ["images/scaled"], "images/scaled"),
        helper.make_node("Add", ["images/scaled", "images/pixel_shift"], ["images/normalized"], "images/normalized"),
    ]
    replace_graph(model, graph, [*nodes, *graph.node], [*graph.initializer, *constants])


def level_outputs(model: ModelProto) -> list[tuple[str, str, int, int]]:
    """Of each level of a raw graph: the names of its logits and boxes, and its height and width in cells."""
    outputs = list(model.graph.output)
    half = len(outputs) // 2
    shapes = [[d.dim_value for d in output.type.tensor_type.shape.dim] for output in outputs]  # [N, channels, h, w]
    return [(outputs[i].name, outputs[half + i].name, *shapes[i][2:]) for i in range(half)]  # type: ignore[misc]


def replace_graph(model: ModelProto, graph: GraphProto, nodes: list[NodeProto], constants: list[TensorProto]) -> None:
    """Makes nodes, constants and ``graph``'s inputs and outputs the model's graph; value types are inferred again."""
    name, inputs, outputs = graph.name, list(graph.input), list(graph.output)
    model.graph.CopyFrom(helper.make_graph(nodes, name, inputs, outputs, constants))
    model.CopyFrom(onnx.shape_inference.infer_shapes(model))


def producers_of(graph: GraphProto) -> dict[str, NodeProto]:
    """Value → the node that computes it; graph inputs and constants have none."""
    return {name: node for node in graph.node for name in node.output}


def with_outputs(model: ModelProto, names: Sequence[str]) -> ModelProto:
    """A copy of a raw float32 graph whose outputs are the named values."""
    copy = ModelProto()
    copy.CopyFrom(model)
    del copy.graph.output[:]
    copy.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names)
    return copy


def serialize(model: ModelProto) -> bytes:
    """The content of an ONNX file: the same bytes for the same model.

    Raises:
        OdtkError: the model is larger than the 2 GiB that an ONNX file may hold.
    """
    try:
        return model.SerializeToString(deterministic=True)
    except ValueError as error:
        raise OdtkError("The model is larger than the 2 GiB that an ONNX file may hold.") from error
