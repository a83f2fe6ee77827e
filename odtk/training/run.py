"""A training run: its parts, where it stands, and how both go into a checkpoint and come back.

What a checkpoint holds of a run (Checkpoint.training):
    iteration    optimizer steps done
    optimizer    state of SGD or AdamW: momentum, moments
    scaler       state of the GradScaler
    schedule     lr, iters … of the run, for people to read; a resumed run takes its schedule from the flags, but for
                 the name of its optimizer (files without it: SGD)
    average      the weights that are trained, if the run keeps an EMA (then ``state_dict`` is the EMA), else None
    ema          the EMA, in a file whose ``state_dict`` is not the EMA, as the trained weights had the higher score
    best         highest validation score so far (RunConfig.SCORE), −1 before the first validation
    best_at      its iteration
    adapters     weights beside the detector's that only a run with a teacher has (distill.Student), else None
    unlabeled    position in the unlabeled images of a run that has some, else None
    ended        the run has ended early, see Run.is_over
    rng          state of rank 0's torch generator (the loader has a seed of its own)
    loader       position in the data
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ..categories import Category
from ..config import ModelConfig, OdtkError, PretrainConfig, RunConfig, TrainConfig, best_path
from ..data.batch import Batch, Loader
from ..data.dataset import Dataset
from ..files import check_writable, locked, remove_abandoned
from ..model.checkpoint import Checkpoint, load, load_weights
from ..model.checkpoint_faults import is_number, is_weights, weights_fault
from ..ranks import CpuGroup
from ..settings import LENGTH, PretrainSettings, TrainSettings, flag, options
from ..text import in_words, plural
from .log import Validated, print_line
from .optimizer import EMA
from .unlabeled import Unlabeled

MAY_CHANGE = {"freeze_at", "norm_eval", "grad_checkpoint", "zero_init"}  # model settings that a resumed run may change
FLAGS = {  # of ModelConfig's fields that have a flag of another name
    "backbones": "backbone",
    "scales": "anchor_scales",
    "ratios": "anchor_ratios",
    "angles": "rotated_bbox",
    "dcn_modulated": "dcn_v1",
}
SETTINGS: dict[str, type[TrainSettings] | type[PretrainSettings]] = {
    "detector": TrainSettings,
    "classifier": PretrainSettings,
}  # by RunConfig.KIND
S = TypeVar("S", TrainSettings, PretrainSettings)
# Settings that a resumed run is given anew: of these, those that it began with say nothing.
ANEW = {"model", "annotations", "devices", "override", "override_settings", "report", "output"}
SCHEDULE = ("optimizer", "lr", "iters", "schedule", "warmup", "milestones", "gamma")  # what a step depends on


@dataclass(frozen=True)
class Earlier:
    """What a run that is resumed was planned to be: it stays so, whatever the machine is now.

    Attributes:
        planned: the reason of each setting that was decided, by name.
        held_out: ids of the images that are validated on.
    """

    planned: dict[str, str] = field(default_factory=dict)
    held_out: tuple[int, ...] = ()


class Validator(Protocol):
    """What a run is validated by."""

    def run(self, network: nn.Module, autocast: torch.autocast, /) -> Validated | None:
        """Validates a network, which is not changed. All ranks must call this; those but 0 get None."""


@dataclass
class Run:
    """A training run on one rank, whatever it trains: a subclass has the losses and the words.

    Attributes:
        iters: optimizer steps of the whole run.
        network: what is trained.
        model: the network, or a module that calls it; with several ranks, the DistributedDataParallel around it.
        adapters: what is trained beside the network and is kept in the run's file only; None: nothing.
        unlabeled: images without labels that are learned from too; None: there are none.
        settings: those that the checkpoint carries, see model.checkpoint.Checkpoint.
        iteration: optimizer steps done.
        best_score: highest validation score so far, −1 before the first validation.
        best_at: iteration of that validation.
        ended: no iteration is to follow, as validation has stopped improving.
        saved_at: iteration of the newest checkpoint, 0 if there is none.
        save_time: when it was written, or when training began if that was later; seconds of time.monotonic().
    """

    config: RunConfig
    categories: tuple[Category, ...]
    device: torch.device
    iters: int
    ranks: CpuGroup
    network: nn.Module
    model: nn.Module
    ema: EMA | None
    optimizer: torch.optim.Optimizer
    autocast: torch.autocast
    scaler: torch.amp.GradScaler
    loader: Loader
    validation: Validator | None
    adapters: nn.Module | None = None
    unlabeled: Unlabeled | None = None
    settings: dict[str, Any] | None = None
    iteration: int = 0
    best_score: float = -1.0
    best_at: int = 0
    ended: bool = False
    saved_at: int = 0
    save_time: float = 0.0

    def losses(self, images: Tensor, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """The losses of a batch as (sum, normalizer) by name, see loss.normalize.

        Args:
            images: batch.images in the memory format of the network.
        """
        raise NotImplementedError

    @property
    def learns_beside(self) -> bool:
        """Whether unlabeled images have losses in this run, after its burn-in."""
        return False

    def losses_beside(self) -> tuple[dict[str, tuple[Tensor, Tensor]], int]:
        """The losses of the next batch of unlabeled images as losses() has them, none in burn-in; and its images."""
        return {}, 0

    def what(self) -> str:
        """What is trained, in a few words."""
        raise NotImplementedError

    def closing(self) -> str:
        """What to do next, in one line."""
        raise NotImplementedError

    def is_over(self) -> bool:
        """Whether config.patience evaluations have brought no better score; an equal one is as good as better."""
        patience, waited = self.config.patience, self.iteration - self.best_at
        return bool(patience) and self.best_score >= 0 and waited >= patience * self.config.val_iters

    def why_ended(self) -> str:
        """The reason of a run that has ended early."""
        return f"{plural(self.config.patience, 'evaluation')} have brought no better {self.config.SCORE} (--patience)"

    def checkpoint(self, *, raw: bool = False) -> Checkpoint:
        """The run as it stands, for a file.

        Args:
            raw: the file is to be used with the weights that are trained, and not with their EMA.
        """
        weights = self.network.state_dict()
        ema = None if self.ema is None else self.ema.network.state_dict()
        return Checkpoint(
            model=self.config.model,
            categories=self.categories,
            state_dict=weights if raw or ema is None else ema,
            training={
                "iteration": self.iteration,
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "schedule": {name: getattr(self.config, name) for name in SCHEDULE},
                "average": None if self.ema is None else weights,  # this key is in files written before: it stays
                "ema": ema if raw else None,
                "best": self.best_score,
                "best_at": self.best_at,
                "ended": self.ended,
                "adapters": None if self.adapters is None else self.adapters.state_dict(),
                "unlabeled": None if self.unlabeled is None else self.unlabeled.loader.state(),
                "rng": torch.get_rng_state(),
                "loader": self.loader.state(),
            },
            settings=self.settings,
            kind=self.config.KIND,
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continues from a checkpoint, whose trained weights the network already has (see trained_weights).

        Raises:
            OdtkError: what it holds of its run is damaged.
        """
        state = training_state(checkpoint)
        try:
            self.iteration, self.best_score = state["iteration"], float(state["best"])
            self.best_at = int(state.get("best_at", 0))  # files written before lack it
            self.ended = bool(state.get("ended")) and self.is_over()
            # The hyperparameters are this run's: what is resumed are the momenta.
            own = self.optimizer.state_dict()
            self.optimizer.load_state_dict({**own, "state": state["optimizer"]["state"]})
            if not has_fitting_states(self.optimizer, own["state"]):
                raise ValueError("the state of the optimizer belongs to other weights")
            # It differs if the run is resumed in another precision; then the scaler starts anew.
            if state["scaler"]["growth_interval"] == self.scaler.get_growth_interval():
                self.scaler.load_state_dict(state["scaler"])
            if self.adapters is not None:
                self.adapters.load_state_dict(state["adapters"])
            self.loader.restore(state["loader"])
            if self.unlabeled is not None and state.get("unlabeled") is not None:  # else they are new to this run
                self.unlabeled.loader.restore(state["unlabeled"])
            torch.set_rng_state(state["rng"])
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
            raise OdtkError(damaged_run(self.config.path, "its entries are not those of a run")) from error
        if self.ema is not None:
            load_weights(self.ema.network, state.get("ema") or checkpoint.state_dict)


def damaged_run(path: str, fault: str) -> str:
    """The sentence for a checkpoint whose weights are good, but not what it holds of its run."""
    return (
        f"{path} cannot be resumed: {fault}. Go back to an older checkpoint, or start a new run from its weights with "
        f"--fine-tune {path} and another file name."
    )


def run_fault(checkpoint: Checkpoint) -> str | None:
    """What is wrong with a checkpoint's run, as far as that can be seen before anything is built; None: nothing."""
    state = training_state(checkpoint)
    optimizer, scaler, loader, rng = (state.get(name) for name in ("optimizer", "scaler", "loader", "rng"))
    if missing := [name for name in ("iteration", "best", "average") if name not in state]:
        return f"it lacks the run's {missing[0]}"
    if state["average"] is not None and (fault := weights_fault(checkpoint.model, state["average"], checkpoint.kind)):
        return f"in the weights that are trained, {fault}"
    if state.get("ema") is not None and (fault := weights_fault(checkpoint.model, state["ema"], checkpoint.kind)):
        return f"in the EMA of the weights, {fault}"
    adapters = state.get("adapters")
    if adapters is not None and not (isinstance(adapters, dict) and all(map(is_state, adapters.values()))):
        return "its adapters to the teacher are not weights"
    if not (isinstance(optimizer, dict) and isinstance(optimizer.get("state"), dict)):
        return "it lacks the state of the optimizer"
    if not all(isinstance(one, dict) and all(map(is_state, one.values())) for one in optimizer["state"].values()):
        return "the state of the optimizer is not one of finite numbers"
    if not isinstance(scaler, dict) or not all(is_number(value) for value in scaler.values()):
        return "it lacks the state of the loss scaler"
    for position in (loader, state.get("unlabeled") or {}):
        if not isinstance(position, dict) or not all(is_number(one) and one >= 0 for one in position.values()):
            return "it lacks the position in the data"
    if not isinstance(rng, Tensor) or rng.dtype != torch.uint8 or rng.dim() != 1:
        return "it lacks the state of the random numbers"
    return None


def has_fitting_states(optimizer: torch.optim.Optimizer, new: dict[int, dict[str, Any]]) -> bool:
    """Whether an optimizer's states, once loaded, have the shapes of its parameters and the names of new ones.

    Args:
        new: the states before, by the number of the parameter; one that makes them at its first step has none.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, parameter in enumerate(parameters):
        state = optimizer.state.get(parameter, {})
        if number in new and state.keys() != new[number].keys():
            return False
        if any(v.shape not in (parameter.shape, ()) for v in state.values() if isinstance(v, Tensor)):
            return False
    return True


def is_state(value: Any) -> bool:
    """Whether a value can be part of an optimizer's state."""
    if isinstance(value, Tensor):
        return is_weights(value) and bool(torch.isfinite(value).all())
    return value is None or is_number(value)


@contextmanager
def own_files(path: str) -> Iterator[None]:
    """Keeps other runs from writing a run's files while the block runs, and removes what killed ones left.

    Raises:
        OdtkError: another run writes them, or they cannot be written.
    """
    check_writable(path)
    with locked(path, print_line):
        for name in (path, best_path(path)):
            remove_abandoned(name, exclusive=True)
        yield


def training_state(checkpoint: Checkpoint) -> dict[str, Any]:
    """Checkpoint.training of a run."""
    assert checkpoint.training is not None
    return checkpoint.training


def trained_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The weights that the optimizer works on, which ``state_dict`` does not hold if it is the EMA."""
    return training_state(checkpoint)["average"] or checkpoint.state_dict


def find_run(config: RunConfig, categories: tuple[Category, ...]) -> Checkpoint | None:
    """The run in the file config.path, to be resumed; None if there is no file, or if --override replaces it.

    Raises:
        OdtkError: the file holds no run of this model on these categories, or no file could be written there later.
    """
    check_writable(config.path)
    if config.override or not os.path.exists(config.path):
        return None
    found = load(config.path, config.KIND)
    advice = "pass --override to replace it with a new run, or pass another file name"
    if found.training is None:
        raise OdtkError(
            f"{config.path} holds a model but no training run to resume: {advice}; add --fine-tune {config.path} to "
            "start from its weights."
        )
    if fault := run_fault(found):
        raise OdtkError(damaged_run(config.path, fault))
    if config.KIND == "classifier" and found.categories != categories:
        old, new = ({category.name for category in of or ()} for of in (found.categories, categories))
        changed = [f"{'new' if name in new else 'missing'}: {name}" for name in sorted(old ^ new)]
        raise OdtkError(
            f"{config.path} was trained on other classes than those of {source_of(config)} "
            f"({', '.join(changed)}): {advice}."
        )
    if changes := model_changes(found.model, config.model):
        raise OdtkError(
            f"{config.path} is a run of another model ({', '.join(changes)}): resume it as it was, {advice}."
        )
    refuse_other_settings(config, found)
    schedule = found.training.get("schedule")
    optimizer = schedule.get("optimizer", "sgd") if isinstance(schedule, dict) else "sgd"
    if optimizer != config.optimizer:
        raise OdtkError(
            f"{config.path} was trained by --optimizer {optimizer}, whose state --optimizer {config.optimizer} cannot "
            f"continue: {advice}."
        )
    if found.categories != categories:
        raise OdtkError(f"{config.path} was trained on other categories than those of {source_of(config)}: {advice}.")
    if (found.training["average"] is None) != (config.ema is None):
        raise OdtkError(f"{config.path} was trained {'with' if config.ema is None else 'without'} --ema: {advice}.")
    return found


def source_of(config: RunConfig) -> str:
    """The path of what is trained on, for messages."""
    return str(config.data.annotations or config.data.images)


def refuse_other_settings(config: RunConfig, found: Checkpoint) -> None:
    """Raises OdtkError for settings that differ from the run's and change its result, unless they are overridden."""
    if config.settings is None or found.settings is None or config.override_settings:
        return
    cls = SETTINGS[config.KIND]
    known = options(cls)
    new = config.settings
    before = cls.of({k: v for k, v in found.settings.items() if k in known})
    # Settings that are newer than the file are those of its head.
    old = before.resolved(batch=before.batch or 1, iters=before.iters or 1, classes=found.model.classes).to_dict()
    given = {*found.settings.get("given", ()), *new.get("given", ())}  # the others follow from these
    names = [n for n, one in known.items() if one.changes_result and n in given and old[n] != new[n]]
    if names:
        changes = ", ".join(f"{flag(name)} {in_words(old[name])} → {in_words(new[name])}" for name in names)
        raise OdtkError(
            f"{config.path} was trained with other settings ({changes}): leave them as they were, or pass "
            "--override-settings to continue with the new ones."
        )


def model_changes(old: ModelConfig, new: ModelConfig) -> list[str]:
    """What a resumed run may not change about its model and does: ``--flag old → new``."""
    may = MAY_CHANGE | ({"mean", "std"} if old.backbones != new.backbones else set())  # which follow from it
    names = [field.name for field in fields(ModelConfig) if field.name not in may]
    pairs = [(name, as_given(name, getattr(old, name)), as_given(name, getattr(new, name))) for name in names]
    return [f"{flag(FLAGS.get(n, n))} {in_words(a)} → {in_words(b)}" for n, a, b in pairs if a != b]


def as_given(name: str, value: Any) -> Any:
    """A value of ModelConfig as its flag says it."""
    return bool(value) if name == "angles" else not value if name == "dcn_modulated" else value


def continued(settings: S) -> tuple[S, Earlier | None]:
    """The settings of a run that is resumed: those that were given or decided when it began, under those given now.

    Returns:
        These settings and what was decided; without a run to resume the settings as they are, and None.

    Raises:
        OdtkError: the file cannot be read.
    """
    if settings.override or not os.path.exists(settings.model):
        return settings, None
    cls = type(settings)
    old = load(settings.model, next(kind for kind, own in SETTINGS.items() if issubclass(cls, own))).settings
    if old is None:
        return settings, Earlier()
    planned: dict[str, str] = old.get("planned", {})
    now = {name: getattr(settings, name) for name in settings.given()}
    known: list[str] = [name for name in old.get("given", ()) if name in options(cls) and name not in ANEW]
    kept = {name: old[name] for name in [*planned, *known] if old.get(name) is not None}
    if {"epochs", "time"} & set(known):
        kept["iters"] = old["iters"]  # which they came to
    if {"iters", "epochs", "time"} & now.keys():
        for name in LENGTH:
            if name == "iters" or name in planned:
                kept.pop(name, None)
    if now.get("unlabeled_loss") == "none":  # then there is nothing that these are of
        for name in ("burn_in", "unlabeled_weight"):
            kept.pop(name, None)
        kept["ema"] = old.get("ema") or 0.0  # which pseudo-labels brought with them
    if isinstance(settings, TrainSettings) and settings.annotations != old.get("annotations"):
        kept.pop("images", None)
    return cls.layered({**kept, **now}), Earlier(planned, tuple(old.get("held_out", ())))


def dataset_hash(dataset: Dataset) -> str:
    """A hash of what is learned from: images by id and size, boxes, labels and categories, wherever the files lie."""
    digest = hashlib.sha256(repr([(c.id, c.name) for c in dataset.categories]).encode())
    for image in dataset.images:
        digest.update(repr((image.id, image.path.name, image.width, image.height)).encode())
        digest.update(image.boxes.tobytes() + image.labels.tobytes())
    return digest.hexdigest()


def refuse_other_data(config: RunConfig, found: Checkpoint, now: str) -> None:
    """Raises OdtkError if a resumed run's images or boxes have changed, unless that is overridden."""
    then = found.setting("data")
    if then is not None and then != now and not config.override_settings:
        what = "boxes" if config.KIND == "detector" else "classes"
        raise OdtkError(
            f"{config.path} was trained on other images or {what} than {source_of(config)} has now: take the "
            "former, or pass --override-settings to continue with these."
        )


def refuse_other_teacher(config: TrainConfig | PretrainConfig, found: Checkpoint, now: str | None) -> None:
    """Raises OdtkError if a resumed run is to be taught by other weights than before.

    Args:
        now: the hash of the teacher's weights; None: there is no teacher.
    """
    then = found.setting("teacher_hash")
    if config.settings is None or found.settings is None or then == now:
        return
    before = "had no teacher" if then is None else "had a teacher" if now is None else "was taught by other weights"
    start = "--fine-tune" if config.KIND == "detector" else "--backbone-weights"
    given = "without --teacher" if now is None else f"by --teacher {config.teacher}"
    raise OdtkError(
        f"{config.path} {before}, so it cannot be continued {given}: start a new run from its weights with "
        f"{start} {config.path} and another file name."
    )


def refuse_other_unlabeled(config: TrainConfig, found: Checkpoint, now: str | None) -> None:
    """Raises OdtkError if the unlabeled images of a resumed run have changed, unless that is overridden.

    Args:
        now: the hash of their names and sizes; None: there are none.
    """
    then = found.setting("unlabeled_data")
    if config.settings is None or found.settings is None or then == now or config.override_settings:
        return
    before = "was trained without unlabeled images" if then is None else "was trained with other unlabeled images"
    raise OdtkError(
        f"{config.path} {before}: leave --unlabeled as it was, or pass --override-settings to continue with these."
    )
