"""recipes/coco.sh: what it refuses, which commands it runs, and the whole of it on a small set of COCO's layout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from odtk.cli import build_parser, settings_of
from odtk.data.synthetic import synthesize

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "coco.sh"
ROWS = ("ResNet18FPN", "ResNet34FPN", "ResNet50FPN", "ResNet101FPN", "ResNet152FPN", "dense-large")
# Notes each command, and writes the figures that evaluate would.
RECORDER = """
import json, sys
open("commands", "a").write(json.dumps(sys.argv[1:]) + "\\n")
if sys.argv[1] == "evaluate":
    json.dump({"stats": {"AP": 0.3579, "AP50": 0.5}}, open(sys.argv[-1], "w"))
if sys.argv[1] == "train" and open("commands").read().count('"train"') == 2:
    sys.exit(3)
"""


@pytest.fixture
def coco_layout(tmp_path: Path) -> Path:
    """A folder of COCO's layout with ten small images."""
    drawn, folder = tmp_path / "drawn", tmp_path / "coco"
    synthesize(drawn, images=10, size=(64, 96), classes=2)
    (folder / "annotations").mkdir(parents=True)
    for part in ("train", "val"):
        (drawn / part).rename(folder / f"{part}2017")
        (drawn / f"{part}.json").rename(folder / "annotations" / f"instances_{part}2017.json")
    return folder


def run(folder: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(RECIPE.parents[1]), **environment}
    command = [str(a) for a in (RECIPE, *arguments)]
    return subprocess.run(command, cwd=folder.parent, env=settings, capture_output=True, text=True)


def recorded(folder: Path) -> list[list[str]]:
    return [json.loads(line) for line in (folder.parent / "commands").read_text().splitlines()]


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        (["ResNet19FPN"], {}, "there is no row ResNet19FPN"),
        ([], {"GPUS": "3"}, "a batch of 16 needs 1, 2, 4 or 8 GPUs"),
        ([], {"GPUS": "8", "ACCUMULATE": "4"}, "must divide 16"),
        ([], {"SUBSET": ""}, "train2017 has 8 images, COCO 2017 has 118287"),
        ([], {"ODTK": "no-such-odtk"}, "no-such-odtk"),
    ],
)
def test_what_cannot_work_is_refused(
    coco_layout: Path, arguments: list[str], environment: dict[str, str], said: str
) -> None:
    settings = {"GPUS": "1", "SUBSET": "1", "ODTK": "true", **environment}
    done = run(coco_layout, coco_layout, "out", *arguments, **settings)
    assert done.returncode == 1 and said in done.stderr and done.stderr.count("\n") == 1
    assert not (coco_layout.parent / "out").exists()


def test_missing_annotations_are_named(coco_layout: Path) -> None:
    (coco_layout / "annotations" / "instances_val2017.json").unlink()
    done = run(coco_layout, coco_layout, "out", GPUS="1", SUBSET="1", ODTK="true")
    assert done.returncode == 1 and "instances_val2017.json" in done.stderr


def test_every_row_is_trained_measured_and_resumed(coco_layout: Path) -> None:
    recorder = coco_layout.parent / "recorder.py"
    recorder.write_text(RECORDER)
    settings = {"GPUS": "4", "ACCUMULATE": "2", "SUBSET": "1", "ODTK": f"{sys.executable} {recorder}"}
    assert run(coco_layout, coco_layout, "out", **settings).returncode == 3  # the second training is interrupted
    assert [command[0] for command in recorded(coco_layout)] == ["check"] * 2 + ["train", "infer", "evaluate", "train"]
    done = run(coco_layout, coco_layout, "out", **settings)
    assert done.returncode == 0, done.stderr
    commands = recorded(coco_layout)
    trained = [Path(command[1]).stem for command in commands if command[0] == "train"]
    assert trained == [ROWS[0], ROWS[1], *ROWS[1:]]  # the second goes on, the first is not made again
    for command in commands:
        settings_of(build_parser().parse_args(command))  # every flag exists, and fits the others
    flags = commands[-3]
    assert flags[flags.index("--batch") + 1] == "8" and flags[flags.index("--devices") + 1] == "4"
    table = (coco_layout.parent / "out" / "table.md").read_text()
    assert "| ResNet50FPN | 0.358 | 0.500 | 0.358 | 0.00 | 7 |" in table and table.count("\n") == 8


@pytest.mark.slow
def test_the_whole_recipe_on_a_small_set(coco_layout: Path) -> None:
    small = "--devices cpu --loader torch --resize 64 --max-size 96 --iters 2 --backbone-weights none --val-iters 2"
    small += " --backbone ResNet18FPN --pyramid-channels 32 --head-channels 32 --head-convs 1"
    settings = {"ACCUMULATE": "8", "SUBSET": "1", "ODTK": f"{sys.executable} -m odtk"}
    settings |= {"TRAIN_FLAGS": small, "INFER_FLAGS": "--devices cpu --loader torch"}
    done = run(coco_layout, coco_layout, "out", "dense-large", **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    output = coco_layout.parent / "out"
    table = (output / "table.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in table[2:]] == ["dense-large"]
    assert isinstance(json.loads((output / "dense-large.detections.json").read_text()), list)
