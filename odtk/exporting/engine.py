"""TensorRT: what it needs on this machine, and the build of an engine. Importable without onnx, for running a .plan."""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

import torch

from ..config import ExportConfig, OdtkError
from .metadata import Metadata, pack

if TYPE_CHECKING:
    from onnx import ModelProto

logger = logging.getLogger("odtk.tensorrt")


def require_tensorrt(*, build: bool = False) -> Any:
    """The compiled extension ``odtk._C``, on a machine where it can run engines.

    Args:
        build: it must be able to build them too.

    Raises:
        OdtkError: names which of GPU, extension and TensorRT is missing, and how to get it.
    """
    try:
        extension = importlib.import_module("odtk._C")
    except ImportError:
        extension = None
    missing = []
    if not torch.cuda.is_available():
        missing.append("a GPU that PyTorch can use (an engine runs only on the kind of GPU it was built on)")
    if extension is None:
        missing.append("odtk's compiled extension (`pip install .` with CUDA's nvcc on the PATH)")
    elif not hasattr(extension, "Engine"):
        missing.append("TensorRT (set TENSORRT_ROOT to its folder and run `pip install .` again)")
    elif build and not extension.CAN_BUILD:
        missing.append(
            "NvOnnxParser.h, the header of TensorRT's ONNX parser (put the one of onnx/onnx-tensorrt for this version "
            "beside NvInfer.h and run `pip install .` again)"
        )
    if missing:
        what = "Building" if build else "Running"
        raise OdtkError(f"{what} a .plan or .engine needs {' and '.join(missing)}; an .onnx needs none of this.")
    assert extension is not None
    try:
        extension.tensorrt_version()
    except RuntimeError as error:  # compiled against its headers, but its library cannot be loaded
        # The packages of the extras are TensorRT 11, which an extension built for another version cannot use.
        extra = extension.TENSORRT_HEADERS.startswith("11.")
        remedy = "; pip install 'odtk[tensorrt-cu13]' (or tensorrt-cu12) brings it" if extra else ""
        raise OdtkError(f"{str(error).rstrip('.')}{remedy}.") from error
    return extension


def build_engine(model: ModelProto, metadata: Metadata, config: ExportConfig) -> bytes:
    """The serialized engine (plan) of a graph whose postprocessing is our plugins, built for this machine's GPU.

    TensorRT's messages go to the logger ``odtk.tensorrt``, and with ``config.verbose`` all of them to the screen.

    Args:
        model: the graph; TensorRT 8 gets it rewritten in place (tensorrt8.py).

    Raises:
        OdtkError: with TensorRT's own message.
    """
    from .graph import serialize  # here, as both import onnx
    from .tensorrt8 import expand_instance_norm, float32_nodes

    extension = require_tensorrt(build=True)
    if config.verbose:
        logging.basicConfig()
        logger.setLevel(logging.DEBUG)
    extension.set_logger(logger.log)
    gpu, version = torch.cuda.get_device_name(), extension.tensorrt_version()
    float_layers: list[str] = []
    if int(version.partition(".")[0]) < 10:
        expand_instance_norm(model)
        float_layers = float32_nodes(model)
    name = name_or_field(model, metadata, extension.LONGEST_METADATA)
    print(f"TensorRT {version} is timing kernels on {gpu}, which takes minutes.", flush=True)
    try:
        return extension.engine_build(
            serialize(model),
            batch=config.batch,
            workspace=config.workspace,
            fp16=config.precision != "fp32",
            int8=config.precision == "int8",
            tf32=config.precision != "fp32",
            hardware_compatible=config.hardware_compatible,
            version_compatible=config.version_compatible,
            float_layers=float_layers,
            timing_cache=config.timing_cache or "",
            metadata=name,
        )
    except (RuntimeError, ValueError) as error:
        raise OdtkError(f"TensorRT could not build {config.output}: {error}") from error


def name_or_field(model: ModelProto, metadata: Metadata, longest: int) -> str:
    """The metadata, to be the engine's name; or "", if it is longer and was put into the graph's OdtkNms instead.

    Nothing may follow a plan in its file: TensorRT, trtexec and Triton would refuse it.
    """
    from onnx import helper

    text = metadata.to_json()
    if len(text.encode()) <= longest:
        return text
    (nms,) = [node for node in model.graph.node if node.op_type == "OdtkNms"]
    nms.attribute.append(helper.make_attribute("metadata", pack(text)))
    return ""
