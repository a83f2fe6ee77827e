"""Attacks odtk for some minutes, with damaged files and on a hostile machine, and lists what it did wrong.

    python -m tests.attack [--minutes 20] [--seed 0] [--kinds coco images …]
    python -m tests.attack --case coco:0:17          one case again; its files are kept and named

Everything happens in a temporary folder. Each case is named kind:seed:number, from which all its random numbers follow;
every kind gets the same time. The files of a case that failed are kept: its inputs, and the arguments and words of each
command.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from tests.attack import materials
from tests.attack.kinds import KINDS, Case

IMPORTED: tuple[str, ...] = (
    "onnxruntime",
    "onnxscript",
    "pycocotools.cocoeval",
    "tensorboardX",
    "odtk.api",
    "odtk.evaluation.pictures",
)
IMPORTED += ("odtk.evaluation.verify", "odtk.evaluation.visualize", "odtk.exporting.export", "odtk.inference.infer")
IMPORTED += ("odtk.training.train",)


def attack(name: str, folder: Path, made: Path) -> Case:
    """One case, after it ran; its files are in ``folder``."""
    case = Case(name, folder, made)
    try:
        KINDS[name.split(":")[0]](case)
    except Exception:  # a fault of the attack, or a file that odtk should have left
        case.faults.append(f"the attack itself failed: {traceback.format_exc()[-1000:]}")
    return case


def warm_up() -> None:
    """Imports what every case would import; torch must start no threads here, as a fork has none of them."""
    torch.set_num_threads(1)
    for name in IMPORTED:
        importlib.import_module(name)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.attack", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, metavar="N", help="number of the first case of each kind")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS), metavar="KIND")
    parser.add_argument("--case", help="kind:seed:number")
    args = parser.parse_args()
    if args.case and args.case.split(":")[0] not in KINDS:
        parser.error(f"--case {args.case}: the kinds are {', '.join(KINDS)}")
    print(f"Seed {args.seed}; making the files to attack …", flush=True)
    warm_up()
    top = Path(tempfile.mkdtemp(prefix="odtk-attack-"))
    made = top / "materials"
    materials.make(made)
    if args.case:
        faults = attack(args.case, top / "case", made).faults
        print("\n".join(faults) or "No fault.", f"Its files are in {top / 'case'}.", sep="\n")
        return int(bool(faults))

    tallies = {kind: Tally(args.first) for kind in args.kinds}
    end = time.monotonic() + args.minutes * 60
    said = time.monotonic()
    while time.monotonic() < end:
        kind = min(tallies, key=lambda kind: tallies[kind].seconds)  # each gets the same time, not as many cases
        tallies[kind].run(kind, args.seed, top, made)
        if time.monotonic() - said > 30:
            said = time.monotonic()
            print(f"{(end - said) / 60:5.1f} minutes left: {summed(tallies.values())}", flush=True)
    for kind, tally in tallies.items():
        print(f"{kind:12} {tally}")
    print(f"seed {args.seed}: {summed(tallies.values())}")
    failed = any(tally.failed for tally in tallies.values())
    if not failed:
        shutil.rmtree(top)
    return int(failed)


@dataclass
class Tally:
    """What became of the cases of one kind.

    Attributes:
        number: of the next case.
        cases: that ran.
        failed: of these, with a fault.
        commands: of odtk that ran, and of these those that ended with 0 (the others refused what they were given).
    """

    number: int
    cases: int = 0
    failed: int = 0
    commands: int = 0
    succeeded: int = 0
    seconds: float = 0.0

    def run(self, kind: str, seed: int, top: Path, made: Path) -> None:
        """Runs the next case; its files are removed if it has no fault, which is else printed."""
        name = f"{kind}:{seed}:{self.number}"
        folder = top / name.replace(":", "-")
        started = time.monotonic()
        case = attack(name, folder, made)
        self.seconds += time.monotonic() - started
        self.number, self.cases = self.number + 1, self.cases + 1
        self.commands, self.succeeded = self.commands + len(case.codes), self.succeeded + case.codes.count(0)
        if case.faults:
            self.failed += 1
            print(f"FAILED {name} ({folder})", *case.faults, sep="\n  ", flush=True)
        else:
            shutil.rmtree(folder)

    def __str__(self) -> str:
        refused = self.commands - self.succeeded
        return (
            f"{self.cases:5} cases, {self.succeeded:5} commands succeeded, {refused:5} refused, {self.failed:3} failed"
        )


def summed(tallies: Iterable[Tally]) -> str:
    total = Tally(0)
    for tally in tallies:
        for field in fields(Tally):
            setattr(total, field.name, getattr(total, field.name) + getattr(tally, field.name))
    return " ".join(str(total).split())


if __name__ == "__main__":
    os.environ.pop("ODTK_DEBUG", None)
    sys.exit(main())
