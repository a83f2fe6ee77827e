"""`odtk train` and `odtk plan`: what their fields (train_fields.py) say together, and what follows from what."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ..config import AugmentConfig, ModelConfig, OdtkError, TrainConfig
from .defaults import (
    ADAMW_BATCH,
    ADAMW_DECAY,
    ADAMW_LR,
    DENSE,
    DENSE_COLOR,
    DENSE_EMA,
    DENSE_SCALE,
    DENSE_SGD_LR,
    LR_BATCH,
    ODTK_ITERS,
    ODTK_JITTER,
    ODTK_MILESTONES,
    ODTK_RESIZE,
    ODTK_WARMUP,
    PRESETS,
    UNLABELED_LOSSES,
    VARIANTS,
)
from .fields import TEXT, flag, option
from .shared import check_rotated, check_run, rising
from .train_fields import TrainFields

# What one word on the length of a run decides.
LENGTH = ("iters", "epochs", "time", "milestones", "warmup", "burn_in", "val_iters")


@dataclass(frozen=True, kw_only=True)
class TrainSettings(TrainFields):
    """`odtk train`, and what a checkpoint keeps of a run."""

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = PRESETS
    REPLACES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **dict.fromkeys(("iters", "epochs", "time"), LENGTH),
        "resize": ("jitter",),
        "unlabeled_loss": ("unlabeled_weight", "burn_in"),
    }

    @classmethod
    def expanded(cls, layer: dict[str, Any], lower: Mapping[str, Any]) -> dict[str, Any]:
        """With the values of ``variant``; not if it was said before, and what has been changed since then stays."""
        variant = layer.get("variant")
        return layer if variant in (None, lower.get("variant")) else {**VARIANTS[variant], **layer}

    def check(self) -> None:
        super().check()
        check_run(self)
        check_rotated(self.head, self.rotated_bbox)
        if self.absolute_angle and not self.rotated_bbox:
            raise OdtkError("--absolute-angle requires --rotated-bbox.")
        if self.teacher_weight != TrainConfig.teacher_weight and not self.teacher:
            raise OdtkError("--teacher-weight needs --teacher PATH.")
        if self.teacher_scale is not None and not self.teacher:
            raise OdtkError("--teacher-scale needs --teacher PATH.")
        if self.absolute_angle and self.head == "dense":
            raise OdtkError("--absolute-angle needs --head retinanet: to the dense head a half turn changes no box.")
        self.check_unlabeled()
        if self.dcn_v1 and not self.dcn:
            raise OdtkError("--dcn-v1 requires deformable convolution: name its stages with --dcn, for example 3 4 5.")
        lengths = [flag(name) for name in ("iters", "epochs", "time") if getattr(self, name) is not None]
        if len(lengths) > 1:
            raise OdtkError(f"{lengths[0]} and {lengths[1]} both give the length: keep one.")
        if self.jitter is not None:
            rising("--jitter", self.jitter)
        rising("--augment-free-rotate", self.augment_free_rotate)
        if self.augment_scale is not None:
            rising("--augment-scale", self.augment_scale)
        if self.milestones and self.lr_schedule not in (None, "milestones"):
            raise OdtkError(
                f"--milestones and --lr-schedule {self.lr_schedule} both lower the learning rate: keep one."
            )
        if self.milestones is not None and tuple(sorted(set(self.milestones))) != self.milestones:
            raise OdtkError("--milestones must rise from one to the next.")

    def check_unlabeled(self) -> None:
        """What must hold for images without boxes."""
        names = ("unlabeled_loss", "unlabeled_batch", "unlabeled_weight", "unlabeled_colors", "burn_in")
        if not self.unlabeled and (given := [name for name in names if getattr(self, name) is not None]):
            raise OdtkError(f"{flag(given[0])} needs --unlabeled PATH.")
        if self.unlabeled and self.unlabeled_loss in (None, "none"):
            if self.unlabeled_colors == 0:
                raise OdtkError("--unlabeled-colors 0 leaves nothing to --unlabeled: choose an --unlabeled-loss, too.")
            if given := [name for name in ("unlabeled_weight", "burn_in") if getattr(self, name) is not None]:
                raise OdtkError(f"{flag(given[0])} needs --unlabeled-loss pseudo-labels or entropy.")
        if self.pseudo_labels and self.ema == 0:
            raise OdtkError("The pseudo-labels come from the average of the weights: leave --ema 0 out.")
        if self.burn_in and self.iters is not None:
            iters = round(self.iters * self.schedule)
            if self.burn_in >= iters:
                raise OdtkError(
                    f"--burn-in {self.burn_in} leaves none of the {iters} iterations to --unlabeled: shorten it."
                )

    @property
    def pseudo_labels(self) -> bool:
        return bool(self.unlabeled) and self.unlabeled_loss == "pseudo-labels"

    @property
    def pretrained(self) -> bool:
        return self.backbone_weights != "none" or self.fine_tune is not None

    def resolved(self, *, batch: int, iters: int, classes: int) -> TrainSettings:
        """Every value that follows from other settings, once data and machine have given these three.

        Args:
            batch: images per step over all devices.
        """
        dense = self.head == "dense"
        factors = self.augment_scale or (DENSE_SCALE if dense else AugmentConfig.scale)
        # Where images vary in a frame, the frame itself need not.
        low, high = (side / ODTK_RESIZE for side in ODTK_JITTER) if factors == (1.0, 1.0) else (1.0, 1.0)
        shape = DENSE if dense else {name: getattr(ModelConfig, name) for name in DENSE}
        if any(name.endswith("C4") for name in self.backbone):  # a level as wide as the default pyramid's
            shape = {**shape, "pyramid_channels": round(ModelConfig.pyramid_channels * self.resnet_width / 8) * 8}
        optimizer = self.optimizer or ("adamw" if dense else TrainConfig.optimizer)
        schedule = self.lr_schedule or ("flat-cosine" if dense and not self.milestones else TrainConfig.lr_schedule)
        if optimizer == "adamw":
            lr = ADAMW_LR * math.sqrt(batch * self.accumulate / ADAMW_BATCH)
        else:
            lr = (DENSE_SGD_LR if dense else TrainConfig.lr) * batch * self.accumulate / LR_BATCH
        follows: dict[str, Any] = {
            "batch": batch,
            "iters": iters,
            "classes": classes,
            "epochs": None,
            "time": None,
            "jitter": (max(1, round(self.resize * low)), max(1, round(self.resize * high))),
            "norm": "frozen" if self.pretrained else "batch",
            "milestones": tuple(sorted({max(1, round(iters * m / ODTK_ITERS)) for m in ODTK_MILESTONES}))
            if schedule == "milestones"
            else (),
            "warmup": min(ODTK_WARMUP, iters // 10),
            "val_iters": min(TrainConfig.val_iters, max(1, iters // 5)),
            "optimizer": optimizer,
            "lr_schedule": schedule,
            "lr": lr,
            "regularization_l2": ADAMW_DECAY if optimizer == "adamw" else TrainConfig.weight_decay,
            "ema": DENSE_EMA if dense or self.pseudo_labels else None,
            "augment_crop": 0.0 if dense else AugmentConfig.crop,
            "augment_scale": factors,
            **{f"augment_{n}": value if dense else getattr(AugmentConfig, n) for n, value in DENSE_COLOR.items()},
            "val_share": 0.0,
            "patience": 0,
            "precision": "fp32" if self.full_precision else "mixed",
            **shape,
        }
        if self.unlabeled:
            loss = self.unlabeled_loss or TrainConfig.unlabeled_loss
            follows |= {
                "unlabeled_loss": loss,
                "unlabeled_batch": batch,
                "unlabeled_colors": TrainConfig.unlabeled_colors,
            }
            if loss != "none":
                follows |= {
                    "unlabeled_weight": UNLABELED_LOSSES[loss],
                    "burn_in": round(iters * self.schedule) // 5,
                }
        kept = ("batch", "iters", "classes", "epochs", "time")
        return dataclasses.replace(self, **{k: v for k, v in follows.items() if k in kept or getattr(self, k) is None})


@dataclass(frozen=True, kw_only=True)
class PlanSettings(TrainSettings):
    """`odtk plan`: those of `odtk train`."""

    model: str = option(
        "model.pth", "checkpoint that train would write", TEXT, "MODEL.pth", positional=True, changes_result=False
    )
    output: str | None = option(
        None, "write the settings there, for train --settings", TEXT, "YAML", shown="none", changes_result=False
    )
