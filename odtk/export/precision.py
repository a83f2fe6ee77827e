"""Precision in the graph: FP16 types, and INT8 by Q/DQ nodes from calibration images. No TensorRT.

INT8 here is what TensorRT fuses: symmetric, one scale per output channel of a weight and one per activation tensor.
Q/DQ pairs stand at the inputs of convolutions and of additions (the residual ones and the pyramid's), nowhere between
a convolution and its ReLU; both inputs of an addition have one scale.

Why not onnxruntime.quantization: its quantizer gives a tensor's Q/DQ pair to all consumers, so a layer that stays in
FP16 would still read rounded inputs; it does not tie the scales of an addition. Its entropy calibrator keeps every
activation of every image in memory, and tries as many ranges as it has bins more than 128, by default none.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from ..config import OdtkError
from .calibration_table import Table
from .graph import makers_of, replace_graph

HALF_MAX = 65504.0  # float16
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)
FUSED = ("Relu", "Clip", "Add", "MaxPool", "Resize")  # into the INT8 kernels around them
FLOAT_ONLY = {"Resize": (1, 2)}  # inputs that ONNX has in float32 alone: region and scales

LEVELS = 127  # of a sign: symmetric INT8 leaves −128 unused
SMALLEST = 1e-12  # scale, of a channel whose weights are all 0


# ---------------------------------------------------------------------------------------------------------------------
# FP16


def to_fp16(model: ModelProto) -> None:
    """Gives the float values of a raw graph the type float16, in place; the images stay float32 and are cast.

    Three regions stay float32. Sampling positions (GridSample of deformable convolutions, and the arithmetic they come
    from): eleven bits do not hold a position in a map. INT8's islands, from DequantizeLinear over a convolution and its
    ReLU to QuantizeLinear: a fused INT8 kernel works so anyhow, no float leaves it, and ONNX Runtime 1.31 rewrites
    float16 Q/DQ nodes into wrong ones (its WeightBiasQuantization; 4 points of AP on BCCD). GroupNorm's statistics, as
    in autocast; besides, TensorRT 8's parser takes the bytes of their float16 constants for float32.
    onnxruntime's own converter (transformers.float16) silently clips constants and knows no such regions.

    Raises:
        OdtkError: a constant beyond float16's 65504, or not a number.
    """
    graph = onnx.shape_inference.infer_shapes(model).graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.value_info, *graph.output)}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    types |= {name: tensor.data_type for name, tensor in constants.items()}
    norms = [node for node in graph.node if node.op_type == "InstanceNormalization"]
    precise = {node.output[0] for node in (*sampling_nodes(graph), *island_nodes(graph), *norms)}
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
        wanted = TensorProto.FLOAT if node.output[0] in precise else TensorProto.FLOAT16
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


def island_nodes(graph: GraphProto) -> Iterator[NodeProto]:
    """Q/DQ nodes, what computes on dequantized values, and what a convolution's INT8 kernel fuses behind it."""
    inside: set[str] = set()  # values made in an island
    dequantized: set[str] = set()
    constants = {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        activations = {name for name in node.input if name and name not in constants}
        fused = node.op_type in FUSED and activations <= inside
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") or fused or activations & dequantized:
            yield node
            inside |= set(node.output)
            dequantized |= set(node.output) if node.op_type == "DequantizeLinear" else set()


# ---------------------------------------------------------------------------------------------------------------------
# INT8: where


def layer_of(node: NodeProto) -> str:
    """The layer that a convolution computes: its weight's name. A head's layer has a node on each level."""
    return node.input[1].removesuffix(".weight")


def layers(model: ModelProto) -> list[str]:
    """Every convolution of a raw graph that INT8 may take, in order, once.

    Not those that predict sampling positions of deformable convolutions (model.layers.DeformConv2d.offset).
    """
    names = dict.fromkeys(layer_of(node) for node in model.graph.node if node.op_type == "Conv")
    return [name for name in names if not name.endswith(".offset")]


def additions(graph: GraphProto) -> list[NodeProto]:
    """Additions of two activations: the residual ones and the pyramid's."""
    constants = {tensor.name for tensor in graph.initializer}
    positions = {node.output[0] for node in sampling_nodes(graph)}
    return [
        node
        for node in graph.node
        if node.op_type == "Add" and not constants & set(node.input) and node.output[0] not in positions
    ]


def source(name: str, makers: dict[str, NodeProto]) -> str:
    """The value to quantize for an input: what lies before a nearest upsampling, which only repeats it."""
    maker = makers.get(name)
    return source(maker.input[0], makers) if maker is not None and maker.op_type == "Resize" else name


def scale_groups(graph: GraphProto) -> list[list[str]]:
    """All activations that INT8 may quantize, in order of use; those that share a scale are one group."""
    makers = makers_of(graph)
    groups: dict[str, list[str]] = {}
    for node in graph.node:
        if node.op_type == "Conv":
            groups.setdefault(node.input[0], [node.input[0]])
    for node in additions(graph):
        joined: list[str] = []
        for name in (source(value, makers) for value in node.input):
            joined += [member for member in groups.get(name, [name]) if member not in joined]
        groups |= dict.fromkeys(joined, joined)
    return list({id(group): group for group in groups.values()}.values())


def insert_qdq(model: ModelProto, table: Table) -> None:
    """Writes Q/DQ nodes into a raw float32 graph, in place, except for ``table.fp16_layers``.

    Raises:
        OdtkError: a layer to leave out that the model does not have.
    """
    graph = model.graph
    if unknown := set(table.fp16_layers) - set(layers(model)):
        raise OdtkError(f"The model has no layer {sorted(unknown)[0]}, which was to stay in FP16.")
    chosen = set(layers(model)) - set(table.fp16_layers)
    makers = makers_of(graph)
    weights = {tensor.name: tensor for tensor in graph.initializer}
    constants: dict[str, TensorProto] = {}
    pairs: dict[str, list[NodeProto]] = {}  # activation → its Q and DQ

    def constant(name: str, value: np.ndarray) -> str:
        constants.setdefault(name, numpy_helper.from_array(value, name))
        return name

    def activation(name: str) -> str:
        """The value after its Q/DQ pair."""
        if name not in pairs:
            scale = constant(f"{name}/scale", np.array(table.scales[name], np.float32))
            ends = [scale, constant("zero", np.zeros((), np.int8))]
            pairs[name] = [
                helper.make_node("QuantizeLinear", [name, *ends], [f"{name}/q"], f"{name}/quantize"),
                helper.make_node("DequantizeLinear", [f"{name}/q", *ends], [f"{name}/dq"], f"{name}/dequantize"),
            ]
        return f"{name}/dq"

    def weight(name: str, node: NodeProto) -> Iterator[NodeProto]:
        """A DequantizeLinear for the node alone, as TensorRT's fusions want it."""
        quantized, scale = quantize_weight(numpy_helper.to_array(weights[name]))
        inputs = [
            constant(f"{name}/int8", quantized),
            constant(f"{name}/scale", scale),
            constant(f"{name}/zero", np.zeros(len(scale), np.int8)),
        ]
        node.input[1] = f"{node.name}/weight"
        yield helper.make_node("DequantizeLinear", inputs, [node.input[1]], f"{node.name}/dequantize_weight", axis=0)

    for node in additions(graph):
        inputs = [source(name, makers) for name in node.input]
        made_by = [makers[name] for name in inputs if name in makers]
        if any(maker.op_type == "Conv" and layer_of(maker) not in chosen for maker in made_by):
            continue
        for i, name in enumerate(inputs):
            above = makers.get(node.input[i])
            if above is not None and above.op_type == "Resize":
                above.input[0] = activation(name)
            else:
                node.input[i] = activation(name)
    nodes: list[NodeProto] = []
    for node in graph.node:
        if node.op_type == "Conv" and layer_of(node) in chosen:
            node.input[0] = activation(node.input[0])
            nodes += weight(node.input[1], node)
        nodes.append(node)
    nodes = [new for node in nodes for new in (node, *(p for name in node.output for p in pairs.get(name, ())))]
    nodes = [p for value in graph.input for p in pairs.get(value.name, ())] + nodes
    used = {name for node in nodes for name in node.input}
    kept = [tensor for name, tensor in weights.items() if name in used]
    replace_graph(model, graph, nodes, [*kept, *constants.values()])


def quantize_weight(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A kernel [O, …] as int8 of the same shape, and the scale of each output channel [O]."""
    most = np.abs(weight.reshape(len(weight), -1)).max(1)  # [O, I, k, k] -> [O, I·k·k] -> [O]
    scale = np.maximum(most / LEVELS, SMALLEST).astype(np.float32)
    shaped = scale.reshape(-1, *[1] * (weight.ndim - 1))  # [O] -> [O, 1, 1, 1]
    return np.clip(np.rint(weight / shaped), -LEVELS, LEVELS).astype(np.int8), scale
