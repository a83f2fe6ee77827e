"""TensorRT's build."""

from __future__ import annotations

import importlib
import logging
from typing import Any

import torch
from onnx import ModelProto

from ..config import ExportConfig, OdtkError
from .graph import serialize
from .metadata import Metadata
from .tensorrt8 import layers_in_float, spell_out_norms

logger = logging.getLogger("odtk.tensorrt")


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
