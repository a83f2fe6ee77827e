"""Seconds and peak memory of reading a large COCO dataset, at a first start and at a second one (cached headers).

python benchmarks/dataset.py [--images 118000 --boxes 860000]

The images are hard links to a few small JPEGs of 640×480 pixels, as only their headers are read. Every start is a
process of its own; its memory is the peak of its resident set, with the interpreter and every module. With --tars the
same images are in tar files too, which are read from the disk, and from an HTTP server on this machine.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import io
import json
import os
import random
import subprocess
import sys
import tarfile
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


def write_tars(folder: Path, images: int, count: int) -> None:
    """The images of the folder in ``count`` tar files."""
    (folder / "tars").mkdir()
    originals = [(folder / "images" / f"{i:012}.jpg").read_bytes() for i in range(min(images, ORIGINALS))]
    for number in range(count):
        with tarfile.open(folder / "tars" / f"{number:04}.tar", "w") as tar:
            for i in range(number * images // count, (number + 1) * images // count):
                info = tarfile.TarInfo(f"{i:012}.jpg")
                info.size = len(originals[i % ORIGINALS])
                tar.addfile(info, io.BytesIO(originals[i % ORIGINALS]))


class Ranges(http.server.SimpleHTTPRequestHandler):
    """A file server that answers ranges and keeps connections open."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        with open(self.translate_path(self.path), "rb") as file:
            file.seek(first)
            content = file.read(last + 1 - first)
            size = os.fstat(file.fileno()).st_size
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


def serve(folder: str) -> None:
    """Serves a folder until it is ended, and prints its port."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Ranges, directory=folder)) as server:
        print(server.server_address[1], flush=True)
        server.serve_forever()


def start(code: str, arguments: list[str], environment: dict[str, str]) -> str:
    """What a process prints."""
    argv = [sys.executable, "-c", code, *arguments]
    return subprocess.run(argv, env=environment, check=True, capture_output=True, text=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=118_000)
    parser.add_argument("--boxes", type=int, default=860_000)
    parser.add_argument("--tars", type=int, default=0, help="tar files to read the images from, too")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help="for the data, which are left there; default: a temporary one")
    args = parser.parse_args()
    if args.serve:
        return serve(args.serve)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.folder or temporary)
        if not (folder / "annotations.json").exists():
            folder.mkdir(exist_ok=True)
            write(folder, args.images, args.boxes)
        paths = [str(folder / "annotations.json"), str(folder / "images")]
        print(f"annotations.json: {os.path.getsize(paths[0]) / 1e6:.0f} MB")
        environment = {**os.environ, "XDG_CACHE_HOME": f"{temporary}/cache"}
        for what, code in (("first start", LOAD), ("second start", LOAD), ("ground truth to evaluate", EVALUATION)):
            print(f"{what}: {start(code, paths, environment)}", flush=True)
        if args.tars:
            if not (folder / "tars").exists():
                write_tars(folder, args.images, args.tars)
            pattern = f"{{0000..{args.tars - 1:04}}}.tar"
            argv = [sys.executable, __file__, "--serve", str(folder / "tars")]
            with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as server:
                assert server.stdout is not None
                port = server.stdout.readline().strip()
                for source in (f"{folder}/tars/{pattern}", f"http://127.0.0.1:{port}/{pattern}"):
                    for what in ("first start", "second start"):
                        found = start(LOAD, [paths[0], source], environment)
                        print(f"{args.tars} tar files, {source.partition(':')[0]}, {what}: {found}", flush=True)
                server.terminate()


if __name__ == "__main__":
    main()
