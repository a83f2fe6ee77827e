"""What the settings of several commands share: fields, their wording, and checks."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import Any

from ..config import LoaderConfig, LossConfig, ModelConfig, OdtkError, PostprocessConfig, best_path
from .base import Settings
from .fields import DEVICES, FRACTION, POSITIVE, POSITIVE_INT, TEXT, option, switch

FORMATS = "COCO JSON, YOLO's data.yaml, or a folder of one of them or of Pascal VOC; :SPLIT names a split"
ANY_MODEL = (
    "checkpoint, exported file, the folder of a bundle, or a model that a Triton server has: http://HOST:8000/NAME or "
    "grpc://HOST:8001/NAME"
)


@dataclass(frozen=True, kw_only=True)
class WithDevices(Settings):
    devices: str | None = option(
        None,
        "GPUs to use, one process each; cpu, or cpu:N processes",
        DEVICES,
        "N|cpu",
        shown="all visible GPUs, else cpu",
        changes_result=False,
    )


@dataclass(frozen=True, kw_only=True)
class WithLoader(Settings):
    loader: str = option(
        LoaderConfig.loader, "what reads the images; torch where DALI cannot be imported", choices=("dali", "torch")
    )


@dataclass(frozen=True, kw_only=True)
class WithSize(Settings):
    size: tuple[int, ...] | None = option(
        None,
        "fit images inside H×W and pad them; one number for a square",
        POSITIVE_INT,
        ("H", "W"),
        count=(1, 2),
        shown="as the model was trained or exported",
    )

    @property
    def height_width(self) -> tuple[int, int] | None:
        return None if self.size is None else (self.size[0], self.size[-1])


@dataclass(frozen=True, kw_only=True)
class WithResize(Settings):
    resize: int | None = option(
        None, "shorter side of the image", POSITIVE_INT, "PIXELS", shown="as the model was trained"
    )
    max_size: int | None = option(
        None, "cap of the longer side", POSITIVE_INT, "PIXELS", shown="as the model was trained"
    )


@dataclass(frozen=True, kw_only=True)
class WithThresholds(Settings):
    score_threshold: float | None = option(
        None, "detections score above this", FRACTION, "SCORE", shown=f"{PostprocessConfig.score_threshold}"
    )
    nms_threshold: float | None = option(
        None,
        "a box that overlaps a better one by more is dropped",
        FRACTION,
        "IOU",
        shown=f"{PostprocessConfig.nms_threshold}",
    )
    detections: int | None = option(
        None, "detections per image at most", POSITIVE_INT, "N", shown=f"{PostprocessConfig.detections}"
    )

    @property
    def thresholds(self) -> dict[str, Any]:
        """Those that were given."""
        names = ("score_threshold", "nms_threshold", "detections")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@dataclass(frozen=True, kw_only=True)
class WithPrecision(Settings):
    full_precision: bool = switch("compute in fp32 rather than in mixed precision")

    @property
    def computing_precision(self) -> str:
        return "fp32" if self.full_precision else "mixed"


@dataclass(frozen=True, kw_only=True)
class WithAnchors(Settings):
    anchor_ious: tuple[float, ...] = option(
        (LossConfig.background_iou, LossConfig.foreground_iou),
        "an anchor that overlaps less than BG is background, from FG on foreground",
        FRACTION,
        ("BG", "FG"),
        count=2,
        section="model",
    )
    anchor_scales: tuple[float, ...] = option(
        ModelConfig.scales,
        "sides of the anchors, in strides of their level: smaller for small objects; "
        "`odtk check` counts the boxes that no anchor matches",
        POSITIVE,
        "SCALE",
        count=(1, None),
        shown="4 5.04 6.35",
        section="model",
    )
    anchor_ratios: tuple[float, ...] = option(
        ModelConfig.ratios, "height over width of the anchors", POSITIVE, "RATIO", count=(1, None), section="model"
    )

    def check(self) -> None:
        rising("--anchor-ious", self.anchor_ious)


def rising(name: str, pair: tuple[float, ...]) -> None:
    """Refuses a range whose first number is above its second."""
    if pair[0] > pair[1]:
        raise OdtkError(f"{name} {pair[0]:g} {pair[1]:g}: the first number must not be above the second.")


def check_rotated(head: str, rotated: bool) -> None:
    if head == "fcos" and rotated:
        raise OdtkError("--head fcos has no angle: rotated boxes need --head dense or retinanet.")


def check_run(settings: Any) -> None:
    """What train and pretrain both refuse."""
    own = {os.path.realpath(path) for path in (settings.model, best_path(settings.model))}
    if settings.teacher and os.path.realpath(settings.teacher) in own:
        raise OdtkError(
            f"--teacher {settings.teacher}: training to {settings.model} would overwrite it; give one of the two "
            "another name."
        )
    if settings.full_precision and settings.precision not in (None, "fp32"):
        raise OdtkError(f"--full-precision contradicts --precision {settings.precision}.")
    if settings.log_to and not settings.logdir:
        raise OdtkError(f"--log-to {' '.join(settings.log_to)} needs --logdir DIR.")


def model_field(suffixes: str, help: str) -> Any:
    return option(dataclasses.MISSING, help, TEXT, f"MODEL.{suffixes}", positional=True, changes_result=False)
