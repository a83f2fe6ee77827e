"""From the settings that were given to those of one run: what follows from the data and the machine.

The rules are in rules.py. What follows from other settings alone is worked out in settings/train.py.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import yaml

from ..config import OdtkError, PostprocessConfig, TrainConfig
from ..data.coco import categories_of
from ..data.fingerprint import Fingerprint, fingerprint
from ..data.split import validation_split
from ..launch import parse_devices, under_torchrun
from ..model.sizes import gflops_per_megapixel
from ..model.weights import PACKAGES, packaged_files
from ..settings import TrainSettings
from ..text import plural
from .configs import model_config, train_config
from .rules import Decision, Machine, Situation, count_evaluations, decide, is_planned
from .run import Earlier
from .training_set import TrainingSet


@dataclass(frozen=True)
class Plan:
    """A run before it begins.

    Attributes:
        given: names of the settings that were given.
        settings: what was given, over what was decided.
        decisions: in the order in which they were taken; of a run that is resumed the length alone, by --time.
        config: the run; its length under --time is an estimate.
        data: the dataset's fingerprint, where it was needed.
        expectation: what the run takes on this machine, in a sentence; empty without decisions.
        evaluation: what an evaluation takes, in iterations.
    """

    given: tuple[str, ...]
    settings: TrainSettings
    decisions: tuple[Decision, ...]
    config: TrainConfig
    data: Fingerprint | None = None
    expectation: str = ""
    evaluation: float = 0.0

    def lines(self) -> list[str]:
        """What people read: the data, each decision with its reason, and what to expect."""
        if not self.decisions:
            return []
        found = [] if self.data is None else [f"data: {line}" for line in self.data.lines()]
        lines = [*found, *(f"plan: {decision.line()}" for decision in self.decisions)]
        if self.expectation:
            lines.append(f"expected: {self.expectation}")
        most = max(self.data.per_image, default=0) if self.data is not None else 0
        if most > (kept := PostprocessConfig.detections):
            enough = math.ceil(most / 100) * 100
            lines.append(
                f"note: images have up to {most:.0f} boxes: give infer and export --detections {enough}, not {kept}"
            )
        return lines

    def to_yaml(self) -> str:
        """A file for --settings that makes the same run: first what was given, then what was decided and why, then what
        follows. Paths are kept as they were given."""
        decided = {name: d.reason for d in self.decisions for name in d.values}
        resolved = dataclasses.replace(self.config_settings(), model=self.settings.model).to_dict()
        if self.settings.time is not None:  # the length, and what follows from it, is not known yet
            unknown = {"iters", "warmup", "val_iters", "milestones", "burn_in"} - {*self.given}
            resolved |= dict.fromkeys(unknown) | {"time": self.settings.time}
        lines = ["# A plan of odtk: odtk train MODEL.pth --settings THIS_FILE"]
        parts = {"given": self.given, "decided": tuple(decided), "following from these": tuple(resolved)}
        done: set[str] = {"model", "override", "override_settings"}
        for title, names in parts.items():
            own = [name for name in names if name not in done and resolved.get(name) is not None]
            done.update(own)
            lines += ["", f"# {title}"] if own else []
            for name in own:
                value = yaml.safe_dump(resolved[name], default_flow_style=True, width=10**9, allow_unicode=True)
                value = value.removesuffix("...\n").strip()  # YAML's end of a document that is a single value
                lines.append(f"{name}: {value}" + (f"  # {decided[name]}" if name in decided else ""))
        return "\n".join(lines) + "\n"

    def config_settings(self) -> TrainSettings:
        """Every setting with its value."""
        values = self.config.settings or {}
        known = {f.name for f in dataclasses.fields(TrainSettings)}
        return TrainSettings(**{name: value for name, value in values.items() if name in known})


def plan(
    settings: TrainSettings,
    machine: Machine,
    earlier: Earlier | None = None,
    tried: Sequence[Decision] = (),
    source: TrainingSet | None = None,
    measured: float | None = None,
) -> Plan:
    """The run that settings, data and machine give.

    Args:
        settings: what was given; of a run that is resumed also what was decided when it began.
        earlier: of a run that is resumed: no rule applies to it, and what it held out stays so.
        tried: decisions that trial steps led to, and those that they left as they were. They stand over the rules, and
            a length among them over --time.
        source: the images to train on, which may have been read; None reads them.
        measured: seconds of an iteration by trial steps; None: they are estimated.

    Raises:
        OdtkError: annotations that cannot be read, or a batch that cannot be shared out.
    """
    source = source or TrainingSet.of(settings)
    content, images, _, tars = source.annotations
    classes = settings.classes or count_categories(content, settings.annotations)
    given = tuple(settings.given())
    if tried:
        stated = {name: getattr(settings, name) for name in given}
        found = {name: value for decision in tried for name, value in decision.values.items()}
        if "iters" in found:
            stated.pop("time", None)
        settings = TrainSettings.layered({**found, **stated})
    decisions, held_out = list(tried), earlier.held_out if earlier is not None else ()
    situation, expectation, evaluation = None, "", 0.0
    if settings.time is not None or (earlier is None and (is_planned(settings) or settings.val_share)):
        situation = Situation(settings, fingerprint(source.dataset), machine, gflops_of)
    if situation is not None and earlier is None:
        decisions += decide(situation)
        settings = situation.settings
        if settings.val_share:
            _, aside = validation_split(source.dataset, situation.data, share=settings.val_share)
            held_out = tuple(image.id for image in aside.images)
    count = len(content["images"]) - len(held_out)
    batch = settings.batch or 2 * machine.processes
    iters = settings.iters or TrainConfig.iters
    if situation is not None:
        situation.settings = dataclasses.replace(settings, batch=batch)
        evaluation = situation.evaluation
        expectation = expected(situation, measured) if decisions else ""
    if settings.epochs is not None:
        iters = max(1, math.ceil(settings.epochs * count / (batch * settings.accumulate)))
    elif settings.time is not None and situation is not None:
        iters = situation.iterations()
    reasons = earlier.planned if earlier is not None else {}
    reasons = reasons | {name: d.reason for d in decisions for name in d.values}
    config = train_config(
        settings.resolved(batch=batch, iters=iters, classes=classes), machine.processes, str(tars or images), held_out
    )
    kept = {**(config.settings or {}), "given": list(given), "planned": reasons, "held_out": list(held_out)}
    config = dataclasses.replace(config, settings=kept)
    data = situation.data if situation is not None else None
    return Plan(given, settings, tuple(decisions), config, data, expectation, evaluation)


def gflops_of(settings: TrainSettings) -> float:
    """10⁹ operations for a megapixel of the model that settings make."""
    settings = dataclasses.replace(settings, burn_in=None)  # it would be compared with the iterations below
    return gflops_per_megapixel(model_config(settings.resolved(batch=1, iters=1, classes=settings.classes or 1)))


def expected(s: Situation, measured: float | None) -> str:
    """What a run takes, in a sentence; ``measured`` as in plan."""
    settings = s.settings
    iters = s.iterations()
    seconds = measured or s.iteration_seconds(s.pixels)
    seconds *= iters + count_evaluations(iters, s.evaluation) * s.evaluation
    time = f"{seconds / 3600:.1f} hours" if seconds >= 2 * 3600 else plural(max(1, round(seconds / 60)), "minute")
    memory = s.bytes(s.batch / settings.accumulate / s.machine.processes) / 2**30
    gpu = "GPU " if s.machine.kind == "cuda" else ""
    length = "; the first steps are timed, and count the iterations" if settings.time else ""
    shorter = "" if settings.time or seconds < 600 else "; --time 8m makes it a short one"
    return (
        f"about {time} on this machine ({s.machine}) for {iters} iterations, {iters * s.batch} images seen, about "
        f"{memory:.1f} GiB of {gpu}memory{length}{shorter}"
    )


def this_machine(settings: TrainSettings, processes: int) -> Machine:
    """What this machine gives to a run of so many processes."""
    kind = parse_devices(settings.devices)[0]
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if under_torchrun() else 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = min(allowed, torch.get_num_threads() * local)
    memory = torch.cuda.get_device_properties(0).total_memory if kind == "cuda" else main_memory() // processes
    installed = (name for name, package in PACKAGES.items() if packaged_files(package))
    return Machine(kind, processes, cores, memory, frozenset(f"{name}FPN" for name in installed))


def main_memory() -> int:
    """Bytes of this machine's memory, or of what a container may use of it."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            with open(path, encoding="ascii") as file:
                found = min(found, int(file.read()))
        except (OSError, ValueError):  # no such file, or "max"
            pass
    return found


def count_categories(content: dict, path: str) -> int:
    """Number of categories of COCO annotations: those listed, or those that the annotations name."""
    categories = categories_of(content)
    if not categories:
        raise OdtkError(f"The annotations {path} have no categories: add them, one per class.")
    return len({str(category.get("id")) for category in categories})  # a wrong id is refused with the dataset
