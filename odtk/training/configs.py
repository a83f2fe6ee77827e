"""Settings that are resolved → what the stages of a training are told."""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any

from ..config import ROTATED_ANGLES, AugmentConfig, LoaderConfig, LossConfig, ModelConfig, PretrainConfig, TrainConfig
from ..data.layouts import image_folder, with_split
from ..launch import share, workers_of
from ..model.backbones.catalog import normalization
from ..settings import PRETRAIN_BATCH, PRETRAIN_EPOCHS, RESNET_OPTIONS, PretrainSettings, TrainSettings

# ---------------------------------------------------------------------------------------------------------------------
# What a detector and a classifier share


def run_fields(settings: TrainSettings | PretrainSettings) -> dict[str, Any]:
    """The fields of RunConfig that both set, by name."""
    assert settings.optimizer and settings.iters and settings.lr and settings.val_iters
    assert settings.warmup is not None and settings.regularization_l2 is not None
    return {
        "path": settings.model,
        "optimizer": settings.optimizer,
        "iters": settings.iters,
        "warmup": settings.warmup,
        "lr": settings.lr,
        "weight_decay": settings.regularization_l2,
        "precision": settings.precision or "mixed",
        "val_iters": settings.val_iters,
        "patience": settings.patience or 0,
        "override": settings.override,
        "override_settings": settings.override_settings,
        "accumulate": settings.accumulate,
        "clip_grad": settings.clip_grad or None,
        "ema": settings.ema or None,
        "logdir": settings.logdir,
        "post_metrics": settings.post_metrics,
        "log_to": settings.log_to,
        "seed": settings.seed,
    }


def loader_fields(settings: TrainSettings | PretrainSettings, world: int) -> dict[str, Any]:
    """The fields of the LoaderConfig to train with that both set, by name.

    Raises:
        OdtkError: the batch cannot be shared out.
    """
    assert settings.batch
    return {
        "skip_damaged": settings.skip_damaged,
        "batch": share(settings.batch, world),
        "training": True,
        "repeat_threshold": settings.repeat_threshold,
        "loader": settings.loader,
        "workers": workers_of(world),
        "seed": settings.seed,
        "world": world,
    }


def augment_fields(settings: TrainSettings | PretrainSettings) -> dict[str, Any]:
    """The fields of AugmentConfig that both set, by name."""
    names = ("flip", "rotate", "brightness", "contrast", "hue", "saturation")
    return {name: getattr(settings, f"augment_{name}") for name in names}


def backbone_fields(settings: TrainSettings | PretrainSettings, first: str) -> dict[str, Any]:
    """The fields of ModelConfig that both set, by name.

    Args:
        first: the backbone whose normalization the images get.
    """
    assert settings.norm
    mean, std = normalization(first)
    return {
        "mean": mean,
        "std": std,
        "norm": settings.norm,
        "resnet_width": settings.resnet_width,
        "grad_checkpoint": settings.grad_checkpoint,
        **{RESNET_OPTIONS[name]: True for name in settings.resnet},
    }


# ---------------------------------------------------------------------------------------------------------------------
# A detector


def train_config(settings: TrainSettings, world: int, images: str, held_out: tuple[int, ...] = ()) -> TrainConfig:
    """The training of a detector.

    Args:
        settings: resolved.
        images: the folder of the images.
        held_out: ids of the images that are validated on instead of trained on.
    """
    assert settings.lr_schedule and settings.milestones is not None
    data = train_data(settings, world, images)
    return TrainConfig(
        **run_fields(settings),
        model=model_config(settings),
        data=data,
        val_data=validation_data(settings, data, held_out),
        loss=LossConfig(
            background_iou=settings.anchor_ious[0],
            foreground_iou=settings.anchor_ious[1],
            absolute_angle=settings.absolute_angle,
        ),
        held_out=held_out,
        lr_schedule=settings.lr_schedule,
        milestones=settings.milestones,
        schedule=settings.schedule,
        gamma=settings.gamma,
        fine_tune=settings.fine_tune,
        backbone_weights=settings.backbone_weights,
        **unlabeled_config(settings, world),
        teacher=settings.teacher,
        teacher_scale=settings.teacher_scale,
        teacher_weight=settings.teacher_weight,
        settings=settings.to_dict(),
    )


def train_data(settings: TrainSettings, world: int, images: str) -> LoaderConfig:
    """What a detector is trained on, from the folder of the images."""
    assert settings.jitter and settings.augment_crop is not None and settings.augment_scale
    return LoaderConfig(
        **loader_fields(settings, world),
        images=images,
        annotations=settings.annotations,
        resize=settings.resize,
        max_size=settings.max_size,
        jitter=(settings.jitter[0], settings.jitter[1]),
        rotated=settings.rotated_bbox,
        absolute_angle=settings.absolute_angle,
        augment=AugmentConfig(
            **augment_fields(settings),
            crop=settings.augment_crop,
            scale=(settings.augment_scale[0], settings.augment_scale[1]),
            free_rotate=(settings.augment_free_rotate[0], settings.augment_free_rotate[1]),
        ),
    )


def validation_data(settings: TrainSettings, data: LoaderConfig, held_out: tuple[int, ...]) -> LoaderConfig | None:
    """What a detector is validated on: images that are held out of ``data``, or those of --val-annotations."""
    if held_out:
        return dataclasses.replace(data, training=False)
    if not settings.val_annotations:
        return None
    annotations = with_split(settings.val_annotations, "val", strict=True)
    images = settings.val_images or image_folder(annotations, settings.images)
    return dataclasses.replace(data, images=images, annotations=annotations, training=False)


def unlabeled_config(settings: TrainSettings, world: int) -> dict[str, Any]:
    """The fields of TrainConfig that say what is learned from images without boxes, by name; none without such images.

    Raises:
        OdtkError: their batch cannot be shared out.
    """
    if not settings.unlabeled:
        return {}
    assert settings.unlabeled_batch
    found = {
        "unlabeled": settings.unlabeled,
        "unlabeled_batch": share(settings.unlabeled_batch, world, "unlabeled_batch"),
        "unlabeled_loss": settings.unlabeled_loss,
        "unlabeled_colors": settings.unlabeled_colors,
    }
    if settings.unlabeled_loss != "none":
        found |= {"unlabeled_weight": settings.unlabeled_weight, "burn_in": settings.burn_in}
    return found


def model_config(settings: TrainSettings) -> ModelConfig:
    """The detector that resolved settings describe."""
    assert settings.classes
    assert settings.last_level and settings.pyramid_channels and settings.head_channels and settings.head_convs
    return ModelConfig(
        **backbone_fields(settings, settings.backbone[0]),
        backbones=settings.backbone,
        head=settings.head,
        classes=settings.classes,
        last_level=settings.last_level,
        pyramid_channels=settings.pyramid_channels,
        head_channels=settings.head_channels,
        head_convs=settings.head_convs,
        padding="black" if settings.head == "dense" else "mean",  # DeepStream pads with black
        ratios=settings.anchor_ratios,
        scales=settings.anchor_scales,
        angles=() if not settings.rotated_bbox else ROTATED_ANGLES if settings.head == "retinanet" else (0.0,),
        freeze_at=settings.freeze_at,
        dcn=tuple(sorted(set(settings.dcn))),
        dcn_modulated=not settings.dcn_v1,
    )


# ---------------------------------------------------------------------------------------------------------------------
# A classifier


def pretrain_config(settings: PretrainSettings, world: int, images: int, classes: int) -> PretrainConfig:
    """The training of a backbone as a classifier, from the number of its images and classes."""
    batch = settings.batch or PRETRAIN_BATCH * world
    epochs = settings.epochs or PRETRAIN_EPOCHS
    iters = settings.iters or max(1, math.ceil(epochs * images / (batch * settings.accumulate)))
    given = settings.given()
    settings = settings.resolved(batch=batch, iters=iters, classes=classes)
    data, val_data = pretrain_data(settings, world)
    return PretrainConfig(
        **run_fields(settings),
        model=ModelConfig(
            **backbone_fields(settings, settings.backbone), backbones=(settings.backbone,), classes=classes
        ),
        data=data,
        val_data=val_data,
        milestones=(),
        lr_schedule="cosine",
        settings={**settings.to_dict(), "given": given},
        backbone_weights=None if settings.backbone_weights == "imagenet" else settings.backbone_weights,
        label_smoothing=settings.label_smoothing,
        teacher=settings.teacher,
        teacher_labels=settings.teacher_labels,
        teacher_weight=PretrainConfig.teacher_weight if settings.teacher_weight is None else settings.teacher_weight,
        teacher_temperature=settings.teacher_temperature,
        report=settings.report,
        output=settings.output,
    )


def pretrain_data(settings: PretrainSettings, world: int) -> tuple[LoaderConfig, LoaderConfig | None]:
    """What a classifier is trained on and what it is validated on."""
    data = LoaderConfig(
        **loader_fields(settings, world),
        images=settings.images or os.path.dirname(settings.labels or "") or ".",
        annotations=settings.labels,
        square=settings.size,
        center=settings.center,
        augment=AugmentConfig(**augment_fields(settings), area=(settings.augment_area[0], settings.augment_area[1])),
    )
    if not settings.validates:
        return data, None
    folder = settings.val_images or os.path.dirname(settings.val_labels or "") or "."
    return data, dataclasses.replace(data, images=folder, annotations=settings.val_labels, training=False)
