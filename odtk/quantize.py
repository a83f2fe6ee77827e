"""Precision in the graph: FP16 types, and INT8 by Q/DQ nodes from calibration images. No TensorRT."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from .config import ExportConfig, OdtkError

HALF_MAX = 65504.0  # float16
OPSET = 19  # the first whose Q/DQ nodes take float16
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)
FLOAT_ONLY = {"Resize": (1, 2)}  # inputs that ONNX has in float32 alone: region and scales


# ---------------------------------------------------------------------------------------------------------------------
# FP16


def to_fp16(model: ModelProto) -> None:
    """Gives every float value of a raw graph the type float16, in place; the images stay float32 and are cast.

    Sampling positions (GridSample of deformable convolutions, and the arithmetic they come from) stay float32: eleven
    bits do not hold a position in a map. The outputs are float16; an ending casts them before its arithmetic.
    onnxruntime's own converter (transformers.float16) silently clips constants and knows no such region.

    Raises:
        OdtkError: a constant beyond float16's 65504, or not a number.
    """
    graph = onnx.shape_inference.infer_shapes(model).graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.value_info, *graph.output)}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    types |= {name: tensor.data_type for name, tensor in constants.items()}
    precise = {id(node) for node in sampling_nodes(graph)}
    nodes: list[NodeProto] = []
    casts: dict[tuple[str, int], str] = {}  # (value, type) → the same value in that type
    halves: dict[str, TensorProto] = {}

    def typed(name: str, wanted: int) -> str:
        """The value in the wanted type, by a new constant or a Cast."""
        if types.get(name) not in FLOATS or types[name] == wanted:
            return name
        if (name, wanted) not in casts:
            casts[name, wanted] = f"{name}/{'fp16' if wanted == TensorProto.FLOAT16 else 'fp32'}"
            if name in constants:
                halves[name] = half_constant(constants[name], casts[name, wanted])
            else:
                nodes.append(helper.make_node("Cast", [name], [casts[name, wanted]], casts[name, wanted], to=wanted))
        return casts[name, wanted]

    for node in graph.node:
        wanted = TensorProto.FLOAT if id(node) in precise else TensorProto.FLOAT16
        fixed = FLOAT_ONLY.get(node.op_type, ())
        node.input[:] = [name if i in fixed else typed(name, wanted) for i, name in enumerate(node.input)]
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT:
                attribute.i = wanted
            elif wanted == TensorProto.FLOAT16 and attribute.t.data_type == TensorProto.FLOAT:
                attribute.t.CopyFrom(half_constant(attribute.t, attribute.t.name))
        types |= {name: wanted for name in node.output if types.get(name) == TensorProto.FLOAT}
        nodes.append(node)
    for output in graph.output:
        output.type.tensor_type.elem_type = types[output.name]
    used = {name for node in nodes for name in node.input}
    kept = [tensor for name, tensor in constants.items() if name in used]
    replace_graph(model, graph, nodes, [*kept, *halves.values()])


def half_constant(tensor: TensorProto, name: str) -> TensorProto:
    """A float32 constant in float16, to nearest.

    Raises:
        OdtkError: a value that float16 cannot hold.
    """
    values = numpy_helper.to_array(tensor)
    worst = float(np.abs(values).max(initial=0.0))
    if not worst <= HALF_MAX:  # also when it is not a number
        raise OdtkError(f"{tensor.name} holds {worst:.3g}, more than FP16 can ({HALF_MAX:.0f}): use --full-precision.")
    return numpy_helper.from_array(values.astype(np.float16), name)


def sampling_nodes(graph: GraphProto) -> Iterator[NodeProto]:
    """GridSample nodes, and those between a convolution and their positions (input 1)."""
    makers = {name: node for node in graph.node for name in node.output}
    stack: list[str] = []
    for node in graph.node:
        if node.op_type == "GridSample":
            yield node
            stack.append(node.input[1])
    seen: set[str] = set()
    while stack:
        name = stack.pop()
        maker = makers.get(name)
        if maker is None or name in seen or maker.op_type in ("Conv", "DequantizeLinear"):
            continue
        seen.add(name)
        yield maker
        stack += maker.input


def replace_graph(
    model: ModelProto, graph: GraphProto, nodes: list[NodeProto], constants: list[TensorProto]
) -> None:
    """Puts nodes and constants, and the graph's inputs and outputs, into the model; value types are inferred anew."""
    name, inputs, outputs = graph.name, list(graph.input), list(graph.output)
    model.graph.CopyFrom(helper.make_graph(nodes, name, inputs, outputs, constants))
    model.CopyFrom(onnx.shape_inference.infer_shapes(model))


# INT8


@dataclass(frozen=True)
class Table:
    fp16_layers: tuple[str, ...] = ()


def table_for(model: ModelProto, config: ExportConfig, fingerprint: str, stride: int) -> Table:
    raise OdtkError("--int8 is not there yet.")


def table_path(config: ExportConfig) -> str:
    return ""


def insert_qdq(model: ModelProto, table: Table) -> None:
    raise OdtkError("--int8 is not there yet.")
