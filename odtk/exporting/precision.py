"""Precision in the graph: FP16 types, and INT8 as Q/DQ nodes. Independent of TensorRT.

INT8 here is the kind that TensorRT fuses into its kernels: symmetric, with one scale per output channel of a weight and
one per activation tensor. Q/DQ pairs stand at the inputs of convolutions and of additions (those of residual blocks and
of the feature pyramid), never between a convolution and its ReLU; the two inputs of an addition share one scale.

Why not onnxruntime.quantization: its quantizer gives the Q/DQ pair of a tensor to all consumers, so a layer that stays
in FP16 would still read rounded inputs, and it does not tie the scales of an addition. Its entropy calibrator keeps
every activation of every image in memory, and tries as many ranges as the histogram has bins beyond 128: none with the
default number of bins.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from ..config import OdtkError
from .calibration_table import CalibrationTable
from .graph import producers_of, replace_graph

FP16_MAX = 65504.0  # the largest finite float16
FLOAT_TYPES = (TensorProto.FLOAT, TensorProto.FLOAT16)
FUSED_OPS = ("Relu", "Clip", "Add", "MaxPool", "Resize")  # TensorRT fuses them into the INT8 kernels around them
FLOAT32_INPUTS = {"Resize": (1, 2)}  # operator → inputs that ONNX defines in float32 only: here region and scales

INT8_MAX = 127  # symmetric INT8 leaves −128 unused
MIN_SCALE = 1e-12  # the scale of a channel whose weights are all 0


# ---------------------------------------------------------------------------------------------------------------------
# FP16


def to_fp16(model: ModelProto) -> None:
    """Converts a graph of raw levels to float16, in place; the images stay float32 and are cast.

    Three regions stay float32:
      - Sampling positions: GridSample of deformable convolutions, and the arithmetic that makes its positions. The 11
        significant bits of float16 are too few for a position in a feature map.
      - INT8 islands: from DequantizeLinear over a convolution and its ReLU to QuantizeLinear. A fused INT8 kernel
        computes so anyway and no float value leaves it, and ONNX Runtime 1.31 rewrites float16 Q/DQ nodes into wrong
        ones (its WeightBiasQuantization; 4 points of AP on BCCD).
      - The statistics of GroupNorm, as in torch.autocast. TensorRT 8's parser, besides, reads the bytes of their
        float16 constants as float32.
    onnxruntime's own converter (transformers.float16) silently clips constants and has no such regions.

    Raises:
        OdtkError: a constant is beyond float16's 65504, or not a number.
    """
    graph = onnx.shape_inference.infer_shapes(model).graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.value_info, *graph.output)}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    types |= {name: tensor.data_type for name, tensor in constants.items()}
    norms = [node for node in graph.node if node.op_type == "InstanceNormalization"]
    float32_values = {node.output[0] for node in (*sampling_nodes(graph), *int8_island_nodes(graph), *norms)}
    nodes: list[NodeProto] = []
    casts: dict[tuple[str, int], str] = {}  # (value, type) → the same value in that type
    fp16_constants: dict[str, TensorProto] = {}

    def in_type(name: str, wanted: int) -> str:
        """The name of the value in the wanted type, made by a new constant or a Cast where needed."""
        if types.get(name) not in FLOAT_TYPES or types[name] == wanted:
            return name
        if (name, wanted) not in casts:
            casts[name, wanted] = f"{name}/{'fp16' if wanted == TensorProto.FLOAT16 else 'fp32'}"
            if name in constants:
                fp16_constants[name] = fp16_constant(constants[name], casts[name, wanted])
            else:
                nodes.append(helper.make_node("Cast", [name], [casts[name, wanted]], casts[name, wanted], to=wanted))
        return casts[name, wanted]

    for node in graph.node:
        wanted = TensorProto.FLOAT if node.output[0] in float32_values else TensorProto.FLOAT16
        float32_inputs = FLOAT32_INPUTS.get(node.op_type, ())
        node.input[:] = [name if i in float32_inputs else in_type(name, wanted) for i, name in enumerate(node.input)]
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT:
                attribute.i = wanted
            elif wanted == TensorProto.FLOAT16 and attribute.t.data_type == TensorProto.FLOAT:
                attribute.t.CopyFrom(fp16_constant(attribute.t, attribute.t.name))
        types |= {name: wanted for name in node.output if types.get(name) == TensorProto.FLOAT}
        nodes.append(node)
    for output in graph.output:
        output.type.tensor_type.elem_type = types[output.name]
    used = {name for node in nodes for name in node.input}
    kept = [tensor for name, tensor in constants.items() if name in used]
    replace_graph(model, graph, nodes, [*kept, *fp16_constants.values()])


def fp16_constant(tensor: TensorProto, name: str) -> TensorProto:
    """A float32 constant rounded to the nearest float16.

    Raises:
        OdtkError: it holds a value that float16 cannot.
    """
    values = numpy_helper.to_array(tensor)
    largest = float(np.abs(values).max(initial=0.0))
    if not largest <= FP16_MAX:  # written so that NaN is refused too
        raise OdtkError(f"{tensor.name} holds {largest:.3g}, beyond FP16's {FP16_MAX:.0f}: use --full-precision.")
    return numpy_helper.from_array(values.astype(np.float16), name)


def sampling_nodes(graph: GraphProto) -> Iterator[NodeProto]:
    """GridSample nodes, and the nodes that make their positions (input 1) from the output of a convolution."""
    producers = producers_of(graph)
    stack: list[str] = []
    for node in graph.node:
        if node.op_type == "GridSample":
            yield node
            stack.append(node.input[1])
    seen: set[str] = set()
    while stack:
        name = stack.pop()
        producer = producers.get(name)
        if producer is None or name in seen or producer.op_type in ("Conv", "DequantizeLinear"):
            continue
        seen.add(name)
        yield producer
        stack += producer.input


def int8_island_nodes(graph: GraphProto) -> Iterator[NodeProto]:
    """The nodes that INT8 kernels replace: Q/DQ, what computes on dequantized values, and what is fused behind it."""
    inside: set[str] = set()  # values that are computed in an island
    dequantized: set[str] = set()
    constants = {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        activations = {name for name in node.input if name and name not in constants}
        fused = node.op_type in FUSED_OPS and activations <= inside
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") or fused or activations & dequantized:
            yield node
            inside |= set(node.output)
            dequantized |= set(node.output) if node.op_type == "DequantizeLinear" else set()


# ---------------------------------------------------------------------------------------------------------------------
# INT8: where Q/DQ pairs go


def layer_of(conv: NodeProto) -> str:
    """The layer that a Conv node belongs to, named by its weight. A layer of the head has one node per level."""
    return conv.input[1].removesuffix(".weight")


def quantizable_layers(model: ModelProto) -> list[str]:
    """The convolution layers of a raw graph that may be quantized, each once, in the order of the graph.

    Those that predict sampling positions of deformable convolutions (model.layers.DeformConv2d.offset) are left out.
    """
    names = dict.fromkeys(layer_of(node) for node in model.graph.node if node.op_type == "Conv")
    return [name for name in names if not name.endswith(".offset")]


def additions(graph: GraphProto) -> list[NodeProto]:
    """Additions of two activations: those of residual blocks and of the feature pyramid."""
    constants = {tensor.name for tensor in graph.initializer}
    positions = {node.output[0] for node in sampling_nodes(graph)}
    return [
        node
        for node in graph.node
        if node.op_type == "Add" and not constants & set(node.input) and node.output[0] not in positions
    ]


def before_resize(name: str, producers: dict[str, NodeProto]) -> str:
    """The value to quantize for an input: the one before any nearest upsampling, which only repeats values."""
    producer = producers.get(name)
    if producer is not None and producer.op_type == "Resize":
        return before_resize(producer.input[0], producers)
    return name


def scale_groups(graph: GraphProto) -> list[list[str]]:
    """The activations that may be quantized, in order of use; those of one group share a scale."""
    producers = producers_of(graph)
    groups: dict[str, list[str]] = {}
    for node in graph.node:
        if node.op_type == "Conv":
            groups.setdefault(node.input[0], [node.input[0]])
    for node in additions(graph):
        joined: list[str] = []
        for name in (before_resize(value, producers) for value in node.input):
            joined += [member for member in groups.get(name, [name]) if member not in joined]
        groups |= dict.fromkeys(joined, joined)
    return list({id(group): group for group in groups.values()}.values())


def insert_qdq(model: ModelProto, table: CalibrationTable) -> None:
    """Puts Q/DQ nodes into a raw float32 graph, in place, at every quantizable layer but ``table.fp16_layers``.

    Raises:
        OdtkError: the model does not have one of ``table.fp16_layers``.
    """
    graph = model.graph
    layers = set(quantizable_layers(model))
    if unknown := set(table.fp16_layers) - layers:
        raise OdtkError(f"The model has no layer {sorted(unknown)[0]}, which was to stay in FP16.")
    quantized_layers = layers - set(table.fp16_layers)
    producers = producers_of(graph)
    weights = {tensor.name: tensor for tensor in graph.initializer}
    constants: dict[str, TensorProto] = {}
    pairs: dict[str, list[NodeProto]] = {}  # activation → its Q and DQ nodes

    def constant(name: str, value: np.ndarray) -> str:
        constants.setdefault(name, numpy_helper.from_array(value, name))
        return name

    def quantize_activation(name: str) -> str:
        """The name of the value after its Q/DQ pair, which is made on first use."""
        if name not in pairs:
            scale = constant(f"{name}/scale", np.array(table.scales[name], np.float32))
            scale_and_zero = [scale, constant("zero", np.zeros((), np.int8))]
            pairs[name] = [
                helper.make_node("QuantizeLinear", [name, *scale_and_zero], [f"{name}/q"], f"{name}/quantize"),
                helper.make_node(
                    "DequantizeLinear", [f"{name}/q", *scale_and_zero], [f"{name}/dq"], f"{name}/dequantize"
                ),
            ]
        return f"{name}/dq"

    def dequantized_weight(conv: NodeProto) -> NodeProto:
        """Makes the weight of a convolution INT8: a DequantizeLinear of its own, as TensorRT's fusions need it."""
        name = conv.input[1]
        quantized, scale = quantize_weight(numpy_helper.to_array(weights[name]))
        inputs = [
            constant(f"{name}/int8", quantized),
            constant(f"{name}/scale", scale),
            constant(f"{name}/zero", np.zeros(len(scale), np.int8)),
        ]
        conv.input[1] = f"{conv.name}/weight"
        return helper.make_node("DequantizeLinear", inputs, [conv.input[1]], f"{conv.name}/dequantize_weight", axis=0)

    for node in additions(graph):
        inputs = [before_resize(name, producers) for name in node.input]
        made_by = [producers[name] for name in inputs if name in producers]
        if any(producer.op_type == "Conv" and layer_of(producer) not in quantized_layers for producer in made_by):
            continue
        for i, name in enumerate(inputs):
            above = producers.get(node.input[i])
            if above is not None and above.op_type == "Resize":
                above.input[0] = quantize_activation(name)
            else:
                node.input[i] = quantize_activation(name)
    nodes: list[NodeProto] = []
    for node in graph.node:
        if node.op_type == "Conv" and layer_of(node) in quantized_layers:
            node.input[0] = quantize_activation(node.input[0])
            nodes.append(dequantized_weight(node))
        nodes.append(node)
    nodes = [new for node in nodes for new in (node, *(p for name in node.output for p in pairs.get(name, ())))]
    nodes = [p for value in graph.input for p in pairs.get(value.name, ())] + nodes
    used = {name for node in nodes for name in node.input}
    kept = [tensor for name, tensor in weights.items() if name in used]
    replace_graph(model, graph, nodes, [*kept, *constants.values()])


def quantize_weight(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A kernel [O, …] float32 → its int8 values, of the same shape, and the scale of each output channel [O]."""
    largest = np.abs(weight.reshape(len(weight), -1)).max(1)  # [O, I, k, k] -> [O, I·k·k] -> [O]
    scale = np.maximum(largest / INT8_MAX, MIN_SCALE).astype(np.float32)
    shaped = scale.reshape(-1, *[1] * (weight.ndim - 1))  # [O] -> [O, 1, 1, 1]
    return np.clip(np.rint(weight / shaped), -INT8_MAX, INT8_MAX).astype(np.int8), scale
