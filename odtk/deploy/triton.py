"""What a Triton server takes: model repositories for its ONNX Runtime and TensorRT backends, and a client.

config.pbtxt is written by protobuf's text_format from Triton's own schema, which tritonclient carries.
"""

from __future__ import annotations

import os
import shutil
from importlib.resources import files
from typing import Any

import torch

from ..config import ExportConfig, OdtkError
from ..exporting.metadata import Metadata
from ..exporting.session import open_session
from ..inference.served import PARAMETER
from ..text import say
from .manifest import ENGINE, ONNX, PLUGINS, write_text

FOLDER = "triton"
MODEL = "detector"  # a model's folder in a repository is its name, and may be renamed
REPOSITORIES = {ONNX: "onnx", ENGINE: "tensorrt"}
CLIENT = "client.py"
TYPES = {"tensor(float)": "TYPE_FP32", "tensor(int64)": "TYPE_INT64", "tensor(int32)": "TYPE_INT32"}
Outputs = list[tuple[str, str, list[int]]]  # name, Triton's type, and dims without the batch


def write_triton(config: ExportConfig, metadata: Metadata, artifacts: list[str], labels: str) -> list[str]:
    """Writes the folder ``triton`` of the bundle ``config.output``.

    Args:
        metadata: of the bundle's ONNX file.
        artifacts: the exported files in the bundle, manifest.ONNX and perhaps manifest.ENGINE.
        labels: content of labels.txt.

    Returns:
        The model files, relative to the bundle; empty, and nothing written, without tritonclient.
    """
    try:
        from tritonclient.grpc import model_config_pb2 as schema
    except ImportError:
        say(f"The bundle gets no {FOLDER}/: `pip install 'odtk[{FOLDER}]'` and export it again.")
        return []
    own = [name for name in artifacts if name != ENGINE or metadata.batch[0] == 1]
    if own != artifacts:
        say(f"The bundle gets no {FOLDER}/tensorrt: Triton also forms batches below the MIN of --batch.")
    written = []
    for name in own:
        model = f"{FOLDER}/{REPOSITORIES[name]}/{MODEL}"
        capability = None
        if name == ENGINE and not config.hardware_compatible:
            capability = "{}.{}".format(*torch.cuda.get_device_capability())
        file = f"model.{capability}.plan" if capability else name
        made = model_config(schema, metadata, name, outputs_of(config.output, metadata, name), capability)
        write_text(config.output, f"{model}/config.pbtxt", as_text(made))
        write_text(config.output, f"{model}/labels.txt", labels)
        os.mkdir(os.path.join(config.output, model, "1"))
        shutil.copyfile(os.path.join(config.output, name), os.path.join(config.output, model, "1", file))
        written.append(f"{model}/1/{file}")
    write_text(config.output, f"{FOLDER}/README.md", readme(own))
    text = (files(__package__) / "triton_client" / CLIENT).read_text(encoding="utf-8")
    write_text(config.output, f"{FOLDER}/{CLIENT}", text)
    return written


def require_tritonclient() -> None:
    """Raises:
    OdtkError: tritonclient, without which a bundle has no folder for Triton, cannot be imported.
    """
    try:
        import tritonclient.grpc  # noqa: F401
    except ImportError as error:
        raise OdtkError(f"--as triton needs tritonclient: `pip install 'odtk[triton]'` ({error}).") from error


def outputs_of(folder: str, metadata: Metadata, artifact: str) -> Outputs:
    """The outputs of an exported file of the bundle ``folder``."""
    if artifact == ONNX:
        found = open_session(os.path.join(folder, ONNX)).get_outputs()
        return [(output.name, TYPES[output.type], [int(size) for size in output.shape[1:]]) for output in found]
    rows, values = metadata.detections, metadata.box_values
    return [("scores", "TYPE_FP32", [rows]), ("boxes", "TYPE_FP32", [rows, values]), ("classes", "TYPE_INT32", [rows])]


def model_config(schema: Any, metadata: Metadata, artifact: str, outputs: Outputs, capability: str | None) -> Any:
    """Triton's configuration of an exported file, a message ModelConfig without a name: the folder's name is used.

    Args:
        schema: tritonclient.grpc.model_config_pb2.
        artifact: manifest.ONNX or manifest.ENGINE.
        capability: of the only kind of GPU that an engine is for, such as "8.6"; None: it runs on several.
    """
    low, best, high = metadata.batch
    kind = {"uint8": "TYPE_UINT8", "float32": "TYPE_FP32"}[metadata.input_type]
    made = schema.ModelConfig(
        backend="onnxruntime" if artifact == ONNX else "tensorrt",
        max_batch_size=high,
        input=[{"name": "images", "data_type": kind, "dims": [3, *metadata.size]}],
        output=[
            {
                "name": name,
                "data_type": type_,
                "dims": dims,
                "label_filename": "labels.txt" if name == "classes" else "",
            }
            for name, type_, dims in outputs
        ],
        parameters={PARAMETER: {"string_value": metadata.to_json()}},
    )
    if high > 1:
        made.dynamic_batching.preferred_batch_size.extend(sorted({best, high} - {1}))
    if artifact == ENGINE:
        # An engine whose batches begin at 1 has a second profile for single images (csrc/engine/engine.cpp).
        profiles = ["0", "1"] if low == 1 and best > 1 else ["0"]
        made.instance_group.add(kind=schema.ModelInstanceGroup.KIND_GPU, count=1, profile=profiles)
    if capability:  # another GPU finds no file, instead of an engine that it cannot run
        made.cc_model_filenames[capability] = f"model.{capability}.plan"
    return made


def as_text(config: Any) -> str:
    """The text of a config.pbtxt."""
    from google.protobuf import text_format

    return text_format.MessageToString(config, as_utf8=True)


def readme(artifacts: list[str]) -> str:
    """How the server is started and asked, Markdown."""
    lines = ["# Triton", "In the folder of the bundle; YY.MM is a release of Triton:", ""]
    start = "docker run --rm --gpus all -p 8000:8000 -p 8001:8001 -v $PWD:/bundle nvcr.io/nvidia/tritonserver:YY.MM-py3"
    for name in artifacts:
        repository = f"/bundle/{FOLDER}/{REPOSITORIES[name]}"
        words = f"tritonserver --model-repository={repository}"
        if name == ENGINE:
            words += f" --backend-config=tensorrt,plugins=/bundle/{PLUGINS}"
            lines += ["", "or the engine, in a release with the TensorRT that built it:", ""]
        lines += [f"    {start} \\", f"        {words}"]
    lines += [
        "",
        "Without a GPU, omit `--gpus all`. The folder `detector` is the model's name, and may be renamed. To serve",
        "other kinds of GPU as well, add their engines beside this one and name them in `cc_model_filenames`.",
        "",
        "Then, where odtk is installed (`pip install 'odtk[triton]'`), over HTTP or gRPC:",
        "",
        f"    odtk infer http://localhost:8000/{MODEL} --images photos/ --output detections.json --draw pictures/",
        f"    odtk infer grpc://localhost:8001/{MODEL} --images photos/ --output detections.json",
        "",
        "and where it is not (`pip install 'tritonclient[http,grpc]' pillow`):",
        "",
        f"    python {FOLDER}/{CLIENT} photo.jpg --output pictures/",
        "",
    ]
    return "\n".join(lines)
