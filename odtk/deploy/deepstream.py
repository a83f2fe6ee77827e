"""What DeepStream's nvinfer takes: a model of float32 pixels, its configuration, and the source of our parser.

nvinfer writes floats into the input layer whatever its type, so a uint8 input would be overrun
(NVIDIA/DeepStream 9.1, src/utils/nvdsinfer/nvdsinfer_context_impl.cpp, line 501). Its keys are those of
src/gst-plugins/gst-nvinfer/gstnvinfer_property_parser.h.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from importlib.resources import files

from ..config import ExportConfig
from ..exporting.export import export
from ..exporting.metadata import Metadata
from .manifest import ENGINE, ONNX, write_text

FOLDER = "deepstream"
CONFIG = f"{FOLDER}/config_infer.txt"
PARSER = ("odtk_parser.cpp", "CMakeLists.txt")

# nvinfer sets the builder's INT8 flag only beside a calibrator (its nvdsinfer_model_builder.cpp, line 1031).
TENSORRT8 = {
    "fp32": "delete the line strongly-typed.",
    "fp16": "delete the line strongly-typed, and set network-mode to 2.",
    "int8": "name an engine as model-engine-file (odtk export --int8 --input-type float32): nvinfer builds no Q/DQ.",
}


def write_deepstream(config: ExportConfig, metadata: Metadata, artifacts: list[str], labels: str) -> list[str]:
    """Writes the folder ``deepstream`` of the bundle ``config.output``.

    Args:
        metadata: of the bundle's ONNX file.
        artifacts: files to export, manifest.ONNX and perhaps manifest.ENGINE. A model of rotated boxes needs the
            engine, as ONNX has no NMS for them.
        labels: content of labels.txt.

    Returns:
        The exported files, relative to the bundle; empty, and nothing written, where none can be.
    """
    own = [name for name in artifacts if name == ENGINE or not metadata.rotated]
    if not own:
        return []
    folder = os.path.join(config.output, FOLDER)
    os.makedirs(folder, exist_ok=True)
    for name in own:
        path = os.path.join(folder, name)
        if config.input_type == "float32":
            shutil.copyfile(os.path.join(config.output, name), path)
        else:
            export(dataclasses.replace(config, output=path, input_type="float32"))
    write_text(config.output, f"{FOLDER}/labels.txt", labels)
    write_text(config.output, CONFIG, nvinfer_config(metadata, own))
    for name in PARSER:
        text = (files(__package__) / "deepstream_parser" / name).read_text()
        write_text(config.output, f"{FOLDER}/parser/{name}", text)
    return [f"{FOLDER}/{name}" for name in own]


def nvinfer_config(metadata: Metadata, artifacts: list[str]) -> str:
    """The text of nvinfer's configuration; its paths are relative to its own folder.

    Each value is what makes nvinfer feed what the model was trained on: RGB from 0 to 255 as it is, the aspect kept,
    padding at the right and the bottom, which is black.
    """
    values = {
        "gpu-id": 0,
        **({"model-engine-file": ENGINE} if ENGINE in artifacts else {}),
        **({"onnx-file": ONNX} if ONNX in artifacts else {}),
        "labelfile-path": "labels.txt",
        "batch-size": metadata.batch[1],
        "infer-dims": f"3;{metadata.size[0]};{metadata.size[1]}",
        "network-type": 0,
        "network-mode": 0,
        "strongly-typed": 1,
        "num-detected-classes": metadata.classes,
        "net-scale-factor": 1,
        "model-color-format": 0,
        "maintain-aspect-ratio": 1,
        "symmetric-padding": 0,
        "scaling-filter": 1,
        "cluster-mode": 4,
        "crop-objects-to-roi-boundary": 1,
        "output-blob-names": "scores;boxes;classes",
        "parse-bbox-func-name": "NvDsInferParseCustomOdtk",
        "custom-lib-path": "libodtk_parser.so",
        "gie-unique-id": 1,
    }
    lines = [
        "# nvinfer's configuration of a model that odtk exported. First build the parser:",
        "#   cmake -S parser -B build && cmake --build build",
        "# The precision is in the types of the graph (strongly-typed, TensorRT 10 and later); network-mode stays 0,",
        "# as its other values set flags that such a build refuses.",
        f"# With TensorRT 8.6 {TENSORRT8[metadata.precision]}",
    ]
    if ENGINE in artifacts:
        lines += ["# The engine needs its plugins: start with LD_PRELOAD=PATH/libodtk_plugins.so"]
    if metadata.padding != "black":
        lines += [
            "# The model was trained with padding of its mean; nvinfer pads with black, which changes scores near it."
        ]
    lines += ["[property]", *(f"{key}={value}" for key, value in values.items())]
    for index in range(metadata.classes):
        threshold = f"pre-cluster-threshold={metadata.score_threshold:g}"
        lines += ["", f"[class-attrs-{index}]", threshold, f"topk={metadata.detections}"]
    return "\n".join(lines) + "\n"
