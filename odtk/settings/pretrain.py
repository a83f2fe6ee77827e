"""`odtk pretrain`: a backbone as a classifier. Where a field means the same as in train, it is train's."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..config import AugmentConfig, LoaderConfig, ModelConfig, OdtkError, PretrainConfig, TrainConfig
from .defaults import ADAMW_DECAY, ADAMW_LR, DENSE_COLOR, DENSE_EMA, ODTK_WARMUP
from .fields import FRACTION, NUMBER, PART, POSITIVE, SHARE, SQUARE, TEXT, Option, flag, option
from .shared import WithDevices, WithLoader, check_run, rising
from .train import TrainSettings

PRETRAIN_EPOCHS, PRETRAIN_BATCH = 100, 32  # the latter per device
PRETRAIN_LR_BATCH = 256  # the default learning rates of a classifier are meant for this batch
PRETRAIN_SGD_LR = 0.1  # https://arxiv.org/abs/1706.02677
TEACHER_SOFT = 0.1  # the weight of soft labels, https://arxiv.org/abs/2012.12877 section 5.1


def as_in_train(name: str, **changes: Any) -> Any:
    """A field that another command has as TrainSettings has it, but for some attributes of its Option."""
    found = next(f for f in dataclasses.fields(TrainSettings) if f.name == name)
    one: Option = found.metadata["option"]
    return field(
        default=changes.pop("default", found.default), metadata={"option": dataclasses.replace(one, **changes)}
    )


def _changed_color(name: str) -> Any:
    """How much one property of the colors varies where images are classified."""
    value = DENSE_COLOR[name]
    return option(value, "standard deviation of the change", NUMBER, "STD", section="augmentation")


@dataclass(frozen=True, kw_only=True)
class PretrainSettings(WithDevices, WithLoader):
    """`odtk pretrain`, and what its file keeps of a run."""

    REPLACES: ClassVar[Mapping[str, tuple[str, ...]]] = dict.fromkeys(
        ("iters", "epochs"), ("iters", "epochs", "warmup", "val_iters")
    )

    model: str = option(
        dataclasses.MISSING,
        "file to write, for train --backbone-weights; training resumes from it if it exists",
        TEXT,
        "WEIGHTS.pth",
        positional=True,
        changes_result=False,
    )

    images: str | None = option(
        None,
        "folder with one subfolder of images per class; with --labels the folder that its file names are relative to",
        TEXT,
        "DIR",
        shown="beside --labels",
        section="data",
        changes_result=False,  # what is in them is compared, not where they lie
    )
    labels: str | None = option(
        None,
        "CSV of a file name and a class per line; a first line may name the columns (file, class)",
        TEXT,
        "CSV",
        shown="none: the subfolders are the classes",
        section="data",
        changes_result=False,
    )
    val_images: str | None = option(
        None,
        "the same to validate on; the best weights are kept",
        TEXT,
        "DIR",
        shown="none; beside --val-labels",
        section="data",
        changes_result=False,
    )
    val_labels: str | None = option(
        None, "CSV of the images to validate on", TEXT, "CSV", shown="none", section="data", changes_result=False
    )
    val_iters: int | None = as_in_train("val_iters")
    patience: int | None = as_in_train("patience", shown="0", help="end the run after so many evaluations without a "
                                       "better top-1, 0 for never")  # fmt: skip
    skip_damaged: bool = as_in_train("skip_damaged")
    batch: int | None = as_in_train("batch", shown=f"{PRETRAIN_BATCH} × devices")
    repeat_threshold: float = as_in_train("repeat_threshold")
    size: int = option(224, "side of the square that each image becomes", SQUARE, "PIXELS", section="data")
    center: float = option(
        LoaderConfig.center,
        "part of the image's shorter side that is validated on, in its center",
        PART,
        "SHARE",
        section="data",
        changes_result=False,
    )

    backbone: str = option(ModelConfig.backbones[0], "what is trained, by its name in train", section="model")
    norm: str | None = as_in_train("norm", choices=("batch", "group"), shown="batch")
    resnet: tuple[str, ...] = as_in_train("resnet")
    resnet_width: float = as_in_train("resnet_width")
    grad_checkpoint: bool = as_in_train("grad_checkpoint")
    backbone_weights: str = as_in_train(
        "backbone_weights",
        default="none",
        help="weights to start from: a file, imagenet (as train has them), or none: from scratch",
        shown="none",
    )
    override: bool = as_in_train("override", help="start anew over an existing WEIGHTS.pth")
    override_settings: bool = as_in_train("override_settings")

    teacher: str | None = option(
        None,
        "file of `odtk pretrain` with the same classes, whose answers are learned too",
        TEXT,
        "WEIGHTS.pth",
        shown="none",
        section="teacher",
        changes_result=False,  # its weights are compared
    )
    teacher_labels: str = option(
        PretrainConfig.teacher_labels,
        "what is learned of it: its first answer, or the probabilities of all",
        choices=("hard", "soft"),
        section="teacher",
    )
    teacher_weight: float | None = option(
        None,
        "share of the teacher's loss; that of the labels has the rest",
        FRACTION,
        "SHARE",
        shown=f"{PretrainConfig.teacher_weight:g}; {TEACHER_SOFT:g} for --teacher-labels soft",
        section="teacher",
    )
    teacher_temperature: float = option(
        PretrainConfig.teacher_temperature,
        "by which logits are divided for soft labels",
        POSITIVE,
        "FACTOR",
        section="teacher",
    )

    iters: int | None = as_in_train("iters", shown=f"as many as {PRETRAIN_EPOCHS} epochs have")
    epochs: float | None = as_in_train("epochs")
    optimizer: str | None = as_in_train("optimizer", shown="adamw")
    warmup: int | None = as_in_train("warmup")
    lr: float | None = as_in_train(
        "lr",
        shown=f"adamw: {ADAMW_LR:g} for a batch of {PRETRAIN_LR_BATCH}, scaled with its root; sgd: {PRETRAIN_SGD_LR:g} "
        "for that batch, scaled with the batch",
    )
    regularization_l2: float | None = as_in_train("regularization_l2")
    label_smoothing: float = option(
        PretrainConfig.label_smoothing, "share of the label that all classes get", SHARE, "SHARE", section="schedule"
    )
    precision: str | None = as_in_train("precision")
    full_precision: bool = as_in_train("full_precision")
    accumulate: int = as_in_train("accumulate")
    clip_grad: float = as_in_train("clip_grad")
    ema: float | None = as_in_train("ema", shown=f"{DENSE_EMA:g}")
    seed: int = as_in_train("seed")

    augment_flip: float = as_in_train("augment_flip")
    augment_rotate: bool = as_in_train("augment_rotate")
    augment_area: tuple[float, ...] = option(
        AugmentConfig.area,
        "range of the area of a random crop, relative to the image's; 1 1: nearly the whole image",
        PART,
        ("MIN", "MAX"),
        count=2,
        section="augmentation",
    )
    augment_brightness: float = _changed_color("brightness")
    augment_contrast: float = _changed_color("contrast")
    augment_hue: float = _changed_color("hue")
    augment_saturation: float = _changed_color("saturation")

    logdir: str | None = as_in_train("logdir")
    post_metrics: str | None = as_in_train("post_metrics")
    log_to: tuple[str, ...] = as_in_train("log_to")
    report: str | None = option(
        None,
        "write a page for the browser: every class, confusion, calibration, the surest mistakes",
        TEXT,
        "HTML",
        shown="none",
        section="log",
        changes_result=False,
    )
    output: str | None = option(
        None, "write the figures there too", TEXT, "JSON", shown="none", section="log", changes_result=False
    )

    def check(self) -> None:
        super().check()
        if not self.images and not self.labels:
            raise OdtkError("--images DIR or --labels CSV is required.")
        for name in ("report", "output"):
            if getattr(self, name) and not self.validates:
                raise OdtkError(f"{flag(name)} is about the images to validate on: give them as --val-images.")
        check_run(self)
        rising("--augment-area", self.augment_area)
        if self.iters is not None and self.epochs is not None:
            raise OdtkError("--iters and --epochs both give the length: keep one.")
        if self.teacher is None and {"teacher_weight", "teacher_labels", "teacher_temperature"} & {*self.given()}:
            raise OdtkError("--teacher-labels, --teacher-weight and --teacher-temperature require --teacher.")
        if self.teacher_labels == "hard" and self.teacher_temperature != PretrainConfig.teacher_temperature:
            raise OdtkError("--teacher-temperature is for --teacher-labels soft.")
        if self.report and not self.report.lower().endswith((".html", ".htm")):
            raise OdtkError(f"--report {self.report}: the name of the page must end in .html.")
        if self.output and not self.output.lower().endswith(".json"):
            raise OdtkError(f"--output {self.output}: the name of the figures' file must end in .json.")

    @property
    def validates(self) -> bool:
        return bool(self.val_images or self.val_labels)

    def resolved(self, *, batch: int, iters: int, classes: int) -> PretrainSettings:
        """Every value that follows from other settings, once data and machine have given these three.

        Args:
            batch: images per step over all devices.
        """
        share = batch * self.accumulate / PRETRAIN_LR_BATCH
        optimizer = self.optimizer or "adamw"
        follows: dict[str, Any] = {
            "batch": batch,
            "iters": iters,
            "epochs": None,
            "val_iters": min(TrainConfig.val_iters, max(1, iters // 5)),
            "patience": 0,
            "norm": "batch",
            "optimizer": optimizer,
            "warmup": min(ODTK_WARMUP, iters // 10),
            "lr": ADAMW_LR * math.sqrt(share) if optimizer == "adamw" else PRETRAIN_SGD_LR * share,
            "regularization_l2": ADAMW_DECAY if optimizer == "adamw" else TrainConfig.weight_decay,
            "precision": "fp32" if self.full_precision else "mixed",
            "ema": DENSE_EMA,
            "teacher_weight": TEACHER_SOFT if self.teacher_labels == "soft" else PretrainConfig.teacher_weight,
        }
        if self.teacher is None:
            del follows["teacher_weight"]
        kept = ("batch", "iters", "epochs")
        return dataclasses.replace(self, **{k: v for k, v in follows.items() if k in kept or getattr(self, k) is None})
