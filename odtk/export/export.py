"""Checkpoint → ONNX → engine: one traced graph of raw levels, its precision, and the ending that was asked for.

Endings (values of `Metadata.ending`):
    detections   standard operators: scores [N, D], boxes [N, D, 4], classes [N, D]; rows in use first, the rest zero
    candidates   rotated boxes, for which ONNX has no NMS: the decoded candidates of all levels, scores [N, T],
                 boxes [N, T, 6], classes [N, T]; backends.py ends with ops.nms
    plugins      odtk's own TensorRT nodes, outputs as detections
    raw          the levels themselves: logits_0 …, boxes_0 …

Boxes are x1, y1, x2, y2 (and sin, cos) in pixels of the network's input, inclusive corners (boxes.py).
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import logging
import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from .. import __version__
from ..config import IMAGENET_MEAN, IMAGENET_STD, ExportConfig, ModelConfig, OdtkError, PostprocessConfig
from ..data.sampler import round_up
from ..model.checkpoint import Checkpoint, build, fingerprint, load, replacing
from ..model.detector import Detector
from ..ops import to_logit
from . import precision

FORMAT = 1  # of the metadata
OPSET = 18  # what torch.onnx writes natively, and the least that is accepted
ENGINES = (".plan", ".engine")
logger = logging.getLogger("odtk.tensorrt")


@dataclass(frozen=True)
class Metadata:
    """What travels inside an exported file, so that running it needs nothing else.

    Attributes:
        size: (height, width) of the input in pixels.
        stride: size is a multiple of it.
        categories: [id, name] in the order of the class indices, or None where the checkpoint does not say.
        model: fingerprint of the checkpoint's weights.
        mean, std: of RGB values in [0, 1]; padding is 0 after normalisation.
        box_values: 4, or 6 when rotated.
        ending: see the module's text.
        batch: MIN, OPT, MAX. ONNX Runtime takes any batch, an engine those from MIN to MAX.
    """

    size: tuple[int, int]
    stride: int
    classes: int
    categories: tuple[tuple[int, str], ...] | None
    precision: str
    ending: str
    box_values: int
    score_threshold: float
    nms_threshold: float
    detections: int
    top_n: int
    batch: tuple[int, int, int]
    model: str
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    odtk: str = __version__
    torch: str = torch.__version__
    format: int = FORMAT

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), separators=(",", ":"))  # short: TensorRT holds 4 kB in a plan

    @classmethod
    def from_json(cls, text: str, path: str) -> Metadata:
        """The inverse of to_json.

        Raises:
            OdtkError: text of a newer odtk, or damaged.
        """
        try:
            values = json.loads(text)
            if values["format"] > FORMAT:
                raise OdtkError(f"{path} was written by a newer odtk ({values['odtk']}): update odtk.")
            for name in ("size", "batch", "mean", "std"):
                values[name] = tuple(values[name])
            if values["categories"] is not None:
                values["categories"] = tuple((id, name) for id, name in values["categories"])
            return cls(**values)
        except (ValueError, KeyError, TypeError) as error:
            raise OdtkError(f"The metadata in {path} is damaged: export the model again.") from error

    @property
    def postprocess(self) -> PostprocessConfig:
        """The thresholds that are baked in."""
        return PostprocessConfig(self.score_threshold, self.nms_threshold, self.detections, self.top_n)


@dataclass(frozen=True)
class Report:
    """What export wrote.

    Attributes:
        path: the file.
        bytes: its size.
        precision: fp32, fp16 or int8.
        table: path of the calibration table that INT8 was written from.
        fp16_layers: convolutions that INT8 left in FP16.
    """

    path: str
    bytes: int
    precision: str
    table: str | None = None
    fp16_layers: tuple[str, ...] = ()


def export(config: ExportConfig) -> Report:
    """Writes ``config.output`` from the checkpoint ``config.path``, whole or not at all.

    Raises:
        OdtkError: another suffix, a missing GPU or TensorRT for an engine, no calibration images for INT8 …
    """
    suffix = os.path.splitext(config.output)[1]
    if suffix != ".onnx" and suffix not in ENGINES:
        raise OdtkError(f"{config.output} must end in .onnx, .plan or .engine.")
    if suffix in ENGINES:
        need_engine()
    checkpoint = load(config.path)
    detector = build(checkpoint).fold()
    height, width = round_up(config.size, detector.stride)
    if (height, width) != tuple(config.size):
        asked = f"{config.size[0]} {config.size[1]}"
        print(f"--size {asked} becomes {height} {width}: sides are multiples of {detector.stride}.")
    config = dataclasses.replace(config, size=(height, width))
    graph, table = body(detector, checkpoint, config)
    ending = "plugins" if suffix in ENGINES else "candidates" if checkpoint.model.rotated else "detections"
    metadata = describe(detector, checkpoint, config, ending)
    model = finish(graph, detector, metadata)
    content = build_engine(model, metadata, config) if suffix in ENGINES else serialize(model)
    with replacing(config.output) as file:
        file.write(content)
    fp16_layers = table.fp16_layers if table else ()
    print(f"Wrote {config.output}: {config.precision}, {height}×{width}, {len(content) / 2**20:.1f} MiB.")
    return Report(
        config.output, len(content), config.precision, precision.table_path(config) if table else None, fp16_layers
    )


def body(detector: Detector, checkpoint: Checkpoint, config: ExportConfig) -> tuple[ModelProto, precision.Table | None]:
    """The raw graph of a folded detector in the precision asked for, and INT8's calibration table."""
    model = trace(detector, config.size, config.opset)
    table = None
    if config.precision == "int8":
        table = precision.table_for(model, config, fingerprint(checkpoint.state_dict), detector.stride)
        precision.insert_qdq(model, table)
    if config.precision != "fp32":
        precision.to_fp16(model)
    return model, table


def describe(detector: Detector, checkpoint: Checkpoint, config: ExportConfig, ending: str) -> Metadata:
    """The metadata of one export."""
    categories = checkpoint.categories
    return Metadata(
        size=config.size,
        stride=detector.stride,
        classes=checkpoint.model.classes,
        categories=None if categories is None else tuple((c.id, c.name) for c in categories),
        precision=config.precision,
        ending=ending,
        box_values=6 if checkpoint.model.rotated else 4,
        score_threshold=config.postprocess.score_threshold,
        nms_threshold=config.postprocess.nms_threshold,
        detections=config.postprocess.detections,
        top_n=config.postprocess.top_n,
        batch=config.batch,
        model=fingerprint(checkpoint.state_dict),
    )


def finish(model: ModelProto, detector: Detector, metadata: Metadata) -> ModelProto:
    """Appends the ending that the metadata names to a raw graph, and the metadata; checks the result."""
    levels = [Level(*level) for level in zip(level_names(model), detector.anchors(), detector.strides, strict=True)]
    if metadata.ending in ("detections", "candidates"):
        standard_ending(model, levels, detector.config, metadata)
    elif metadata.ending == "plugins":
        plugin_ending(model, levels, detector.config, metadata)
    helper.set_model_props(model, {"odtk": metadata.to_json()})
    if metadata.ending != "plugins":  # onnx does not know our nodes
        onnx.checker.check_model(model, full_check=True)
    return model


# ---------------------------------------------------------------------------------------------------------------------
# the traced graph


def trace(detector: Detector, size: tuple[int, int], opset: int = OPSET) -> ModelProto:
    """The raw graph of a folded detector: images [N, 3, H, W] float32, normalised → logits_i, boxes_i of each level.

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


# ---------------------------------------------------------------------------------------------------------------------
# endings


class Level(NamedTuple):
    """One level of a raw graph: its values and shape, base anchors [A, 4 or 5] in px, and stride in px per cell."""

    names: tuple[str, str, int, int]
    anchors: torch.Tensor
    stride: int


class Writer:
    """Appends nodes and constants to a graph; every node's outputs get fresh names under ``ending/``."""

    def __init__(self, model: ModelProto) -> None:
        self.graph = model.graph
        self.count = 0

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """One node with one output, whose name is returned."""
        return self.ops(kind, *inputs, outputs=1, **attributes)[0]

    def ops(self, kind: str, *inputs: str, outputs: int, **attributes: Any) -> list[str]:
        name = self.fresh(kind.lower())
        names = [name, *(f"{name}.{i}" for i in range(1, outputs))]
        self.graph.node.append(helper.make_node(kind, list(inputs), names, name=name, **attributes))
        return names

    def constant(self, value: Any, dtype: type = np.float32) -> str:
        name = self.fresh("constant")
        self.graph.initializer.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def integers(self, *values: int) -> str:
        """A constant [n] int64: a shape, axes or indices."""
        return self.constant(values, np.int64)  # type: ignore[arg-type]

    def fresh(self, stem: str) -> str:
        self.count += 1
        return f"ending/{stem}_{self.count}"

    def outputs(self, values: Iterable[tuple[str, str, int, Sequence[int | str]]]) -> None:
        """Replaces the graph's outputs by (value, name, element type, shape)."""
        del self.graph.output[:]
        for value, name, kind, shape in values:
            self.graph.node.append(helper.make_node("Identity", [value], [name], name=f"ending/{name}"))
            self.graph.output.append(helper.make_tensor_value_info(name, kind, shape))


def standard_ending(model: ModelProto, levels: Sequence[Level], config: ModelConfig, metadata: Metadata) -> None:
    """Decoding and NMS (spec §2) in standard operators, in FP32: the same steps as ops.decode and ops.nms."""
    g = Writer(model)
    candidates = [decode_level(g, level, config, metadata) for level in levels]
    scores, boxes, classes = (
        values[0] if len(values) == 1 else g.op("Concat", *values, axis=1) for values in zip(*candidates, strict=True)
    )
    rows = sum(min(metadata.top_n, level_size(level, config)) for level in levels)
    if metadata.ending == "detections":
        scores, boxes, classes = suppress(g, scores, boxes, classes, metadata, rows)
        rows = metadata.detections
    used = g.op("Greater", scores, g.constant(0.0))  # [N, D]
    boxes = g.op("Where", g.op("Unsqueeze", used, g.integers(2)), boxes, g.constant(0.0))
    classes = g.op("Where", used, classes, g.constant(0, np.int64))  # type: ignore[arg-type]
    g.outputs(
        [
            (scores, "scores", TensorProto.FLOAT, ["batch", rows]),
            (boxes, "boxes", TensorProto.FLOAT, ["batch", rows, metadata.box_values]),
            (classes, "classes", TensorProto.INT64, ["batch", rows]),
        ]
    )


def level_size(level: Level, config: ModelConfig) -> int:
    """A·C·h·w, the candidates of a level."""
    return config.num_anchors * config.classes * level.names[2] * level.names[3]


def decode_level(g: Writer, level: Level, config: ModelConfig, metadata: Metadata) -> tuple[str, str, str]:
    """The best candidates of a level: scores [N, K] falling, boxes [N, K, 4 or 6], classes [N, K]; scores of 0 unused.

    A candidate's index is ((a·C + c)·h + y)·w + x, its regressed number v lies at ((a·V + v)·h + y)·w + x.
    """
    (logits, boxes, height, width), cells = level.names, level.names[2] * level.names[3]
    values = config.box_values
    logits, boxes = (g.op("Cast", name, to=TensorProto.FLOAT) for name in (logits, boxes))
    scores = g.op("Sigmoid", logits)  # [N, A·C, h, w]
    keep = g.op("Greater", logits, g.constant(to_logit(metadata.score_threshold)))  # false for NaN
    if values == 5:
        centreness = g.op("Sigmoid", g.op("Slice", boxes, g.integers(4), g.integers(5), g.integers(1)))
        scores = g.op("Sqrt", g.op("Mul", scores, centreness))
        keep = g.op("And", keep, g.op("Greater", scores, g.constant(0.0)))  # false for NaN
    scores = g.op("Where", keep, scores, g.constant(0.0))
    best = g.integers(min(metadata.top_n, level_size(level, config)))
    scores, index = g.ops("TopK", g.op("Reshape", scores, g.integers(0, -1)), best, outputs=2, axis=1)  # [N, K]

    cell = g.op("Mod", index, g.integers(cells))
    channel = g.op("Div", index, g.integers(cells))  # a·C + c
    anchor = g.op("Div", channel, g.integers(config.classes))
    classes = g.op("Mod", channel, g.integers(config.classes))

    first = g.op("Add", g.op("Mul", anchor, g.integers(values * cells)), cell)  # [N, K], of v = 0
    steps = g.integers(*(v * cells for v in range(6 if values == 6 else 4)))
    where = g.op("Add", g.op("Unsqueeze", first, g.integers(2)), steps)  # [N, K, V]
    flat = g.op("Reshape", boxes, g.integers(0, -1))  # [N, A·V·h·w]
    numbers = g.op("GatherElements", flat, g.op("Reshape", where, g.integers(0, -1)), axis=1)  # [N, K·V]
    numbers = g.op("Reshape", numbers, g.integers(0, -1, 6 if values == 6 else 4))  # [N, K, V]

    x, y = g.op("Mod", cell, g.integers(width)), g.op("Div", cell, g.integers(width))  # [N, K]
    axis = g.integers(2)
    xy = g.op("Concat", g.op("Unsqueeze", x, axis), g.op("Unsqueeze", y, axis), axis=2)  # [N, K, 2]
    corner = g.op("Mul", g.op("Cast", xy, to=TensorProto.FLOAT), g.constant(level.stride))
    base = level.anchors.numpy()
    size = base[:, 2:4] - base[:, :2] + 1  # [A, 2]
    anchor_size = g.op("Gather", g.constant(size), anchor, axis=0)  # [N, K, 2]
    centre = g.op("Add", g.op("Gather", g.constant(base[:, :2] + 0.5 * size), anchor, axis=0), corner)
    limits = (width * level.stride, height * level.stride)
    return scores, place(g, numbers, centre, anchor_size, level.stride, limits, values), classes


def place(g: Writer, numbers: str, centre: str, size: str, stride: int, limits: tuple[int, int], values: int) -> str:
    """Boxes [N, K, 4 or 6] from regressed numbers [N, K, V] and the centres and sizes [N, K, 2] of anchors, px.

    boxes.decode, decode_rotated and decode_distances in operators.

    Args:
        limits: (width, height) of the level in px; corners are clamped inside, a NaN becomes 0.
    """
    one = g.constant(1.0)
    if values == 5:
        distances = g.op("Mul", g.op("Relu", numbers), g.constant(stride))
        before, after = g.ops("Split", distances, outputs=2, axis=2, num_outputs=2)  # (left, top), (right, bottom)
        start, end = g.op("Sub", centre, before), g.op("Sub", g.op("Add", centre, after), one)
    else:
        parts = g.ops("Split", numbers, outputs=values // 2, axis=2, num_outputs=values // 2)  # (dx, dy), (dw, dh), …
        centre = g.op("Add", g.op("Mul", parts[0], size), centre)
        half = g.op("Mul", g.op("Mul", g.op("Exp", parts[1]), size), g.constant(0.5))
        start, end = g.op("Sub", centre, half), g.op("Sub", g.op("Add", centre, half), one)
    boxes = g.op("Concat", start, end, axis=2)  # [N, K, 4]
    boxes = g.op("Where", g.op("IsNaN", boxes), g.constant(0.0), boxes)
    most = [limits[0] - 1, limits[1] - 1]
    boxes = g.op("Min", g.op("Max", boxes, g.constant(0.0)), g.constant(most * 2))
    if values == 6:
        turn = g.op("Where", g.op("IsNaN", parts[2]), g.constant(0.0), parts[2])
        boxes = g.op("Concat", boxes, turn, axis=2)
    return boxes


def suppress(g: Writer, scores: str, boxes: str, classes: str, metadata: Metadata, rows: int) -> tuple[str, str, str]:
    """NMS per class of candidates (scores [N, T], boxes [N, T, 4], classes [N, T]), then the D best of each image.

    NonMaxSuppression has no notion of an inclusive corner, so it is given boxes one pixel longer, and takes one score
    per class and box, so a candidate scores 0, which is never kept, in all classes but its own.
    """
    longer = g.op("Add", boxes, g.constant([0, 0, 1, 1]))
    every = g.constant(np.arange(metadata.classes)[None, :, None], np.int64)  # type: ignore[arg-type]
    own = g.op("Equal", g.op("Unsqueeze", classes, g.integers(1)), every)  # [N, C, T]
    by_class = g.op("Where", own, g.op("Unsqueeze", scores, g.integers(1)), g.constant(0.0))
    kept = g.op(
        "NonMaxSuppression",
        longer,
        by_class,
        g.integers(metadata.detections),
        g.constant([metadata.nms_threshold]),
        g.constant([0.0]),
    )  # [S, 3]: image, class, candidate
    kept = g.op("Gather", kept, g.integers(0, 2), axis=1)  # [S, 2]
    zeros = g.op("Mul", scores, g.constant(0.0))
    scores = g.op("ScatterND", zeros, kept, g.op("GatherND", scores, kept))  # [N, T], 0 where suppressed
    if missing := max(0, metadata.detections - rows):
        scores = g.op("Pad", scores, g.integers(0, 0, 0, missing))
        boxes = g.op("Pad", boxes, g.integers(0, 0, 0, 0, missing, 0))
        classes = g.op("Pad", classes, g.integers(0, 0, 0, missing))
    scores, order = g.ops("TopK", scores, g.integers(metadata.detections), outputs=2, axis=1)  # [N, D]
    boxes = g.op("GatherND", boxes, g.op("Unsqueeze", order, g.integers(2)), batch_dims=1)  # [N, D, 4]
    return scores, boxes, g.op("GatherElements", classes, order, axis=1)


def plugin_ending(model: ModelProto, levels: Sequence[Level], config: ModelConfig, metadata: Metadata) -> None:
    """Decoding and NMS by odtk's TensorRT plugins (csrc/plugins); they read the levels as float16 but for fp32."""
    g = Writer(model)
    kind = TensorProto.FLOAT if metadata.precision == "fp32" else TensorProto.FLOAT16
    model.opset_import.append(helper.make_opsetid("odtk", 1))
    plugin = {"domain": "odtk", "plugin_version": "1", "plugin_namespace": ""}
    anchors = g.constant(np.stack([level.anchors[:, :4].numpy() for level in levels]))  # [L, A, 4]
    heads = [*(level.names[0] for level in levels), *(level.names[1] for level in levels)]
    candidates = g.ops(
        "OdtkDecode",
        *(g.op("Cast", head, to=kind) for head in heads),
        anchors,
        outputs=3,
        strides=[level.stride for level in levels],
        classes=config.classes,
        values=config.box_values,
        score_threshold=metadata.score_threshold,
        top_n=metadata.top_n,
        **plugin,
    )
    scores, boxes, classes = g.ops(
        "OdtkNms",
        *candidates,
        outputs=3,
        values=metadata.box_values,
        threshold=metadata.nms_threshold,
        detections=metadata.detections,
        **plugin,
    )
    rows = metadata.detections
    g.outputs(
        [
            (scores, "scores", TensorProto.FLOAT, ["batch", rows]),
            (boxes, "boxes", TensorProto.FLOAT, ["batch", rows, metadata.box_values]),
            (classes, "classes", TensorProto.INT32, ["batch", rows]),
        ]
    )


# ---------------------------------------------------------------------------------------------------------------------
# files and engines


def serialize(model: ModelProto) -> bytes:
    """The bytes of an ONNX file, the same at every run.

    Raises:
        OdtkError: more than the 2 GiB that such a file may hold.
    """
    try:
        return model.SerializeToString(deterministic=True)
    except ValueError as error:
        raise OdtkError("The model is larger than the 2 GiB that an ONNX file may hold.") from error


def need_engine() -> Any:
    """The compiled extension with its TensorRT half, on a machine with a GPU and TensorRT's library.

    Raises:
        OdtkError: naming which of GPU, extension and TensorRT is missing, and how to get it.
    """
    try:
        extension = importlib.import_module("odtk._C")
    except ImportError:
        extension = None
    missing = []
    if not torch.cuda.is_available():
        missing.append("a GPU that PyTorch sees (an engine is built where it runs)")
    if extension is None:
        missing.append("odtk's compiled extension (`pip install .` with CUDA's nvcc on the PATH)")
    elif not hasattr(extension, "Engine"):
        missing.append("TensorRT (set TENSORRT_ROOT to its folder and `pip install .` again)")
    if missing:
        raise OdtkError(f"A .plan or .engine needs {' and '.join(missing)}; an .onnx needs neither.")
    assert extension is not None
    try:
        extension.tensorrt_version()
    except RuntimeError as error:  # built with its headers, the library is missing
        raise OdtkError(str(error)) from error
    return extension


def build_engine(model: ModelProto, metadata: Metadata, config: ExportConfig) -> bytes:
    """The plan of a plugin-ended graph, built by TensorRT on this machine's GPU.

    TensorRT's lines go to the logger ``odtk.tensorrt``, and all of them to the screen with ``config.verbose``.

    Raises:
        OdtkError: with TensorRT's own message.
    """
    extension = need_engine()
    if config.verbose:
        logging.basicConfig()
        logger.setLevel(logging.DEBUG)
    extension.set_logger(logger.log)
    gpu, version = torch.cuda.get_device_name(), extension.tensorrt_version()
    float_layers: list[str] = []
    if int(version.partition(".")[0]) < 10:
        spell_out_norms(model)
        float_layers = layers_in_float(model)
    print(f"TensorRT {version} times kernels on {gpu}: this takes minutes.", flush=True)
    try:
        return extension.engine_build(
            serialize(model),
            batch=config.batch,
            workspace=config.workspace,
            fp16=config.precision != "fp32",
            int8=config.precision == "int8",
            float_layers=float_layers,
            timing_cache=config.timing_cache or "",
            metadata=metadata.to_json(),
        )
    except (RuntimeError, ValueError) as error:
        raise OdtkError(f"TensorRT could not build {config.output}: {error}") from error


def spell_out_norms(model: ModelProto) -> None:
    """GroupNorm's InstanceNormalization [N, G, L] in plain operators, in place: (x − mean) / √(variance + ε).

    TensorRT 8 makes a plugin of it that needs cuDNN, and that an engine then looks for in vain where only odtk's own
    plugins are registered. torch.onnx gives it no scale and bias: those of GroupNorm are nodes behind it.
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
        map_, mean, centred, square, variance, sum_, deviation, shape, epsilon = (
            f"{node.name}/{part}"
            for part in ("map", "mean", "centred", "square", "variance", "sum", "deviation", "shape", "epsilon")
        )
        least = np.array([helper.get_node_attr_value(node, "epsilon")], np.float32)
        constants[shape] = numpy_helper.from_array(np.array([0, 0, -1, 1]), shape)
        constants[epsilon] = numpy_helper.from_array(least, epsilon)
        nodes += [
            helper.make_node("Reshape", [x, shape], [map_], map_),  # [N, G, L] → [N, G, L, 1]
            helper.make_node("GlobalAveragePool", [map_], [mean], mean),
            helper.make_node("Sub", [map_, mean], [centred], centred),
            helper.make_node("Mul", [centred, centred], [square], square),
            helper.make_node("GlobalAveragePool", [square], [variance], variance),
            helper.make_node("Add", [variance, epsilon], [sum_], sum_),
            helper.make_node("Sqrt", [sum_], [deviation], deviation),
            helper.make_node("Div", [centred, deviation], list(node.output), node.name),
        ]
    used = {name for node in nodes for name in node.input}
    precision.replace_graph(model, model.graph, nodes, [tensor for name, tensor in constants.items() if name in used])


def layers_in_float(model: ModelProto) -> list[str]:
    """Names of the nodes that compute in float32 in a half-precision graph, INT8's islands left out.

    TensorRT 8 gives its layers types of its own choice unless it is told; 10 and 11 take those of the graph.
    """
    graph = onnx.shape_inference.infer_shapes(model).graph
    types = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    if TensorProto.FLOAT16 not in types.values():
        return []
    islands = {node.name for node in precision.island_nodes(graph)}
    return [
        node.name
        for node in graph.node
        if types.get(node.output[0]) == TensorProto.FLOAT and node.name not in islands and node.op_type != "Cast"
    ]
