"""What a teacher, unlabeled images and entropy are worth on BCCD: AP with and without, at the same iterations.

    python benchmarks/teach.py BCCD --teacher TEACHER.pth [--parts teacher labels stain camera] [--seeds 0 1]
        [--iters 512] [--output teach] [-- --devices cpu --batch 8]

BCCD is the folder that holds train.json, val.json, train/ and val/; what follows -- goes to every `odtk train`.
    teacher   the variant nano alone, and with the teacher (--teacher)
    labels    nano on a tenth and on 30 % of the labels alone, and with the other images as --unlabeled: their colors
              alone, with pseudo-labels, and with entropy
    stain     nano on all labels, scored on val images of another stain, blurred and noisy (made here), alone, and with
              the training images changed alike as --unlabeled; no label of the changed images is used
    camera    the same with images of another camera: darker, yellow, with vignetting, slightly blurred and noisy

Each run trains on the labels named, all iterations, and its last checkpoint is scored on val by pycocotools. Writes
into --output: the sets, runs.jsonl (runs that are in it are not repeated) and table.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from accuracy import call, score
from PIL import Image, ImageFilter

SHARES = (10, 30)  # percent of the labels
LOSSES = {"colors": "none", "pseudo-labels": "pseudo-labels", "entropy": "entropy"}  # names in the table
# RGB of another microscope and stain: less blue, a warm ground.
STAIN = np.array([[0.75, 0.35, 0.05], [0.15, 0.65, 0.05], [0.05, 0.35, 0.45]])
OFFSET = np.array([-10.0, 5.0, 0.0])
# A camera of another tone curve and white balance.
GAMMA, BALANCE = np.array([1.8, 1.4, 2.2]), np.array([0.95, 0.9, 0.6])
VIGNETTE = 0.7  # of the light, lost at a height's distance from the center
BLUR, NOISE = {"stain": 1.5, "camera": 1.0}, {"stain": 8.0, "camera": 6.0}  # standard deviations, pixels and 0…255


@dataclass(frozen=True)
class Trial:
    """A run.

    Attributes:
        part, name: what it is compared with, and what it is.
        annotations: file of the labels, in the folder of the sets or of BCCD.
        flags: beside those of every run.
        unlabeled: folder of the images without labels, in that of the sets.
        scored: the images in which it is scored: val, or the name of a shift.
    """

    part: str
    name: str
    annotations: str
    flags: tuple[str, ...] = ()
    unlabeled: str = ""
    scored: str = "val"


def trials(parts: list[str], teacher: Path | None) -> list[Trial]:
    found = []
    if "teacher" in parts:
        found += [
            Trial("teacher", "alone", "train.json"),
            Trial("teacher", "taught", "train.json", ("--teacher", str(teacher))),
        ]
    for share in SHARES if "labels" in parts else ():
        found += with_and_without(f"{share} % of the labels", f"{share}.json", f"rest{share}", "val")
    for shift in (part for part in parts if part in BLUR):
        found += with_and_without(shift, "train.json", f"{shift}-train", shift)
    return found


def with_and_without(part: str, annotations: str, unlabeled: str, scored: str) -> list[Trial]:
    """On labels alone, and with unlabeled images by each of LOSSES."""
    alone = Trial(part, "alone", annotations, scored=scored)
    return [alone] + [
        Trial(part, name, annotations, ("--unlabeled-loss", loss), unlabeled, scored) for name, loss in LOSSES.items()
    ]


def part_of(content: dict, percent: float) -> dict:
    """A COCO file's content with this part of its images, always the same ones, and their annotations."""
    order = random.Random(0).sample(content["images"], len(content["images"]))
    kept = order[: round(len(order) * percent / 100)]
    ids = {row["id"] for row in kept}
    return {**content, "images": kept, "annotations": [a for a in content["annotations"] if a["image_id"] in ids]}


def make_sets(cells: Path, sets: Path) -> None:
    """Parts of the labels, the other images as links, and the changed images."""
    sets.mkdir(parents=True, exist_ok=True)
    content = json.loads((cells / "train.json").read_text())
    for share in SHARES:
        part = part_of(content, share)
        (sets / f"{share}.json").write_text(json.dumps(part))
        rest = sets / f"rest{share}"
        rest.mkdir(exist_ok=True)
        kept = {row["id"] for row in part["images"]}
        for row in content["images"]:
            if row["id"] not in kept and not (rest / row["file_name"]).is_symlink():
                os.symlink((cells / "train" / row["file_name"]).resolve(), rest / row["file_name"])
    for shift, split in itertools.product(BLUR, ("train", "val")):
        folder = sets / f"{shift}-{split}"
        folder.mkdir(exist_ok=True)
        for number, path in enumerate(sorted((cells / split).iterdir())):
            if not (folder / path.name).exists():
                shifted(Image.open(path).convert("RGB"), shift, number).save(folder / path.name, quality=92)


def shifted(picture: Image.Image, shift: str, seed: int) -> Image.Image:
    """A picture of another stain or camera."""
    pixels = np.asarray(picture.filter(ImageFilter.GaussianBlur(BLUR[shift])), dtype=np.float64)  # [H, W, 3]
    if shift == "stain":
        changed = pixels @ STAIN.T + OFFSET
    else:
        height, width = pixels.shape[:2]
        y, x = np.mgrid[:height, :width]
        radius = np.hypot(y - height / 2, x - width / 2) / height
        changed = 255 * BALANCE * (pixels / 255) ** GAMMA * (1 - VIGNETTE * radius**2)[..., None]
    changed = changed + np.random.default_rng(seed).normal(0, NOISE[shift], pixels.shape)
    return Image.fromarray(changed.round().clip(0, 255).astype(np.uint8))


def run(trial: Trial, seed: int, args: argparse.Namespace, sets: Path) -> dict:
    """Trains, detects in the validation images, and scores."""
    # What two parts have in common, a run without unlabeled images, is trained once.
    name = "-".join(filter(None, (Path(trial.annotations).stem, trial.unlabeled, trial.name, str(seed))))
    model, log = args.output / f"{name}.pth", args.output / f"{name}.txt"
    own = sets / trial.annotations
    odtk = [sys.executable, "-m", "odtk"]
    labels = own if own.exists() else args.cells / trial.annotations
    source = ["--annotations", labels, "--images", args.cells / "train"]
    recipe = ["--variant", "nano", "--val-share", "0", "--iters", args.iters, "--seed", seed]
    beside: list[str | Path] = ["--unlabeled", sets / trial.unlabeled] if trial.unlabeled else []
    call([*odtk, "train", model, *source, *recipe, *beside, *trial.flags, *args.more], log)
    images = args.cells / "val" if trial.scored == "val" else sets / f"{trial.scored}-val"
    truth, found = args.cells / "val.json", args.output / f"{name}-{trial.scored}.json"
    call([*odtk, "infer", model, "--images", images, "--annotations", truth, "--output", found], log)
    return score(found, truth)


def write_table(runs: list[dict], path: Path) -> None:
    rows = ["| part | run | AP (AP50), one per seed | mean AP |", "|---|---|---|---|"]
    for part, name in dict.fromkeys((one["part"], one["name"]) for one in runs):
        own = [one for one in runs if (one["part"], one["name"]) == (part, name)]
        shown = ", ".join(f"{one['ap']:.3f} ({one['ap50']:.3f})" for one in own)
        rows.append(f"| {part} | {name} | {shown} | {statistics.mean(one['ap'] for one in own):.3f} |")
    path.write_text("\n".join(rows) + "\n")
    print("\n".join(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", type=Path, help="folder of BCCD")
    parser.add_argument("--teacher", type=Path, help="checkpoint of the teacher")
    parser.add_argument("--parts", nargs="+", default=["teacher", "labels", "stain", "camera"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--iters", type=int, default=512)
    parser.add_argument("--output", type=Path, default=Path("teach"))
    given = sys.argv[1:]
    end = given.index("--") if "--" in given else len(given)
    args = parser.parse_args(given[:end])
    args.more, args.output, args.cells = given[end + 1 :], args.output.resolve(), args.cells.resolve()
    if args.teacher is None and "teacher" in args.parts:
        parser.error("--parts teacher needs --teacher TEACHER.pth.")
    sets = args.output / "sets"
    make_sets(args.cells, sets)
    record = args.output / "runs.jsonl"
    runs = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    for seed in args.seeds:
        for trial in trials(args.parts, args.teacher and args.teacher.resolve()):
            key = {"part": trial.part, "name": trial.name, "seed": seed, "iters": args.iters, "more": args.more}
            if any(key.items() <= one.items() for one in runs):
                continue
            print(f"{trial.part}: {trial.name}, seed {seed}", flush=True)
            runs.append(key | run(trial, seed, args, sets))
            print(f"  AP {runs[-1]['ap']:.3f}, AP50 {runs[-1]['ap50']:.3f}", flush=True)
            with record.open("a") as file:
                file.write(json.dumps(runs[-1]) + "\n")
    write_table(runs, args.output / "table.md")


if __name__ == "__main__":
    main()
