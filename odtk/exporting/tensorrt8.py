"""What TensorRT 8 needs of a graph that TensorRT 10 and 11 do not."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from .graph import replace_graph
from .precision import int8_island_nodes


def expand_instance_norm(model: ModelProto) -> None:
    """Replaces each InstanceNormalization [N, G, L] by plain operators, in place: (x − mean) / √(variance + ε).

    They come from GroupNorm, whose own scale and bias torch.onnx writes as nodes of their own, so that here they are
    all 1 and 0. TensorRT 8 would implement the node by a plugin that needs cuDNN and that cannot be found when an
    engine is loaded where only odtk's plugins are registered.
    """
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        if node.op_type != "InstanceNormalization":
            nodes.append(node)
            continue
        x, scale, bias = node.input
        assert (numpy_helper.to_array(constants[scale]) == 1).all(), node.name
        assert (numpy_helper.to_array(constants[bias]) == 0).all(), node.name
        map_, mean, centered, square, variance, sum_, deviation, shape, epsilon = (
            f"{node.name}/{part}"
            for part in ("map", "mean", "centered", "square", "variance", "sum", "deviation", "shape", "epsilon")
        )
        epsilon_value = np.array([helper.get_node_attr_value(node, "epsilon")], np.float32)
        constants[shape] = numpy_helper.from_array(np.array([0, 0, -1, 1]), shape)
        constants[epsilon] = numpy_helper.from_array(epsilon_value, epsilon)
        nodes += [
            helper.make_node("Reshape", [x, shape], [map_], map_),  # [N, G, L] → [N, G, L, 1]
            helper.make_node("GlobalAveragePool", [map_], [mean], mean),
            helper.make_node("Sub", [map_, mean], [centered], centered),
            helper.make_node("Mul", [centered, centered], [square], square),
            helper.make_node("GlobalAveragePool", [square], [variance], variance),
            helper.make_node("Add", [variance, epsilon], [sum_], sum_),
            helper.make_node("Sqrt", [sum_], [deviation], deviation),
            helper.make_node("Div", [centered, deviation], list(node.output), node.name),
        ]
    used = {name for node in nodes for name in node.input}
    replace_graph(model, model.graph, nodes, [tensor for name, tensor in constants.items() if name in used])


def float32_nodes(model: ModelProto) -> list[str]:
    """Names of the nodes that compute in float32 in a graph of float16; none for a graph of float32 alone.

    TensorRT 8 chooses the types of its layers itself unless it is told; TensorRT 10 and 11 take the graph's. The nodes
    of INT8 islands (precision.py) are left out: INT8 kernels replace them.
    """
    graph = onnx.shape_inference.infer_shapes(model).graph
    types = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    if TensorProto.FLOAT16 not in types.values():
        return []
    islands = {node.name for node in int8_island_nodes(graph)}
    return [
        node.name
        for node in graph.node
        if types.get(node.output[0]) == TensorProto.FLOAT and node.name not in islands and node.op_type != "Cast"
    ]
