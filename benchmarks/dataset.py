"""Seconds and peak memory of reading a large COCO dataset, at a first start and at a second one (cached headers).

python benchmarks/dataset.py [--images 118000 --boxes 860000]

The images are hard links to a few small JPEGs of 640×480 pixels, as only their headers are read. Every start is a
process of its own; its memory is the peak of its resident set, with the interpreter and every module.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

LOAD = """
import resource, sys, time
before = time.perf_counter()
from odtk.data.dataset import Dataset
imported = time.perf_counter()
dataset = Dataset.load(sys.argv[1], sys.argv[2], training=True)
seconds, cpu = time.perf_counter() - imported, time.process_time()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
boxes = sum(len(image.boxes) for image in dataset.images)
print(f"{len(dataset.images)} images, {boxes} boxes: {seconds:.2f} s, peak {peak:.2f} GiB (processor {cpu:.2f} s)")
"""
EVALUATION = """
import resource, sys, time
from odtk.evaluation.evaluate import load_truth
before = time.perf_counter()
load_truth(sys.argv[1], [], sys.argv[2])
seconds = time.perf_counter() - before
print(f"{seconds:.2f} s, peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")
"""
ORIGINALS = 100  # image files that the others are links to
SIZE = (640, 480)  # width, height


def write(folder: Path, images: int, boxes: int) -> None:
    """A dataset of 80 categories in a folder: annotations.json and images/."""
    from PIL import Image

    (folder / "images").mkdir()
    for i in range(images):
        path = folder / "images" / f"{i:012}.jpg"
        if i < ORIGINALS:
            Image.new("RGB", SIZE, (i, i, i)).save(path)
        else:
            os.link(folder / "images" / f"{i % ORIGINALS:012}.jpg", path)
    generator = random.Random(0)

    def annotation(id: int) -> dict[str, object]:
        w, h = round(generator.uniform(8, 300), 2), round(generator.uniform(8, 300), 2)
        x, y = round(generator.uniform(0, SIZE[0] - w), 2), round(generator.uniform(0, SIZE[1] - h), 2)
        of = {"image_id": generator.randrange(images), "category_id": generator.randint(1, 80)}
        return {"id": id, **of, "bbox": [x, y, w, h], "area": w * h, "iscrowd": 0}

    content = {
        "images": [{"id": i, "file_name": f"{i:012}.jpg", "width": SIZE[0], "height": SIZE[1]} for i in range(images)],
        "annotations": [annotation(i) for i in range(boxes)],
        "categories": [{"id": i, "name": f"category {i}"} for i in range(1, 81)],
    }
    (folder / "annotations.json").write_text(json.dumps(content))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=118_000)
    parser.add_argument("--boxes", type=int, default=860_000)
    parser.add_argument("--folder", help="for the data, which are left there; default: a temporary one")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.folder or temporary)
        if not (folder / "annotations.json").exists():
            folder.mkdir(exist_ok=True)
            write(folder, args.images, args.boxes)
        paths = [str(folder / "annotations.json"), str(folder / "images")]
        print(f"annotations.json: {os.path.getsize(paths[0]) / 1e6:.0f} MB")
        environment = {**os.environ, "XDG_CACHE_HOME": f"{temporary}/cache"}
        for what, code in (("first start", LOAD), ("second start", LOAD), ("ground truth to evaluate", EVALUATION)):
            run = subprocess.run(
                [sys.executable, "-c", code, *paths], env=environment, check=True, capture_output=True, text=True
            )
            print(f"{what}: {run.stdout.strip()}", flush=True)


if __name__ == "__main__":
    main()
