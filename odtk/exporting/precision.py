"""Precision in the graph: FP16 types, and INT8 as Q/DQ nodes. Independent of TensorRT.

INT8 here is the kind that TensorRT fuses into its kernels: symmetric, with one scale per output channel of a weight and
one per activation tensor. Q/DQ pairs stand at the inputs of convolutions, and at one input of each addition (those of
residual blocks and of the feature pyramid): the residual one. The convolution that feeds an addition stays plain, as
does a convolution before its ReLU, so that one kernel computes convolution, addition and ReLU. These are NVIDIA's rules
(TensorRT's guide, "Q/DQ Layer-Placement Recommendations"), and what nvidia-modelopt 0.47 does with our networks.

Why not onnxruntime.quantization: its quantizer gives the Q/DQ pair of a tensor to all consumers, so a layer that stays
in FP16 would still read rounded inputs, and it quantizes both inputs of an addition. Its entropy calibrator keeps every
activation of every image in memory, and tries as many ranges as the histogram has bins beyond 128: none with the
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
FP16_QDQ_OPSET = 19  # the first ONNX operator set whose DequantizeLinear can yield float16
FP16_QDQ_TENSORRT = 10  # the first TensorRT (major version) that reads it


# ---------------------------------------------------------------------------------------------------------------------
# FP16


def to_fp16(model: ModelProto, tensorrt: int | None = None) -> None:
    """Converts a graph of raw levels to float16, in place; the normalized images stay float32 and are cast.

    Args:
        tensorrt: as in insert_qdq, whose graph this may be.

    Three regions stay float32:
      - Sampling positions: GridSample of deformable convolutions, and the arithmetic that makes its positions. The 11
        significant bits of float16 are too few for a position in a feature map.
      - INT8 islands: from DequantizeLinear over a convolution and its ReLU to QuantizeLinear. ONNX Runtime 1.31
        rewrites float16 Q/DQ nodes into wrong ones (its WeightBiasQuantization; 4 points of AP on BCCD), and TensorRT 8
        chooses its types itself. For TensorRT 10 and later, which takes the types of the graph, they are float16
        (fp16_islands): otherwise what leaves an island would be written in float32 and cast.
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
    islands = quantized_weight_nodes(graph) if fp16_islands(model, tensorrt) else int8_island_nodes(graph)
    float32_values = {node.output[0] for node in (*sampling_nodes(graph), *islands, *norms)}
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


def residual_input(addition: NodeProto, producers: dict[str, NodeProto]) -> int:
    """Which input of an addition is quantized, 0 or 1; the other stays plain for the kernel that computes the sum.

    Where a single input comes straight from a convolution, it is the other one: the skip of an identity block, the
    upsampled input of the pyramid. Otherwise it is the input with fewer convolutions behind it that are not behind the
    other too: the skip of a block whose own input is a convolution's output (MobileNetV2) or whose last layer is not a
    convolution (GhostNet), and the shortcut of a downsampling block.
    """
    from_convolution = [name in producers and producers[name].op_type == "Conv" for name in addition.input]
    if from_convolution[0] != from_convolution[1]:
        return from_convolution.index(False)
    first, second = (convolutions_behind(name, producers) for name in addition.input)
    return 0 if len(first - second) < len(second - first) else 1


def convolutions_behind(name: str, producers: dict[str, NodeProto]) -> set[str]:
    """The outputs of the convolutions that a value is computed from; its own, if it is one."""
    stack, seen, found = [name], {name}, set()
    while stack:
        value = stack.pop()
        producer = producers.get(value)
        if producer is None:
            continue
        if producer.op_type == "Conv":
            found.add(value)
        stack += (new := set(producer.input) - seen)
        seen |= new
    return found


def before_resize(name: str, producers: dict[str, NodeProto]) -> str:
    """The value before any nearest upsampling, which only repeats values: both have one scale."""
    producer = producers.get(name)
    if producer is not None and producer.op_type == "Resize":
        return before_resize(producer.input[0], producers)
    return name


def source_layers(name: str, producers: dict[str, NodeProto]) -> set[str]:
    """The layers whose output a value is, directly, upsampled or concatenated."""
    producer = producers.get(name)
    if producer is None or producer.op_type not in ("Conv", "Resize", "Concat"):
        return set()
    if producer.op_type == "Conv":
        return {layer_of(producer)}
    inputs = producer.input if producer.op_type == "Concat" else producer.input[:1]
    return {layer for value in inputs for layer in source_layers(value, producers)}


def quantizable_activations(graph: GraphProto) -> list[str]:
    """The activations that need a scale: the inputs of convolutions, and the residual inputs of additions."""
    producers = producers_of(graph)
    names = [node.input[0] for node in graph.node if node.op_type == "Conv"]
    residual = [node.input[residual_input(node, producers)] for node in additions(graph)]
    return list(dict.fromkeys([*names, *(before_resize(name, producers) for name in residual)]))


def fp16_islands(model: ModelProto, tensorrt: int | None) -> bool:
    """Whether DequantizeLinear yields float16 for a TensorRT of this major version, or None for ONNX Runtime."""
    opset = next(entry.version for entry in model.opset_import if not entry.domain)
    return tensorrt is not None and tensorrt >= FP16_QDQ_TENSORRT and opset >= FP16_QDQ_OPSET


def quantized_weight_nodes(graph: GraphProto) -> list[NodeProto]:
    """QuantizeLinear nodes over constant weights, which are float32 in every graph."""
    constants = {tensor.name for tensor in graph.initializer}
    return [node for node in graph.node if node.op_type == "QuantizeLinear" and node.input[0] in constants]


def insert_qdq(model: ModelProto, table: CalibrationTable, tensorrt: int | None = None) -> None:
    """Puts Q/DQ nodes into a raw float32 graph, in place, at every quantizable layer but ``table.fp16_layers``.

    Args:
        tensorrt: major version of the TensorRT that builds the graph, or None for ONNX Runtime. TensorRT gets weights
            as float32 → Q → DQ, the only form that TensorRT 8 takes; ONNX Runtime gets int8 → DQ, a quarter the size.

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
    # Q and DQ must have the same scale: where DQ's is float16, both have its value.
    rounded = round_up_to_fp16 if fp16_islands(model, tensorrt) else np.asarray

    def constant(name: str, value: np.ndarray) -> str:
        constants.setdefault(name, numpy_helper.from_array(value, name))
        return name

    def quantize_activation(name: str) -> str:
        """The name of the value after its Q/DQ pair, which is made on first use."""
        if name not in pairs:
            source = before_resize(name, producers)
            scale = constant(f"{source}/scale", rounded(np.array(table.scales[source], np.float32)))
            scale_and_zero = [scale, constant("zero", np.zeros((), np.int8))]
            pairs[name] = [
                helper.make_node("QuantizeLinear", [name, *scale_and_zero], [f"{name}/q"], f"{name}/quantize"),
                helper.make_node(
                    "DequantizeLinear", [f"{name}/q", *scale_and_zero], [f"{name}/dq"], f"{name}/dequantize"
                ),
            ]
        return f"{name}/dq"

    def dequantized_weight(conv: NodeProto) -> list[NodeProto]:
        """Makes the weight of a convolution INT8: by nodes of its own, as TensorRT's fusions need them."""
        name, q = conv.input[1], f"{conv.name}/weight/q"
        weight = numpy_helper.to_array(weights[name])
        scale = rounded(weight_scale(weight))
        scale_and_zero = [
            constant(f"{name}/scale", scale),
            constant(f"{name}/zero", np.zeros(len(scale), np.int8)),
        ]
        conv.input[1] = f"{conv.name}/weight"
        nodes = []
        if tensorrt is None:
            q = constant(f"{name}/int8", quantize_weight(weight, scale))
        else:
            inputs = [name, *scale_and_zero]
            nodes.append(helper.make_node("QuantizeLinear", inputs, [q], f"{conv.name}/quantize_weight", axis=0))
        inputs = [q, *scale_and_zero]
        name = f"{conv.name}/dequantize_weight"
        return [*nodes, helper.make_node("DequantizeLinear", inputs, [conv.input[1]], name, axis=0)]

    for node in additions(graph):
        if not set.union(*(source_layers(name, producers) for name in node.input)) <= quantized_layers:
            continue  # what a layer in FP16 writes is not rounded
        i = residual_input(node, producers)
        node.input[i] = quantize_activation(node.input[i])
    nodes: list[NodeProto] = []
    for node in graph.node:
        if node.op_type == "Resize" and node.output[0] in pairs:
            node.input[0] = quantize_activation(node.input[0])  # so that int8 is upsampled
        if node.op_type == "Conv" and layer_of(node) in quantized_layers:
            node.input[0] = quantize_activation(node.input[0])
            nodes += dequantized_weight(node)
        nodes.append(node)
    nodes = [new for node in nodes for new in (node, *(p for name in node.output for p in pairs.get(name, ())))]
    nodes = [p for value in graph.input for p in pairs.get(value.name, ())] + nodes
    used = {name for node in nodes for name in node.input}
    kept = [tensor for name, tensor in weights.items() if name in used]
    replace_graph(model, graph, nodes, [*kept, *constants.values()])


def round_up_to_fp16(scale: np.ndarray) -> np.ndarray:
    """The nearest float16 that is not below each positive float32 scale, as float32; up, so that nothing is clipped."""
    nearest = scale.astype(np.float16)
    return np.where(nearest < scale, np.nextafter(nearest, np.float16(np.inf)), nearest).astype(np.float32)


def weight_scale(weight: np.ndarray) -> np.ndarray:
    """The scale of each output channel [O], float32, of a kernel [O, …] float32: its largest magnitude becomes 127."""
    largest = np.abs(weight.reshape(len(weight), -1)).max(1)  # [O, I, k, k] -> [O, I·k·k] -> [O]
    return np.maximum(largest / INT8_MAX, MIN_SCALE).astype(np.float32)


def quantize_weight(weight: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The int8 values of a kernel [O, …] float32, of the same shape, by the scale of each output channel [O]."""
    shaped = scale.reshape(-1, *[1] * (weight.ndim - 1))  # [O] -> [O, 1, 1, 1]
    return np.clip(np.rint(weight / shaped), -INT8_MAX, INT8_MAX).astype(np.int8)
