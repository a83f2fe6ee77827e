"""The calibration table of INT8: a readable file."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass

from ..config import ExportConfig, OdtkError
from ..files import atomic_write


@dataclass(frozen=True)
class Table:
    """What calibration found: all that INT8 needs beside the weights, as a readable JSON file.

    Attributes:
        model: fingerprint of the checkpoint's weights.
        size: (H, W) of the network's input in pixels.
        method: entropy, percentile or minmax.
        images: the files of the sample, in the order they were used.
        scales: activation → what one step of its int8 stands for.
        fp16_layers: convolutions that stay in FP16.
        sensitivity: layer → decibels by which the raw outputs stand above the error that quantizing this layer
            alone makes; the worst first; empty before `odtk export --verify` has measured it.
    """

    model: str
    size: tuple[int, int]
    method: str
    images: tuple[str, ...]
    scales: dict[str, float]
    fp16_layers: tuple[str, ...] = ()
    sensitivity: dict[str, float] = dataclasses.field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"


def load_table(path: str) -> Table:
    """Reads a table.

    Raises:
        OdtkError: no table.
    """
    try:
        with open(path, encoding="utf-8") as file:
            values = json.load(file)
        for name in ("size", "images", "fp16_layers"):
            values[name] = tuple(values[name])
        return Table(**values)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OdtkError(f"{path} is not a calibration table of odtk ({type(error).__name__}).") from error


def save_table(path: str, table: Table) -> None:
    """Writes a table, whole or not at all."""
    with atomic_write(path) as file:
        file.write(table.to_json().encode())


def table_path(config: ExportConfig) -> str:
    """Where the table of an export lies: as given, else beside the output."""
    return config.calibration_table or os.path.splitext(config.output)[0] + ".calibration.json"
