"""Checkpoint → ONNX → engine: one traced graph of raw levels, in its precision, with its postprocessing."""

from __future__ import annotations

import dataclasses
import os
import sys
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import ModelProto, helper

from ..config import ExportConfig, ModelConfig, OdtkError
from ..data.batch import nearest_pixels
from ..data.sampler import round_up
from ..files import atomic_write, check_writable
from ..model.checkpoint import Checkpoint, build_detector, load, trained_size, weights_hash
from ..model.detector import Detector
from ..model.padding import padding_warning, share_in_frame
from ..text import printable
from .calibration import load_or_calibrate
from .calibration_table import CalibrationTable, table_path
from .engine import build_engine, require_tensorrt
from .graph import level_outputs, serialize, take_pixels, trace
from .metadata import ENGINES, Metadata
from .postprocess_graph import Level, append_plugin_postprocess, append_standard_postprocess
from .precision import FP16_QDQ_OPSET, FP16_QDQ_TENSORRT, insert_qdq, to_fp16

DEFAULT_SIZE = (1280, 1280)  # for files that do not say at which size they were trained, as in ODTK 0.2


@dataclass(frozen=True)
class ExportResult:
    """What export wrote.

    Attributes:
        path: the file.
        bytes: its size.
        precision: fp32, fp16 or int8.
        table: path of the calibration table; None unless the precision is int8.
        fp16_layers: convolution layers that stay in FP16 in an int8 file.
    """

    path: str
    bytes: int
    precision: str
    table: str | None = None
    fp16_layers: tuple[str, ...] = ()


def export(config: ExportConfig) -> ExportResult:
    """Writes ``config.output`` from the checkpoint ``config.path``, completely or not at all.

    Raises:
        OdtkError: the suffix is unknown, an engine lacks its GPU or TensorRT, INT8 lacks its calibration images …
    """
    suffix = os.path.splitext(config.output)[1]
    if suffix != ".onnx" and suffix not in ENGINES:
        raise OdtkError(f"{config.output} must end in .onnx, .plan or .engine.")
    check_writable(config.output)
    if config.calibration_table and not os.path.exists(config.calibration_table):
        check_writable(config.calibration_table)
    tensorrt = int(require_tensorrt(build=True).tensorrt_version().partition(".")[0]) if suffix in ENGINES else None
    checkpoint = load(config.path)
    detector = build_detector(checkpoint).fold()
    config = with_input_size(config, checkpoint, detector.stride)
    warn_of_padding(detector, checkpoint, config.input_size)
    if config.input_type == "uint8" and checkpoint.model.padding == "mean":
        print(describe_rounded_padding(checkpoint.model))
    graph, table = raw_graph(detector, checkpoint, config, tensorrt)
    postprocessing = "plugins" if suffix in ENGINES else "candidates" if checkpoint.model.rotated else "detections"
    metadata = metadata_of(detector, checkpoint, config, postprocessing)
    model = append_postprocess(graph, detector, metadata)
    content = build_engine(model, metadata, config) if suffix in ENGINES else serialize(model)
    with atomic_write(config.output) as file:
        file.write(content)
    size = "×".join(map(str, config.input_size))
    print(f"Wrote {printable(config.output)}: {config.precision}, {size}, {len(content) / 2**20:.1f} MiB.")
    return ExportResult(
        path=config.output,
        bytes=len(content),
        precision=config.precision,
        table=table_path(config) if table else None,
        fp16_layers=table.fp16_layers if table else (),
    )


def with_input_size(config: ExportConfig, checkpoint: Checkpoint, stride: int) -> ExportConfig:
    """The config with the size that the model was trained at, if none is given; sides are multiples of the stride.

    A size that is given and is another is printed beside it.
    """
    trained = trained_size(checkpoint)
    if config.size is None:
        return dataclasses.replace(config, size=trained or round_up(DEFAULT_SIZE, stride))
    height, width = round_up(config.size, stride)
    given = f"{config.size[0]} {config.size[1]}"
    if (height, width) != tuple(config.size):
        print(f"--size {given} becomes {height} {width}: both must be multiples of {stride}.")
    if trained is not None and trained != (height, width):
        print(f"--size {given}: the model was trained at {trained[0]}×{trained[1]}.")
    return dataclasses.replace(config, size=(height, width))


def warn_of_padding(detector: Detector, checkpoint: Checkpoint, size: tuple[int, int]) -> None:
    """Prints a warning where the detections depend on padding, and images like those of training get more or less."""
    shapes = checkpoint.setting("aspects")
    share = share_in_frame(shapes, size) if shapes else 0.0
    trained = checkpoint.setting("padding_share") if shapes else None
    if warning := padding_warning(detector, trained, share, f"at {size[0]}×{size[1]} for images of the same shapes"):
        print(warning, file=sys.stderr)


def describe_rounded_padding(model: ModelConfig) -> str:
    """What padding by zero after normalization becomes in pixels of uint8, and by how much it differs."""
    exact = 255 * np.array(model.mean)
    pixel = nearest_pixels(exact)
    off = float((np.abs(pixel - exact) / (255 * np.array(model.std))).max())
    values = ", ".join(map(str, pixel.tolist()))
    return (
        f"The model was trained with padding of zero after normalization, which in uint8 becomes the pixel ({values}), "
        f"off by up to {off:.4f} after normalization; --input-type float32 pads exactly."
    )


def raw_graph(
    detector: Detector, checkpoint: Checkpoint, config: ExportConfig, tensorrt: int | None = None
) -> tuple[ModelProto, CalibrationTable | None]:
    """The graph from pixels to the raw levels of a folded detector in ``config.precision``, and INT8's table.

    Args:
        tensorrt: major version of the TensorRT that builds the graph, or None for ONNX Runtime (precision.py).
    """
    opset = config.opset
    if config.precision == "int8" and tensorrt is not None and tensorrt >= FP16_QDQ_TENSORRT:
        opset = max(opset, FP16_QDQ_OPSET)
    model = trace(detector, config.input_size, opset)
    table = None
    if config.precision == "int8":
        table = load_or_calibrate(model, config, weights_hash(checkpoint.state_dict), detector)
        insert_qdq(model, table, tensorrt)
    if config.precision != "fp32":
        to_fp16(model, tensorrt)
    take_pixels(model, checkpoint.model.mean, checkpoint.model.std, config.input_type)
    return model, table


def metadata_of(detector: Detector, checkpoint: Checkpoint, config: ExportConfig, postprocessing: str) -> Metadata:
    """The metadata of one export; ``postprocessing`` is one of the values that Metadata documents."""
    return Metadata(
        size=config.input_size,
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
        model=weights_hash(checkpoint.state_dict),
        input_type=config.input_type,
        **checkpoint.model.pixels,
    )


def append_postprocess(model: ModelProto, detector: Detector, metadata: Metadata) -> ModelProto:
    """Appends to a graph of raw levels the postprocessing that the metadata names, and the metadata itself; checks it.

    This is where the graphs for ONNX Runtime and for TensorRT differ: standard operators or nodes of odtk's plugins
    (postprocess_graph.py). Everything before is the same.
    """
    levels = [Level(*level) for level in zip(level_outputs(model), detector.anchors(), detector.strides, strict=True)]
    if metadata.postprocessing in ("detections", "candidates"):
        append_standard_postprocess(model, levels, detector.config, metadata)
    elif metadata.postprocessing == "plugins":
        append_plugin_postprocess(model, levels, detector.config, metadata)
    helper.set_model_props(model, {"odtk": metadata.to_json()})
    if metadata.postprocessing != "plugins":  # onnx's checker does not know our nodes
        onnx.checker.check_model(model, full_check=True)
    return model
