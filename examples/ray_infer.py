"""Finds objects in the images of a folder or a bucket with Ray Data, and writes Parquet, one row per detection.

    pip install 'odtk' 'ray[data]'
    python examples/ray_infer.py model.pth photos/ found/ --actors 4 [--cpus 6]

Each actor loads the model once and takes images as Ray reads them, from wherever pyarrow can (s3://bucket/photos). On a
cluster (RAY_ADDRESS) leave --cpus out. A worker that is killed is replaced, and its images are done again.

**More CPUs than actors**: each actor holds one, and Ray reads and writes files with those that are left. With none left
it would wait for ever, without a word; so this is refused.

**An empty output folder**: Ray adds to what is there, so a second run would double every detection; a folder that is
not empty is refused. Rotated boxes have a column theta.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

import numpy as np
import ray
from pyarrow.fs import FileSelector, FileSystem
from ray.data import ActorPoolStrategy

import odtk

EXTENSIONS = ["jpg", "jpeg", "png", "bmp", "webp", "tif", "tiff", "avif"]
COLUMNS = ("path", "category_id", "category", "score", "x", "y", "w", "h")


class Detector:
    """What each actor holds: a loaded model, called with a batch of encoded images and their paths."""

    def __init__(self, model: str, batch: int, **settings: Any) -> None:
        self.model, self.batch = odtk.load(model, **settings), batch
        self.columns = (*COLUMNS, "theta") if self.model.rotated else COLUMNS

    def __call__(self, rows: dict[str, np.ndarray]) -> dict[str, Any]:
        found: dict[str, list[Any]] = {name: [] for name in self.columns}
        names = {category.id: category.name for category in self.model.categories}
        images = self.model.predict(list(rows["bytes"]), batch=self.batch, skip_damaged=True)
        for path, one in zip(rows["path"], images, strict=True):
            if one.error:
                print(f"{path} gets no detections: {one.error}", file=sys.stderr)
            for result in one.to_coco():
                values = (path, result["category_id"], names[result["category_id"]], result["score"], *result["bbox"])
                for name, value in zip(self.columns, values, strict=True):
                    found[name].append(value)
        return found


def is_empty(folder: str) -> bool:
    """Whether nothing lies in a folder, or it is not there."""
    system, path = FileSystem.from_uri(folder if "://" in folder else os.path.abspath(folder))
    return not system.get_file_info(FileSelector(path, allow_not_found=True))


def main() -> None:
    parser = argparse.ArgumentParser(description="Finds objects in many images with Ray Data.")
    parser.add_argument("model", help=".pth, .onnx or .plan, at a path that every machine has")
    parser.add_argument("images", help="a folder, or s3://… and the like")
    parser.add_argument("output", help="a folder for Parquet files, or s3://… and the like")
    parser.add_argument("--actors", type=int, default=1, help="processes with a model (%(default)s)")
    parser.add_argument("--cpus", type=int, help="of this machine, that Ray may use (all)")
    parser.add_argument("--gpus", type=float, default=0, help="of each actor (%(default)s)")
    parser.add_argument("--threshold", type=float, help="objects score above this")
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help="that images are fitted into")
    parser.add_argument(
        "--batch",
        type=int,
        default=1,
        help="images that go through the model at a time (%(default)s); without --size, those of a batch are padded to "
        "a common size, which changes detections a little",
    )
    args = parser.parse_args()

    if not is_empty(args.output):
        sys.exit(f"{args.output} is not empty, and Ray would add to it: give another folder, or remove this one.")
    ray.init(num_cpus=args.cpus)
    cpus = int(ray.cluster_resources().get("CPU", 0))
    if cpus <= args.actors:
        sys.exit(f"--actors {args.actors} needs more than {args.actors} CPUs, and Ray has {cpus}: it would hang.")
    settings = {"threshold": args.threshold, "size": args.size and tuple(args.size)}
    device = {"device": "cuda" if args.gpus else "cpu"}
    images = ray.data.read_binary_files(args.images, include_paths=True, file_extensions=EXTENSIONS)
    found = images.map_batches(
        Detector,
        fn_constructor_args=(args.model, args.batch),
        fn_constructor_kwargs={**settings, **device},
        batch_size=max(16, args.batch),
        compute=ActorPoolStrategy(size=args.actors),
        num_cpus=1,
        num_gpus=args.gpus,
    )
    found.write_parquet(args.output)


if __name__ == "__main__":
    main()
