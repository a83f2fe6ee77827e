"""What an exported file says of itself."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

import torch

from .. import __version__
from ..categories import Category, from_pairs, to_pairs
from ..config import IMAGENET_MEAN, IMAGENET_STD, OdtkError, PostprocessConfig

FORMAT = 2  # of the metadata
ENGINES = (".plan", ".engine")


@dataclass(frozen=True)
class Metadata:
    """What travels inside an exported file, so that running it needs nothing else.

    Attributes:
        size: (height, width) of the input in pixels.
        stride: size is a multiple of it.
        categories: in the order of the class indices, or None where the checkpoint does not say.
        model: fingerprint of the checkpoint's weights.
        mean, std: of RGB values in [0, 1]; padding is 0 after normalization.
        box_values: 4, or 6 when rotated.
        postprocessing: see the module's text.
        batch: MIN, OPT, MAX. ONNX Runtime takes any batch, an engine those from MIN to MAX.
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
    odtk: str = __version__
    torch: str = torch.__version__
    format: int = FORMAT

    def to_json(self) -> str:
        values = dataclasses.asdict(self) | {"categories": to_pairs(self.categories)}
        return json.dumps(values, separators=(",", ":"))  # short: TensorRT holds 4 kB in a plan

    @classmethod
    def from_json(cls, text: str, path: str) -> Metadata:
        """The inverse of to_json.

        Raises:
            OdtkError: text of a newer odtk, or damaged.
        """
        try:
            values = json.loads(text)
            if values["format"] > FORMAT:
                raise OdtkError(f"{path} was written by a newer odtk ({values['odtk']}): update odtk.")
            if values["format"] < 2:  # the field's name then
                values["postprocessing"] = values.pop("ending")
            for name in ("size", "batch", "mean", "std"):
                values[name] = tuple(values[name])
            values["categories"] = from_pairs(values["categories"])
            return cls(**values | {"format": FORMAT})
        except (ValueError, KeyError, TypeError) as error:
            raise OdtkError(f"The metadata in {path} is damaged: export the model again.") from error

    @property
    def postprocess(self) -> PostprocessConfig:
        """The thresholds that are baked in."""
        return PostprocessConfig(self.score_threshold, self.nms_threshold, self.detections, self.top_n)
