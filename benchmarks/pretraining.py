"""What pre-training on the objects of a dataset is worth to its detector: AP from scratch, from crops, from ImageNet.

    python benchmarks/pretraining.py shared/data/bccd runs/pretraining --iters 512 --seeds 0 1 [--labels 10]
        [--starts scratch "crops, frozen norms"]

The folder of the dataset has train.json, train/, val.json and val/. Crops of both sets are cut, a backbone is trained
to classify those of the training set, from scratch and from ImageNet's weights, and detectors of one variant are
trained for the same number of iterations from each start, with the boxes of all images or of --labels percent of them;
the last weights count, as nothing may be chosen on the validation set. What is there already is not made again, so that
the script can be stopped and started. It ends with a table; APs are 0 to 1, of `odtk infer --full-precision`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from crops import cut
from teach import part_of

import odtk
from odtk.settings import VARIANTS

ARGUMENTS = {"devices": "cpu", "loader": "torch"}


def backbone_weights(args: argparse.Namespace, start: str, seed: int) -> str:
    """The file of a backbone that was trained on the crops, from start: none or imagenet."""
    for part in ("train", "val"):
        if not (args.output / "crops" / part).is_dir():
            source = str(args.data / f"{part}.json"), str(args.data / part)
            print(part, cut(*source, str(args.output / "crops" / part)))
    path = args.output / f"backbone-{start}{seed}.pth"
    odtk.pretrain(
        path,
        images=args.output / "crops" / "train",
        val_images=args.output / "crops" / "val",
        backbone=VARIANTS[args.variant]["backbone"][0],
        backbone_weights=start,
        size=64,
        batch=32,
        iters=args.pretrain_iters,
        repeat_threshold=0.3,
        augment_rotate=True,
        augment_area=(0.4, 1.0),
        report=str(path.with_suffix(".html")),
        output=str(path.with_suffix(".json")),
        seed=seed,
        **ARGUMENTS,
    )
    return str(path)


def detector_ap(args: argparse.Namespace, labels: Path, path: Path, seed: int, start: dict[str, str]) -> list[float]:
    """AP, AP50 and the minutes of a detector that is trained on labels."""
    figures = path.with_suffix(".ap.json")
    if not figures.exists():
        began = time.monotonic()
        odtk.train(
            path,
            annotations=labels,
            images=args.data / "train",
            variant=args.variant,
            val_share=0,
            augment_rotate=True,
            batch=8,
            iters=args.iters,
            seed=seed,
            **start,
            **ARGUMENTS,
        )
        minutes = (time.monotonic() - began) / 60
        detections = str(path.with_suffix(".json"))
        truth = {"images": str(args.data / "val"), "annotations": str(args.data / "val.json")}
        odtk.infer(path, output=detections, full_precision=True, **truth, **ARGUMENTS)
        metrics = odtk.evaluate(detections, **truth)
        figures.write_text(json.dumps([metrics.ap, metrics.ap50, minutes]))
    found: list[float] = json.loads(figures.read_text())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--variant", default="nano", choices=tuple(VARIANTS))
    parser.add_argument("--iters", type=int, default=512)
    parser.add_argument("--pretrain-iters", type=int, default=400)
    parser.add_argument("--labels", type=float, default=100, help="percent of the images with boxes; crops are of all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--starts", nargs="+", help="those of the table to run; all without it")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    labels = args.data / "train.json"
    if args.labels < 100:
        part = part_of(json.loads(labels.read_text()), args.labels)
        labels = args.output / f"{args.labels:g}.json"
        labels.write_text(json.dumps(part))
    rows = []
    for seed in args.seeds:
        crops, both = (backbone_weights(args, start, seed) for start in ("none", "imagenet"))
        starts = {
            "scratch": {"backbone_weights": "none", "norm": "batch"},
            "crops": {"backbone_weights": crops, "norm": "batch"},
            "crops, frozen norms": {"backbone_weights": crops, "norm": "frozen"},
            "ImageNet, frozen norms": {"norm": "frozen"},
            "ImageNet, then crops, frozen norms": {"backbone_weights": both, "norm": "frozen"},
        }
        for name in args.starts or starts:
            start = starts[name]
            path = args.output / f"{labels.stem}-{name.replace(', ', '-').replace(' ', '-')}{seed}.pth"
            ap, ap50, minutes = detector_ap(args, labels, path, seed, start)
            rows.append(f"| {name} | {seed} | {ap:.3f} | {ap50:.3f} | {minutes:.1f} |")
            print(rows[-1], flush=True)
    print("\n".join(["| start | seed | AP | AP50 | minutes |", "|---|---|---|---|---|", *rows]))


if __name__ == "__main__":
    main()
