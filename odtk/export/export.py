"""Checkpoint → ONNX → engine: one traced graph of raw levels, its precision, and the postprocessing that was asked for.

Postprocessing (values of `Metadata.postprocessing`):
    detections   standard operators: scores [N, D], boxes [N, D, 4], classes [N, D]; rows in use first, the rest zero
    candidates   rotated boxes, for which ONNX has no NMS: the decoded candidates of all levels, scores [N, T],
                 boxes [N, T, 6], classes [N, T]; backends.py ends with ops.nms
    plugins      odtk's own TensorRT nodes, outputs as detections
    raw          the levels themselves: logits_0 …, boxes_0 …

Boxes are x1, y1, x2, y2 (and sin, cos) in pixels of the network's input, inclusive corners (boxes.py).
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass

import onnx
from onnx import ModelProto, helper

from ..config import ExportConfig, OdtkError
from ..data.sampler import round_up
from ..files import atomic_write
from ..model.checkpoint import Checkpoint, build, fingerprint, load
from ..model.detector import Detector
from . import calibration, calibration_table, precision
from .engine import build_engine, need_engine
from .graph import level_names, serialize, trace
from .metadata import ENGINES, Metadata
from .postprocess_graph import Level, append_plugin_postprocess, append_standard_postprocess


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
    postprocessing = "plugins" if suffix in ENGINES else "candidates" if checkpoint.model.rotated else "detections"
    metadata = describe(detector, checkpoint, config, postprocessing)
    model = append_postprocess(graph, detector, metadata)
    content = build_engine(model, metadata, config) if suffix in ENGINES else serialize(model)
    with atomic_write(config.output) as file:
        file.write(content)
    fp16_layers = table.fp16_layers if table else ()
    print(f"Wrote {config.output}: {config.precision}, {height}×{width}, {len(content) / 2**20:.1f} MiB.")
    return Report(
        config.output,
        len(content),
        config.precision,
        calibration_table.table_path(config) if table else None,
        fp16_layers,
    )


def body(
    detector: Detector, checkpoint: Checkpoint, config: ExportConfig
) -> tuple[ModelProto, calibration_table.Table | None]:
    """The raw graph of a folded detector in the precision asked for, and INT8's calibration table."""
    model = trace(detector, config.size, config.opset)
    table = None
    if config.precision == "int8":
        table = calibration.table_for(model, config, fingerprint(checkpoint.state_dict), detector.stride)
        precision.insert_qdq(model, table)
    if config.precision != "fp32":
        precision.to_fp16(model)
    return model, table


def describe(detector: Detector, checkpoint: Checkpoint, config: ExportConfig, postprocessing: str) -> Metadata:
    """The metadata of one export."""
    return Metadata(
        size=config.size,
        stride=detector.stride,
        classes=checkpoint.model.classes,
        categories=checkpoint.categories,
        precision=config.precision,
        postprocessing=postprocessing,
        box_values=6 if checkpoint.model.rotated else 4,
        score_threshold=config.postprocess.score_threshold,
        nms_threshold=config.postprocess.nms_threshold,
        detections=config.postprocess.detections,
        top_n=config.postprocess.top_n,
        batch=config.batch,
        model=fingerprint(checkpoint.state_dict),
    )


def append_postprocess(model: ModelProto, detector: Detector, metadata: Metadata) -> ModelProto:
    """Appends the postprocessing that the metadata names to a raw graph, and the metadata; checks the result."""
    levels = [Level(*level) for level in zip(level_names(model), detector.anchors(), detector.strides, strict=True)]
    if metadata.postprocessing in ("detections", "candidates"):
        append_standard_postprocess(model, levels, detector.config, metadata)
    elif metadata.postprocessing == "plugins":
        append_plugin_postprocess(model, levels, detector.config, metadata)
    helper.set_model_props(model, {"odtk": metadata.to_json()})
    if metadata.postprocessing != "plugins":  # onnx does not know our nodes
        onnx.checker.check_model(model, full_check=True)
    return model
