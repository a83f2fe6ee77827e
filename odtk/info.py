"""What this machine can do."""

from __future__ import annotations

import importlib.util
import os
import platform
from typing import Any

import torch

from . import __version__, ops
from .config import OdtkError
from .evaluation.benchmark import cpu_name, gpus
from .export.engine import need_engine

PACKAGES = (
    "torch",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "nvidia-dali-cuda120",
    "nvidia-dali-cuda130",
    "tensorrt",
    "pycocotools",
    "numpy",
    "pillow",
    "tensorboardX",
    "matplotlib",
)


def environment() -> dict[str, Any]:
    """Versions, devices, and what odtk can do here: each ability with True, or how to get it."""
    versions = {"odtk": __version__, "Python": platform.python_version(), "CUDA of torch": torch.version.cuda or "none"}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if ops.kernels is not None:
        version, architectures = ops.kernels.CUDA_VERSION, ops.kernels.ARCHITECTURES
        versions["CUDA of odtk._C"] = f"{version // 1000}.{version % 1000 // 10}, architectures {architectures}"
    return {
        "versions": versions,
        "devices": [f"{cpu_name()}, {os.cpu_count()} cores", *gpus()],
        "abilities": abilities(),
    }


def abilities() -> dict[str, bool | str]:
    """What works on this machine: True, or what is missing and how to get it."""
    if torch.cuda.is_available():
        gpu: bool | str = True
    elif torch.version.cuda:
        gpu = "no GPU is visible: check nvidia-smi and CUDA_VISIBLE_DEVICES"
    else:
        gpu = "this torch is for CPUs only: on a machine with an NVIDIA GPU install one with CUDA (pytorch.org)"
    return {
        "train, infer, export to ONNX": True,
        "training and inference on GPUs": gpu,
        "DALI loader": has_module("nvidia.dali")
        or "pip install 'odtk[cuda13]' (or cuda12); until then images are read by the torch loader",
        "ONNX Runtime": has_module("onnxruntime") or "pip install onnxruntime, or onnxruntime-gpu",
        "compiled kernels (odtk._C)": kernels_state(),
        "TensorRT engines (.plan)": engine_state(),
        "training curves": has_module("matplotlib") or "pip install 'odtk[plot]'",
    }


def kernels_state() -> bool | str:
    """Whether the compiled kernels can run here."""
    if ops.kernels is None and has_module("odtk._C"):
        return "odtk._C is there but does not load: `pip install .` in the clone builds it for this Python"
    if ops.kernels is None:
        return "not built: `pip install .` in the clone builds it where nvcc is found; until then torch does its work"
    error = ops.kernels.device_error()
    return True if error is None else f"built for CUDA, which cannot run here ({error}); torch does its work"


def engine_state() -> bool | str:
    """Whether TensorRT engines can be built and run here."""
    try:
        need_engine()
    except OdtkError as error:
        return str(error)
    return True


def has_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its parent package is missing
        return False


def report_environment(found: dict[str, Any]) -> None:
    """Prints what environment() found."""
    for name, version in found["versions"].items():
        print(f"{name:20} {version}")
    for device in found["devices"]:
        print(f"{'device':20} {device}")
    print()
    for name, state in found["abilities"].items():
        print(f"{name:32} {'yes' if state is True else f'no: {state}'}")
