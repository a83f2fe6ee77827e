"""What a user can set: per command one frozen dataclass whose fields are its flags, keys and keywords.

A field owns its default (taken from config.py where a stage of the pipeline has it already), its help text and its
check. The command line, a settings file and the Python API all call the class with the values that were given, so all
three accept the same, refuse the same, and mean the same. Standard library only.

None as a value means: no preference. What then holds is worked out from the other settings here (``resolved``), and
from the data and the machine in training/plan.py.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from .config import (
    INPUT_TYPES,
    AugmentConfig,
    BenchmarkConfig,
    ExportConfig,
    LoaderConfig,
    LossConfig,
    ModelConfig,
    OdtkError,
    PostprocessConfig,
    PretrainConfig,
    TilesConfig,
    TrainConfig,
    VideoConfig,
)

HEADS = ("retinanet", "fcos", "dense")
DENSE = {"last_level": 5, "pyramid_channels": 96, "head_channels": 96, "head_convs": 2}  # of the dense head, by default
LR_BATCH = 16  # the default learning rate of SGD is meant for this global batch and scaled to others
ADAMW_LR, ADAMW_BATCH = 0.001, 8  # that of AdamW, and its batch; scaled with the root, https://arxiv.org/abs/2205.10287
DENSE_SGD_LR = 0.04  # for LR_BATCH
ADAMW_DECAY = 0.05
DENSE_EMA = 0.99
DENSE_SCALE = (0.75, 4 / 3)
DENSE_COLOR = {"brightness": 0.1, "contrast": 0.1, "hue": 0.01, "saturation": 0.1}
PRETRAIN_EPOCHS, PRETRAIN_BATCH = 100, 32  # the latter per device
PRETRAIN_LR_BATCH = 256  # the default learning rates of a classifier are meant for this batch
PRETRAIN_SGD_LR = 0.1  # https://arxiv.org/abs/1706.02677
TEACHER_SOFT = 0.1  # the weight of soft labels, https://arxiv.org/abs/2012.12877 section 5.1
PLANNED = "from the data, see `odtk plan`"  # the default of what training/rules.py decides
FORMATS = "COCO JSON, YOLO's data.yaml, or a folder of one of them or of Pascal VOC; :SPLIT names a split"
RESNET_OPTIONS = {  # of --resnet → fields of ModelConfig
    "caffe-stride": "caffe_stride",
    "deep-stem": "deep_stem",
    "avg-down": "avg_down",
    "zero-init": "zero_init",
    "norm-eval": "norm_eval",
}
UNLABELED_LOSSES = {"pseudo-labels": 1.0, "entropy": 0.01}  # and their weights
ODTK_RESIZE, ODTK_JITTER = LoaderConfig.resize, LoaderConfig.jitter  # jitter is for this size and scaled to others
ODTK_ITERS, ODTK_WARMUP, ODTK_MILESTONES = TrainConfig.iters, TrainConfig.warmup, TrainConfig.milestones


# ---------------------------------------------------------------------------------------------------------------------
# Options


@dataclass(frozen=True)
class Check:
    """A kind of value: how it is made from text, which values are good, and the words for those that are."""

    kind: Callable[[Any], Any]
    good: Callable[[Any], bool]
    words: str

    def __call__(self, value: Any) -> Any:
        """The value in its own type.

        Raises:
            ValueError: it is not of this kind.
        """
        if isinstance(value, bool):  # an int to Python
            raise ValueError
        made = self.kind(os.fspath(value) if isinstance(value, os.PathLike) else value)
        if (isinstance(value, float) and made != value) or not self.good(made):
            raise ValueError
        return made


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError
    return value


def _devices(value: Any) -> bool:
    kind, _, number = value.partition(":")
    if kind == "cpu":
        return value == "cpu" or (number.isdecimal() and int(number) > 0)
    return value.isdecimal() and int(value) > 0


def seconds_of(time: str) -> float:
    """Seconds of a time such as 8m, 1.5h or 1h30m10s; 0 if it is none."""
    found = re.fullmatch(r"(?:([0-9.]+)h)?(?:([0-9.]+)m)?(?:([0-9.]+)s)?", time)
    if found is None:
        return 0.0
    return sum(float(part or 0) * unit for part, unit in zip(found.groups(), (3600, 60, 1), strict=True))


TEXT = Check(_text, bool, "a text")
POSITIVE_INT = Check(int, lambda v: v > 0, "a positive whole number")
COUNT = Check(int, lambda v: v >= 0, "a whole number, 0 or more")
SEED = Check(int, lambda v: 0 <= v < 2**64, "a whole number from 0 to 2^64 - 1")  # as torch takes them
SQUARE = Check(int, lambda v: v > 0 and v % 32 == 0, "a positive multiple of 32")
POSITIVE = Check(float, lambda v: 0 < v < math.inf, "a positive number")
NUMBER = Check(float, lambda v: 0 <= v < math.inf, "a number, 0 or more")
ANGLE = Check(float, math.isfinite, "a number of degrees")
SIDE = Check(float, lambda v: 0.005 <= v <= 0.6, "a number from 0.005 to 0.6")
RATIO = Check(float, lambda v: 1 <= v < math.inf, "a number, 1 or more")
PART = Check(float, lambda v: 0 < v <= 1, "a number above 0, 1 at most")
SHARE = Check(float, lambda v: 0 <= v < 1, "a number from 0 to below 1")
FRACTION = Check(float, lambda v: 0 <= v <= 1, "a number from 0 to 1")
DURATION = Check(_text, lambda v: seconds_of(v) > 0, "a time such as 8m, 1h30m or 90s")
DEVICES = Check(str, _devices, "a number of GPUs, cpu or cpu:N")
SWITCH = Check(bool, lambda v: True, "true or false")


@dataclass(frozen=True)
class Option:
    """How one field is set.

    Attributes:
        help: one phrase, without the default.
        check: of the value, or of each of several.
        metavar: its placeholder in the help; None for a positional argument's or a switch's own.
        count: how many values: None for one, a number, or the least and the greatest number (None: any).
        choices: the values there are, or None.
        flags: names beside the field's own.
        shown: the default in words, where it is not the field's own.
        section: heading in the help.
        positional: given without a flag.
        changes_result: whether a resumed run with another value would end in other weights.
    """

    help: str
    check: Check
    metavar: str | tuple[str, ...] | None = None
    count: int | tuple[int, int | None] | None = None
    choices: tuple[Any, ...] | None = None
    flags: tuple[str, ...] = ()
    shown: str | None = None
    section: str = ""
    positional: bool = False
    changes_result: bool = True

    def value(self, name: str, given: Any) -> Any:
        """A given value, checked and in the field's type.

        Raises:
            OdtkError: naming the flag and the values it takes.
        """
        if self.check is SWITCH:
            if not isinstance(given, bool):
                raise OdtkError(f"{flag(name)}: {given!r} is not true or false.")
            return given
        if self.count is None:
            return self.one(name, given)
        if isinstance(given, (str, int, float, os.PathLike)):
            given = [given]
        if not isinstance(given, (list, tuple)):
            raise OdtkError(f"{flag(name)}: {given!r} is not a list.")
        least, most = (self.count, self.count) if isinstance(self.count, int) else self.count
        if len(given) < least or (most is not None and len(given) > most):
            wanted = f"{least} values" if least == most else f"{least} to {most} values" if most else f"{least} or more"
            raise OdtkError(f"{flag(name)} takes {wanted}, not {len(given)}.")
        return tuple(self.one(name, part) for part in given)

    def one(self, name: str, given: Any) -> Any:
        try:
            made = self.check(given)
        except (ValueError, TypeError, OverflowError):
            raise OdtkError(f"{flag(name)}: {given!r} is not {self.check.words}.") from None
        if self.choices is not None and made not in self.choices:
            listed = ", ".join(map(str, self.choices))
            raise OdtkError(f"{flag(name)}: {given!r} is not one of {listed}.")
        return made


def option(
    default: Any, help: str, check: Check = TEXT, metavar: str | tuple[str, ...] | None = None, **more: Any
) -> Any:
    """A dataclass field that is an option; ``default`` may be dataclasses.MISSING for one that must be given."""
    return field(default=default, metadata={"option": Option(help, check, metavar, **more)})


def switch(help: str, **more: Any) -> Any:
    """An option that is off unless it is given."""
    return option(False, help, SWITCH, **more)


def flag(name: str) -> str:
    """A field's name as its flag."""
    return "--" + name.replace("_", "-")


def options(cls: type) -> dict[str, Option]:
    """The options of a settings class by field name, in order."""
    return {f.name: f.metadata["option"] for f in dataclasses.fields(cls)}


S = TypeVar("S", bound="Settings")


@dataclass(frozen=True)
class Settings:
    """Base of all: checks every value, however it was given.

    Attributes:
        PRESETS: values as a whole, by name.
        REPLACES: setting → those that a lower layer's word on it decided, and that go when it is given anew.
    """

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    REPLACES: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    def __post_init__(self) -> None:
        for name, one in options(type(self)).items():
            given = getattr(self, name)
            if given is not None:
                object.__setattr__(self, name, one.value(name, given))
            elif next(f for f in dataclasses.fields(self) if f.name == name).default is not None:
                raise OdtkError(f"{flag(name)} needs a value.")
        self.check()

    def check(self) -> None:
        """What several settings say together.

        Raises:
            OdtkError: they contradict each other.
        """

    @classmethod
    def checked(cls, values: Mapping[str, Any], source: str = "") -> dict[str, Any]:
        """Values by name, where ``-`` may stand for ``_``, each known and good.

        Args:
            source: of the values, for the sentence of an error.

        Raises:
            OdtkError: an unknown name (the nearest right one is offered), or a wrong value.
        """
        known = options(cls)
        found = {}
        where = f"{source}: " if source else ""
        for key, value in values.items():
            name = str(key).replace("-", "_")
            if name not in known:
                raise OdtkError(where + unknown(str(key), known))
            try:
                found[name] = None if value is None else known[name].value(name, value)
            except OdtkError as error:
                raise OdtkError(f"{where}{error}") from None
        return found

    @classmethod
    def of(cls: type[S], values: Mapping[str, Any]) -> S:
        """The settings of values by name: those of ``settings``, a YAML file, and of a ``preset`` lie below them.

        Raises:
            OdtkError: as checked, or something required is missing, or the values contradict each other.
        """
        own = dict(values)
        path, preset = own.pop("settings", None), own.pop("preset", None)
        file = read_settings(path) if path is not None else {}
        preset = file.pop("preset", None) if preset is None else preset
        return cls.layered(cls.presets(preset), cls.checked(file, str(path)), own)

    @classmethod
    def layered(cls: type[S], *layers: Mapping[str, Any]) -> S:
        """The settings of several layers, of which the later stand over the earlier.

        What an earlier layer says of something that a later one decides otherwise goes with it: milestones with another
        length, jitter with another size (see ``REPLACES``).

        Raises:
            OdtkError: as of.
        """
        given: dict[str, Any] = {}
        for layer in layers:
            new = cls.expanded(cls.checked(layer), given)
            for name in new:
                for other in cls.REPLACES.get(name, ()):
                    given.pop(other, None)
            given.update(new)
        for f in dataclasses.fields(cls):
            if f.default is dataclasses.MISSING and given.get(f.name) is None:
                one = f.metadata["option"]
                raise OdtkError(
                    f"{one.metavar if one.positional else flag(f.name) + ' ' + str(one.metavar)} is required."
                )
        found = cls(**given)
        object.__setattr__(found, "_given", frozenset(given))
        return found

    @classmethod
    def expanded(cls, layer: dict[str, Any], lower: Mapping[str, Any]) -> dict[str, Any]:
        """A layer with the values that a word in it stands for, below its own.

        Args:
            lower: the values of the layers below.
        """
        return layer

    @classmethod
    def presets(cls, name: str | None) -> dict[str, Any]:
        """The values of a preset; none without a name.

        Raises:
            OdtkError: there is no such preset.
        """
        if name is None:
            return {}
        if name not in cls.PRESETS:
            listed = ", ".join(cls.PRESETS) or "none for this command"
            raise OdtkError(f"There is no preset {name!r}: there is {listed}.")
        return dict(cls.PRESETS[name])

    def given(self) -> list[str]:
        """Names of the settings that were given, or, of settings made directly, that differ from their defaults."""
        known: frozenset[str] | None = getattr(self, "_given", None)
        if known is not None:
            return [name for name in options(type(self)) if name in known]
        return [f.name for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]

    def to_dict(self) -> dict[str, Any]:
        """Plain values by name, as a settings file takes them."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(self).items()}


def unknown(name: str, known: Mapping[str, Any]) -> str:
    """The sentence for a setting that does not exist."""
    near = difflib.get_close_matches(name.replace("-", "_"), known, n=1)
    return f"There is no setting {name!r}" + (f": did you mean {near[0]!r}?" if near else ".")


# ---------------------------------------------------------------------------------------------------------------------
# What several commands share


@dataclass(frozen=True, kw_only=True)
class _Devices(Settings):
    devices: str | None = option(
        None,
        "GPUs to use, one process each; cpu, or cpu:N processes",
        DEVICES,
        "N|cpu",
        shown="all visible GPUs, else cpu",
        changes_result=False,
    )


@dataclass(frozen=True, kw_only=True)
class _Loader(Settings):
    loader: str = option(
        LoaderConfig.loader, "what reads the images; torch where DALI cannot be imported", choices=("dali", "torch")
    )


@dataclass(frozen=True, kw_only=True)
class _Size(Settings):
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
class _Resize(Settings):
    resize: int | None = option(
        None, "shorter side of the image", POSITIVE_INT, "PIXELS", shown="as the model was trained"
    )
    max_size: int | None = option(
        None, "cap of the longer side", POSITIVE_INT, "PIXELS", shown="as the model was trained"
    )


@dataclass(frozen=True, kw_only=True)
class _Thresholds(Settings):
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
class _Precision(Settings):
    full_precision: bool = switch("compute in fp32 rather than in mixed precision")

    @property
    def computing_precision(self) -> str:
        return "fp32" if self.full_precision else "mixed"


@dataclass(frozen=True, kw_only=True)
class _Anchors(Settings):
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
    if settings.full_precision and settings.precision not in (None, "fp32"):
        raise OdtkError(f"--full-precision contradicts --precision {settings.precision}.")
    if settings.log_to and not settings.logdir:
        raise OdtkError(f"--log-to {' '.join(settings.log_to)} needs --logdir DIR.")


def _changed_color(name: str) -> Any:
    """How much one property of the colors varies where images are classified."""
    value = DENSE_COLOR[name]
    return option(value, "standard deviation of the change", NUMBER, "STD", section="augmentation")


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


ANY_MODEL = (
    "checkpoint, exported file, the folder of a bundle, or a model that a Triton server has: http://HOST:8000/NAME or "
    "grpc://HOST:8001/NAME"
)


def _model(suffixes: str, help: str) -> Any:
    return option(dataclasses.MISSING, help, TEXT, f"MODEL.{suffixes}", positional=True, changes_result=False)


# ---------------------------------------------------------------------------------------------------------------------
# Presets

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
# What one word on the length of a run decides.
LENGTH = ("iters", "epochs", "time", "milestones", "warmup", "burn_in", "val_iters")


# ---------------------------------------------------------------------------------------------------------------------
# The commands


@dataclass(frozen=True, kw_only=True)
class TrainSettings(_Devices, _Loader, _Anchors):
    """`odtk train`, and what a checkpoint keeps of a run."""

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = PRESETS
    REPLACES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **dict.fromkeys(("iters", "epochs", "time"), LENGTH),
        "resize": ("jitter",),
    }

    model: str = _model("pth", "checkpoint to write; training resumes from it if it exists")

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
        "what they teach: pseudo-labels, which the average of the weights gives for every point (Dense Teacher), or "
        "entropy, by which scores move away from 0.5 (ADVENT)",
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
        shown=", ".join(f"{weight:g} for {name}" for name, weight in UNLABELED_LOSSES.items()),
        section="data",
    )
    burn_in: int | None = option(
        None,
        "iterations on the labeled images alone, before the unlabeled ones join",
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
        ModelConfig.freeze_at, "ResNet stages 1 to N, the stem being 1, are not trained", COUNT, "N", section="model"
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
        if self.teacher and os.path.abspath(self.teacher) == os.path.abspath(self.model):
            raise OdtkError(f"--teacher {self.teacher}: the detector to train cannot be its own teacher.")
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
        names = ("unlabeled_loss", "unlabeled_batch", "unlabeled_weight", "burn_in")
        if not self.unlabeled and (given := [name for name in names if getattr(self, name) is not None]):
            raise OdtkError(f"{flag(given[0])} needs --unlabeled PATH.")
        if self.unlabeled and self.ema == 0 and self.unlabeled_loss != "entropy":
            raise OdtkError("--unlabeled: the pseudo-labels come from the average of the weights: leave --ema 0 out.")
        if self.burn_in is not None and self.iters is not None and self.burn_in >= self.iters:
            raise OdtkError(
                f"--burn-in {self.burn_in} leaves none of the {self.iters} iterations to --unlabeled: shorten it."
            )

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
            "ema": DENSE_EMA if dense or (self.unlabeled and self.unlabeled_loss != "entropy") else None,
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
                "unlabeled_weight": UNLABELED_LOSSES[loss],
                "burn_in": iters // 5,
            }
        kept = ("batch", "iters", "classes", "epochs", "time")
        return dataclasses.replace(self, **{k: v for k, v in follows.items() if k in kept or getattr(self, k) is None})


def as_in_train(name: str, **changes: Any) -> Any:
    """A field that another command has as TrainSettings has it, but for some attributes of its Option."""
    found = next(f for f in dataclasses.fields(TrainSettings) if f.name == name)
    one: Option = found.metadata["option"]
    return field(
        default=changes.pop("default", found.default), metadata={"option": dataclasses.replace(one, **changes)}
    )


@dataclass(frozen=True, kw_only=True)
class PretrainSettings(_Devices, _Loader):
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


@dataclass(frozen=True, kw_only=True)
class PlanSettings(TrainSettings):
    """`odtk plan`: those of `odtk train`."""

    model: str = option(
        "model.pth", "checkpoint that train would write", TEXT, "MODEL.pth", positional=True, changes_result=False
    )
    output: str | None = option(
        None, "write the settings there, for train --settings", TEXT, "YAML", shown="none", changes_result=False
    )


@dataclass(frozen=True, kw_only=True)
class InferSettings(_Devices, _Loader, _Size, _Resize, _Thresholds, _Precision):
    """`odtk infer`."""

    model: str = _model("{pth,onnx,plan,engine}", ANY_MODEL)
    images: tuple[str, ...] | None = option(
        None,
        "folder of the images, or tar files; without --annotations also files and patterns such as 'scans/*.jpg', "
        "several of them",
        TEXT,
        "PATH",
        count=(1, None),
        shown="beside the annotations, else this folder",
    )
    annotations: str | None = option(
        None,
        f"take the images of these annotations and print COCO figures: {FORMATS}",
        TEXT,
        "PATH",
        shown="every image",
    )
    tiles: tuple[int, ...] | None = option(
        None,
        "cut each image into tiles of H×W pixels that overlap, for tiny objects in large images; one number for "
        "squares; --detections then limits those of a tile",
        POSITIVE_INT,
        ("H", "W"),
        count=(1, 2),
        shown="whole images",
    )
    overlap: float = option(
        TilesConfig.overlap,
        "part of a tile that two neighbors share at least; as large as the objects",
        FRACTION,
        "FRACTION",
    )
    video: str | None = option(
        None,
        "take a video in place of images: a file, an address such as rtsp://HOST/PATH, or a camera such as /dev/video0",
        TEXT,
        "FILE|URL|DEVICE",
        shown="none",
        section="video",
    )
    every: int = option(VideoConfig.every, "detect in each N-th frame only", POSITIVE_INT, "N", section="video")
    realtime: bool = switch(
        "read a file as fast as it plays, and drop frames that wait too long, as of a camera",
        shown="off: a file drops none",
        section="video",
    )
    track: bool = switch("give the same object the same number in every frame (ByteTrack)", section="video")
    track_threshold: float = option(
        VideoConfig.track_threshold,
        "a detection that scores so much starts a track",
        FRACTION,
        "SCORE",
        section="video",
    )
    rtsp_transport: str = option(VideoConfig.transport, "what carries rtsp://", choices=("tcp", "udp"), section="video")
    output: tuple[str, ...] | None = option(
        None,
        "files to write the detections to, in COCO result form or, where they end in .parquet, as Parquet; of a video "
        ".jsonl or - (a line per frame as it comes) and .mp4 (boxes drawn, no sound)",
        TEXT,
        "PATH",
        count=(1, None),
        shown="detections.json; of a video detections.jsonl",
    )
    strict: bool = switch(
        "fail on a damaged image, or at the end of a damaged video", shown="off: they are named, and the rest is used"
    )
    override: bool = switch("begin anew where OUTPUT.parts holds detections of a run that did not end")
    batch: int | None = option(None, "images at a time over all devices", POSITIVE_INT, "N", shown="2 × devices")
    draw: str | None = option(
        None, "write the images, or the frames of a video, with their detections there", TEXT, "DIR", shown="none"
    )
    draw_threshold: float | None = option(
        None,
        "draw detections that score above this",
        FRACTION,
        "SCORE",
        shown="with annotations the one of the best F1, of a video 0.3, else the best 20 of each image",
    )

    @property
    def outputs(self) -> tuple[str, ...]:
        """The files to write."""
        return self.output or (("detections.jsonl",) if self.video else ("detections.json",))

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> InferSettings:
        """As Settings.of; a model that was named after several images, as in `--images DIR MODEL`, is the model."""
        images = values.get("images")
        if values.get("model") is None and isinstance(images, (list, tuple)) and len(images) > 1:
            last = str(images[-1])
            if os.path.splitext(last)[1] in (".pth", ".onnx", ".plan", ".engine"):
                values = {**values, "model": last, "images": images[:-1]}
        return super().of(values)

    def check(self) -> None:
        tars = all(path.endswith(".tar") for path in self.images or ())  # a shell may have written out {00..99}.tar
        if self.annotations and self.images and len(self.images) > 1 and not tars:
            raise OdtkError("--images takes one folder where --annotations says which images to use.")
        if self.overlap == 1:
            raise OdtkError("--overlap 1: tiles must share less than all of themselves, at most 0.9 or so.")
        if "overlap" in self.given() and not self.tiles:
            raise OdtkError("--overlap needs --tiles H W.")
        drawn = self.draw or (self.video and any(path.endswith(".mp4") for path in self.outputs))
        if self.draw_threshold is not None and not drawn:
            raise OdtkError("--draw-threshold needs --draw DIR, or an .mp4 of a video.")
        if "track_threshold" in self.given() and not self.track:
            raise OdtkError("--track-threshold needs --track.")
        if self.video:
            self.check_video(self.video)
        elif names := [name for name in ("every", "realtime", "track", "rtsp_transport") if name in self.given()]:
            raise OdtkError(f"{flag(names[0])} needs --video.")
        elif "-" in self.outputs:
            raise OdtkError("--output - is for --video: name a file for the detections of images.")

    def check_video(self, source: str) -> None:
        """What the other settings may be where there is a video."""
        for name in ("images", "annotations"):
            if getattr(self, name):
                raise OdtkError(f"--video takes the place of {flag(name)}: omit one of them.")
        for path in self.outputs:
            if path != "-" and os.path.splitext(path)[1] not in (".jsonl", ".mp4"):
                raise OdtkError(f"--output {path}: of a video it must end in .jsonl or .mp4, or be - (lines of JSON).")
            if path != "-" and os.path.realpath(path) == os.path.realpath(source):
                raise OdtkError(f"--output {path} is the video itself: name another file.")


@dataclass(frozen=True, kw_only=True)
class ExportSettings(_Size, _Thresholds):
    """`odtk export`."""

    model: str = _model("pth", "checkpoint")
    output: str = option(
        dataclasses.MISSING,
        "file to write, or with --bundle a new folder",
        TEXT,
        "OUT.{onnx,plan,engine}",
        positional=True,
    )
    bundle: bool = switch(
        "write a folder that a server can take: the model as ONNX, and as an engine where a GPU is, its labels, "
        "settings, figures and a manifest with the hash of every file"
    )
    batch: tuple[int, ...] = option(
        ExportConfig.batch,
        "batch sizes that the file accepts and is tuned for",
        POSITIVE_INT,
        ("MIN", "OPT", "MAX"),
        count=3,
        flags=("--dynamic-batch-opts",),
    )
    input_type: str = option(
        ExportConfig.input_type,
        "of the RGB pixels, from 0 to 255, that the file takes; DeepStream gives float32",
        choices=INPUT_TYPES,
    )
    full_precision: bool = switch("fp32", shown="fp16")
    int8: bool = switch("int8, with fp16 where it would cost accuracy", shown="fp16")
    calibration_images: str | None = option(None, "images for --int8", TEXT, "DIR", shown="none")
    calibration_batches: int | None = option(
        None, "batches of calibration images to use", POSITIVE_INT, "N", shown="as many as hold 500 images"
    )
    calibration_table: str | None = option(
        None,
        "table of --int8: read instead of images when it exists, else written",
        TEXT,
        "PATH",
        shown="beside OUT",
    )
    calibration_method: str | None = option(
        None,
        "how the range of an activation is chosen",
        choices=("entropy", "percentile", "minmax"),
        shown="percentile with the dense head, entropy with others",
    )
    opset: int = option(ExportConfig.opset, "ONNX operator set", POSITIVE_INT, "N")
    rotated_bbox: bool = switch(
        "refuse a MODEL.pth without rotated boxes", shown="the checkpoint says which boxes it has"
    )
    timing_cache: str | None = option(None, "TensorRT's timing cache, read and updated", TEXT, "PATH", shown="none")
    hardware_compatible: bool = switch(
        "an engine that every GPU from Ampere on can run, slower than one for this GPU; DLA is not supported"
    )
    version_compatible: bool = switch(
        "an engine that newer TensorRT can run too; it contains code for the CPU, which odtk runs only where the "
        "environment has ODTK_ALLOW_HOST_CODE=1"
    )
    verify: bool = switch("run the written file beside PyTorch in fp32 on --annotations and --images")
    annotations: str | None = option(None, f"annotations for --verify: {FORMATS}", TEXT, "PATH", shown="none")
    images: str | None = option(None, "images for --verify", TEXT, "DIR", shown="beside the annotations")
    max_ap_drop: float = option(
        0.3,
        "points of AP (0 to 100) that --verify allows to be lost, else exit code 2, or 3 where the images cannot tell",
        NUMBER,
        "POINTS",
    )
    fed_as: tuple[str, ...] = option(
        (),
        "--verify measures the model of a bundle as the client for Triton, and as DeepStream feeds it too; exit code 2 "
        "names a mistake in that",
        TEXT,
        "NAME",
        count=(0, None),
        choices=("triton", "deepstream"),
        flags=("--as",),
        shown="as odtk feeds it only",
    )
    verbose: bool = switch("print the log of the conversion")
    devices: str | None = option(
        None,
        "cpu: no GPU is to be used",
        DEVICES,
        "N|cpu",
        shown="an .onnx is written on the CPU, an engine on the first GPU",
    )

    def check(self) -> None:
        suffix = os.path.splitext(self.output)[1]
        if self.bundle and suffix in (".onnx", ".plan", ".engine"):
            raise OdtkError(f"--bundle writes a folder: {self.output} names a file; omit one of them.")
        if not self.bundle and suffix not in (".onnx", ".plan", ".engine"):
            raise OdtkError(f"{self.output} must end in .onnx, .plan or .engine; a folder needs --bundle.")
        if self.devices and self.devices.startswith("cpu") and suffix in (".plan", ".engine"):
            raise OdtkError(f"--devices cpu: {self.output} is built on the GPU that will run it; an .onnx needs none.")
        if self.output.endswith(".onnx"):
            for name in ("hardware_compatible", "version_compatible"):
                if getattr(self, name):
                    raise OdtkError(f"{flag(name)} is for a .plan or .engine: {self.output} runs on any GPU.")
        if self.int8 and self.full_precision:
            raise OdtkError("--int8 contradicts --full-precision.")
        if self.int8 and not self.calibration_images and not self.calibration_table:
            raise OdtkError("--int8 needs --calibration-images DIR, or a --calibration-table PATH written earlier.")
        if self.verify and not self.annotations:
            raise OdtkError("--verify needs --annotations PATH and --images DIR.")
        if self.fed_as and not (self.bundle and self.verify):
            raise OdtkError(f"--as {' '.join(self.fed_as)} needs --bundle and --verify.")
        low, best, high = self.batch
        if not low <= best <= high:
            raise OdtkError(f"--batch {low} {best} {high}: the numbers are MIN, OPT and MAX, in rising order.")


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings(Settings):
    """`odtk evaluate`."""

    detections: str = option(
        dataclasses.MISSING, "COCO results, such as `odtk infer` writes", TEXT, "DETECTIONS.json", positional=True
    )
    annotations: str = option(dataclasses.MISSING, f"annotations of the same images: {FORMATS}", TEXT, "PATH")
    images: str | None = option(
        None, "folder of the images, which give YOLO's boxes their size", TEXT, "DIR", shown="beside the annotations"
    )
    segmentation: bool = switch(
        "overlap of masks; rotated boxes count as polygons", shown="off: of boxes, rotated if they are"
    )
    evaluator: str = option(
        "pycocotools",
        "what computes the figures; faster-coco-eval (an extra package) is quicker on large sets",
        choices=("pycocotools", "faster-coco-eval"),
    )
    output: str | None = option(None, "write the figures there too", TEXT, "JSON", shown="none")
    report: str | None = option(
        None,
        "write a page for the browser: intervals, thresholds, confusion, sizes, errors with pictures",
        TEXT,
        "HTML",
        shown="none",
    )

    def check(self) -> None:
        super().check()
        if self.report and not self.report.lower().endswith((".html", ".htm")):
            raise OdtkError(f"--report {self.report}: the name of the page must end in .html.")
        if self.report and self.evaluator != "pycocotools":
            raise OdtkError(
                f"--report needs --evaluator pycocotools, as {self.evaluator} does not say what it matched."
            )


@dataclass(frozen=True, kw_only=True)
class CheckSettings(_Anchors):
    """`odtk check`."""

    annotations: str | None = option(
        None, f"annotations: {FORMATS}", TEXT, "PATH", shown="none: only looks for damaged images"
    )
    images: str | None = option(None, "folder of the images", TEXT, "DIR", shown="beside the annotations")
    resize: int = option(LoaderConfig.resize, "shorter side of the image", POSITIVE_INT, "PIXELS")
    max_size: int = option(LoaderConfig.max_size, "cap of the longer side", POSITIVE_INT, "PIXELS")
    head: str = option(
        ModelConfig.head, "to be trained; only retinanet has anchors to match", choices=HEADS, section="model"
    )
    backbone: tuple[str, ...] = option(
        ModelConfig.backbones, "whose levels the anchors stand on", TEXT, "NAME", count=(1, None), section="model"
    )
    rotated_bbox: bool = switch("boxes are [x, y, w, h, theta], theta in radians, counterclockwise")
    headers_only: bool = switch("neither decode the images to their end nor compare them with each other")
    verbose: bool = switch("print every finding", shown="off: the first of each kind, and their number")

    def check(self) -> None:
        super().check()
        if not self.annotations and not self.images:
            raise OdtkError("--annotations PATH or --images DIR is required.")
        check_rotated(self.head, self.rotated_bbox)


@dataclass(frozen=True, kw_only=True)
class BenchmarkSettings(_Devices, _Loader, _Size, _Precision):
    """`odtk benchmark`."""

    model: str = _model("{pth,onnx,plan,engine}", ANY_MODEL)
    batch: int | None = option(None, "images at a time over all devices", POSITIVE_INT, "N", shown="1 × devices")
    iters: int = option(BenchmarkConfig.iters, "timed batches", POSITIVE_INT, "N")
    warmup: int = option(BenchmarkConfig.warmup, "batches before those", COUNT, "N")
    images: str | None = option(
        None,
        "time it from these files to their detections too",
        TEXT,
        "DIR",
        shown="the model alone, on random images",
    )
    output: str | None = option(None, "write the figures there too", TEXT, "JSON", shown="none")


@dataclass(frozen=True, kw_only=True)
class InfoSettings(Settings):
    """`odtk info`."""

    model: str | None = option(
        None, "file or bundle to tell about", TEXT, "MODEL", positional=True, shown="this machine"
    )
    json: bool = switch("as JSON", shown="a table")


@dataclass(frozen=True, kw_only=True)
class VisualizeSettings(_Size, _Resize):
    """`odtk visualize`."""

    model: str | None = option(
        None, "checkpoint, for --features and --anchors", TEXT, "MODEL.pth", positional=True, shown="none"
    )
    images: str | None = option(None, "folder of the images", TEXT, "DIR", shown="beside the annotations")
    annotations: str | None = option(
        None, f"draws the ground truth of annotations: {FORMATS}", TEXT, "PATH", shown="none"
    )
    detections: str | None = option(
        None, "COCO results: draws the detections, beside the ground truth", TEXT, "JSON", shown="none"
    )
    score_threshold: float = option(0.3, "draw detections above this score", FRACTION, "SCORE")
    features: str | None = option(
        None, "draw the feature maps of this layer of MODEL.pth, for example layer4", TEXT, "LAYER", shown="none"
    )
    anchors: bool = switch("draw which anchors match which boxes")
    anchor_ious: tuple[float, ...] = option(
        (LossConfig.background_iou, LossConfig.foreground_iou),
        "bounds of the match, as in training",
        FRACTION,
        ("BG", "FG"),
        count=2,
    )
    curves: str | None = option(None, "draw the training curves of LOGDIR/metrics.jsonl", TEXT, "LOGDIR", shown="none")
    count: int = option(16, "images to draw", POSITIVE_INT, "N")
    output: str = option("pictures", "folder for the pictures", TEXT, "DIR")

    def check(self) -> None:
        rising("--anchor-ious", self.anchor_ious)
        if (self.features or self.anchors) and not self.model:
            raise OdtkError("--features and --anchors need MODEL.pth.")
        if self.anchors and not self.annotations:
            raise OdtkError("--anchors needs --annotations PATH.")


@dataclass(frozen=True, kw_only=True)
class ConvertSettings(Settings):
    """`odtk convert`."""

    source: str = option(dataclasses.MISSING, f"annotations: {FORMATS}", TEXT, "SOURCE", positional=True)
    target: str = option(
        dataclasses.MISSING,
        "a .json, or a folder to make for yolo and voc; must not exist",
        TEXT,
        "TARGET",
        positional=True,
    )
    to: str = option(dataclasses.MISSING, "format to write", TEXT, "{coco,yolo,voc}", choices=("coco", "yolo", "voc"))
    images: str | None = option(None, "folder of the images", TEXT, "DIR", shown="beside the annotations")
    box_format: str | None = option(
        None,
        "what a COCO file's boxes are instead of x y w h in pixels: x1 y1 x2 y2; x y w h in fractions of the image; "
        "or the center and the size",
        TEXT,
        choices=("xyxy", "normalized", "cxcywh"),
        flags=("--from",),
        shown="x y w h in pixels",
    )
    lossy: bool = switch("go on where TARGET's format cannot hold everything", shown="off: what would be lost is said")


@dataclass(frozen=True, kw_only=True)
class SynthSettings(Settings):
    """`odtk synth`."""

    folder: str = option(
        dataclasses.MISSING, "where to write train/, val/, train.json and val.json", TEXT, "DIR", positional=True
    )
    images: int = option(240, "images of both sets together, every fifth for validation", POSITIVE_INT, "N")
    size: tuple[int, ...] = option(
        (240, 320), "height and width of the images in pixels", POSITIVE_INT, ("H", "W"), count=(1, 2)
    )
    classes: int = option(4, "kinds of shapes", POSITIVE_INT, "N")
    object_size: tuple[float, ...] = option(
        (0.18, 0.45), "range of the shapes' widths, relative to the image's shorter side", SIDE, ("MIN", "MAX"), count=2
    )
    objects: tuple[int, ...] = option(
        (2, 7), "range of the number of shapes that an image is tried to hold", POSITIVE_INT, ("MIN", "MAX"), count=2
    )
    imbalance: float = option(1.0, "how many times as frequent the first class is as the last", RATIO, "FACTOR")
    gray: bool = switch("images without color")
    clutter: int = option(0, "pieces of lines and blobs in an image that are no objects", COUNT, "N")
    rotated: bool = switch("elongated shapes with boxes [x, y, w, h, theta]", flags=("--rotated-bbox",))
    seed: int = option(0, "of everything that is drawn at random", SEED, "N")

    def check(self) -> None:
        rising("--object-size", self.object_size)
        rising("--objects", self.objects)


def read_settings(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The values in a YAML file by name, not yet checked.

    Raises:
        OdtkError: it cannot be read, or is no YAML of names and values.
    """
    import yaml

    try:
        with open(path, encoding="utf-8") as file:
            values = yaml.safe_load(file) or {}
    except OSError as error:
        raise OdtkError(f"Cannot read the settings {path}: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise OdtkError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(values, dict):
        raise OdtkError(f"{path} holds no settings: write one `name: value` per line.")
    return values
