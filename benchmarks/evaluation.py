"""Time of the COCO evaluation: odtk.evaluation.evaluate and bare pycocotools on the same detections.

python benchmarks/evaluation.py DETECTIONS.json --annotations JSON
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
from pathlib import Path

from harness import again, arguments, compare, serve


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
        from odtk.evaluation.evaluate import evaluate

        def step() -> int:
            evaluate(detections, args.annotations)
            return images

    serve(step)


def main() -> None:
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("detections")
    parser.add_argument("--annotations", required=True)
    args = parser.parse_args()
    if args.variant:
        return variant(args)
    compare(
        "COCO evaluation",
        {name: again(name) for name in ("pycocotools", "odtk")},
        rounds=args.rounds,
        report=args.report,
    )


if __name__ == "__main__":
    main()
