"""The kinds of attack. Each is a function of a Case, whose random numbers decide everything that it does."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import torch
import yaml

from tests.attack.judge import Outcome, Run, changes, faults_of, leftovers, snapshot
from tests.attack.materials import TRAIN
from tests.attack.mutations import mutate_bytes, mutate_lines, mutate_text, mutate_value, to_json

IMAGES = ["--images", "user/images"]
JSON = ["--annotations", "user/train.json"]
CPU = ["--devices", "cpu"]
LOOK = ["--headers-only"]
SECONDS: dict[str, float] = {}  # that each command took when it last succeeded


class Case:
    """One attack: a folder with user/ (what must not change) and out/ (what odtk writes), and its random numbers.

    Attributes:
        name: kind:seed:number, from which all that happens follows.
        faults: what went wrong.
        codes: exit codes of its commands; None of one that was killed.
    """

    def __init__(self, name: str, folder: Path, materials: Path) -> None:
        self.name, self.folder, self.materials = name, folder, materials
        self.rng = random.Random(name)
        self.user, self.out = folder / "user", folder / "out"
        self.faults: list[str] = []
        self.codes: list[int | None] = []
        self.user.mkdir(parents=True)
        self.out.mkdir()
        self.environment = {"XDG_CACHE_HOME": str(folder / "cache"), "ODTK_DEBUG": "0"}

    def give(self, *names: str) -> None:
        """Copies files or folders of the materials to user/."""
        for name in names:
            source = self.materials / name
            if source.is_dir():
                shutil.copytree(source, self.user / name)  # links are followed: the images are its own
            else:
                shutil.copy(source, self.user / name)

    def start(self, *argv: object, file_bytes: int | None = None) -> Run:
        return Run(argv, self.folder, self.environment, file_bytes)

    def odtk(self, *argv: object, keeps: Path | None = None, file_bytes: int | None = None) -> Outcome:
        """Runs a command and judges it.

        Args:
            keeps: a file in out/ that must stay as it is if the command fails.
        """
        before = snapshot(self.user)
        kept = keeps.read_bytes() if keeps and keeps.exists() else None
        outcome = self.start(*argv, file_bytes=file_bytes).wait()
        self.judge(outcome)
        self.faults += changes(before, snapshot(self.user))
        self.faults += leftovers(self.out)
        if keeps and kept is not None and not outcome.succeeded and (not keeps.exists() or keeps.read_bytes() != kept):
            self.faults.append(f"it failed and changed {keeps.name}")
        return outcome

    def judge(self, outcome: Outcome) -> None:
        self.faults += [f"{' '.join(outcome.argv)}: {fault}" for fault in faults_of(outcome)]
        self.codes.append(outcome.code)
        if outcome.succeeded:
            SECONDS[outcome.argv[0]] = outcome.seconds

    def change(self, path: Path, mutate: Callable[[random.Random, bytes], bytes]) -> None:
        path.write_bytes(mutate(self.rng, path.read_bytes()))


def change_json(rng: random.Random, data: bytes) -> bytes:
    """Most of the damage is to values, as text that is not JSON is refused early."""
    if rng.random() < 0.25:
        return mutate_text(rng, data)
    return to_json(mutate_value(rng, json.loads(data)))


# ---------------------------------------------------------------------------------------------------------------------
# Damaged files


def coco(case: Case) -> None:
    """Mutated COCO annotations, in every command that takes them."""
    case.give("images", "train.json", "detections.json")
    case.change(case.user / "train.json", change_json)
    annotations_of(case, "user/train.json")


def yolo(case: Case) -> None:
    """A mutated data.yaml, label or list of images."""
    case.give("yolo")
    files = [path for path in sorted((case.user / "yolo").rglob("*")) if path.suffix in (".txt", ".yaml")]
    for path in case.rng.sample(files, case.rng.randint(1, 3)):
        case.change(path, mutate_lines)
    annotations_of(case, "user/yolo/data.yaml")


def voc(case: Case) -> None:
    """Mutated XML files."""
    case.give("voc")
    files = sorted((case.user / "voc").rglob("*.xml"))
    for path in case.rng.sample(files, case.rng.randint(1, 3)):
        case.change(path, mutate_lines)
    annotations_of(case, "user/voc")


def annotations_of(case: Case, path: str) -> None:
    """A command on annotations; their images are where the format has them."""
    own = IMAGES if path.endswith(".json") else []
    detections = "user/detections.json"
    if not own:
        shutil.copy(case.materials / "detections.json", case.user)
    target = case.rng.choice(["coco", "yolo", "voc"])
    argv: list[object] = case.rng.choice(
        [
            ["check", "--annotations", path, *own, *case.rng.choice([[], LOOK, ["--rotated-bbox", "--verbose"]])],
            ["check", "--annotations", path, *own],
            ["convert", path, f"out/c.{'json' if target == 'coco' else target}", "--to", target, *own, "--lossy"],
            ["evaluate", detections, "--annotations", path, *own],
            ["evaluate", detections, "--annotations", path, *own, "--segmentation"],
            ["visualize", "--annotations", path, *own, "--output", "out/pictures", "--count", "2"],
            ["train", "out/m.pth", "--annotations", path, *own, *TRAIN, "--iters", "1"],
        ]
    )
    case.odtk(*argv)


def detections(case: Case) -> None:
    """Mutated detections."""
    case.give("images", "train.json", "detections.json")
    case.change(case.user / "detections.json", change_json)
    found = "user/detections.json"
    argv = case.rng.choice(
        [
            ["evaluate", found, *JSON, *IMAGES],
            ["evaluate", found, *JSON, *IMAGES, "--segmentation", "--output", "out/figures.json"],
            ["visualize", "--detections", found, *JSON, *IMAGES, "--output", "out/pictures", "--count", "2"],
        ]
    )
    case.odtk(*argv)


def images(case: Case) -> None:
    """Images with damaged bytes."""
    case.give("images", "train.json", "model.onnx")
    files = sorted((case.user / "images").iterdir())
    for path in case.rng.sample(files, case.rng.randint(1, 4)):
        case.change(path, mutate_bytes)
    infer = ["infer", "user/model.onnx", *IMAGES, "--output", "out/found.json", "--batch", "2", *CPU]
    argv = case.rng.choice(
        [
            ["check", *JSON, *IMAGES],
            infer,
            [*infer, *JSON, "--strict"],
            [*infer, "--draw", "out/pictures"],
            ["train", "out/m.pth", *JSON, *IMAGES, *TRAIN, "--iters", "4", "--skip-damaged"],
            ["visualize", *JSON, *IMAGES, "--output", "out/pictures"],
        ]
    )
    case.odtk(*argv)


def checkpoint(case: Case) -> None:
    """A .pth with damaged bytes, or with other values in it."""
    case.give("images", "train.json", "model.pth")
    path = case.user / "model.pth"
    if case.rng.random() < 0.4:
        case.change(path, mutate_bytes)
    else:
        content = torch.load(path, weights_only=True)
        part = case.rng.choice(["model", "training", "settings", "categories", "versions", "all"])
        tensors = {"state_dict": content.pop("state_dict"), **content.pop("optimizer", {})}
        if part == "all":
            content = mutate_value(case.rng, content)
        elif part in content:
            content[part] = mutate_value(case.rng, content[part])
        if isinstance(content, dict) and case.rng.random() < 0.95:
            content.update(tensors)
        torch.save(content, path)
    what = case.rng.random()
    if what < 0.3:  # continued: the file is in out/, as it is written
        path = Path(shutil.move(path, case.out / "model.pth"))
        case.odtk("train", path, *JSON, *IMAGES, *TRAIN, "--iters", "3", keeps=path)
    elif what < 0.5:
        case.odtk("export", "user/model.pth", "out/m.onnx", "--size", "64", "--full-precision")
    elif what < 0.6:
        case.odtk("train", "out/m.pth", *JSON, *IMAGES, *TRAIN, "--iters", "1", "--fine-tune", "user/model.pth")
    else:
        case.odtk("infer", "user/model.pth", *IMAGES, "--output", "out/found.json", *CPU)


def onnx_metadata(case: Case) -> None:
    """An .onnx whose metadata have other values, or whose end is missing."""
    case.give("images", "train.json", "model.onnx")
    path = case.user / "model.onnx"
    if case.rng.random() < 0.15:
        content = path.read_bytes()
        path.write_bytes(content[: case.rng.randrange(len(content))])
    else:
        model = onnx.load(path)
        for entry in model.metadata_props:
            try:
                entry.value = change_json(case.rng, entry.value.encode()).decode("utf-8", "replace")
            except ValueError:
                entry.value = mutate_text(case.rng, entry.value.encode()).decode("utf-8", "replace")
        if case.rng.random() < 0.05:
            del model.metadata_props[:]
        onnx.save(model, path)
    argv = case.rng.choice(
        [
            ["infer", "user/model.onnx", *IMAGES, "--output", "out/found.json", *CPU],
            ["infer", "user/model.onnx", *IMAGES, *JSON, "--output", "out/found.json", *CPU],
            ["benchmark", "user/model.onnx", "--iters", "1", "--warmup", "0", *CPU],
            ["visualize", "user/model.onnx", *IMAGES, "--output", "out/pictures", "--count", "2"],
        ]
    )
    case.odtk(*argv)


def calibration_table(case: Case) -> None:
    """A calibration table with other values."""
    case.give("model.pth")
    table = next(
        path for path in sorted(case.materials.iterdir()) if path.name.startswith("int8") and path.suffix != ".onnx"
    )
    shutil.copy(table, case.user / "table.json")
    case.change(case.user / "table.json", change_json)
    own = ["--int8", "--calibration-table", "user/table.json"]
    case.odtk("export", "user/model.pth", "out/m.onnx", "--size", "64", *own)


def settings(case: Case) -> None:
    """A file of settings with other values."""
    values: dict[str, Any] = {
        "annotations": "user/train.json",
        "images": "user/images",
        "head": "dense",
        "optimizer": "sgd",
        "lr": 0.01,
        "milestones": [1],
        "gamma": 0.1,
        "anchor-ious": [0.4, 0.5],
        "augment-crop": 0.5,
        "augment-hue": 0.1,
        "augment-free-rotate": [0, 3],
        "clip-grad": 5,
        "ema": 0.9,
        "seed": 1,
        "skip-damaged": True,
        "accumulate": 1,
    }
    case.give("images", "train.json")
    content = yaml.safe_dump(values, allow_unicode=True).encode()
    if case.rng.random() < 0.4:
        content = mutate_text(case.rng, content)
    else:
        mutated = mutate_value(case.rng, values)
        content = yaml.safe_dump(mutated, allow_unicode=False).encode("utf-8", "surrogatepass")
    (case.user / "settings.yaml").write_bytes(content)
    # So that the run stays small, whatever the file says.
    kept = [*TRAIN, "--iters", "1", "--accumulate", "1", "--head", "dense"]
    argv = case.rng.choice(
        [
            ["train", "out/m.pth", "--settings", "user/settings.yaml", *kept],
            ["train", "out/m.pth", "--settings", "user/settings.yaml", *kept],
            ["check", "--settings", "user/settings.yaml"],
        ]
    )
    case.odtk(*argv)


# ---------------------------------------------------------------------------------------------------------------------
# A hostile machine


def killed(case: Case) -> None:
    """SIGKILL at a random moment of a training that saves after each iteration, or of infer; then the same again."""
    case.give("images", "train.json", "model.onnx")
    if case.rng.random() < 0.3:
        argv: list[object] = ["infer", "user/model.onnx", *IMAGES, "--output", "out/found.json", "--batch", "1", *CPU]
        result = case.out / "found.json"
    else:
        own = [*JSON, *IMAGES, "--val-annotations", "user/train.json", "--val-iters", "1"]
        argv = ["train", "out/m.pth", *own, *TRAIN, "--iters", "6"]
        result = case.out / "m.pth"
    before = snapshot(case.user)
    for _ in range(case.rng.randint(1, 3)):
        run = case.start(*argv)
        time.sleep(case.rng.uniform(0, 1.2) * seconds_of(argv))
        run.kill()
        outcome = run.wait()
        if not outcome.killed:  # it was quicker
            case.judge(outcome)
        if result.exists():
            check_whole(case, result)
    outcome = case.odtk(*argv)
    if not outcome.succeeded:
        case.faults.append(f"after a SIGKILL the same command fails: {outcome.stderr.strip()}")
    case.faults += changes(before, snapshot(case.user))
    check_whole(case, result)


def seconds_of(argv: list[object]) -> float:
    """About how long a command takes here and now: as long as the last one that succeeded."""
    return SECONDS.get(str(argv[0]), 3.0)


def check_whole(case: Case, path: Path) -> None:
    """A file under its own name is complete."""
    try:
        if path.suffix == ".json":
            json.loads(path.read_bytes())
        elif path.suffix == ".pth":
            torch.load(path, weights_only=True)
        elif path.suffix == ".onnx":
            onnx.checker.check_model(onnx.load(path))
    except Exception as error:
        case.faults.append(f"{path.name} is not whole: {type(error).__name__}: {error}")


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[bool]:
    """A disk of ``size`` bytes at a folder, and whether it could be mounted, which needs root."""
    folder.mkdir(exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "odtk-attack", folder], capture_output=True)
    try:
        yield mounted.returncode == 0
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", "-l", folder], check=True)


def writers(case: Case, target: str) -> tuple[list[object], str]:
    """A command that writes into a folder, and the name of its result."""
    infer = ["infer", "user/model.onnx", *IMAGES, *CPU]
    choices: list[tuple[list[object], str]] = [
        (["train", f"{target}/m.pth", *JSON, *IMAGES, *TRAIN, "--iters", "2"], "m.pth"),
        (["train", "out/m.pth", *JSON, *IMAGES, *TRAIN, "--iters", "2", "--logdir", f"{target}/log"], "log"),
        ([*infer, "--output", f"{target}/found.json"], "found.json"),
        ([*infer, "--output", "out/found.json", "--draw", f"{target}/pictures"], "pictures"),
        (["convert", "user/train.json", f"{target}/voc", "--to", "voc", *IMAGES, "--lossy"], "voc"),
        (["convert", "user/train.json", f"{target}/c.json", "--to", "coco", *IMAGES, "--lossy"], "c.json"),
        (["evaluate", "user/detections.json", *JSON, "--output", f"{target}/figures.json"], "figures.json"),
        (["visualize", *JSON, *IMAGES, "--output", f"{target}/pictures"], "pictures"),
        (["synth", f"{target}/synth", "--images", "5", "--size", "64"], "synth"),
        (["export", "user/model.pth", f"{target}/m.onnx", "--size", "64", "--full-precision"], "m.onnx"),
    ]
    return case.rng.choice(choices)


def full_disk(case: Case) -> None:
    """A disk that is full after a few bytes or megabytes, where a result of before may lie already."""
    case.give("images", "train.json", "detections.json", "model.onnx", "model.pth")
    size = int(4096 * 2 ** case.rng.uniform(0, 13.5))
    argv, name = writers(case, "full")
    if case.rng.random() < 0.3:
        case.environment["XDG_CACHE_HOME"] = str(case.folder / "full" / "cache")
    with small_disk(case.folder / "full", size) as mounted:
        result = case.folder / "full" / name
        before = None
        if result.suffix == ".json" and case.rng.random() < 0.5 and argv[0] != "convert":
            result.write_text("[]")
            before = "[]"
        outcome = case.odtk(*argv, file_bytes=None if mounted else size)
        case.faults += leftovers(case.folder / "full")
        if result.is_file() and result.stat().st_size and (outcome.succeeded or before is None):
            check_whole(case, result)
        if before is not None and not outcome.succeeded and result.read_text() != before:
            case.faults.append(f"a full disk cost the {name} of before")


def read_only(case: Case) -> None:
    """A disk on which nothing can be written: for the results, or for what is only read."""
    case.give("images", "train.json", "detections.json", "model.onnx", "model.pth")
    argv, _ = writers(case, case.rng.choice(["out", "still"]))
    with small_disk(case.folder / "still", 64 << 20) as mounted:
        shutil.move(case.user, case.folder / "still" / "user")
        case.user.symlink_to(case.folder / "still" / "user")
        if not mounted:
            os.chmod(case.folder / "still", 0o555)
        else:
            subprocess.run(["mount", "-o", "remount,ro", case.folder / "still"], check=True)
        outcome = case.odtk(*argv)
        if not mounted:
            os.chmod(case.folder / "still", 0o755)
        to_still = any(str(part).startswith("still") for part in argv)
        if to_still and outcome.succeeded and "--logdir" not in argv and (mounted or os.geteuid()):
            case.faults.append(f"{argv[0]} says that it wrote on a disk on which nothing can be written")
        if not to_still and not outcome.succeeded:
            case.faults.append(f"{argv[0]} fails as its inputs cannot be written: {outcome.stderr.strip()}")


def vanishing(case: Case) -> None:
    """Files of the user's that vanish or shrink while a command runs."""
    case.give("images", "train.json", "detections.json", "model.onnx", "model.pth")
    argv, _ = writers(case, "out")
    run = case.start(*argv)
    files = sorted(path for path in case.user.rglob("*") if path.is_file())
    time.sleep(case.rng.uniform(0, 0.9) * seconds_of(argv))
    for path in case.rng.sample(files, case.rng.randint(1, 5)):
        if case.rng.random() < 0.7:
            path.unlink()
        else:
            os.truncate(path, case.rng.randrange(path.stat().st_size))
    before = snapshot(case.user)
    case.judge(run.wait())
    case.faults += changes(before, snapshot(case.user))
    case.faults += leftovers(case.out)


def two_runs(case: Case) -> None:
    """Two runs at once that write the same file."""
    case.give("images", "train.json", "detections.json", "model.onnx", "model.pth")
    argv, name = writers(case, "out")
    before = snapshot(case.user)
    first = case.start(*argv)
    time.sleep(case.rng.uniform(0, 1) * case.rng.choice([0.0, 0.1, 1.0]) * seconds_of(argv))
    second = case.start(*argv)
    outcomes = [first.wait(), second.wait()]
    for outcome in outcomes:
        case.judge(outcome)
    if not any(outcome.succeeded for outcome in outcomes):
        case.faults.append(f"neither of two runs succeeded: {[outcome.stderr for outcome in outcomes]}")
    case.faults += changes(before, snapshot(case.user))
    case.faults += leftovers(case.out)
    if (case.out / name).is_file():
        check_whole(case, case.out / name)


KINDS: dict[str, Callable[[Case], None]] = {
    "coco": coco,
    "yolo": yolo,
    "voc": voc,
    "detections": detections,
    "images": images,
    "checkpoint": checkpoint,
    "onnx": onnx_metadata,
    "table": calibration_table,
    "settings": settings,
    "killed": killed,
    "full-disk": full_disk,
    "read-only": read_only,
    "vanishing": vanishing,
    "two-runs": two_runs,
}
