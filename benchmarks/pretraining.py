"""What pre-training on the objects of a dataset is worth to its detector: AP from scratch, from crops, from ImageNet.

    python benchmarks/pretraining.py shared/data/bccd runs/pretraining --iters 512 --seeds 0 1

The folder of the dataset has train.json, train/, val.json and val/. Crops of both sets are cut, a backbone is trained
to classify those of the training set, and detectors of one variant are trained for the same number of iterations from
each start; the last weights count, as nothing may be chosen on the validation set. What is there already is not made
again, so that the script can be stopped and started. It ends with a table; APs are 0 to 1, of `odtk infer
--full-precision`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from crops import cut

import odtk
from odtk.settings import VARIANTS

ARGUMENTS = {"devices": "cpu", "loader": "torch"}


def backbone_weights(data: Path, output: Path, backbone: str, iters: int, seed: int) -> str:
    """The file of a backbone that was trained on the crops."""
    for part in ("train", "val"):
        if not (output / "crops" / part).is_dir():
            print(part, cut(str(data / f"{part}.json"), str(data / part), str(output / "crops" / part)))
    path = output / f"backbone{seed}.pth"
    odtk.pretrain(
        path,
        images=output / "crops" / "train",
        val_images=output / "crops" / "val",
        backbone=backbone,
        size=64,
        batch=32,
        iters=iters,
        repeat_threshold=0.3,
        augment_rotate=True,
        augment_area=(0.4, 1.0),
        report=str(path.with_suffix(".html")),
        output=str(path.with_suffix(".json")),
        seed=seed,
        **ARGUMENTS,
    )
    return str(path)


def detector_ap(data: Path, path: Path, variant: str, iters: int, seed: int, start: dict[str, str]) -> list[float]:
    """AP, AP50 and the minutes of a detector."""
    figures = path.with_suffix(".ap.json")
    if not figures.exists():
        began = time.monotonic()
        odtk.train(
            path,
            annotations=data / "train.json",
            images=data / "train",
            variant=variant,
            val_share=0,
            augment_rotate=True,
            batch=8,
            iters=iters,
            seed=seed,
            **start,
            **ARGUMENTS,
        )
        minutes = (time.monotonic() - began) / 60
        detections = str(path.with_suffix(".json"))
        truth = {"images": str(data / "val"), "annotations": str(data / "val.json")}
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
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    backbone = VARIANTS[args.variant]["backbone"][0]
    rows = []
    for seed in args.seeds:
        crops = backbone_weights(args.data, args.output, backbone, args.pretrain_iters, seed)
        starts = {
            "scratch": {"backbone_weights": "none", "norm": "batch"},
            "crops": {"backbone_weights": crops, "norm": "batch"},
            "crops, frozen norms": {"backbone_weights": crops, "norm": "frozen"},
            "ImageNet, frozen norms": {"norm": "frozen"},
        }
        for name, start in starts.items():
            path = args.output / f"{name.replace(', ', '-').replace(' ', '-')}{seed}.pth"
            ap, ap50, minutes = detector_ap(args.data, path, args.variant, args.iters, seed, start)
            rows.append(f"| {name} | {seed} | {ap:.3f} | {ap50:.3f} | {minutes:.1f} |")
            print(rows[-1], flush=True)
    print("\n".join(["| start | seed | AP | AP50 | minutes |", "|---|---|---|---|---|", *rows]))


if __name__ == "__main__":
    main()
