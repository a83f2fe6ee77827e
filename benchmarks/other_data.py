"""odtk without flags on datasets of many kinds, beside hand-chosen flags and YOLO11n from scratch, in equal minutes.

    python benchmarks/other_data.py --cells BCCD --peer-python PEER/bin/python [--minutes 4] [--sets few tiny …]
        [--candidates odtk tuned YOLO11n] [--output other-data]

The sets are made here: some by `odtk synth`, some out of BCCD's images (the folder that holds train.json,
val.json, train/ and val/). Each candidate trains for --minutes of wall clock, one after another, on all cores; AP is
pycocotools'. `tuned` is the best of a few runs with flags that somebody who knows the set and odtk would try.
Writes into --output: runs.jsonl (runs that are in it are not repeated) and table.md.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from accuracy import call, score, train_yolo
from PIL import Image, ImageOps

CANDIDATES = ("odtk", "tuned", "YOLO11n")
Images = list[tuple[Image.Image, list[dict]]]  # pictures with their annotations


@dataclass(frozen=True)
class Set:
    """A dataset to make.

    Attributes:
        says: what is special in it.
        make: called with the folder to write to and the folder of the cells.
        tuned: flags that somebody who knows it would try.
        yolo_size: the longer side for YOLO.
    """

    says: str
    make: Callable[[Path, Path], None]
    tuned: tuple[tuple[str, ...], ...]
    yolo_size: int = 320


def synth(*flags: str) -> Callable[[Path, Path], None]:
    return lambda folder, _: print(
        call([sys.executable, "-m", "odtk", "synth", folder, *flags], folder.with_suffix(".txt"))
    )


def cells(
    change: Callable[[Images, random.Random], Images], train: int | None = None, classes: tuple[str, ...] = ()
) -> Callable[[Path, Path], None]:
    """BCCD with pictures and boxes changed: the first ``train`` of a random order, and only these classes, if named."""

    def make(folder: Path, source: Path) -> None:
        for split in ("train", "val"):
            content = json.loads((source / f"{split}.json").read_text())
            categories = [c for c in content["categories"] if not classes or c["name"] in classes]
            kept = {category["id"] for category in categories}
            rng = random.Random(0)
            rows = rng.sample(content["images"], train) if train and split == "train" else content["images"]
            pictures: Images = []
            for row in rows:
                own = [a for a in content["annotations"] if a["image_id"] == row["id"] and a["category_id"] in kept]
                pictures.append((Image.open(source / split / row["file_name"]).convert("RGB"), own))
            write(folder, split, categories, change(pictures, rng))

    return make


def write(folder: Path, split: str, categories: list[dict], pictures: Images) -> None:
    (folder / split).mkdir(parents=True)
    images: list[dict] = []
    annotations: list[dict] = []
    for number, (picture, own) in enumerate(pictures, start=1):
        name = f"{number}.jpg"
        picture.save(folder / split / name, quality=92)
        images.append({"id": number, "file_name": name, "width": picture.width, "height": picture.height})
        for a in own:
            x, y, w, h = a["bbox"]
            row = {"id": len(annotations) + 1, "image_id": number, "category_id": a["category_id"], "iscrowd": 0}
            annotations.append(row | {"bbox": [x, y, w, h], "area": w * h})
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / f"{split}.json").write_text(json.dumps(content))


def same(pictures: Images, rng: random.Random) -> Images:
    return pictures


def almost_binary(pictures: Images, rng: random.Random) -> Images:
    """Gray with nearly all pixels black or white, as scans are."""

    def steep(value: int) -> int:
        return max(0, min(255, 128 + 6 * (value - 128)))

    return [(ImageOps.autocontrast(p.convert("L"), cutoff=5).point(steep).convert("RGB"), own) for p, own in pictures]


def many_sizes(pictures: Images, rng: random.Random) -> Images:
    """Each picture scaled by a factor of its own."""
    return [resized(p, own, rng.uniform(0.3, 1.6)) for p, own in pictures]


def resized(picture: Image.Image, own: list[dict], scale: float) -> tuple[Image.Image, list[dict]]:
    size = round(picture.width * scale), round(picture.height * scale)
    fx, fy = size[0] / picture.width, size[1] / picture.height
    boxes = [a | {"bbox": [v * f for v, f in zip(a["bbox"], (fx, fy, fx, fy), strict=True)]} for a in own]
    return picture.resize(size), boxes


def frames(pictures: Images, rng: random.Random) -> Images:
    """Frames of 1920×1440 out of 36 pictures at half their size each."""
    found: Images = []
    for start in range(0, len(pictures) - 35, 36):
        frame, boxes = Image.new("RGB", (1920, 1440)), []
        for cell, (picture, own) in enumerate(pictures[start : start + 36]):
            small, moved = resized(picture, own, 0.5)
            x, y = cell % 6 * 320, cell // 6 * 240
            frame.paste(small, (x, y))
            boxes += [a | {"bbox": [a["bbox"][0] + x, a["bbox"][1] + y, *a["bbox"][2:]]} for a in moved]
        found.append((frame, boxes))
    return found


TUNED_CELLS = (
    ("--val-share", "0", "--resize", "480", "--max-size", "640"),
    ("--val-share", "0", "--variant", "small"),
)
SETS = {
    "one": Set(
        "1 class, 45 images of 480×640, one or two large objects",
        synth(
            *("--images", "57", "--classes", "1", "--size", "480", "640"),
            *("--object-size", "0.3", "0.6", "--objects", "1", "2", "--clutter", "10"),
        ),
        (("--resize", "192", "--max-size", "256"), ("--resize", "320", "--max-size", "448")),
    ),
    "eight": Set(
        "8 classes, the first 20 times as frequent as the last, 340 images of 240×320, clutter",
        synth("--images", "425", "--classes", "8", "--imbalance", "20", "--clutter", "15", "--objects", "3", "9"),
        (("--repeat-threshold", "0.3"), ("--lr", "0.002")),
    ),
    "tiny": Set(
        "objects of 8 to 16 px in frames of 1764×1323, 3 classes, 72 images, gray",
        synth(
            *("--images", "90", "--classes", "3", "--size", "1323", "1764"),
            *("--object-size", "0.006", "0.012", "--objects", "10", "30", "--gray"),
        ),
        (("--pyramid-channels", "64", "--head-channels", "64"), ("--lr", "0.002")),
        1280,
    ),
    "few": Set(
        "20 images of BCCD",
        cells(same, 20),
        TUNED_CELLS,
    ),
    "fifty": Set(
        "50 images of BCCD",
        cells(same, 50),
        TUNED_CELLS,
    ),
    "binary": Set(
        "BCCD in gray, nearly all pixels black or white",
        cells(almost_binary),
        (("--val-share", "0", "--variant", "small"), ("--val-share", "0", "--lr", "0.002")),
    ),
    "sizes": Set(
        "BCCD, each image of a size of its own, 192×144 to 1024×768",
        cells(many_sizes),
        TUNED_CELLS,
    ),
    "frames": Set(
        "BCCD's white cells and platelets at half their size, 36 images in a frame of 1920×1440: 5 frames to train",
        cells(frames, classes=("WBC", "Platelets")),
        (
            ("--resize", "1440", "--max-size", "1920", "--jitter", "512", "512", "--augment-scale", "2.1", "3.75"),
            ("--resize", "960", "--max-size", "1280", "--jitter", "512", "512", "--augment-scale", "1.4", "2.5"),
        ),
        1280,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=Path, required=True, help="folder of BCCD")
    parser.add_argument("--peer-python", type=Path, help="Python with ultralytics")
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS))
    parser.add_argument("--candidates", nargs="+", default=CANDIDATES, choices=CANDIDATES)
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("other-data"))
    args = parser.parse_args()
    if args.peer_python is None and "YOLO11n" in args.candidates:
        parser.error("YOLO11n needs --peer-python, or name what to run by --candidates.")
    args.output.mkdir(parents=True, exist_ok=True)
    record = args.output / "runs.jsonl"
    runs = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    for name in args.sets:
        data = args.output / "sets" / name
        if not (data / "val.json").exists():
            data.parent.mkdir(parents=True, exist_ok=True)
            SETS[name].make(data, args.cells)
        for candidate, flags in commands(name, args.candidates):
            if any((run["set"], run["candidate"], run["flags"]) == (name, candidate, list(flags)) for run in runs):
                continue
            print(f"{name}: {candidate} {' '.join(flags)}", flush=True)
            run = {"set": name, "candidate": candidate, "flags": list(flags), "minutes": args.minutes}
            run |= train(name, candidate, flags, data, args)
            print(f"  AP {run['ap']:.3f}, AP50 {run['ap50']:.3f}", flush=True)
            runs.append(run)
            with record.open("a") as file:
                file.write(json.dumps(run) + "\n")
    write_table(runs, args.output / "table.md")


def commands(name: str, candidates: list[str]) -> list[tuple[str, tuple[str, ...]]]:
    found: list[tuple[str, tuple[str, ...]]] = []
    for candidate in candidates:
        found += [(candidate, flags) for flags in (SETS[name].tuned if candidate == "tuned" else [()])]
    return found


def train(name: str, candidate: str, flags: tuple[str, ...], data: Path, args: Namespace) -> dict:
    """Trains, detects on the validation images, and scores."""
    number = SETS[name].tuned.index(flags) if candidate == "tuned" else 0
    folder = args.output / f"{name}-{candidate}-{number}"
    folder.mkdir(exist_ok=True)
    given = Namespace(
        annotations=data / "train.json",
        images=data / "train",
        val_annotations=data / "val.json",
        val_images=data / "val",
        minutes=args.minutes,
        output=folder,
        peer_python=args.peer_python,
        yolo_size=SETS[name].yolo_size,
    )
    if candidate == "YOLO11n":
        return score(Path(train_yolo(candidate, args.seed, folder, given)["detections"]), given.val_annotations)
    odtk = [sys.executable, "-m", "odtk"]
    model, log = folder / "model.pth", folder / "log.txt"
    source = ["--annotations", given.annotations, "--images", given.images, "--override"]
    call([*odtk, "train", model, *source, "--time", f"{args.minutes:g}m", "--seed", args.seed, *flags], log)
    best = model.with_suffix(".best.pth")
    source = ["--images", given.val_images, "--annotations", given.val_annotations]
    call([*odtk, "infer", best if best.exists() else model, *source, "--output", folder / "found.json"], log)
    return score(folder / "found.json", given.val_annotations)


def write_table(runs: list[dict], path: Path) -> None:
    rows = ["| set | what it is | no flags | best by hand | flags | YOLO11n |", "|---|---|---|---|---|---|"]
    for name in dict.fromkeys(run["set"] for run in runs):
        own = [run for run in runs if run["set"] == name]
        shown = {}
        for candidate in CANDIDATES:
            best = max((run for run in own if run["candidate"] == candidate), key=lambda run: run["ap"], default=None)
            shown[candidate] = f"{best['ap']:.3f} / {best['ap50']:.3f}" if best else "–"
            if candidate == "tuned":
                shown["flags"] = " ".join(best["flags"]) if best else ""
        cells = [name, SETS[name].says, f"**{shown['odtk']}**", shown["tuned"], f"`{shown['flags']}`", shown["YOLO11n"]]
        rows.append(f"| {' | '.join(cells)} |")
    path.write_text("\n".join(rows) + "\n")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
