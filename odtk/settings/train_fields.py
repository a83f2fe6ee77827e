"""The fields of `odtk train`; train.py has what they say together."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from ..config import AugmentConfig, LoaderConfig, ModelConfig, TrainConfig
from .defaults import (
    ADAMW_BATCH,
    ADAMW_DECAY,
    ADAMW_LR,
    DENSE,
    DENSE_COLOR,
    DENSE_EMA,
    DENSE_SGD_LR,
    HEADS,
    LR_BATCH,
    ODTK_ITERS,
    ODTK_WARMUP,
    UNLABELED_LOSSES,
    VARIANTS,
)
from .fields import ANGLE, COUNT, DURATION, FRACTION, NUMBER, POSITIVE, POSITIVE_INT, SEED, SHARE, TEXT, option, switch
from .shared import FORMATS, WithAnchors, WithDevices, WithLoader, model_field

PLANNED = "from the data, see `odtk plan`"  # the default of what training/rules.py decides
RESNET_OPTIONS = {  # of --resnet → fields of ModelConfig
    "caffe-stride": "caffe_stride",
    "deep-stem": "deep_stem",
    "avg-down": "avg_down",
    "zero-init": "zero_init",
    "norm-eval": "norm_eval",
}


def _color_option(name: str) -> Any:
    """How much one property of the colors varies."""
    return option(
        None,
        "standard deviation of the change",
        NUMBER,
        "STD",
        shown=f"{getattr(AugmentConfig, name):g}; {DENSE_COLOR[name]:g} for --head dense",
        section="augmentation",
    )


@dataclass(frozen=True, kw_only=True, init=False, repr=False, eq=False)  # TrainSettings makes those of all fields
class TrainFields(WithDevices, WithLoader, WithAnchors):
    """What can be set of a training run."""

    model: str = model_field("pth", "checkpoint to write; training resumes from it if it exists")

    annotations: str = option(
        dataclasses.MISSING,
        f"annotations to train on: {FORMATS}",
        TEXT,
        "PATH",
        section="data",
        changes_result=False,  # what is in them is compared, not where they lie
    )
    images: str | None = option(
        None,
        "folder of the images, or tar files (PATH or URL, such as s3://bucket/train-{000..146}.tar)",
        TEXT,
        "DIR|TAR",
        shown="beside the annotations",
        section="data",
        changes_result=False,
    )
    val_annotations: str | None = option(
        None,
        "annotations to evaluate on while training, of several splits val; the best checkpoint is kept",
        TEXT,
        "PATH",
        shown="none",
        section="data",
        changes_result=False,
    )
    val_images: str | None = option(
        None,
        "folder of the validation images",
        TEXT,
        "DIR",
        shown="beside the validation annotations, else that of --images",
        section="data",
        changes_result=False,
    )
    val_iters: int | None = option(
        None,
        "iterations between evaluations",
        POSITIVE_INT,
        "N",
        shown="a fifth of --iters, 8000 at most",
        section="data",
        changes_result=False,
    )
    val_share: float | None = option(
        None,
        "without --val-annotations, the share of the images that is set aside to validate on: near-duplicates stay "
        "together, every class stays in training",
        SHARE,
        "SHARE",
        shown=f"{PLANNED}; 0, none, for other heads",
        section="data",
    )
    patience: int | None = option(
        None,
        "end the run after so many evaluations without a better AP, 0 for never",
        COUNT,
        "N",
        shown=f"{PLANNED}; 0 for other heads",
        section="schedule",
        changes_result=False,
    )
    skip_damaged: bool = switch(
        "leave damaged images out", shown="off: damaged images are refused before the run", section="data"
    )
    unlabeled: tuple[str, ...] | None = option(
        None,
        "learn from these images without boxes too: folders, files or patterns such as 'scans/*.jpg'",
        TEXT,
        "PATH",
        count=(1, None),
        shown="none",
        section="data",
        changes_result=False,  # the images are compared, not where they lie
    )
    unlabeled_loss: str | None = option(
        None,
        "what they teach beside their colors: nothing, pseudo-labels, which the average of the weights gives for every "
        "point (Dense Teacher), or entropy, by which scores move away from 0.5 (ADVENT)",
        choices=UNLABELED_LOSSES,
        shown=TrainConfig.unlabeled_loss,
        section="data",
    )
    unlabeled_batch: int | None = option(
        None, "of them per iteration over all devices", POSITIVE_INT, "N", shown="as --batch", section="data"
    )
    unlabeled_weight: float | None = option(
        None,
        "of their losses",
        POSITIVE,
        "WEIGHT",
        shown=f"1; {UNLABELED_LOSSES['entropy']:g} for entropy",
        section="data",
    )
    unlabeled_colors: float | None = option(
        None,
        "of the labeled images take on the colors of an unlabeled one",
        FRACTION,
        "SHARE",
        shown=f"{TrainConfig.unlabeled_colors:g}",
        section="data",
    )
    burn_in: int | None = option(
        None,
        "iterations without the unlabeled images' losses",
        COUNT,
        "N",
        shown="a fifth of --iters",
        section="schedule",
    )
    batch: int | None = option(
        None, "images per iteration over all devices", POSITIVE_INT, "N", shown="2 × devices", section="data"
    )
    repeat_threshold: float = option(
        LoaderConfig.repeat_threshold,
        "images of a class that fewer than this fraction of the images hold come sqrt(threshold / fraction) times as "
        "often; 0: off",
        FRACTION,
        "FRACTION",
        section="data",
    )
    resize: int = option(LoaderConfig.resize, "shorter side of the image", POSITIVE_INT, "PIXELS", section="data")
    max_size: int = option(LoaderConfig.max_size, "cap of the longer side", POSITIVE_INT, "PIXELS", section="data")
    jitter: tuple[int, ...] | None = option(
        None,
        "range of the shorter side in training",
        POSITIVE_INT,
        ("MIN", "MAX"),
        count=2,
        shown="0.8 to 1.28 of --resize, or --resize itself with --augment-scale",
        section="data",
    )

    backbone: tuple[str, ...] = option(
        ModelConfig.backbones,
        "one or several, whose levels are concatenated",
        TEXT,
        "NAME",
        count=(1, None),
        section="model",
    )
    variant: str | None = option(
        None,
        "a detector of this size: dense head, backbone, levels, widths and input size; other flags change parts of it",
        choices=tuple(VARIANTS),
        shown="none",
        section="model",
    )
    head: str = option(ModelConfig.head, "what detects on the levels", choices=HEADS, section="model")
    last_level: int | None = option(
        None,
        "the feature pyramid ends with P5, P6 or P7, of strides 32, 64 and 128",
        POSITIVE_INT,
        "LEVEL",
        choices=(5, 6, 7),
        shown=f"{ModelConfig.last_level}; {DENSE['last_level']} for --head dense",
        section="model",
    )
    pyramid_channels: int | None = option(
        None,
        "of every level of the feature pyramid",
        POSITIVE_INT,
        "N",
        shown=f"{ModelConfig.pyramid_channels}; {DENSE['pyramid_channels']} for --head dense",
        section="model",
    )
    head_channels: int | None = option(
        None,
        "of the head's towers",
        POSITIVE_INT,
        "N",
        shown=f"{ModelConfig.head_channels}; {DENSE['head_channels']} for --head dense",
        section="model",
    )
    head_convs: int | None = option(
        None,
        "convolutions in each of the head's towers, without the last one",
        POSITIVE_INT,
        "N",
        shown=f"{ModelConfig.head_convs}; {DENSE['head_convs']} for --head dense",
        section="model",
    )
    classes: int | None = option(
        None, "number of classes", POSITIVE_INT, "N", shown="from the annotations", section="model"
    )
    norm: str | None = option(
        None,
        "normalization of the backbone",
        choices=("frozen", "batch", "group"),
        shown="frozen when pretrained, else batch",
        section="model",
    )
    freeze_at: int = option(
        ModelConfig.freeze_at,
        "stages 1 to N of backbones, the stem being 1, are not trained",
        COUNT,
        "N",
        section="model",
    )
    grad_checkpoint: bool = switch("recompute activations to save memory", section="model", changes_result=False)
    dcn: tuple[int, ...] = option(
        ModelConfig.dcn,
        "ResNet stages, 2 to 5, with deformable convolution",
        POSITIVE_INT,
        "STAGE",
        count=(0, None),
        choices=(2, 3, 4, 5),
        shown="none",
        section="model",
    )
    dcn_v1: bool = switch("deformable convolution without its masks", shown="off: version 2", section="model")
    resnet: tuple[str, ...] = option(
        (),
        f"what ResNets are built like: {', '.join(RESNET_OPTIONS)}",
        TEXT,
        "OPTION",
        count=(0, None),
        choices=tuple(RESNET_OPTIONS),
        shown="none",
        section="model",
    )
    resnet_width: float = option(
        ModelConfig.resnet_width,
        "factor of the channels of every stage of a ResNet, 0.5 for example; only 1 has ImageNet weights",
        POSITIVE,
        "FACTOR",
        section="model",
    )
    backbone_weights: str | None = option(
        None,
        "weights to start from; none: from scratch",
        TEXT,
        "PATH",
        shown="ImageNet weights: an installed package's for EfficientNetLite, torchvision's by URL for others",
        section="model",
        changes_result=False,
    )
    fine_tune: str | None = option(
        None,
        "checkpoint of which every matching tensor is taken, the rest is initialized",
        TEXT,
        "PATH",
        shown="none",
        section="model",
        changes_result=False,
    )
    teacher: str | None = option(
        None,
        "checkpoint of a better detector, of any kind, whose features this one learns to imitate",
        TEXT,
        "PATH",
        shown="none",
        section="model",
        changes_result=False,  # its weights are compared, not where they lie
    )
    teacher_scale: float | None = option(
        None,
        "the teacher sees the images enlarged by this factor",
        POSITIVE,
        "FACTOR",
        shown="from --resize to the size that it was trained at",
        section="model",
    )
    teacher_weight: float = option(
        TrainConfig.teacher_weight,
        "of what the teacher says, beside the losses of the boxes",
        POSITIVE,
        "WEIGHT",
        section="model",
    )
    override: bool = switch("start anew over an existing MODEL.pth", section="model", changes_result=False)
    override_settings: bool = switch(
        "resume although settings that change the result differ from the run's", section="model", changes_result=False
    )
    rotated_bbox: bool = switch("boxes are [x, y, w, h, theta], theta in radians, anticlockwise", section="model")
    absolute_angle: bool = switch(
        "rotated boxes keep their angle instead of being brought within 45 degrees", section="model"
    )

    iters: int | None = option(
        None, "iterations", POSITIVE_INT, "N", shown=f"{ODTK_ITERS}", section="schedule", changes_result=False
    )
    epochs: float | None = option(
        None,
        "passes over the images, instead of --iters",
        POSITIVE,
        "N",
        shown="none",
        section="schedule",
        changes_result=False,
    )
    optimizer: str | None = option(
        None,
        "what updates the weights; adamw does not let norms and biases decay",
        choices=("sgd", "adamw"),
        shown="sgd; adamw for --head dense",
        section="schedule",
    )
    time: str | None = option(
        None,
        "how long the run may take, instead of --iters, such as 8m or 1h30m; counted in iterations once, by 20 trial "
        "steps",
        DURATION,
        "TIME",
        shown="none",
        section="schedule",
        changes_result=False,
    )
    lr_schedule: str | None = option(
        None,
        "how the learning rate falls: by --gamma at --milestones, or along a cosine in the second half",
        choices=("milestones", "flat-cosine"),
        shown=f"{TrainConfig.lr_schedule}; flat-cosine for --head dense without --milestones",
        section="schedule",
    )
    milestones: tuple[int, ...] | None = option(
        None,
        "iterations at which the learning rate falls",
        POSITIVE_INT,
        "N",
        count=(0, None),
        shown="two thirds and eight ninths of --iters",
        section="schedule",
    )
    schedule: float = option(
        TrainConfig.schedule,
        "scales --iters and --milestones",
        POSITIVE,
        "FACTOR",
        section="schedule",
        changes_result=False,
    )
    warmup: int | None = option(
        None,
        "iterations of linear warm-up from a tenth of the learning rate",
        COUNT,
        "N",
        shown=f"a tenth of --iters, {ODTK_WARMUP} at most",
        section="schedule",
    )
    gamma: float = option(
        TrainConfig.gamma, "the learning rate falls by this factor", POSITIVE, "FACTOR", section="schedule"
    )
    lr: float | None = option(
        None,
        "learning rate",
        POSITIVE,
        "RATE",
        shown=f"sgd: {TrainConfig.lr:g} ({DENSE_SGD_LR:g} for --head dense) for a batch of {LR_BATCH}, scaled with the "
        f"batch; adamw: {ADAMW_LR:g} for a batch of {ADAMW_BATCH}, scaled with its root",
        section="schedule",
    )
    regularization_l2: float | None = option(
        None,
        "weight decay",
        NUMBER,
        "DECAY",
        shown=f"{TrainConfig.weight_decay:g}; {ADAMW_DECAY:g} for adamw",
        section="schedule",
    )
    precision: str | None = option(
        None,
        "of the forward and backward pass",
        choices=("mixed", "fp16", "bf16", "fp32"),
        shown="mixed, which is fp16 on GPUs and bf16 on CPUs",
        section="schedule",
    )
    full_precision: bool = switch("same as --precision fp32", section="schedule")
    accumulate: int = option(
        TrainConfig.accumulate,
        "batches whose gradients are added up for one iteration",
        POSITIVE_INT,
        "N",
        section="schedule",
    )
    clip_grad: float = option(
        TrainConfig.clip_grad, "cap of the gradient's norm, 0 for none", NUMBER, "NORM", section="schedule"
    )
    ema: float | None = option(
        None,
        "decay of an exponential moving average of the weights, 0.9998 for example; 0 for none",
        FRACTION,
        "DECAY",
        shown=f"none; {DENSE_EMA:g} for --head dense",
        section="schedule",
    )
    seed: int = option(TrainConfig.seed, "of everything that is drawn at random", SEED, "N", section="schedule")

    augment_flip: float = option(
        AugmentConfig.flip,
        "probability of a mirror image, left for right",
        FRACTION,
        "PROBABILITY",
        section="augmentation",
    )
    augment_rotate: bool = switch("turn by multiples of 90 degrees", section="augmentation")
    augment_crop: float | None = option(
        None,
        "probability of a crop that keeps boxes; 0 suits short training from scratch",
        FRACTION,
        "PROBABILITY",
        shown=f"{AugmentConfig.crop:g}; 0 for --head dense",
        section="augmentation",
    )
    augment_scale: tuple[float, ...] | None = option(
        None,
        "enlarge by a factor from this range in a frame that keeps its size: above 1 a part of the image fills it, "
        "below 1 the image lies in padding; 1 1: off",
        POSITIVE,
        ("LOW", "HIGH"),
        count=2,
        shown="off; 0.75 1.333 for --head dense",
        section="augmentation",
    )
    augment_free_rotate: tuple[float, ...] = option(
        AugmentConfig.free_rotate,
        "turn by degrees from this range",
        ANGLE,
        ("MIN", "MAX"),
        count=2,
        section="augmentation",
    )
    augment_brightness: float | None = _color_option("brightness")
    augment_contrast: float | None = _color_option("contrast")
    augment_hue: float | None = _color_option("hue")
    augment_saturation: float | None = _color_option("saturation")

    logdir: str | None = option(
        None,
        "run.html to watch the run, TensorBoard files and metrics.jsonl",
        TEXT,
        "DIR",
        shown="none",
        section="log",
        changes_result=False,
    )
    post_metrics: str | None = option(
        None, "POST metrics as JSON to this address", TEXT, "URL", shown="none", section="log", changes_result=False
    )
    log_to: tuple[str, ...] = option(
        (),
        "log there too: mlflow (LOGDIR/mlflow.db, or MLFLOW_TRACKING_URI), wandb (offline in LOGDIR, or WANDB_MODE)",
        TEXT,
        "NAME",
        count=(0, None),
        choices=("mlflow", "wandb"),
        shown="none",
        section="log",
        changes_result=False,
    )
