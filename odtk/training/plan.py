"""From the settings that were given to those of one run: what follows from the data and the machine.

What follows from other settings alone is worked out in settings.py.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from ..config import ROTATED_ANGLES, AugmentConfig, LoaderConfig, LossConfig, ModelConfig, OdtkError, TrainConfig
from ..data.coco import categories_of
from ..data.layouts import image_folder, load_annotations, with_split
from ..launch import share, workers_of
from ..model.backbones.catalog import normalization
from ..settings import RESNET_OPTIONS, TrainSettings


def plan(settings: TrainSettings, world: int) -> TrainConfig:
    """The run that settings give over `world` processes.

    Raises:
        OdtkError: annotations that cannot be read, or a batch that cannot be shared out.
    """
    content, images, _ = load_annotations(settings.annotations, settings.images, boxes_only=True)
    batch = settings.batch or 2 * world
    iters = settings.iters or TrainConfig.iters
    if settings.epochs is not None:
        iters = max(1, math.ceil(settings.epochs * len(content["images"]) / (batch * settings.accumulate)))
    classes = settings.classes or count_categories(content, settings.annotations)
    config = train_config(settings.resolved(batch=batch, iters=iters, classes=classes), world, str(images))
    assert config.settings is not None
    return dataclasses.replace(config, settings={**config.settings, "given": settings.given()})


def count_categories(content: dict, path: str) -> int:
    """Number of categories of COCO annotations: those listed, or those that the annotations name."""
    categories = categories_of(content)
    if not categories:
        raise OdtkError(f"The annotations {path} have no categories: add them, one per class.")
    return len({str(category.get("id")) for category in categories})  # a wrong id is refused with the dataset


def train_config(settings: TrainSettings, world: int, images: str) -> TrainConfig:
    """The stages' own configs, from settings that are resolved, and from the folder of the images."""
    assert settings.batch and settings.iters and settings.classes and settings.jitter and settings.lr
    assert settings.last_level and settings.pyramid_channels and settings.head_channels and settings.head_convs
    assert settings.augment_crop is not None and settings.augment_scale
    assert settings.augment_brightness is not None and settings.augment_contrast is not None
    assert settings.augment_hue is not None and settings.augment_saturation is not None
    assert settings.optimizer and settings.lr_schedule and settings.regularization_l2 is not None
    assert settings.norm and settings.milestones is not None and settings.warmup is not None and settings.val_iters
    data = LoaderConfig(
        images=images,
        annotations=settings.annotations,
        skip_damaged=settings.skip_damaged,
        batch=share(settings.batch, world),
        training=True,
        resize=settings.resize,
        max_size=settings.max_size,
        jitter=(settings.jitter[0], settings.jitter[1]),
        repeat_threshold=settings.repeat_threshold,
        rotated=settings.rotated_bbox,
        absolute_angle=settings.absolute_angle,
        augment=AugmentConfig(
            crop=settings.augment_crop,
            scale=(settings.augment_scale[0], settings.augment_scale[1]),
            rotate=settings.augment_rotate,
            free_rotate=(settings.augment_free_rotate[0], settings.augment_free_rotate[1]),
            brightness=settings.augment_brightness,
            contrast=settings.augment_contrast,
            hue=settings.augment_hue,
            saturation=settings.augment_saturation,
        ),
        loader=settings.loader,
        workers=workers_of(world),
        seed=settings.seed,
        world=world,
    )
    val_data = None
    if settings.val_annotations:
        val_annotations = with_split(settings.val_annotations, "val", strict=True)
        own = settings.val_images or settings.images or image_folder(val_annotations)
        val_data = dataclasses.replace(data, images=own, annotations=val_annotations, training=False)
    mean, std = normalization(settings.backbone[0])
    resnet: dict[str, Any] = {RESNET_OPTIONS[name]: True for name in settings.resnet}
    return TrainConfig(
        path=settings.model,
        model=ModelConfig(
            backbones=settings.backbone,
            head=settings.head,
            classes=settings.classes,
            last_level=settings.last_level,
            pyramid_channels=settings.pyramid_channels,
            head_channels=settings.head_channels,
            head_convs=settings.head_convs,
            mean=mean,
            std=std,
            padding="black" if settings.head == "dense" else "mean",  # DeepStream pads with black
            ratios=settings.anchor_ratios,
            scales=settings.anchor_scales,
            angles=ROTATED_ANGLES if settings.rotated_bbox else (),
            norm=settings.norm,
            freeze_at=settings.freeze_at,
            resnet_width=settings.resnet_width,
            dcn=tuple(sorted(set(settings.dcn))),
            dcn_modulated=not settings.dcn_v1,
            grad_checkpoint=settings.grad_checkpoint,
            **resnet,
        ),
        data=data,
        val_data=val_data,
        loss=LossConfig(
            background_iou=settings.anchor_ious[0],
            foreground_iou=settings.anchor_ious[1],
            absolute_angle=settings.absolute_angle,
        ),
        optimizer=settings.optimizer,
        iters=settings.iters,
        lr_schedule=settings.lr_schedule,
        milestones=settings.milestones,
        schedule=settings.schedule,
        warmup=settings.warmup,
        gamma=settings.gamma,
        lr=settings.lr,
        weight_decay=settings.regularization_l2,
        precision=settings.precision or "mixed",
        val_iters=settings.val_iters,
        fine_tune=settings.fine_tune,
        backbone_weights=settings.backbone_weights,
        override=settings.override,
        override_settings=settings.override_settings,
        accumulate=settings.accumulate,
        clip_grad=settings.clip_grad or None,
        ema=settings.ema or None,
        logdir=settings.logdir,
        post_metrics=settings.post_metrics,
        seed=settings.seed,
        settings=settings.to_dict(),
    )
