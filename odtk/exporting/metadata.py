"""What an exported file says about itself. Importable without onnx, for running a .plan."""

from __future__ import annotations

import dataclasses
import json
import zlib
from dataclasses import dataclass
from typing import Any, get_type_hints

import torch

from .. import __version__
from ..categories import Category, from_pairs, to_pairs
from ..config import IMAGENET_MEAN, IMAGENET_STD, INPUT_TYPES, OdtkError, PostprocessConfig
from ..model.checkpoint_faults import categories_fault, fits, shown

FORMAT = 4  # version of the fields: 1 calls "postprocessing" "ending", 3 added "padding" and 4 "input_type"
ENGINES = (".plan", ".engine")
POSITIVE = ("size", "stride", "classes", "detections", "top_n", "batch", "std")
LARGEST = 16 << 20  # bytes of metadata that are unpacked; those of 1,203 classes have 0.04


@dataclass(frozen=True)
class Metadata:
    """What is stored in an exported file, so that running it needs nothing else.

    Attributes:
        size: (H, W) of the input in pixels.
        stride: H and W are multiples of it.
        classes: number of classes.
        categories: in the order of the class indices, or None if the checkpoint has none.
        precision: fp32, fp16 or int8.
        postprocessing: what the graph's outputs are, one of
            ``detections``: scores [N, D], boxes [N, D, 4], classes [N, D] from decoding and NMS in standard operators;
            the rows in use come first, the others are zero.
            ``candidates``: the decoded candidates of all levels, of rotated boxes, for which ONNX has no NMS: scores
            [N, T], boxes [N, T, 6], classes [N, T]; inference/backends.py applies ops.nms to them.
            ``plugins``: as ``detections``, by odtk's TensorRT plugins, and for rotated boxes [N, D, 6] too.
            ``raw``: the levels themselves, logits_0 …, boxes_0 …
            Boxes are x1, y1, x2, y2 (and sin, cos) in pixels of the input, inclusive corners (boxes.py).
        box_values: numbers of a box: 4, or 6 if it is rotated.
        score_threshold, nms_threshold, detections, top_n: as in config.PostprocessConfig.
        batch: (MIN, OPT, MAX) of an engine, which takes MIN to MAX images; ONNX Runtime takes any number.
        model: hash of the weights (checkpoint.weights_hash).
        mean, std, padding: how images are prepared, as in config.ModelConfig.
        input_type: what the input holds: ``uint8`` or ``float32``: RGB pixels from 0 to 255, whose normalization is in
            the graph; ``normalized``: float32, normalized by mean and std before (files of format 3 and older).
        odtk, torch: the versions that wrote the file.
        format: version of these fields.
    """

    size: tuple[int, int]
    stride: int
    classes: int
    categories: tuple[Category, ...] | None
    precision: str
    postprocessing: str
    box_values: int
    score_threshold: float
    nms_threshold: float
    detections: int
    top_n: int
    batch: tuple[int, int, int]
    model: str
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    padding: str = "mean"
    input_type: str = "normalized"
    odtk: str = __version__
    torch: str = torch.__version__
    format: int = FORMAT

    def to_json(self) -> str:
        values = dataclasses.asdict(self) | {"categories": to_pairs(self.categories)}
        return json.dumps(values, separators=(",", ":"))  # compact: an engine's name in TensorRT holds 4 kB

    @classmethod
    def from_json(cls, text: str, path: str) -> Metadata:
        """The inverse of to_json.

        Raises:
            OdtkError: a newer odtk wrote the text, or it is damaged.
        """
        try:
            values = json.loads(text)
            if values["format"] > FORMAT:
                raise OdtkError(f"{path} was written by a newer odtk ({values['odtk']}): update odtk.")
            if values["format"] < 2:
                values["postprocessing"] = values.pop("ending")
            for name in ("size", "batch", "mean", "std"):
                values[name] = tuple(values[name])
            if fault := metadata_fault(values):
                raise OdtkError(f"The metadata in {path} is damaged ({fault}): export the model again.")
            values["categories"] = from_pairs(values["categories"])
            return cls(**values | {"format": FORMAT})
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise OdtkError(f"The metadata in {path} is damaged: export the model again.") from error

    @property
    def rotated(self) -> bool:
        """Whether boxes have an angle."""
        return self.box_values == 6

    @property
    def thresholds(self) -> PostprocessConfig:
        """The thresholds that are fixed in the file."""
        return PostprocessConfig(self.score_threshold, self.nms_threshold, self.detections, self.top_n)


def metadata_fault(values: dict[str, Any]) -> str | None:
    """The first value that cannot be right, or None. A std of 0, for one, would give no detections and no error."""
    for name, hint in get_type_hints(Metadata).items():
        if name != "categories" and name in values and not fits(values[name], hint):
            return f"{name} is {shown(values[name])}"
    for name in POSITIVE:
        value = values.get(name, 1)
        if any(number <= 0 for number in (value if isinstance(value, tuple) else [value])):
            return f"{name} is {shown(value)}, and must be positive"
    if values["box_values"] not in (4, 6):
        return f"box_values is {values['box_values']}"
    if values.get("input_type", "normalized") not in (*INPUT_TYPES, "normalized"):
        return f"input_type is {shown(values['input_type'])}"
    return categories_fault(values["categories"], values["classes"])


def pack(text: str) -> list[int]:
    """A text as numbers from -2^31 to 2^31 - 1, compressed: for the field ``metadata`` of the plugin OdtkNms."""
    data = zlib.compress(text.encode(), 9)
    data += bytes(-len(data) % 4)
    return [int.from_bytes(data[i : i + 4], "little", signed=True) for i in range(0, len(data), 4)]


def unpack(data: bytes, path: str) -> str:
    """The text of an engine's metadata: plain, or the bytes of the numbers of ``pack``.

    Raises:
        OdtkError: the bytes are damaged.
    """
    try:
        if data[:1] == b"\x78":  # of zlib; JSON starts with a brace
            data = zlib.decompressobj().decompress(data, LARGEST)  # what fills the last number is ignored
        return data.decode()
    except (zlib.error, UnicodeDecodeError) as error:
        raise OdtkError(f"The metadata in {path} is damaged: export the model again.") from error
