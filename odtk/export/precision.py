"""Precision in the graph: FP16 types, and INT8 by Q/DQ nodes from calibration images. No TensorRT.

INT8 here is what TensorRT fuses: symmetric, one scale per output channel of a weight and one per activation tensor.
Q/DQ pairs stand at the inputs of convolutions and of additions (the residual ones and the pyramid's), nowhere between
a convolution and its ReLU; both inputs of an addition have one scale.

Why not onnxruntime.quantization: its quantiser gives a tensor's Q/DQ pair to all consumers, so a layer that stays in
FP16 would still read rounded inputs; it does not tie the scales of an addition. Its entropy calibrator keeps every
activation of every image in memory, and tries as many ranges as it has bins more than 128, by default none.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from ..config import ExportConfig, LoaderConfig, OdtkError
from ..data.dataset import Dataset
from ..data.loader import create_loader
from ..model.checkpoint import replacing

HALF_MAX = 65504.0  # float16
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)
FUSED = ("Relu", "Clip", "Add", "MaxPool", "Resize")  # into the INT8 kernels around them
FLOAT_ONLY = {"Resize": (1, 2)}  # inputs that ONNX has in float32 alone: region and scales

LEVELS = 127  # of a sign: symmetric INT8 leaves −128 unused
SMALLEST = 1e-12  # scale, of a channel whose weights are all 0
MAX_IMAGES = 500
MIN_IMAGES = 8  # fewer are refused
FEW_IMAGES = 100  # fewer are warned about
METHODS = ("entropy", "percentile", "minmax")
PERCENTILE = 0.9999


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
    """Q/DQ nodes, what computes on dequantised values, and what a convolution's INT8 kernel fuses behind it."""
    inside: set[str] = set()  # values made in an island
    dequantised: set[str] = set()
    constants = {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        activations = {name for name in node.input if name and name not in constants}
        fused = node.op_type in FUSED and activations <= inside
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") or fused or activations & dequantised:
            yield node
            inside |= set(node.output)
            dequantised |= set(node.output) if node.op_type == "DequantizeLinear" else set()


def replace_graph(model: ModelProto, graph: GraphProto, nodes: list[NodeProto], constants: list[TensorProto]) -> None:
    """Puts nodes and constants, and the graph's inputs and outputs, into the model; value types are inferred anew."""
    name, inputs, outputs = graph.name, list(graph.input), list(graph.output)
    model.graph.CopyFrom(helper.make_graph(nodes, name, inputs, outputs, constants))
    model.CopyFrom(onnx.shape_inference.infer_shapes(model))


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
    """The value to quantise for an input: what lies before a nearest upsampling, which only repeats it."""
    maker = makers.get(name)
    return source(maker.input[0], makers) if maker is not None and maker.op_type == "Resize" else name


def makers_of(graph: GraphProto) -> dict[str, NodeProto]:
    """The node that makes each value."""
    return {name: node for node in graph.node for name in node.output}


def scale_groups(graph: GraphProto) -> list[list[str]]:
    """All activations that INT8 may quantise, in order of use; those that share a scale are one group."""
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
        quantised, scale = quantise_weight(numpy_helper.to_array(weights[name]))
        inputs = [
            constant(f"{name}/int8", quantised),
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


def quantise_weight(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A kernel [O, …] as int8 of the same shape, and the scale of each output channel [O]."""
    most = np.abs(weight.reshape(len(weight), -1)).max(1)  # [O, I, k, k] -> [O, I·k·k] -> [O]
    scale = np.maximum(most / LEVELS, SMALLEST).astype(np.float32)
    shaped = scale.reshape(-1, *[1] * (weight.ndim - 1))  # [O] -> [O, 1, 1, 1]
    return np.clip(np.rint(weight / shaped), -LEVELS, LEVELS).astype(np.int8), scale


# ---------------------------------------------------------------------------------------------------------------------
# INT8: how large


@dataclass(frozen=True)
class Table:
    """What calibration found: all that INT8 needs beside the weights, as a readable JSON file.

    Attributes:
        model: fingerprint of the checkpoint's weights.
        size: (H, W) of the network's input in pixels.
        method: entropy, percentile or minmax.
        images: the files of the sample, in the order they were used.
        scales: activation → what one step of its int8 stands for.
        fp16_layers: convolutions that stay in FP16.
        sensitivity: layer → decibels by which the raw outputs stand above the error that quantising this layer
            alone makes; the worst first; empty before `odtk export --verify` has measured it.
    """

    model: str
    size: tuple[int, int]
    method: str
    images: tuple[str, ...]
    scales: dict[str, float]
    fp16_layers: tuple[str, ...] = ()
    sensitivity: dict[str, float] = dataclasses.field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"


def load_table(path: str) -> Table:
    """Reads a table.

    Raises:
        OdtkError: no table.
    """
    try:
        with open(path, encoding="utf-8") as file:
            values = json.load(file)
        for name in ("size", "images", "fp16_layers"):
            values[name] = tuple(values[name])
        return Table(**values)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OdtkError(f"{path} is not a calibration table of odtk ({type(error).__name__}).") from error


def save_table(path: str, table: Table) -> None:
    """Writes a table, whole or not at all."""
    with replacing(path) as file:
        file.write(table.to_json().encode())


def table_path(config: ExportConfig) -> str:
    """Where the table of an export lies: as given, else beside the output."""
    return config.calibration_table or os.path.splitext(config.output)[0] + ".calibration.json"


def table_for(model: ModelProto, config: ExportConfig, fingerprint: str, stride: int) -> Table:
    """The table to export with: the file given, where there is one, else a new one from the images, which is saved.

    Raises:
        OdtkError: a table of another model or size, unusable images, neither table nor images.
    """
    path = table_path(config)
    if config.calibration_table and os.path.exists(path):
        table = load_table(path)
        needed = {name for group in scale_groups(model.graph) for name in group}
        if table.model != fingerprint or not needed <= table.scales.keys():
            raise OdtkError(f"{path} is the calibration table of another model: calibrate this one with images.")
        if table.size != config.size:
            own, asked = ("×".join(map(str, size)) for size in (table.size, config.size))
            raise OdtkError(f"{path} was calibrated at {own}, not {asked}: calibrate again with images.")
        print(f"INT8 scales of {len(table.scales)} tensors from {path}.")
        kept = tuple(dict.fromkeys([*table.fp16_layers, *config.fp16_layers]))
        return dataclasses.replace(table, fp16_layers=kept)
    if not config.calibration_images:
        raise OdtkError("INT8 needs --calibration-images DIR, or a --calibration-table PATH written earlier.")
    limit = MAX_IMAGES
    if config.calibration_batches is not None:
        limit = min(limit, config.calibration_batches * config.batch[1])
    dataset = sample(config.calibration_images, limit, config.seed)
    ranges = calibrate(model, images_of(dataset, config, stride), config.calibration_method, len(dataset.images))
    scales = shared_scales(scale_groups(model.graph), ranges)
    files = tuple(os.path.relpath(image.path, config.calibration_images) for image in dataset.images)
    table = Table(fingerprint, config.size, config.calibration_method, files, scales, config.fp16_layers)
    save_table(path, table)
    print(f"INT8 scales of {len(scales)} tensors written to {path}.")
    return table


def shared_scales(groups: Iterable[Sequence[str]], ranges: Mapping[str, float]) -> dict[str, float]:
    """The scale of each activation: of the largest range in its group."""
    scales: dict[str, float] = {}
    for group in groups:
        widest = max(ranges[name] for name in group)
        scales |= dict.fromkeys(group, float(np.float32(widest / LEVELS)))
    return scales


def sample(folder: str, limit: int, seed: int) -> Dataset:
    """Up to ``limit`` images of a folder, shuffled by the seed before they are cut.

    Raises:
        OdtkError: no such folder, none or unusable images in it, or fewer than MIN_IMAGES.
    """
    dataset = Dataset.load(None, folder)
    found = len(dataset.images)
    if found < MIN_IMAGES:
        raise OdtkError(f"{folder} has {found} images: calibration needs {MIN_IMAGES} at least, and better 500.")
    order = np.random.default_rng(seed).permutation(found)[:limit]
    dataset.images = [dataset.images[i] for i in order]
    if len(order) < FEW_IMAGES:
        print(f"Warning: calibration on {len(order)} images; with {FEW_IMAGES} to {MAX_IMAGES} ranges are surer.")
    return dataset


def images_of(dataset: Dataset, config: ExportConfig, stride: int) -> Iterator[np.ndarray]:
    """The dataset's images one by one as inference would prepare them: [1, 3, H, W] float32, normalised, padded."""
    assert config.calibration_images is not None
    data = LoaderConfig(images=config.calibration_images, batch=1, size=config.size, stride=stride)
    for batch in create_loader(dataset, data):
        yield batch.images.numpy()


class Histogram:
    """Magnitudes of one activation: counts over [0, limit), whose limit doubles when a larger value comes."""

    BINS = 2048

    def __init__(self) -> None:
        self.counts = np.zeros(self.BINS)
        self.limit = 0.0
        self.most = 0.0

    def add(self, values: np.ndarray) -> None:
        """Counts an array of any shape; zeros, which every scale represents, are left out.

        Raises:
            OdtkError: a value is not finite.
        """
        magnitudes = torch.from_numpy(values).abs().flatten()
        most = float(magnitudes.max())
        if not np.isfinite(most):
            raise OdtkError("The network is not finite on a calibration image: check the checkpoint.")
        self.most = max(self.most, most)
        if most == 0:
            return
        self.limit = self.limit or most
        while most > self.limit:
            merged = self.counts.reshape(-1, 2).sum(1)  # [2048] -> [1024]
            self.counts = np.concatenate([merged, np.zeros(self.BINS // 2)])
            self.limit *= 2
        counts = torch.histc(magnitudes, self.BINS, 0, self.limit).numpy().astype(np.float64)
        counts[0] -= np.count_nonzero(values == 0)
        self.counts += counts

    def range(self, method: str) -> float:
        """The magnitude that the largest int8 stands for; 1 for an activation that is always 0."""
        if self.most == 0:
            return 1.0
        if method == "minmax":
            return self.most
        if method == "percentile":
            inside = np.cumsum(self.counts) >= PERCENTILE * self.counts.sum()
            return min(self.most, self.limit * (int(np.argmax(inside)) + 1) / self.BINS)
        return min(self.most, self.limit * self.best_cut() / self.BINS)

    def best_cut(self) -> int:
        """The number of bins to keep so that int8 resembles the distribution most (Kullback–Leibler divergence).

        S. Migacz, 8-bit inference with TensorRT, GTC 2017.
        """
        best, least = self.BINS, np.inf
        for cut in range(LEVELS + 1, self.BINS + 1, 8):
            kept = self.counts[:cut]
            reference = kept.copy()
            reference[-1] += self.counts[cut:].sum()  # what is cut off lands on the largest level
            level = np.arange(cut) * (LEVELS + 1) // cut
            total, used = np.bincount(level, kept), np.bincount(level, kept > 0)
            candidate = np.where(kept > 0, (total / np.maximum(used, 1))[level], 0)  # each level spread over its bins
            p, q = smooth(reference), smooth(candidate)
            divergence = float((p * np.log(p / q)).sum())
            if divergence < least:
                best, least = cut, divergence
        return best


def smooth(counts: np.ndarray) -> np.ndarray:
    """Counts as probabilities, none of which is 0."""
    smoothed = counts + 1e-4 * max(1.0, counts.sum()) / len(counts)
    return smoothed / smoothed.sum()


def calibrate(model: ModelProto, images: Iterable[np.ndarray], method: str, total: int) -> dict[str, float]:
    """The range of every activation of a raw float32 graph that INT8 may quantise, image by image in fixed memory.

    Raises:
        OdtkError: an unknown method, or activations that are not finite.
    """
    if method not in METHODS:
        raise OdtkError(f"The calibration method {method!r} does not exist: use one of {', '.join(METHODS)}.")
    names = [name for group in scale_groups(model.graph) for name in group]
    session = open_session(with_outputs(model, names))
    histograms = {name: Histogram() for name in names}
    for i, image in enumerate(images):
        for name, values in zip(names, session.run(None, {"images": image}), strict=True):
            histograms[name].add(values)
        if i % 50 == 0:
            print(f"Calibrating: {i}/{total} images", flush=True)
    return {name: histogram.range(method) for name, histogram in histograms.items()}


def with_outputs(model: ModelProto, names: Sequence[str]) -> ModelProto:
    """A copy of a raw graph whose outputs are the named values."""
    copy = ModelProto()
    copy.CopyFrom(model)
    del copy.graph.output[:]
    copy.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names)
    return copy


def open_session(model: ModelProto | str, providers: Sequence[Any] = ("CPUExecutionProvider",)) -> Any:
    """ONNX Runtime for a model or a file, with torch's number of threads."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    content = model if isinstance(model, str) else model.SerializeToString()
    return onnxruntime.InferenceSession(content, options, providers=list(providers))


# ---------------------------------------------------------------------------------------------------------------------
# INT8: at what cost


def sensitivity(model: ModelProto, table: Table, images: Sequence[np.ndarray]) -> dict[str, float]:
    """What quantising each layer alone costs: signal over error of the raw outputs in decibels, the worst layer first.

    Args:
        model: the raw float32 graph.
        images: a few, each [1, 3, H, W]; the time is that of (layers + 1) · images runs.
    """
    expected = [open_session(model).run(None, {"images": image}) for image in images]
    every = layers(model)
    found = {}
    for layer in every:
        alone = ModelProto()
        alone.CopyFrom(model)
        insert_qdq(alone, dataclasses.replace(table, fp16_layers=tuple(name for name in every if name != layer)))
        session = open_session(alone)
        actual = [session.run(None, {"images": image}) for image in images]
        found[layer] = decibels(expected, actual)
    return dict(sorted(found.items(), key=lambda item: item[1]))


def decibels(expected: Sequence[Sequence[np.ndarray]], actual: Sequence[Sequence[np.ndarray]]) -> float:
    """Signal over error, each output's own, averaged over outputs and images; at most 100 dB.

    The signal is the variance: an offset that all cells share (the prior of the scores) says nothing of an image.
    """
    ratios = [
        10 * np.log10(max(float(a.var()), 1e-20) / max(float(np.mean((a - b) ** 2)), 1e-20))
        for outputs, others in zip(expected, actual, strict=True)
        for a, b in zip(outputs, others, strict=True)
    ]
    return round(min(100.0, float(np.mean(ratios))), 2)
