"""The calibration table of INT8, a readable JSON file."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from dataclasses import dataclass
from typing import Any

from ..config import ExportConfig, OdtkError
from ..files import atomic_write, parse_json


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
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise OdtkError(f"The calibration table {path} cannot be read ({type(error).__name__}).") from error
    values = parse_json(text, path)
    fault = "it holds no object" if not isinstance(values, dict) else table_fault(values)
    if fault:
        raise OdtkError(f"{path} is not a calibration table of odtk ({fault}): calibrate again with images.")
    values.pop("sensitivity", None)
    for name in ("size", "images", "fp16_layers"):
        values[name] = tuple(values.get(name, ()))
    return CalibrationTable(**values)


def table_fault(values: dict[str, Any]) -> str:
    """What makes an object no calibration table, or an empty string."""
    fields = {field.name for field in dataclasses.fields(CalibrationTable)}
    for name in ("model", "size", "method", "images", "scales"):
        if name not in values:
            return f"it has no {name!r}"
    if unknown := sorted(values.keys() - fields - {"sensitivity"}):
        return f"{unknown[0]!r} is unknown"
    for name in ("model", "method"):
        if not isinstance(values[name], str):
            return f"its {name!r} is not a text"
    for name in ("images", "fp16_layers"):
        texts = values.get(name, [])
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            return f"its {name!r} is not a list of texts"
    size = values["size"]
    if not isinstance(size, list) or len(size) != 2 or not all(type(side) is int and side > 0 for side in size):
        return "its 'size' is not two positive whole numbers"
    for name, least in (("scales", 0.0), ("layer_costs", -math.inf)):
        numbers = values.get(name, {})
        if not isinstance(numbers, dict):
            return f"its {name!r} is not an object"
        for key, number in numbers.items():
            if type(number) not in (int, float) or not least < number < math.inf:
                kind = "a positive number" if name == "scales" else "a number"
                return f"its {name!r} has {number} for {key}, which is not {kind}"
    return ""


def save_table(path: str, table: CalibrationTable) -> None:
    """Writes a table, whole or not at all."""
    with atomic_write(path) as file:
        file.write(table.to_json().encode())


def table_path(config: ExportConfig) -> str:
    """Path of an export's table: the one given, else OUTPUT.calibration.json without the output's own suffix."""
    return config.calibration_table or os.path.splitext(config.output)[0] + ".calibration.json"
