"""Time of the COCO evaluation: bare pycocotools, and odtk by either evaluator, on the same detections.

python benchmarks/evaluation.py DETECTIONS.json --annotations JSON [--make IMAGES]

With --make both files are written first: for each image 7 boxes of 80 classes, as in COCO, and 100 detections, of
which about half are near a box. The last line is the largest difference between the figures of the two evaluators.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
from pathlib import Path

import numpy as np
from harness import again, arguments, compare, serve

BOXES, DETECTIONS, CLASSES = 7, 100, 80  # of an image
EVALUATORS = ("pycocotools", "faster-coco-eval")
VARIANTS = ("pycocotools", "odtk", "odtk, faster-coco-eval")


def variant(args: argparse.Namespace) -> None:
    detections = json.loads(Path(args.detections).read_text())
    images = len({d["image_id"] for d in detections})
    if args.variant == "pycocotools":
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        def step() -> int:
            with contextlib.redirect_stdout(io.StringIO()):
                truth = COCO(args.annotations)
                run = COCOeval(truth, truth.loadRes(detections), "bbox")
                run.evaluate()
                run.accumulate()
                run.summarize()
            return images

    else:
        from odtk.evaluation.evaluate import metrics_of, run_cocoeval

        evaluator = args.variant.rpartition(", ")[2].replace("odtk", "pycocotools")

        def step() -> int:
            metrics_of(run_cocoeval(detections, args.annotations, evaluator=evaluator))
            return images

    serve(step)


def make(args: argparse.Namespace) -> None:
    """Writes random annotations and detections."""
    rng = np.random.default_rng(0)
    ids = np.arange(1, args.make + 1)
    corners = rng.uniform(0, 400, (args.make, BOXES, 2))
    boxes = np.concatenate([corners, rng.uniform(8, 200, (args.make, BOXES, 2))], 2)  # [N, boxes, (x, y, w, h)]
    classes = rng.integers(1, CLASSES + 1, (args.make, BOXES))
    annotations: list[dict] = []
    detections: list[dict] = []
    for image, own, labels in zip(ids.tolist(), boxes, classes, strict=True):
        for box, label in zip(own.tolist(), labels.tolist(), strict=True):
            row = {"id": len(annotations) + 1, "image_id": image, "category_id": label, "bbox": box, "iscrowd": 0}
            annotations.append(row | {"area": box[2] * box[3]})
        which = rng.integers(BOXES, size=DETECTIONS)
        near = own[which] * rng.normal(1, 0.05, (DETECTIONS, 4))
        label_of = np.where(rng.random(DETECTIONS) < 0.5, labels[which], rng.integers(1, CLASSES + 1, DETECTIONS))
        for box, label, score in zip(near.tolist(), label_of.tolist(), rng.random(DETECTIONS).tolist(), strict=True):
            detections.append({"image_id": image, "category_id": label, "bbox": box, "score": score})
    images = [{"id": image, "file_name": f"{image}.jpg", "width": 640, "height": 640} for image in ids.tolist()]
    categories = [{"id": label, "name": str(label)} for label in range(1, CLASSES + 1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    Path(args.annotations).write_text(json.dumps(content))
    Path(args.detections).write_text(json.dumps(detections))


def main() -> None:
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("detections")
    parser.add_argument("--annotations", required=True)
    parser.add_argument("--make", type=int, metavar="IMAGES", help="write both files first, for so many images")
    args = parser.parse_args()
    if args.variant:
        return variant(args)
    if args.make:
        make(args)
    compare("COCO evaluation", {name: again(name) for name in VARIANTS}, rounds=args.rounds, report=args.report)
    from odtk.evaluation.evaluate import run_cocoeval

    figures = [run_cocoeval(args.detections, args.annotations, evaluator=name).stats[:12] for name in EVALUATORS]
    print(f"largest difference of the figures: {np.abs(np.subtract(*figures)).max():.1e}")


if __name__ == "__main__":
    main()
