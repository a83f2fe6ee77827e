"""Defaults that depend on other settings, and the values that a preset or a variant stands for as a whole."""

from __future__ import annotations

from typing import Any

from ..config import LoaderConfig, TrainConfig

HEADS = ("retinanet", "fcos", "dense")
DENSE = {"last_level": 5, "pyramid_channels": 96, "head_channels": 96, "head_convs": 2}  # of the dense head, by default
LR_BATCH = 16  # the default learning rate of SGD is meant for this global batch and scaled to others
ADAMW_LR, ADAMW_BATCH = 0.001, 8  # that of AdamW, and its batch; scaled with the root, https://arxiv.org/abs/2205.10287
DENSE_SGD_LR = 0.04  # for LR_BATCH
ADAMW_DECAY = 0.05
DENSE_EMA = 0.99
DENSE_SCALE = (0.75, 4 / 3)
DENSE_COLOR = {"brightness": 0.1, "contrast": 0.1, "hue": 0.01, "saturation": 0.1}
CALIBRATION_METHODS = ("entropy", "percentile", "minmax")
CALIBRATION_METHOD_OF_HEAD = {"retinanet": "entropy", "fcos": "entropy", "dense": "percentile"}  # what loses less there
UNLABELED_LOSSES = {"none": 0.0, "pseudo-labels": 1.0, "entropy": 0.01}  # and their weights
ODTK_RESIZE, ODTK_JITTER = LoaderConfig.resize, LoaderConfig.jitter  # jitter is for this size and scaled to others
ODTK_ITERS, ODTK_WARMUP, ODTK_MILESTONES = TrainConfig.iters, TrainConfig.warmup, TrainConfig.milestones

PRESETS: dict[str, dict[str, Any]] = {
    "odtk": {  # NVIDIA's ODTK 0.2.6, whole but for the learning rate, which is scaled with the batch
        "backbone": ("ResNet50FPN",),
        "head": "retinanet",
        "optimizer": "sgd",
        "lr_schedule": "milestones",
        "resize": 800,
        "max_size": 1333,
        "jitter": (640, 1024),
        "iters": 90000,
        "milestones": (60000, 80000),
        "schedule": 1.0,
        "warmup": 1000,
        "gamma": 0.1,
        "regularization_l2": 0.0001,
        "clip_grad": 0.0,
        "norm": "frozen",
        "val_iters": 8000,
        "anchor_ious": (0.4, 0.5),
        "anchor_scales": tuple(4 * 2 ** (i / 3) for i in range(3)),
        "anchor_ratios": (1.0, 2.0, 0.5),
        "augment_crop": 1.0,
        "augment_scale": (1.0, 1.0),
        "augment_brightness": 0.002,
        "augment_contrast": 0.002,
        "augment_hue": 0.0002,
        "augment_saturation": 0.002,
    },
}
VARIANTS: dict[str, dict[str, Any]] = {  # of --variant; their sizes and times are in docs/models.md
    name: {
        "head": "dense",
        "backbone": (backbone,),
        "last_level": last_level,
        "pyramid_channels": channels,
        "head_channels": channels,
        "head_convs": convs,
        "resize": resize,
        "max_size": max_size,
    }
    for name, backbone, last_level, channels, convs, resize, max_size in (
        ("nano", "EfficientNetLite0FPN", 5, 64, 1, 256, 320),
        ("small", "EfficientNetLite0FPN", 5, 64, 2, 352, 448),
        ("medium", "EfficientNetLite0FPN", 5, 96, 2, 480, 640),
        ("large", "ResNet50FPN", 7, 256, 2, 800, 1333),
    )
}
