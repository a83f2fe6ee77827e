"""How a run begins: rank 0 plans it, trial steps show what the plan could not know, then it is trained."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from ..config import LoaderConfig, TrainConfig
from ..ranks import CpuGroup
from ..settings import LENGTH, TrainSettings, seconds_of
from .log import Meter, print_line
from .plan import Plan, plan
from .rules import SHORT_BATCH, Decision, Machine, count_evaluations, enough_steps, too_few_steps, without_evaluations
from .run import Earlier
from .train import set_up, step, train
from .training_set import TrainingSet

TRIAL_STEPS, UNTIMED_STEPS = 20, 3  # the first steps are slower: memory is taken, kernels are chosen
TRIAL_SHARE = 0.05  # of the time, after which they end early
MEMORY_STEPS = 3  # that show whether a batch fits


@dataclass(frozen=True)
class Task:
    """What every process of `odtk train` is told.

    Attributes:
        settings: those given; of a run that is resumed, over those that it began with.
        machine: that the plan is for.
        earlier: of a run that is resumed.
        data: where launch() writes this process's rank and device; its other fields come with the plan.
    """

    settings: TrainSettings
    machine: Machine
    earlier: Earlier | None = None
    data: LoaderConfig = field(default_factory=lambda: LoaderConfig(images=""))


def begin(task: Task, rank: int = 0, world: int = 1) -> None:
    """Plans, tries and trains; all ranks go by what rank 0 has decided.

    Raises:
        OdtkError: as plan() and train().
    """
    began = time.monotonic()
    ranks = CpuGroup(world)
    source = TrainingSet.of(task.settings)
    made: Plan = ranks.from_first(lambda: plan(task.settings, task.machine, task.earlier, source=source))
    if task.earlier is None:
        made = fit_batch(made, task, source, ranks)
    if made.settings.time is not None:
        limit = TRIAL_SHARE * seconds_of(made.settings.time)
        seconds = step_seconds(own(made.config, task), source, ranks, rank, world, limit)
        made = ranks.from_first(lambda: with_length(made, task, source, seconds, time.monotonic() - began))
    if rank == 0:
        for line in made.lines():
            print_line(line)
    train(own(made.config, task), rank, world, source)


def own(config: TrainConfig, task: Task) -> TrainConfig:
    """The run as this process has it."""
    place = {name: getattr(task.data, name) for name in ("rank", "world", "device")}
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **place))


# ---------------------------------------------------------------------------------------------------------------------
# Trial steps


def fit_batch(made: Plan, task: Task, source: TrainingSet, ranks: CpuGroup) -> Plan:
    """The plan, whose batch is halved until the memory of every GPU holds it, unless it was given.

    Each process tries alone, so that none waits for another that has failed.

    Raises:
        torch.OutOfMemoryError: not even one image fits.
    """
    while task.machine.kind == "cuda" and "batch" not in made.given and made.decisions:
        config = own(made.config, task)
        try:
            trial(config, source, 0, 1, MEMORY_STEPS)
            failed = False
        except torch.OutOfMemoryError:
            if config.data.batch == 1:
                raise
            failed = True
        if not ranks.all_max(failed)[0]:
            break
        torch.cuda.empty_cache()
        total = config.data.batch // 2 * task.machine.processes
        smaller = Decision({"batch": total}, "what the memory holds: a trial step with twice as many did not fit")
        made = ranks.from_first(functools.partial(replan, made, task, source, smaller))
    return made


def step_seconds(
    config: TrainConfig, source: TrainingSet, ranks: CpuGroup, rank: int, world: int, limit: float
) -> float:
    """Seconds of an iteration, of the slowest rank, by trial steps of ``limit`` seconds or little more."""

    def is_late(seconds: float) -> bool:
        return bool(ranks.all_max(seconds > limit)[0])

    seconds = trial(config, source, rank, world, TRIAL_STEPS, UNTIMED_STEPS, is_late)
    return ranks.all_max(math.ceil(seconds * 1e6))[0] / 1e6


def trial(
    config: TrainConfig,
    source: TrainingSet,
    rank: int,
    world: int,
    steps: int,
    untimed: int = 0,
    is_late: Callable[[float], bool] = lambda seconds: False,
) -> float:
    """Seconds of an iteration, from some of a run that is thrown away.

    Args:
        steps: timed ones.
        untimed: those before them.
        is_late: whether to end after a step, by the seconds since the first began; alike on all ranks. Not asked
            before the second step, which is then the one that is timed.

    Raises:
        OdtkError: as train().
        torch.OutOfMemoryError: the batch is too large for a GPU.
    """
    apart = dataclasses.replace(config, override=True, val_data=None, logdir=None, post_metrics=None, burn_in=0)
    run = set_up(apart, rank, world, source, quiet=True)
    meter, batches = Meter(run.device), iter(run.loader)
    run.model.train()
    began = started = time.monotonic()
    timed = 0
    try:
        for number in range(untimed + steps):
            if number in (1, untimed):
                wait_for(run.device)
                started, timed = time.monotonic(), 0
            step(run, batches, meter, world)
            timed += 1
            if number > 0 and is_late(time.monotonic() - began):
                break
        wait_for(run.device)
    finally:
        batches.close()  # type: ignore[attr-defined]  # ends the loader's threads
        if run.unlabeled is not None:
            run.unlabeled.close()
    return (time.monotonic() - started) / timed


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def with_length(made: Plan, task: Task, source: TrainingSet, seconds: float, spent: float) -> Plan:
    """The plan once --time has become iterations.

    Args:
        seconds: of an iteration.
        spent: seconds of the time that are gone.
    """
    given, batch = made.settings.time, made.config_settings().batch
    assert given is not None and batch is not None
    found = []
    possible, evaluation = (seconds_of(given) - spent) / seconds, made.evaluation
    if any("batch" in decision.values for decision in made.decisions):
        images, processes = possible * batch, task.machine.processes
        least = SHORT_BATCH * (processes if task.machine.kind == "cuda" else 1)
        smaller = enough_steps(images, batch, least, processes)
        if smaller < batch:
            found = [Decision({"batch": smaller}, too_few_steps(images, batch))]
            times = batch / smaller
            possible, seconds, evaluation = times * possible, seconds / times, times * evaluation
    iters = int(without_evaluations(possible, evaluation))
    evaluations = count_evaluations(possible, evaluation) * evaluation * seconds
    reason = (
        f"--time {given} allows them, at {seconds:.2f} s for one by trial steps; {spent:.0f} s are gone, evaluations "
        f"take about {evaluations:.0f} s"
    )
    return replan(made, task, source, *found, Decision({"iters": iters}, reason), measured=seconds)


def replan(made: Plan, task: Task, source: TrainingSet, *new: Decision, measured: float | None = None) -> Plan:
    """The plan with decisions that stand over it, and what follows from them anew; ``measured`` as in plan."""
    later = {*LENGTH, "ema", *(name for decision in new for name in decision.values)} - set(made.given)
    kept = [
        dataclasses.replace(old, values=values)
        for old in made.decisions
        if (values := {name: value for name, value in old.values.items() if name not in later})
    ]
    return plan(task.settings, task.machine, task.earlier, (*kept, *new), source, measured)
