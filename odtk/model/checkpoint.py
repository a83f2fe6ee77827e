"""Checkpoint files: those of odtk, and those that NVIDIA's ODTK 0.2.x wrote.

A file of odtk holds plain values and tensors only, so that it loads with ``weights_only`` and runs no code:

    format       "odtk", or "odtk classifier" (FORMATS)
    version      1
    model        config.to_dict(ModelConfig)
    categories   [[id, name], …] in the order of the class indices, or None
    state_dict   the weights to detect with: the moving average (EMA) if training kept one
    training     what resuming needs (see training/run.py), or None
    settings     those of its training by name (settings.TrainSettings) and facts about its data: ``input_size`` [H, W],
                 ``padding_share`` and ``aspects`` (data/padding.py) …; absent in older files
    versions     of odtk and torch that wrote it; absent in older files
"""

from __future__ import annotations

import hashlib
import os
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import __version__
from ..categories import Category, from_pairs, to_pairs
from ..config import ModelConfig, OdtkError, from_dict, to_dict
from ..files import atomic_write, need_file
from .checkpoint_faults import FLOATS, content_fault, mismatch, odtk_02_fault, tensors_of, weights_fault
from .detector import Detector

FORMATS = {"detector": "odtk", "classifier": "odtk classifier"}  # by what a file holds
VERSION = 1


@dataclass(frozen=True)
class Checkpoint:
    """What a file says of a detector, or of a classifier.

    Attributes:
        model: the settings that it is built from.
        categories: entry c is the category of class index c; None if the file does not say (ODTK 0.2.x).
        state_dict: its parameters and buffers, float32: the moving average (EMA) if training kept one.
        training: optimizer, iteration, loader position and so on, to resume from; None if it cannot be resumed.
        settings: those of its training by name, plain values, with ``input_size``: (H, W) in pixels, multiples of the
            stride, that hold nearly all of its images at the size they were trained at; and with the share of padding
            and the images' shapes (data.padding.padding_facts); None if the file does not say.
    """

    model: ModelConfig
    categories: tuple[Category, ...] | None
    state_dict: dict[str, Tensor]
    training: dict[str, Any] | None = None
    settings: dict[str, Any] | None = None
    versions: dict[str, str] | None = None
    kind: str = "detector"  # a key of FORMATS

    def setting(self, name: str) -> Any:
        """One setting of the training, None if the file does not say."""
        return (self.settings or {}).get(name)


def save(path: str | os.PathLike[str], checkpoint: Checkpoint) -> None:
    """Writes a checkpoint, whole or not at all.

    Raises:
        OdtkError: if it cannot be written; a file that was there before is left as it was.
    """
    content = {
        "format": FORMATS[checkpoint.kind],
        "version": VERSION,
        "model": to_dict(checkpoint.model),
        "categories": to_pairs(checkpoint.categories),
        "state_dict": checkpoint.state_dict,
        "training": checkpoint.training,
        "settings": checkpoint.settings,
        "versions": {"odtk": __version__, "torch": str(torch.__version__)},
    }
    with atomic_write(path) as file:
        torch.save(content, file)


def load(path: str | os.PathLike[str], kind: str | None = "detector") -> Checkpoint:
    """Reads a checkpoint of odtk or of ODTK 0.2.x onto the CPU.

    Args:
        kind: what it is to hold, a key of FORMATS; None: any of them.

    Raises:
        OdtkError: no such file, a truncated one, not a checkpoint, one of a newer odtk or of another program; one whose
            entries are not what they must be, or whose weights do not fit its model or are not finite.
    """
    content = read_dictionary(path)
    found = kind_of(content)
    if found is not None and kind is not None and found != kind:
        advice = (
            "start from its weights by --backbone-weights" if found == "classifier" else "`odtk pretrain` makes those"
        )
        raise OdtkError(f"{path} holds a {found}, not a {kind}: {advice}.")
    if found is not None:
        return read_own(content, path, found)
    if content.keys() >= {"backbone", "classes", "state_dict"}:
        return convert_odtk_02(content, path)
    if content and all(isinstance(value, Tensor) for value in content.values()):
        raise OdtkError(
            f"{path} holds bare weights, not a detector: to start training from them, use --backbone-weights."
        )
    raise OdtkError(f"{path} was written by another program: odtk reads its own checkpoints and those of ODTK 0.2.x.")


def kind_of(content: Mapping[str, Any]) -> str | None:
    """What a file of odtk holds, by its content: a key of FORMATS; None: it is not one of odtk."""
    return next((kind for kind, name in FORMATS.items() if content.get("format") == name), None)


def read_own(content: dict[str, Any], path: str | os.PathLike[str], kind: str) -> Checkpoint:
    """The content of a file of odtk as a Checkpoint, once nothing in it can be wrong."""
    version = content.get("version")
    if type(version) is not int:
        raise OdtkError(f"{path} cannot be used: it does not say the version of its format.")
    if version > VERSION:
        raise OdtkError(f"{path} was written by a newer odtk (format {version}): update odtk.")
    if fault := content_fault(content):
        raise OdtkError(f"{path} cannot be used: {fault}.")
    checkpoint = Checkpoint(
        model=from_dict(ModelConfig, content["model"]),
        categories=from_pairs(content["categories"]),
        state_dict=content["state_dict"],
        training=content["training"],
        settings=content.get("settings"),
        versions=content.get("versions"),
        kind=kind,
    )
    if fault := weights_fault(checkpoint.model, checkpoint.state_dict, kind):
        raise OdtkError(f"{path} cannot be used: {fault}.")
    return checkpoint


def trained_size(checkpoint: Checkpoint) -> tuple[int, int] | None:
    """Checkpoint.settings's input_size (H, W), None if the file does not say."""
    size = checkpoint.setting("input_size")
    return None if size is None else (int(size[0]), int(size[1]))


def read_dictionary(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The dictionary in a file written by torch.save, its tensors on the CPU.

    Raises:
        OdtkError: no such file, one that cannot be read, or one that holds no dictionary.
    """
    need_file(path, "checkpoint")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch notices in a damaged file is said by our own sentence
            content = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise OdtkError(f"The checkpoint {path} cannot be read: check its permissions.") from error
    except Exception as error:  # a damaged pickle may call what it may call with any arguments
        raise OdtkError(f"{path} {describe_damage(path)}.") from error
    if not isinstance(content, dict):
        raise OdtkError(f"{path} is not a checkpoint: it holds a {type(content).__name__}.")
    return content


def describe_damage(path: str | os.PathLike[str]) -> str:
    """Why torch.load refused a file, judged by its first bytes and whether the zip archive is whole.

    Returns:
        The end of a sentence that begins with the path.
    """
    with open(path, "rb") as file:
        start = file.read(4)
    if not start:
        return "is empty: the copy or the run that wrote it was cut short"
    if start == b"PK\x03\x04" and not is_archive(path):
        return "is truncated: copy it again, or go back to an older one"
    if start == b"PK\x03\x04":
        return "is damaged, or holds objects that are not plain weights: odtk does not load those"
    return "is not a checkpoint"


def is_archive(path: str | os.PathLike[str]) -> bool:
    """Whether a file ends as a zip archive does."""
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # its last record is there, and damaged
        return False


def convert_odtk_02(content: Mapping[str, Any], path: str | os.PathLike[str]) -> Checkpoint:
    """The content of a file of NVIDIA's ODTK 0.2.x as a Checkpoint, without categories and training.

    The weights have the same names as ours, except that ``cls_head`` and ``box_head`` were not inside ``head``. Every
    norm was frozen. The files also hold classifiers of the backbones, which detection never used: those are dropped.

    Raises:
        OdtkError: as load.
    """
    if fault := odtk_02_fault(content):
        raise OdtkError(f"{path} cannot be used: {fault}.")
    backbones = content["backbone"]
    model = ModelConfig(
        backbones=(backbones,) if isinstance(backbones, str) else tuple(backbones),
        classes=int(content["classes"]),
        ratios=tuple(float(ratio) for ratio in content.get("ratios") or ModelConfig.ratios),
        scales=tuple(float(scale) for scale in content.get("scales") or ModelConfig.scales),
        angles=tuple(float(angle) for angle in content.get("angles") or ()),
        rounded_anchors=bool(content.get("angles")),  # ODTK 0.2 rounded the rotated anchors only (see anchors.py)
        norm="frozen",
    )
    try:
        names = tensors_of(model).keys()
    except OdtkError as error:
        raise OdtkError(f"{path} cannot be used: its model cannot be built: {error}") from error
    weights = {}
    for name, tensor in content["state_dict"].items():
        name = f"head.{name}" if name.startswith(("cls_head.", "box_head.")) else name
        if name in names:
            real = isinstance(tensor, Tensor) and tensor.dtype in FLOATS
            weights[name] = tensor.float() if real else tensor
    if fault := weights_fault(model, weights):
        raise OdtkError(f"{path} cannot be used: {fault}.")
    return Checkpoint(model=model, categories=None, state_dict=weights)


def build_detector(checkpoint: Checkpoint) -> Detector:
    """The detector that a checkpoint describes, with its weights, on the CPU, in training mode.

    Raises:
        OdtkError: the weights do not fit the model that the checkpoint describes.
    """
    detector = Detector(checkpoint.model)
    load_weights(detector, checkpoint.state_dict)
    return detector


def load_weights(network: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Copies weights into a network; names and shapes must all be the same.

    Raises:
        OdtkError: for the first name that only one of them has, or the first shape that differs.
    """
    if fault := mismatch(network.state_dict(), state_dict):
        raise OdtkError(f"The checkpoint {fault.removeprefix('it ')}.")
    network.load_state_dict(dict(state_dict))


def weights_hash(state_dict: Mapping[str, Tensor]) -> str:
    """SHA-256 in hexadecimal of the names, types, shapes and values of all weights, whatever their order or layout."""
    digest = hashlib.sha256()
    for name in sorted(state_dict):
        tensor = state_dict[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())  # any shape → bytes
    return digest.hexdigest()
