"""What this machine can do, and what a file says of itself: what `odtk info` gathers and prints."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from typing import Any

import torch

from . import __version__, kernels
from .categories import to_pairs
from .config import OdtkError, to_dict
from .deploy.manifest import describe as describe_bundle
from .evaluation.benchmark import describe_devices
from .exporting.engine import require_tensorrt
from .files import has_module
from .inference.backends import open_backend
from .model.checkpoint import load
from .ranks import silent
from .text import in_words, printable

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

OF_DETECTORS = {  # fields of ModelConfig that say nothing of a classifier
    *("head", "last_level", "pyramid_channels", "head_channels", "head_convs", "padding"),
    *("ratios", "scales", "angles", "rounded_anchors", "dcn", "dcn_modulated"),
}


def environment() -> dict[str, Any]:
    """What `odtk info --json` prints: versions, devices, and abilities()."""
    versions = {"odtk": __version__, "Python": platform.python_version(), "CUDA of torch": torch.version.cuda or "none"}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if kernels.extension is not None:
        version, architectures = kernels.extension.CUDA_VERSION, kernels.extension.ARCHITECTURES
        versions["CUDA of odtk._C"] = f"{version // 1000}.{version % 1000 // 10}, architectures {architectures}"
    return {
        "versions": versions,
        "devices": describe_devices(),
        "abilities": abilities(),
    }


def abilities() -> dict[str, bool | str]:
    """Ability → True if this machine has it, else a sentence that says what is missing and how to get it."""
    if torch.cuda.is_available():
        gpu: bool | str = True
    elif torch.version.cuda:
        gpu = "no GPU is visible: check nvidia-smi and CUDA_VISIBLE_DEVICES"
    else:
        gpu = "this torch has no CUDA: on a machine with an NVIDIA GPU, install one that has (pytorch.org)"
    return {
        "train, infer, export to ONNX": True,
        "training and inference on GPUs": gpu,
        "DALI loader": has_module("nvidia.dali")
        or "pip install 'odtk[cuda13]' (or cuda12); until then the torch loader reads the images",
        "ONNX Runtime": has_module("onnxruntime") or "pip install onnxruntime, or onnxruntime-gpu",
        "compiled kernels (odtk._C)": kernels_ability(),
        "TensorRT engines (.plan)": tensorrt_ability(),
        "models on Triton": all(map(has_module, ("tritonclient", "geventhttpclient", "grpc")))
        or "pip install 'odtk[triton]'",
        "videos": has_module("av") or "pip install 'odtk[video]'",
        "videos decoded by the GPU": has_module("PyNvVideoCodec")
        or "pip install 'odtk[video-gpu]'; until then the CPU decodes them",
        "training curves": has_module("matplotlib") or "pip install 'odtk[report]'",
    }


def kernels_ability() -> bool | str:
    """True if the compiled kernels can run here, else why not."""
    if kernels.extension is None and has_module("odtk._C"):
        return "odtk._C exists but cannot be loaded: `pip install .` in the clone builds it for this Python"
    if kernels.extension is None:
        return (
            "not built: `pip install .` in the clone builds it if nvcc is on the PATH; until then torch is used instead"
        )
    error = kernels.extension.device_error()
    return True if error is None else f"CUDA, which it is built for, cannot run here ({error}); torch is used instead"


def tensorrt_ability() -> bool | str:
    """True if TensorRT engines can be built and run here, else why not."""
    try:
        require_tensorrt(build=True)
    except OdtkError as error:
        return str(error)
    return True


def print_environment(found: dict[str, Any]) -> None:
    """Prints what environment() returned, as text."""
    for name, version in found["versions"].items():
        print(f"{name:20} {version}")
    for device in found["devices"]:
        print(f"{'device':20} {device}")
    print()
    for name, state in found["abilities"].items():
        print(f"{name:32} {'yes' if state is True else f'no: {state}'}")


# ---------------------------------------------------------------------------------------------------------------------
# What a file says of itself


def describe_file(path: str) -> dict[str, Any]:
    """What a checkpoint, an exported file or a bundle says of itself: plain values by name.

    Raises:
        OdtkError: no such file, or not one of odtk.
    """
    if os.path.isdir(path):
        return describe_bundle(path, describe_file)
    if path.endswith(".pth"):
        return describe_checkpoint(path)
    backend = open_backend(path, device="cpu", precision="fp32", thresholds=None, log=silent)
    assert backend.metadata is not None  # an exported file has some
    return {"file": path, **json.loads(backend.metadata.to_json())}


def describe_checkpoint(path: str) -> dict[str, Any]:
    """The model, categories, settings and progress of a checkpoint."""
    found = load(path, None)
    training, model = found.training or {}, to_dict(found.model)
    if found.kind == "classifier":
        model = {name: value for name, value in model.items() if name not in OF_DETECTORS}
    return {
        "file": path,
        "kind": found.kind,
        "versions": found.versions or "not stated",
        "model": model,
        "categories": to_pairs(found.categories),
        "settings": found.settings or "not stated (written by an odtk before 0.3, or by ODTK 0.2)",
        "iteration": training.get("iteration", "not a training run"),
        f"best {'AP' if found.kind == 'detector' else 'top-1'}": training.get("best", "none"),
    }


def print_file(found: dict[str, Any]) -> None:
    """Prints what describe_file found, one value a line."""
    for name, value in found.items():
        if isinstance(value, dict):
            print(f"{printable(name)}:")
            for key, one in value.items():
                print(f"  {printable(key):22} {printable(in_words(one))}")
        else:
            print(f"{name:24} {printable(in_words(value))}")
