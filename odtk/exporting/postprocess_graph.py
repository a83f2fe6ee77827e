"""The end of the exported graph: decoding and NMS, in standard ONNX operators or as nodes of our TensorRT plugins."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper

from ..box_coder import BOX_CODERS, BoxCoder
from ..boxes import LONGEST
from ..config import ModelConfig
from ..ops import to_logit
from .metadata import Metadata


class Level(NamedTuple):
    """One level of a raw graph.

    Attributes:
        names: the values of its logits and its boxes, then its height and width in cells.
        anchors: the anchors [A, 4 or 5] of the cell (0, 0), in px.
        stride: px per cell.
    """

    names: tuple[str, str, int, int]
    anchors: torch.Tensor
    stride: int


class Writer:
    """Appends nodes and constants to a graph, with new names under ``postprocess/`` for them and their outputs."""

    def __init__(self, model: ModelProto) -> None:
        self.graph = model.graph
        self.count = 0
        self.types = {value.name: value.type.tensor_type.elem_type for value in model.graph.output}

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Appends a node with one output and returns the name of that output."""
        return self.ops(kind, *inputs, outputs=1, **attributes)[0]

    def ops(self, kind: str, *inputs: str, outputs: int, **attributes: Any) -> list[str]:
        """Appends a node and returns the names of its outputs."""
        name = self.fresh(kind.lower())
        names = [name, *(f"{name}.{i}" for i in range(1, outputs))]
        self.graph.node.append(helper.make_node(kind, list(inputs), names, name=name, **attributes))
        return names

    def in_type(self, name: str, kind: int) -> str:
        """An output of the raw graph in an element type: itself, or behind a Cast if it has another one."""
        return name if self.types[name] == kind else self.op("Cast", name, to=kind)

    def constant(self, value: Any, dtype: type = np.float32) -> str:
        """Appends a constant and returns its name."""
        name = self.fresh("constant")
        self.graph.initializer.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def integers(self, *values: int) -> str:
        """Appends a constant [n] int64 (a shape, axes or indices) and returns its name."""
        return self.constant(values, np.int64)  # type: ignore[arg-type]

    def fresh(self, stem: str) -> str:
        """A name that no other node or constant of this writer has."""
        self.count += 1
        return f"postprocess/{stem}_{self.count}"

    def outputs(self, values: Iterable[tuple[str, str, int, Sequence[int | str]]]) -> None:
        """Replaces the graph's outputs with these: (value, name, element type, shape) each."""
        del self.graph.output[:]
        for value, name, kind, shape in values:
            self.graph.node.append(helper.make_node("Identity", [value], [name], name=f"postprocess/{name}"))
            self.graph.output.append(helper.make_tensor_value_info(name, kind, shape))


def append_standard_postprocess(
    model: ModelProto, levels: Sequence[Level], config: ModelConfig, metadata: Metadata
) -> None:
    """Appends decoding and NMS in standard operators, in FP32: the same steps as ops.decode and ops.nms.

    Rotated detectors end after decoding, because ONNX has no NMS of rotated boxes.
    """
    g = Writer(model)
    candidates = [decode_level(g, level, config, metadata) for level in levels]
    scores, boxes, classes = (
        values[0] if len(values) == 1 else g.op("Concat", *values, axis=1) for values in zip(*candidates, strict=True)
    )
    rows = sum(min(metadata.top_n, level_size(level, config)) for level in levels)
    if metadata.postprocessing == "detections":
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
    """A·C·h·w, the number of candidates of a level."""
    return config.num_anchors * config.classes * level.names[2] * level.names[3]


def decode_level(g: Writer, level: Level, config: ModelConfig, metadata: Metadata) -> tuple[str, str, str]:
    """The best candidates of a level: scores [N, K], descending, boxes [N, K, 4 or 6] in px and classes [N, K].

    A row with score 0 is unused. A candidate's index is ((a·C + c)·h + y)·w + x, and number v of its box lies at
    ((a·V + v)·h + y)·w + x, V being the coder's head_values.
    """
    (logits, boxes, height, width), cells = level.names, level.names[2] * level.names[3]
    coder = BOX_CODERS[config.box_coder]
    logits = g.in_type(logits, TensorProto.FLOAT)
    scores = g.op("Sigmoid", logits)  # [N, A·C, h, w]
    keep = g.op("Greater", logits, g.constant(to_logit(metadata.score_threshold)))  # false for NaN
    if coder.has_centerness:
        start, end = g.integers(coder.box_values), g.integers(coder.head_values)
        centerness = g.op("Slice", boxes, start, end, g.integers(1))  # [N, 1, h, w]
        centerness = g.op("Sigmoid", g.op("Cast", centerness, to=TensorProto.FLOAT))
        scores = g.op("Sqrt", g.op("Mul", scores, centerness))
        keep = g.op("And", keep, g.op("Greater", scores, g.constant(0.0)))  # false for NaN
    scores = g.op("Where", keep, scores, g.constant(0.0))
    best = g.integers(min(metadata.top_n, level_size(level, config)))
    scores, index = g.ops("TopK", g.op("Reshape", scores, g.integers(0, -1)), best, outputs=2, axis=1)  # [N, K]

    cell = g.op("Mod", index, g.integers(cells))
    channel = g.op("Div", index, g.integers(cells))  # a·C + c
    anchor = g.op("Div", channel, g.integers(config.classes))
    classes = g.op("Mod", channel, g.integers(config.classes))

    first = g.op("Add", g.op("Mul", anchor, g.integers(coder.head_values * cells)), cell)  # [N, K], at v = 0
    steps = g.integers(*(v * cells for v in range(coder.box_values)))
    where = g.op("Add", g.op("Unsqueeze", first, g.integers(2)), steps)  # [N, K, box_values]
    flat = g.op("Reshape", boxes, g.integers(0, -1))  # [N, A·V·h·w]
    numbers = g.op("GatherElements", flat, g.op("Reshape", where, g.integers(0, -1)), axis=1)  # [N, K·box_values]
    numbers = g.op("Reshape", numbers, g.integers(0, -1, coder.box_values))  # [N, K, box_values]
    numbers = g.op("Cast", numbers, to=TensorProto.FLOAT)  # only now, when they are few

    x, y = g.op("Mod", cell, g.integers(width)), g.op("Div", cell, g.integers(width))  # [N, K]
    axis = g.integers(2)
    xy = g.op("Concat", g.op("Unsqueeze", x, axis), g.op("Unsqueeze", y, axis), axis=2)  # [N, K, 2]
    corner = g.op("Mul", g.op("Cast", xy, to=TensorProto.FLOAT), g.constant(level.stride))
    base = level.anchors.numpy()
    size = base[:, 2:4] - base[:, :2] + 1  # [A, 2]
    anchor_size = g.op("Gather", g.constant(size), anchor, axis=0)  # [N, K, 2]
    center = g.op("Add", g.op("Gather", g.constant(base[:, :2] + 0.5 * size), anchor, axis=0), corner)
    limits = (width * level.stride, height * level.stride)
    return scores, decode_boxes(g, coder, numbers, center, anchor_size, level.stride, limits), classes


def decode_boxes(
    g: Writer, coder: BoxCoder, numbers: str, center: str, size: str, stride: int, limits: tuple[int, int]
) -> str:
    """BoxCoder.decode in operators: boxes [N, K, 4 or 6] in px.

    Args:
        numbers: [N, K, box_values], the head's numbers without a center-ness.
        center, size: [N, K, 2] each, of the anchors, px.
        limits: (width, height) of the level in px; corners are clamped inside, or the center of a rotated box that is
            regressed from a point; a NaN becomes 0.
    """
    if coder.name == "center_size_angle":
        return decode_center_size_angle(g, numbers, center, stride, limits)
    one = g.constant(1.0)
    start, end, *rotation = CORNERS[coder.name](g, numbers, center, size, stride, one)
    boxes = g.op("Concat", start, end, axis=2)  # [N, K, 4]
    boxes = g.op("Where", g.op("IsNaN", boxes), g.constant(0.0), boxes)
    most = [limits[0] - 1, limits[1] - 1]
    boxes = g.op("Min", g.op("Max", boxes, g.constant(0.0)), g.constant(most * 2))
    for sin_cos in rotation:
        finite = g.op("Where", g.op("IsNaN", sin_cos), g.constant(0.0), sin_cos)
        boxes = g.op("Concat", boxes, finite, axis=2)  # [N, K, 6]
    return boxes


def corners_of_deltas(
    g: Writer, numbers: str, center: str, size: str, stride: int, one: str, parts: int = 2
) -> list[str]:
    """boxes.decode without the clamp: the corners (x1, y1) and (x2, y2) [N, K, 2]; the third part is left as it is."""
    center_delta, size_delta, *rotation = g.ops("Split", numbers, outputs=parts, axis=2, num_outputs=parts)
    center = g.op("Add", g.op("Mul", center_delta, size), center)
    half = g.op("Mul", g.op("Mul", g.op("Exp", size_delta), size), g.constant(0.5))
    return [g.op("Sub", center, half), g.op("Sub", g.op("Add", center, half), one), *rotation]


def corners_of_rotated_deltas(g: Writer, numbers: str, center: str, size: str, stride: int, one: str) -> list[str]:
    """boxes.decode_rotated without the clamp: the corners of the un-rotated box, and (sin θ, cos θ) [N, K, 2]."""
    return corners_of_deltas(g, numbers, center, size, stride, one, parts=3)


def corners_of_distances(g: Writer, numbers: str, center: str, size: str, stride: int, one: str) -> list[str]:
    """boxes.decode_distances without the clamp, of distances in strides: the corners [N, K, 2]."""
    distances = g.op("Mul", g.op("Relu", numbers), g.constant(stride))
    before, after = g.ops("Split", distances, outputs=2, axis=2, num_outputs=2)  # (left, top), (right, bottom)
    return [g.op("Sub", center, before), g.op("Sub", g.op("Add", center, after), one)]


def decode_center_size_angle(g: Writer, numbers: str, center: str, stride: int, limits: tuple[int, int]) -> str:
    """boxes.decode_center_size_angle of dx, dy, w, h in strides: boxes [N, K, 6] with sin θ and cos θ."""
    zero = g.constant(0.0)
    offset, sides, doubled = g.ops("Split", numbers, outputs=3, axis=2, num_outputs=3)  # [N, K, 2] each

    def clamp(value: str, least: Any, most: Any) -> str:
        number = g.op("Where", g.op("IsNaN", value), zero, value)
        return g.op("Min", g.op("Max", number, g.constant(least)), g.constant(most))

    center = clamp(g.op("Add", center, g.op("Mul", offset, g.constant(stride))), 0.0, limits)
    half = g.op("Mul", clamp(g.op("Mul", sides, g.constant(stride)), 0.0, sum(limits)), g.constant(0.5))
    start, end = g.op("Sub", center, half), g.op("Sub", g.op("Add", center, half), g.constant(1.0))

    sin, cos = g.ops("Split", clamp(doubled, -LONGEST, LONGEST), outputs=2, axis=2, num_outputs=2)  # [N, K, 1] each
    length = g.op("Sqrt", g.op("Add", g.op("Mul", sin, sin), g.op("Mul", cos, cos)))
    behind = g.op("Less", cos, zero)
    half_sin = g.op("Where", behind, g.op("Sub", length, cos), sin)
    half_cos = g.op("Where", behind, sin, g.op("Add", length, cos))
    return g.op("Concat", start, end, half_sin, half_cos, axis=2)


CORNERS: dict[str, Callable[[Writer, str, str, str, int, str], list[str]]] = {
    "anchor_deltas": corners_of_deltas,
    "rotated_deltas": corners_of_rotated_deltas,
    "distances_centerness": corners_of_distances,
    "distances": corners_of_distances,
}


def suppress(g: Writer, scores: str, boxes: str, classes: str, metadata: Metadata, rows: int) -> tuple[str, str, str]:
    """NMS per class of the candidates (scores [N, T], boxes [N, T, 4], classes [N, T]), then the D best of each image.

    NonMaxSuppression does not know inclusive corners, so it gets boxes that are one pixel longer. It takes a score for
    every class of a box, so a candidate gets 0, which is never kept, in all classes but its own.
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


def one_type(g: Writer, names: Sequence[str]) -> list[str]:
    """The levels' logits, or their boxes, in one type, as OdtkDecode needs them: cast to float16 if they differ."""
    same = len({g.types[name] for name in names}) == 1
    return list(names) if same else [g.in_type(name, TensorProto.FLOAT16) for name in names]


def append_plugin_postprocess(
    model: ModelProto, levels: Sequence[Level], config: ModelConfig, metadata: Metadata
) -> None:
    """Appends decoding and NMS by odtk's TensorRT plugins (csrc/plugins).

    They read the levels in the type that the head writes, float16 or float32: a cast would write a whole level again.
    """
    g = Writer(model)
    model.opset_import.append(helper.make_opsetid("odtk", 1))
    plugin = {"domain": "odtk", "plugin_version": "1", "plugin_namespace": ""}
    anchors = g.constant(np.stack([level.anchors[:, :4].numpy() for level in levels]))  # [L, A, 4]
    heads = [*one_type(g, [level.names[0] for level in levels]), *one_type(g, [level.names[1] for level in levels])]
    candidates = g.ops(
        "OdtkDecode",
        *heads,
        anchors,
        outputs=3,
        strides=[level.stride for level in levels],
        classes=config.classes,
        coder=BOX_CODERS[config.box_coder].number,
        score_threshold=float(metadata.score_threshold),  # of an int, onnx would make an integer attribute
        top_n=metadata.top_n,
        **plugin,
    )
    scores, boxes, classes = g.ops(
        "OdtkNms",
        *candidates,
        outputs=3,
        box_values=metadata.box_values,
        threshold=float(metadata.nms_threshold),
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
