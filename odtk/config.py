"""Every setting of odtk as frozen dataclasses, and their dictionary form. Standard library only.

Units: sizes in pixels, angles in radians, thresholds in [0, 1], thresholds of IoU in [0, 1].
"""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of RGB values in [0, 1]
IMAGENET_STD = (0.229, 0.224, 0.225)
INPUT_TYPES = ("uint8", "float32")  # of an exported file's pixels
ROTATED_ANGLES = (-math.pi / 6, 0.0, math.pi / 6)


class OdtkError(Exception):
    """Something the user can mend. One sentence: what is wrong, where, what to do. The CLI prints it and exits 1."""


@dataclass(frozen=True)
class ModelConfig:
    """What a detector is made of: all that is needed to build it before its weights are loaded.

    Attributes:
        backbones: names from ``odtk.model.backbones.catalog.BACKBONES``; their levels are concatenated.
        head: ``retinanet`` (anchors), ``fcos`` or ``dense`` (points).
        classes: number of foreground classes C.
        last_level: the feature pyramid has the levels P3…P(last_level): 5, 6 or 7.
        pyramid_channels: of every level of the pyramid.
        head_channels, head_convs: of the head's towers, and how many convolutions each has before its last one.
        mean, std: of the images it takes: RGB values in [0, 1], from which mean is subtracted before they are divided.
        padding: of these images: ``mean`` (zero once they are normalized) or ``black`` (zero before).
        ratios, scales, angles: of the anchors (model/anchors.py); ``angles`` is empty for axis-aligned boxes. Without
            anchors, ``angles`` (0,) says that boxes are rotated.
        rounded_anchors: rotated anchors as ODTK 0.2 drew them, sides rounded to whole pixels (model/anchors.py).
        norm: ``frozen`` (affine and statistics fixed), ``batch`` or ``group`` (32 groups).
        norm_eval: BatchNorm keeps its running statistics in training, its affine parameters still learn.
        freeze_at: the backbone's stages 1…freeze_at get no gradient (1 is the stem); 0 freezes nothing.
        dcn: ResNet stages (2…5) whose 3×3 convolutions are deformable; ``dcn_modulated`` is version 2.
        caffe_stride: stride in the 1×1 convolution of a bottleneck instead of the 3×3.
        deep_stem, avg_down: ResNet-D, https://arxiv.org/abs/1812.01187.
        zero_init: the last norm of each residual block starts at weight 0.
        resnet_width: factor of the channels of every stage of a ResNet, the stem included.
        grad_checkpoint: recompute the residual blocks in backward, to save memory.
    """

    backbones: tuple[str, ...] = ("ResNet50FPN",)
    head: str = "retinanet"
    classes: int = 80
    last_level: int = 7
    pyramid_channels: int = 256
    head_channels: int = 256
    head_convs: int = 4
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    padding: str = "mean"
    ratios: tuple[float, ...] = (1.0, 2.0, 0.5)
    scales: tuple[float, ...] = tuple(4 * 2 ** (i / 3) for i in range(3))
    angles: tuple[float, ...] = ()
    rounded_anchors: bool = False
    norm: str = "batch"
    norm_eval: bool = False
    freeze_at: int = 0
    dcn: tuple[int, ...] = ()
    dcn_modulated: bool = True
    caffe_stride: bool = False
    deep_stem: bool = False
    avg_down: bool = False
    zero_init: bool = False
    resnet_width: float = 1.0
    grad_checkpoint: bool = False

    @property
    def rotated(self) -> bool:
        """Whether boxes carry an angle."""
        return bool(self.angles)

    @property
    def pixels(self) -> dict[str, Any]:
        """How images are prepared: the fields that LoaderConfig has too."""
        return {"mean": self.mean, "std": self.std, "padding": self.padding}

    @property
    def anchor_free(self) -> bool:
        """Whether boxes are regressed from the point of each cell, and not from anchors."""
        return self.head in ("fcos", "dense")

    @property
    def num_anchors(self) -> int:
        """A, anchors per cell: scales × ratios × angles for RetinaNet, 1 (the point) without anchors."""
        if self.anchor_free:
            return 1
        return len(self.ratios) * len(self.scales) * max(1, len(self.angles))

    @property
    def box_coder(self) -> str:
        """The name of the coder that says what the head's numbers per anchor mean: a key of box_coder.BOX_CODERS."""
        if self.head == "fcos":
            return "distances_centerness"
        if self.head == "dense":
            return "center_size_angle" if self.rotated else "distances"
        return "rotated_deltas" if self.rotated else "anchor_deltas"


@dataclass(frozen=True)
class LossConfig:
    """Focal loss (https://arxiv.org/abs/1708.02002 eq. 5), smooth L1, and the IoU bounds of anchor matching.

    absolute_angle: a rotated box has a front, and its angle is regressed as it is. Otherwise quarter turns with swapped
    sides are the same box, and each anchor regresses the form that lies nearest to its own angle.
    """

    alpha: float = 0.25
    gamma: float = 2.0
    beta: float = 0.11
    background_iou: float = 0.4  # below: background
    foreground_iou: float = 0.5  # at or above: foreground; between the two an anchor is ignored
    absolute_angle: bool = False


@dataclass(frozen=True)
class PostprocessConfig:
    """From raw levels to detections."""

    score_threshold: float = 0.05  # strictly above survives
    nms_threshold: float = 0.5  # an IoU strictly above suppresses
    detections: int = 100  # D, rows per image
    top_n: int = 1000  # K, candidates per image and level


@dataclass(frozen=True)
class AugmentConfig:
    """Training augmentation. The four color values are standard deviations of normal distributions.

    ``area`` is for images that are classified, ``crop`` and ``scale`` for the others.
    """

    flip: float = 0.5  # probability
    crop: float = 1.0  # probability of a random crop that keeps boxes (SSD, https://arxiv.org/abs/1512.02325 §2.2)
    scale: tuple[float, float] = (1.0, 1.0)  # range of a random factor, see sampler.random_view
    area: tuple[float, float] = (0.08, 1.0)  # of a random crop, relative to the image's, see sampler.resized_crop
    rotate: bool = False  # by a random multiple of 90 degrees
    free_rotate: tuple[float, float] = (0.0, 0.0)  # degrees, uniform in the range
    brightness: float = 0.002
    contrast: float = 0.002
    hue: float = 0.0002
    saturation: float = 0.002


@dataclass(frozen=True)
class LoaderConfig:
    """What a loader reads and how it turns images into a Batch.

    Geometry, aspect always kept:
      training: the shorter side is drawn from ``jitter`` (inclusive), the longer is capped by ``max_size``;
      ``size`` given (H, W): scaled to fit inside, padded right and bottom to exactly H×W;
      otherwise: the shorter side becomes ``resize``, the longer is capped by ``max_size``.
    ``square`` given: images are classified, and each becomes a square of so many pixels. In training that is a random
    crop, whose aspect is not kept, otherwise the ``center`` of the image, so much of its shorter side.
    Images of a batch are then padded right and bottom to a common size, a multiple of ``stride``: with ``padding``
    ``mean`` by zeros once they are normalized, with ``black`` by what black pixels become.
    ``input_type`` says what a batch holds: ``normalized`` float32 or, in inference only, RGB pixels from 0 to 255 as
    ``uint8`` (where padding by ``mean`` is rounded to the nearest pixel) or ``float32``.
    ``annotations`` None means every image file of the folder, without boxes.
    """

    images: str | tuple[str, ...]  # several folders, files or patterns only without annotations
    annotations: str | None = None
    skip_damaged: bool = False  # leave damaged images out instead of refusing them
    batch: int = 1  # images per process
    training: bool = False
    resize: int = 800
    max_size: int = 1333
    jitter: tuple[int, int] = (640, 1024)
    repeat_threshold: float = 0.0  # see sampler.repeat_factors
    size: tuple[int, int] | None = None
    square: int | None = None
    center: float = 0.875
    stride: int = 32
    rotated: bool = False
    absolute_angle: bool = False
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    padding: str = "mean"
    input_type: str = "normalized"
    loader: str = "dali"
    device: str = "cpu"  # where Batch.images ends: cpu, cuda:0 …
    workers: int = 2
    seed: int = 0
    rank: int = 0
    world: int = 1


@dataclass(frozen=True)
class RunConfig:
    """What the training loop is told, whatever is trained.

    Attributes:
        KIND: what is trained.
        SCORE: what validation measures; the weights with the highest are the best.
    """

    KIND: ClassVar[str] = "detector"  # of model.checkpoint.FORMATS
    SCORE: ClassVar[str] = "AP"

    path: str  # of the file to write
    model: ModelConfig
    data: LoaderConfig  # data.batch is per process here; the CLI divides the global --batch
    val_data: LoaderConfig | None = None
    optimizer: str = "sgd"  # or "adamw", see optimizer.create_optimizer
    iters: int = 90000
    milestones: tuple[int, ...] = (60000, 80000)
    lr_schedule: str = "milestones"  # or "flat-cosine", "cosine", see optimizer.learning_rate
    schedule: float = 1.0  # scales iters and milestones
    warmup: int = 1000
    gamma: float = 0.1
    lr: float = 0.01  # the value used (already scaled with the global batch)
    weight_decay: float = 0.0001
    momentum: float = 0.9
    precision: str = "mixed"  # mixed (fp16 on CUDA, bf16 on CPU), fp16, bf16, fp32
    val_iters: int = 8000
    patience: int = 0  # evaluations without a better score after which the run ends; 0: never
    save_seconds: float = 600.0  # a run is also saved when this has passed since the last time
    override: bool = False
    override_settings: bool = False  # resume although settings that change the result differ from the run's
    accumulate: int = 1
    clip_grad: float | None = 5.0  # cap of the gradient's norm; None: no cap
    ema: float | None = None
    logdir: str | None = None
    post_metrics: str | None = None
    log_to: tuple[str, ...] = ()  # training.log.TRACKERS
    seed: int = 0
    settings: dict[str, Any] | None = None  # those of the command as plain values, for the checkpoint

    def if_moved(self, flag: str) -> str:
        """What to do where a file is missing whose place a run that is resumed remembers; nothing for a new run."""
        resumes = os.path.exists(self.path) and not self.override
        return f" If it has moved since {self.path} began, pass {flag} with its new place." if resumes else ""


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    """The training of a detector: plan.plan() makes it from settings, train.train() runs it."""

    loss: LossConfig = field(default_factory=LossConfig)
    postprocess: PostprocessConfig = field(default_factory=PostprocessConfig)
    held_out: tuple[int, ...] = ()  # ids of the images of ``data`` that are validated on instead of trained on
    fine_tune: str | None = None
    backbone_weights: str | None = None  # path, "none", or None: torchvision's ImageNet weights by URL
    teacher: str | None = None  # checkpoint of a detector whose features are imitated, see training/distill.py
    teacher_scale: float | None = None  # of the images for it; None: to the size that it was trained at
    teacher_weight: float = 6.0  # of that loss, as https://arxiv.org/abs/2207.02039 has it
    unlabeled: tuple[str, ...] = ()  # images without boxes that are learned from, see training/unlabeled.py
    unlabeled_batch: int = 1  # of these images, per process
    unlabeled_loss: str = "none"  # or "pseudo-labels", "entropy"
    unlabeled_weight: float = 1.0
    unlabeled_colors: float = 0.5  # of the labeled images take on the colors of these, see data/color_transfer.py
    burn_in: int = 0  # iterations without their losses


@dataclass(frozen=True)
class PretrainConfig(RunConfig):
    """The training of a classifier: commands.pretrain() makes it from settings, pretrain.pretrain() runs it.

    Of ``model`` only the backbone and the number of classes count. ``data.images`` and ``data.annotations`` are the
    folder and the CSV of data.labeled.list_labeled.
    """

    KIND: ClassVar[str] = "classifier"
    SCORE: ClassVar[str] = "top-1"

    backbone_weights: str | None = "none"  # path, "none", or None: ImageNet weights
    label_smoothing: float = 0.1
    teacher: str | None = None  # file of a classifier whose answers are learned too
    teacher_labels: str = "hard"  # or "soft", see pretrain.answer_losses
    teacher_weight: float = 0.5  # of its loss; that of the labels has the rest
    teacher_temperature: float = 3.0  # of soft labels
    report: str | None = None
    output: str | None = None


@dataclass(frozen=True)
class VideoConfig:
    """A video to detect in, and how it is read."""

    source: str  # a file, an address such as rtsp://…, or a camera such as /dev/video0
    every: int = 1  # detect in each n-th frame
    realtime: bool = False  # read a file as fast as it plays, and drop frames that wait too long, like a camera
    transport: str = "tcp"  # of RTSP: tcp or udp
    track: bool = False  # give the same object the same number in every frame
    track_threshold: float = 0.3  # a detection that scores so much starts a track


@dataclass(frozen=True)
class TilesConfig:
    """How large images are cut into tiles."""

    size: tuple[int, int]  # (height, width) of a tile in pixels of the image
    overlap: float = 0.2  # the least part of a tile that two neighbors share


@dataclass(frozen=True)
class InferConfig:
    """One inference run: `odtk infer` fills it, infer.infer() or stream.infer_video() runs it."""

    path: str  # .pth, .onnx, .plan, .engine
    data: LoaderConfig  # its resize and max_size are those below, or those that the model was trained with
    resize: int | None = None
    max_size: int | None = None
    output: tuple[str, ...] = ()
    precision: str = "mixed"
    postprocess: PostprocessConfig = field(default_factory=PostprocessConfig)
    explicit: tuple[str, ...] = ()  # fields of postprocess that the user gave: a file that has others is refused
    draw: str | None = None
    draw_threshold: float | None = None  # None: evaluation.operating_point.choose decides, of a video 0.3
    video: VideoConfig | None = None  # instead of images
    tiles: TilesConfig | None = None
    override: bool = False  # begin anew where an earlier run of other settings did not end
    returns: bool = True  # infer() returns the detections, which then are all in memory


@dataclass(frozen=True)
class ExportConfig:
    """One export: `odtk export` fills it, exporting.export.export() runs it."""

    path: str  # MODEL.pth
    output: str  # .onnx, .plan, .engine
    size: tuple[int, int] | None = None  # None: as the model was trained
    batch: tuple[int, int, int] = (1, 8, 16)  # optimization profile MIN OPT MAX
    precision: str = "fp16"  # fp32, fp16, int8 (with fp16 remainder)
    input_type: str = "uint8"  # of the pixels that the file takes: one of INPUT_TYPES
    opset: int = 18
    postprocess: PostprocessConfig = field(default_factory=PostprocessConfig)
    calibration_images: str | None = None
    calibration_batches: int | None = None
    calibration_table: str | None = None
    calibration_method: str | None = None  # entropy, percentile, minmax; None: by the head (settings/defaults.py)
    fp16_layers: tuple[str, ...] = ()  # layers kept out of INT8
    timing_cache: str | None = None
    workspace: int = 4 << 30  # bytes
    hardware_compatible: bool = False  # an engine for every GPU from Ampere on
    version_compatible: bool = False  # an engine for newer TensorRT too
    seed: int = 0
    verbose: bool = False

    @property
    def input_size(self) -> tuple[int, int]:
        """size, once it is known."""
        assert self.size is not None
        return self.size


@dataclass(frozen=True)
class BenchmarkConfig:
    """One timing: `odtk benchmark` fills it, benchmark.benchmark() runs it."""

    path: str  # .pth, .onnx, .plan, .engine
    data: LoaderConfig  # images "": the model alone; size: of the model's input, batch: per process
    iters: int = 50
    warmup: int = 5
    precision: str = "mixed"
    output: str | None = None


def scale_and_shift(
    mean: tuple[float, float, float], std: tuple[float, float, float]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The normalization of ModelConfig's mean and std as two numbers per channel: pixel (0 … 255) · scale + shift."""
    scale = tuple(1 / (255 * s) for s in std)
    return scale, tuple(-m / s for m, s in zip(mean, std, strict=True))


def best_path(path: str) -> str:
    """Where the weights with the highest validation score go: MODEL.pth → MODEL.best.pth"""
    stem, extension = os.path.splitext(path)
    return f"{stem}.best{extension}"


C = TypeVar("C")


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as nested dictionaries of plain values (what a checkpoint stores)."""
    return dataclasses.asdict(config)


def from_dict(cls: type[C], values: dict[str, Any]) -> C:
    """The inverse of to_dict for the flat configs; lists become tuples again.

    Raises:
        OdtkError: for a key that the class does not have (a file of a newer version).
    """
    known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - known)
    if unknown:
        raise OdtkError(f"The setting {', '.join(unknown)} is unknown to this version of odtk: update odtk.")
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
