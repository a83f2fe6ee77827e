"""The calibration table of INT8, a readable JSON file."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass

from ..config import ExportConfig, OdtkError
from ..files import atomic_write


@dataclass(frozen=True)
class CalibrationTable:
    """All that INT8 needs besides the weights.

    Attributes:
        model: hash of the weights (checkpoint.weights_hash).
        size: (H, W) of the network's input in pixels.
        method: entropy, percentile or minmax.
        images: files of the calibration images, in the order in which they were used.
        scales: activation → the value of one step of its int8.
        fp16_layers: convolution layers that stay in FP16.
        layer_costs: layer → how much the detections change when this layer alone is quantized, in percent
            (evaluation/sensitivity.py), highest first; empty until `odtk export --verify` has measured it.
    """

    model: str
    size: tuple[int, int]
    method: str
    images: tuple[str, ...]
    scales: dict[str, float]
    fp16_layers: tuple[str, ...] = ()
    layer_costs: dict[str, float] = dataclasses.field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"


def load_table(path: str) -> CalibrationTable:
    """Reads a table. Decibels by layer, which tables had before ``layer_costs``, are dropped: they are measured anew.

    Raises:
        OdtkError: the file cannot be read, or is not a calibration table.
    """
    try:
        with open(path, encoding="utf-8") as file:
            values = json.load(file)
        values.pop("sensitivity", None)
        for name in ("size", "images", "fp16_layers"):
            values[name] = tuple(values[name])
        return CalibrationTable(**values)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OdtkError(
            f"{path} is not a calibration table of odtk ({type(error).__name__}): calibrate again with images."
        ) from error


def save_table(path: str, table: CalibrationTable) -> None:
    """Writes a table, whole or not at all."""
    with atomic_write(path) as file:
        file.write(table.to_json().encode())


def table_path(config: ExportConfig) -> str:
    """Path of an export's table: the one given, else OUTPUT.calibration.json without the output's own suffix."""
    return config.calibration_table or os.path.splitext(config.output)[0] + ".calibration.json"
