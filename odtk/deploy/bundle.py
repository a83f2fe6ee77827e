"""Checkpoint → bundle: exports what a server takes, measures it if asked to, and writes the folder (manifest.py)."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Mapping
from typing import Any

import torch
import yaml

import odtk

from ..config import ExportConfig, OdtkError
from ..evaluation.report import Run, Verdict
from ..evaluation.verify import verify
from ..exporting.engine import require_tensorrt
from ..exporting.export import export
from ..exporting.metadata import Metadata
from ..inference.backends import open_backend
from ..model.checkpoint import Checkpoint, load
from ..ranks import silent
from ..settings import ExportSettings, TrainSettings
from ..text import plural, say
from .as_fed import FedVerdict, verify_as_fed
from .deepstream import write_deepstream
from .manifest import CALIBRATION, ENGINE, LABELS, ONNX, PLUGINS, discard, finish, label, start, write_text
from .model_card import model_card, now
from .triton import require_tritonclient, write_triton

Proof = tuple[str, str, float]  # annotations, image folder, and points of AP that may be lost (verify.py)
SEVERITY = (0, 3, 2)  # exit codes of `odtk export --verify`, the worst last


def write_bundle(
    config: ExportConfig,
    proof: Proof | None,
    *,
    settings: ExportSettings,
    command: str,
    engine: bool = True,
) -> Verdict | FedVerdict | None:
    """Writes the folder ``config.output``, which must be new or empty, completely or not at all.

    Args:
        config: of the export; its output is a folder.
        proof: what to measure the files on; None measures nothing.
        settings: from which the config was made, for export.yaml; its ``fed_as`` says as what a file is fed too.
        command: that was given, for the model card.
        engine: write an engine too, if this machine has a GPU and TensorRT.

    Returns:
        The worst of what was measured about the files; a bundle that lost too much is written and says so.

    Raises:
        OdtkError: as exporting.export.export, or the folder is not empty; nothing is left of it then.
    """
    if "triton" in settings.fed_as:
        require_tritonclient()
    folder = config.output
    made = start(folder)
    try:
        return fill(config, proof, settings, command, engine)
    except BaseException:
        discard(folder, made)
        raise


def fill(
    config: ExportConfig, proof: Proof | None, settings: ExportSettings, command: str, engine: bool
) -> Verdict | FedVerdict | None:
    """Writes every file of a bundle into its empty folder, the manifest last."""
    folder, created = config.output, now()
    checkpoint = load(config.path)
    config = with_own_table(config)
    verdicts = {}
    exported = artifacts(engine)
    for name in exported:
        one = dataclasses.replace(config, output=os.path.join(folder, name))
        export(one)
        if proof is not None:
            verdicts[name] = verify(one, annotations=proof[0], images=proof[1], max_ap_drop=proof[2])
        if name == ENGINE:
            shutil.copyfile(plugins_library(), os.path.join(folder, PLUGINS))
    metadata = metadata_of(os.path.join(folder, ONNX))
    labels = "".join(f"{label(name)}\n" for name in names_of(metadata))
    write_text(folder, LABELS, labels)
    deepstream = write_deepstream(config, metadata, exported, labels)
    if not deepstream:
        say(f"The bundle gets no deepstream/: rotated boxes need {ENGINE}, as ONNX has no NMS for them.")
    write_triton(config, metadata, exported, labels)
    fed = []
    if settings.fed_as:
        assert proof is not None  # checked with the settings
        models = {"triton": ONNX, "deepstream": deepstream[0] if deepstream else None}
        fed = as_fed(config, {name: models[name] for name in settings.fed_as}, proof, verdicts[ONNX].runs[-1])
    write_settings(folder, checkpoint, settings, metadata)
    card = model_card(checkpoint, metadata, verdicts, fed, command=command, created=created, images=proof and proof[1])
    write_text(folder, "model_card.md", card)
    manifest = finish(folder, created, metadata)
    files = plural(len(manifest["files"]), "file")
    say(f"Bundle: {folder}, {files} and their hashes. `odtk info {folder}` checks them.")
    found: list[Verdict | FedVerdict] = [*verdicts.values(), *fed]
    return max(found, key=lambda one: SEVERITY.index(one.exit_code), default=None)


def as_fed(config: ExportConfig, models: Mapping[str, str | None], proof: Proof, ours: Run) -> list[FedVerdict]:
    """What was found of the models of a bundle as they are fed.

    Args:
        models: file in the bundle by as_fed.NAMES.
        ours: the bundle's ONNX file as odtk feeds it.

    Raises:
        OdtkError: the bundle has no model for one of them.
    """
    found = []
    for name, file in models.items():
        if file is None:
            raise OdtkError(f"--as {name}: the bundle has no {name}/, as rotated boxes need {ENGINE} there.")
        one = dataclasses.replace(config, output=os.path.join(config.output, file))
        given = {"annotations": proof[0], "images": proof[1], "max_ap_drop": proof[2]}
        found.append(verify_as_fed(one, name, ours, **given))  # type: ignore[arg-type]
    return found


def artifacts(engine: bool) -> list[str]:
    """The exported files of a bundle: ONNX, and an engine if it is wanted and this machine can build it."""
    if not engine or not torch.cuda.is_available():
        return [ONNX]
    try:
        require_tensorrt(build=True)
        plugins_library()
    except OdtkError as error:
        say(f"The bundle gets no {ENGINE}: {error}")
        return [ONNX]
    return [ONNX, ENGINE]


def plugins_library() -> str:
    """The path of odtk's TensorRT plugins as a library.

    Raises:
        OdtkError: it was not built.
    """
    path = os.path.join(os.path.dirname(odtk.__file__), PLUGINS)
    if not os.path.isfile(path):
        raise OdtkError(f"There is no {path}: `pip install .` in the clone builds it where TensorRT's headers are.")
    return path


def with_own_table(config: ExportConfig) -> ExportConfig:
    """The config with the calibration table inside the bundle; one that was given is copied there, and stays as it is.

    Raises:
        OdtkError: the table that was given does not exist, and there are no images to calibrate with.
    """
    if config.precision != "int8":
        return config
    own = os.path.join(config.output, CALIBRATION)
    given = config.calibration_table
    if given and os.path.isfile(given):
        shutil.copyfile(given, own)
    elif given and not config.calibration_images:
        raise OdtkError(f"There is no calibration table {given}, and there are no --calibration-images.")
    return dataclasses.replace(config, calibration_table=own)


def metadata_of(path: str) -> Metadata:
    """What an exported file says of itself."""
    metadata = open_backend(path, device="cpu", precision="fp32", thresholds=None, log=silent).metadata
    assert metadata is not None  # an exported file has some
    return metadata


def names_of(metadata: Metadata) -> list[str]:
    """The class names of an exported file, in the order of the class indices."""
    if metadata.categories is None:
        return [f"class {index}" for index in range(metadata.classes)]
    return [category.name for category in metadata.categories]


def write_settings(folder: str, checkpoint: Checkpoint, settings: ExportSettings, metadata: Metadata) -> None:
    """Writes the settings with which the model can be trained and exported again."""
    exported = settings.to_dict() | {"size": list(metadata.size)}
    write_text(folder, "export.yaml", as_yaml(exported))
    if checkpoint.settings is not None:
        known = {field.name for field in dataclasses.fields(TrainSettings)}  # a checkpoint keeps what was found, too
        known -= {"override", "override_settings"}  # which were meant for that run's own file
        trained = {key: value for key, value in checkpoint.settings.items() if key in known}
        write_text(folder, "train.yaml", as_yaml(trained))


def as_yaml(values: dict[str, Any]) -> str:
    """Settings as a settings file has them; those without a preference are left out."""
    stated = {key: value for key, value in values.items() if value is not None}
    return yaml.safe_dump(stated, allow_unicode=True, sort_keys=False)
