"""A bundle: one folder from which a model can be served and which says what it is; every file stands with its hash.

The folder holds the exported files, the names of the classes, the settings, what was measured, and a manifest, which is
written last: a folder without one is not finished. What a server needs is in a subfolder for each
(deepstream.py, triton.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from .. import __version__
from ..config import OdtkError
from ..exporting.metadata import Metadata
from ..files import atomic_write, file_hash, parse_json
from ..text import printable

SCHEMA = 1
KIND = "odtk bundle"
MANIFEST = "manifest.json"
LONGEST_NAME = 255  # characters of a file's name in a manifest
ONNX, ENGINE, PLUGINS, LABELS, CALIBRATION = (
    "model.onnx",
    "model.plan",
    "libodtk_plugins.so",
    "labels.txt",
    "model.calibration.json",
)
WHAT = {
    ONNX: "the model for ONNX Runtime",
    ENGINE: "the model for TensorRT, on the kind of GPU that built it",
    PLUGINS: "TensorRT's plugins, without which model.plan does not load",
    LABELS: "names of the classes, in the order of the class indices",
    CALIBRATION: "ranges of the activations in INT8",
    "deepstream/model.onnx": "the model for DeepStream, which gives float32",
    "deepstream/model.plan": "the same as an engine",
    "deepstream/config_infer.txt": "nvinfer's configuration",
    "deepstream/labels.txt": "as labels.txt",
    "deepstream/parser/odtk_parser.cpp": "nvinfer's parser of our outputs, to be built where DeepStream is",
    "deepstream/parser/CMakeLists.txt": "builds the parser",
    "deepstream/as_fed.json": "AP as DeepStream feeds the model",
    "triton/as_fed.json": "AP as triton/client.py feeds the model",
    "triton/README.md": "how Triton is started and asked",
    "triton/client.py": "asks Triton and draws, without odtk",
    "triton/onnx/detector/config.pbtxt": "the model for Triton's ONNX Runtime backend",
    "triton/onnx/detector/labels.txt": "as labels.txt",
    "triton/onnx/detector/1/model.onnx": f"as {ONNX}",
    "triton/tensorrt/detector/config.pbtxt": "the model for Triton's TensorRT backend",
    "triton/tensorrt/detector/labels.txt": "as labels.txt",
    f"{ONNX}.verify.html": f"what was measured of {ONNX}, as a page",
    f"{ONNX}.verify.json": "the same for programs",
    f"{ENGINE}.verify.html": f"what was measured of {ENGINE}, as a page",
    f"{ENGINE}.verify.json": "the same for programs",
    "model_card.md": "what the model is, and what was measured",
    "train.yaml": "settings of the training, for `odtk train --settings`",
    "export.yaml": "settings of the export, for `odtk export --settings`",
}


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def start(folder: str) -> bool:
    """Makes the folder of a new bundle; True if there was none.

    Raises:
        OdtkError: it exists and is not empty, or it cannot be made.
    """
    try:
        made = not os.path.isdir(folder)
        os.makedirs(folder, exist_ok=True)
        if os.listdir(folder):
            raise OdtkError(f"{folder} is not empty: pass a new folder for the bundle, or remove this one.")
    except OSError as error:
        raise OdtkError(f"Cannot make the folder {folder}: {error.strerror}.") from error
    return made


def discard(folder: str, made: bool) -> None:
    """Removes what a failed export has written into the folder that ``start`` found empty, or ``made``."""
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder):
            shutil.rmtree(entry.path) if entry.is_dir(follow_symlinks=False) else os.unlink(entry.path)
        if made:
            os.rmdir(folder)


def write_text(folder: str, name: str, text: str) -> None:
    """Writes one text file of a bundle, and the subfolder that it is in."""
    path = Path(folder, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(text.encode())


def label(name: str) -> str:
    """A category's name as a line of labels.txt: line ends would shift the lines after it, and DeepStream splits a line
    at semicolons."""
    return printable(name).replace(";", ",") or "unnamed"


def finish(folder: str, created: str, metadata: Metadata) -> dict[str, Any]:
    """Writes the manifest of a folder that is complete, and returns it.

    Args:
        created: date and time in UTC.
        metadata: of the model, which a program then need not read from the ONNX file or the engine.
    """
    files = {}
    for path in sorted(Path(folder).rglob("*")):
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            files[name] = {"sha256": file_hash(path), "bytes": path.stat().st_size, "what": WHAT.get(name, "")}
    manifest = {
        "kind": KIND,
        "schema": SCHEMA,
        "odtk": __version__,
        "created": created,
        "model": metadata.model,
        "metadata": json.loads(metadata.to_json()),
        "files": files,
    }
    write_text(folder, MANIFEST, json.dumps(manifest, indent=1) + "\n")
    return manifest


# ---------------------------------------------------------------------------------------------------------------------
# Use


def read_manifest(folder: str) -> dict[str, Any]:
    """The manifest of a bundle.

    Raises:
        OdtkError: there is none, it is damaged, or a newer odtk wrote it.
    """
    path = os.path.join(folder, MANIFEST)
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise OdtkError(
            f"{folder} is a folder without {MANIFEST}: not a bundle, or one whose export did not end; "
            "`odtk export MODEL.pth DIR --bundle` writes one."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise OdtkError(f"{path} cannot be read ({type(error).__name__}): export the bundle again.") from error
    found = parse_json(text, path)
    schema = found.get("schema") if isinstance(found, dict) and found.get("kind") == KIND else None
    if type(schema) is not int or schema < 1:
        raise OdtkError(f"{path} is not the manifest of a bundle of odtk.")
    if schema > SCHEMA:
        raise OdtkError(f"{folder} was written by a newer odtk ({printable(found.get('odtk'))}): update odtk.")
    files = found.get("files")
    if not isinstance(files, dict) or not all(is_entry(name, entry) for name, entry in files.items()):
        raise OdtkError(f"{path} is damaged (files): export the bundle again.")
    return found


def is_entry(name: str, entry: Any) -> bool:
    """Whether a file's entry in a manifest names a file inside the folder, and holds what ``finish`` writes of it."""
    inside = not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts
    if not inside or len(name) > LONGEST_NAME or not isinstance(entry, dict):
        return False
    size = entry.get("bytes")
    texts = isinstance(entry.get("sha256"), str) and isinstance(entry.get("what"), str)
    return texts and type(size) is int and size >= 0


def fault(folder: str, name: str, manifest: dict[str, Any]) -> str | None:
    """What is wrong with one file of a bundle: missing, changed, unreadable; None if it is as it was written."""
    path = Path(folder, name)
    try:
        if not path.is_file():
            return "missing"
        return None if file_hash(path) == manifest["files"][name]["sha256"] else "changed"
    except OSError:
        return "unreadable"


def artifact(folder: str, *, gpu: bool) -> str:
    """The path of the file that runs a bundle's model: its engine where a GPU is to be used, else its ONNX file.

    The file is read once more to compare its hash with the manifest's; so is the library that an engine needs.

    Raises:
        OdtkError: the folder is no bundle, or a file that is needed is missing or not the one that the export wrote.
    """
    manifest = read_manifest(folder)
    needed = [ENGINE, PLUGINS] if gpu and ENGINE in manifest["files"] else [ONNX]
    for name in needed:
        if name not in manifest["files"]:
            raise OdtkError(f"The bundle {folder} has no {name}: export it again.")
        if found := fault(folder, name, manifest):
            raise OdtkError(
                f"{os.path.join(folder, name)} is {found}, against {MANIFEST}: copy the whole bundle again, or export "
                "it again."
            )
    return os.path.join(folder, needed[0])


def describe(folder: str, describe_file: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    """What a bundle says of itself, and the state of each of its files.

    Args:
        describe_file: what an exported file says of itself.

    Returns:
        Plain values by name. ``faults``: what is wrong by name of a file, or None; ``model``: None where the
        ONNX file is not whole, or why it is unusable.

    Raises:
        OdtkError: as read_manifest.
    """
    manifest = read_manifest(folder)
    files = manifest["files"]
    faults = {name: found for name in files if (found := fault(folder, name, manifest))}
    states = {
        name: f"{faults.get(name, 'as written')}, {entry['bytes']:,} bytes"
        + (f": {entry['what']}" if entry["what"] else "")
        for name, entry in files.items()
    }
    if ONNX not in files:
        faults[ONNX] = f"not in {MANIFEST}"
    model: dict[str, Any] | str | None = None
    if ONNX not in faults:
        try:
            model = {k: v for k, v in describe_file(os.path.join(folder, ONNX)).items() if k != "file"}
        except OdtkError as error:
            model, faults[ONNX] = str(error), "unusable"
    head = {key: manifest.get(key) for key in ("schema", "odtk", "created")}
    return {"bundle": folder, **head, "files": states, "faults": faults or None, "model": model}
