"""Trace and surgery: from a Detector to one ONNX graph of raw levels."""

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
from ..config import OdtkError
from ..model.detector import Detector


def replace_graph(model: ModelProto, graph: GraphProto, nodes: list[NodeProto], constants: list[TensorProto]) -> None:
    """Puts nodes and constants, and the graph's inputs and outputs, into the model; value types are inferred anew."""
    name, inputs, outputs = graph.name, list(graph.input), list(graph.output)
    model.graph.CopyFrom(helper.make_graph(nodes, name, inputs, outputs, constants))
    model.CopyFrom(onnx.shape_inference.infer_shapes(model))


def makers_of(graph: GraphProto) -> dict[str, NodeProto]:
    """The node that makes each value."""
    return {name: node for node in graph.node for name in node.output}


def with_outputs(model: ModelProto, names: Sequence[str]) -> ModelProto:
    """A copy of a raw graph whose outputs are the named values."""
    copy = ModelProto()
    copy.CopyFrom(model)
    del copy.graph.output[:]
    copy.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names)
    return copy


OPSET = 18  # what torch.onnx writes natively, and the least that is accepted


def trace(detector: Detector, size: tuple[int, int], opset: int = OPSET) -> ModelProto:
    """The raw graph of a folded detector: images [N, 3, H, W] float32, normalized → logits_i, boxes_i of each level.

    The batch is dynamic, H and W are fixed. Values are named by the layers they come from, whatever names the version
    of torch gives, so that a calibration table reads well and stays valid.

    Raises:
        OdtkError: an operator set that torch.onnx cannot write.
    """
    if opset < OPSET:
        raise OdtkError(f"--opset {opset}: the least that can be written is {OPSET}.")
    example = torch.zeros(2, 3, *size)  # a batch of 1 would be taken for a constant
    batch = torch.export.Dim("batch", min=1, max=65536)
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)  # "no torchvision"
    logging.getLogger("onnxscript.version_converter").setLevel(logging.CRITICAL)  # a traceback, where it gives up
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
    for node in model.graph.node:  # where torch found it: long, and different on each machine
        del node.metadata_props[:]
        node.doc_string = ""
    del model.graph.metadata_props[:], model.metadata_props[:], model.graph.value_info[:]
    model.producer_name, model.producer_version = "odtk", __version__
    for output in model.graph.output:
        del output.metadata_props[:]
    fold_constants(model)
    pool_by_name(model)
    rename_values(model)
    return onnx.shape_inference.infer_shapes(model)


def fold_constants(model: ModelProto) -> None:
    """Works out what depends on constants alone, such as reshaped weights; the result keeps the weight's name.

    torch.onnx leaves those that are large, and INT8 needs weights that are constants.
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


def pool_by_name(model: ModelProto) -> None:
    """A mean over H and W becomes GlobalAveragePool: TensorRT 8 overlooks the axes of ReduceMean-18, and means all."""
    values = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type != "ReduceMean" or len(node.input) < 2:
            continue
        axes = sorted(numpy_helper.to_array(values[node.input[1]]).tolist())
        kept = next((a.i for a in node.attribute if a.name == "keepdims"), 1)
        if axes in ([2, 3], [-2, -1]) and kept:
            node.CopyFrom(helper.make_node("GlobalAveragePool", [node.input[0]], list(node.output)))


def rename_values(model: ModelProto) -> None:
    """Names each value by what made it: ``layer1.0.conv1``, ``layer1.0.conv1/relu``; levels ``logits_0``, ``boxes_0`` …

    A convolution is named by its weight; where it is used on several levels, ``:1``, ``:2`` … follow.
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


def level_names(model: ModelProto) -> list[tuple[str, str, int, int]]:
    """(logits, boxes, h, w) of each level of a raw graph."""
    outputs = list(model.graph.output)
    half = len(outputs) // 2
    shapes = [[d.dim_value for d in output.type.tensor_type.shape.dim] for output in outputs]  # [N, channels, h, w]
    return [(outputs[i].name, outputs[half + i].name, *shapes[i][2:]) for i in range(half)]  # type: ignore[misc]


def serialize(model: ModelProto) -> bytes:
    """The bytes of an ONNX file, the same at every run.

    Raises:
        OdtkError: more than the 2 GiB that such a file may hold.
    """
    try:
        return model.SerializeToString(deterministic=True)
    except ValueError as error:
        raise OdtkError("The model is larger than the 2 GiB that an ONNX file may hold.") from error
