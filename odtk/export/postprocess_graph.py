"""The end of the graph: decoding and NMS in standard operators, or as nodes of our TensorRT plugins."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper

from ..config import ModelConfig
from ..ops import to_logit
from .metadata import Metadata


class Level(NamedTuple):
    """One level of a raw graph: its values and shape, base anchors [A, 4 or 5] in px, and stride in px per cell."""

    names: tuple[str, str, int, int]
    anchors: torch.Tensor
    stride: int


class Writer:
    """Appends nodes and constants to a graph; every node's outputs get fresh names under ``postprocess/``."""

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
        return f"postprocess/{stem}_{self.count}"

    def outputs(self, values: Iterable[tuple[str, str, int, Sequence[int | str]]]) -> None:
        """Replaces the graph's outputs by (value, name, element type, shape)."""
        del self.graph.output[:]
        for value, name, kind, shape in values:
            self.graph.node.append(helper.make_node("Identity", [value], [name], name=f"postprocess/{name}"))
            self.graph.output.append(helper.make_tensor_value_info(name, kind, shape))


def append_standard_postprocess(
    model: ModelProto, levels: Sequence[Level], config: ModelConfig, metadata: Metadata
) -> None:
    """Decoding and NMS (spec §2) in standard operators, in FP32: the same steps as ops.decode and ops.nms."""
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
        centerness = g.op("Sigmoid", g.op("Slice", boxes, g.integers(4), g.integers(5), g.integers(1)))
        scores = g.op("Sqrt", g.op("Mul", scores, centerness))
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
    center = g.op("Add", g.op("Gather", g.constant(base[:, :2] + 0.5 * size), anchor, axis=0), corner)
    limits = (width * level.stride, height * level.stride)
    return scores, place(g, numbers, center, anchor_size, level.stride, limits, values), classes


def place(g: Writer, numbers: str, center: str, size: str, stride: int, limits: tuple[int, int], values: int) -> str:
    """Boxes [N, K, 4 or 6] from regressed numbers [N, K, V] and the centers and sizes [N, K, 2] of anchors, px.

    boxes.decode, decode_rotated and decode_distances in operators.

    Args:
        limits: (width, height) of the level in px; corners are clamped inside, a NaN becomes 0.
    """
    one = g.constant(1.0)
    if values == 5:
        distances = g.op("Mul", g.op("Relu", numbers), g.constant(stride))
        before, after = g.ops("Split", distances, outputs=2, axis=2, num_outputs=2)  # (left, top), (right, bottom)
        start, end = g.op("Sub", center, before), g.op("Sub", g.op("Add", center, after), one)
    else:
        parts = g.ops("Split", numbers, outputs=values // 2, axis=2, num_outputs=values // 2)  # (dx, dy), (dw, dh), …
        center = g.op("Add", g.op("Mul", parts[0], size), center)
        half = g.op("Mul", g.op("Mul", g.op("Exp", parts[1]), size), g.constant(0.5))
        start, end = g.op("Sub", center, half), g.op("Sub", g.op("Add", center, half), one)
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


def append_plugin_postprocess(
    model: ModelProto, levels: Sequence[Level], config: ModelConfig, metadata: Metadata
) -> None:
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
