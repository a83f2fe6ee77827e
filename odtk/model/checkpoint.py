"""Files of a detector: what odtk writes, and what NVIDIA's ODTK 0.2.x wrote.

A file holds plain values and tensors only, so that it loads with ``weights_only`` and runs no code:

    format       "odtk"
    version      1
    model        config.to_dict(ModelConfig)
    categories   [[id, name], …] in the order of the class indices, or None
    state_dict   the weights to detect with: those of the moving average where training kept one
    training     what resuming needs (see train.py), or None
"""

from __future__ import annotations

import hashlib
import os
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..categories import Category, from_pairs, to_pairs
from ..config import ModelConfig, OdtkError, from_dict, to_dict
from ..files import atomic_write
from .detector import Detector

FORMAT = "odtk"
VERSION = 1


@dataclass(frozen=True)
class Checkpoint:
    """A detector on its way to or from a file.

    Attributes:
        model: what to build.
        categories: entry c names class index c; None where the file does not say (ODTK 0.2.x).
        state_dict: Detector's parameters and buffers, float32: the moving average where training kept one.
        training: optimizer, iteration, loader position …, to resume from; None after a plain conversion.
    """

    model: ModelConfig
    categories: tuple[Category, ...] | None
    state_dict: dict[str, Tensor]
    training: dict[str, Any] | None = None


def save(path: str | os.PathLike[str], checkpoint: Checkpoint) -> None:
    """Writes a checkpoint, whole or not at all (see atomic_write)."""
    content = {
        "format": FORMAT,
        "version": VERSION,
        "model": to_dict(checkpoint.model),
        "categories": to_pairs(checkpoint.categories),
        "state_dict": checkpoint.state_dict,
        "training": checkpoint.training,
    }
    with atomic_write(path) as file:
        torch.save(content, file)


def load(path: str | os.PathLike[str]) -> Checkpoint:
    """Reads a checkpoint of odtk or of ODTK 0.2.x onto the CPU.

    Raises:
        OdtkError: no such file, a truncated one, no checkpoint, or one of a newer or another program.
    """
    content = read(path)
    if content.get("format") == FORMAT:
        if content["version"] > VERSION:
            raise OdtkError(f"{path} was written by a newer odtk (format {content['version']}): update odtk.")
        return Checkpoint(
            model=from_dict(ModelConfig, content["model"]),
            categories=from_pairs(content["categories"]),
            state_dict=content["state_dict"],
            training=content["training"],
        )
    if content.keys() >= {"backbone", "classes", "state_dict"}:
        return from_odtk_02(content)
    if content and all(isinstance(value, Tensor) for value in content.values()):
        raise OdtkError(f"{path} holds bare weights, not a detector: to start from them, pass --backbone-weights.")
    raise OdtkError(f"{path} is a checkpoint of another program: odtk reads its own and those of ODTK 0.2.x.")


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The dictionary in a file written by torch.save, on the CPU; errors as load() states them."""
    if not os.path.isfile(path):
        raise OdtkError(f"There is no checkpoint {path}.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError) as error:
        if isinstance(error, PermissionError):
            raise OdtkError(f"The checkpoint {path} may not be read: check its permissions.") from error
        raise OdtkError(f"{path} {fault(path)}.") from error
    if not isinstance(content, dict):
        raise OdtkError(f"{path} is not a checkpoint: it holds a {type(content).__name__}.")
    return content


def fault(path: str | os.PathLike[str]) -> str:
    """Why torch.load may have refused a file, by its first and last bytes."""
    with open(path, "rb") as file:
        start = file.read(4)
    if not start:
        return "is empty: the copy or the run that wrote it was cut short"
    if start == b"PK\x03\x04" and not zipfile.is_zipfile(path):
        return "is truncated: copy it again, or go back to an older one"
    if start == b"PK\x03\x04":
        return "is damaged, or holds objects that are not plain weights, which odtk does not load"
    return "is not a checkpoint"


def from_odtk_02(content: Mapping[str, Any]) -> Checkpoint:
    """A file of NVIDIA's ODTK 0.2.x as a Checkpoint without categories and training.

    Its names are ours, but for ``cls_head`` and ``box_head``, which stood outside a head; every norm was fixed; the
    trunks kept the classifier that detection never used, which is left out here.
    """
    backbones = content["backbone"]
    model = ModelConfig(
        backbones=(backbones,) if isinstance(backbones, str) else tuple(backbones),
        classes=int(content["classes"]),
        ratios=tuple(float(ratio) for ratio in content.get("ratios", ModelConfig.ratios)),
        scales=tuple(float(scale) for scale in content.get("scales", ModelConfig.scales)),
        angles=tuple(float(angle) for angle in content.get("angles") or ()),
        rounded_anchors=bool(content.get("angles")),  # how ODTK 0.2 drew them, beside what spec §2 states
        norm="frozen",
    )
    with torch.device("meta"):
        names = Detector(model).state_dict().keys()
    weights = {}
    for name, tensor in content["state_dict"].items():
        name = f"head.{name}" if name.startswith(("cls_head.", "box_head.")) else name
        if name in names:
            weights[name] = tensor.float()
    return Checkpoint(model=model, categories=None, state_dict=weights)


def build(checkpoint: Checkpoint) -> Detector:
    """The detector with its weights, on the CPU, in training mode.

    Raises:
        OdtkError: the weights are not those of the model that the checkpoint describes.
    """
    detector = Detector(checkpoint.model)
    load_weights(detector, checkpoint.state_dict)
    return detector


def load_weights(detector: Detector, state_dict: Mapping[str, Tensor]) -> None:
    """Copies weights into a detector of the very same model, or raises OdtkError with the first difference."""
    own = detector.state_dict()
    for name in [*own, *state_dict]:
        if name not in state_dict:
            raise OdtkError(f"The checkpoint is of another model: it has no {name}.")
        if name not in own:
            raise OdtkError(f"The checkpoint is of another model: {name} has no place in it.")
        if own[name].shape != state_dict[name].shape:
            theirs, ours = tuple(state_dict[name].shape), tuple(own[name].shape)
            raise OdtkError(f"The checkpoint is of another model: {name} is {theirs}, not {ours}.")
    detector.load_state_dict(dict(state_dict))


def fingerprint(state_dict: Mapping[str, Tensor]) -> str:
    """SHA-256 (hexadecimal) over names, types, shapes and values of the weights: equal for equal weights only."""
    digest = hashlib.sha256()
    for name in sorted(state_dict):
        tensor = state_dict[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())  # any shape -> bytes
    return digest.hexdigest()
