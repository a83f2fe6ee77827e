"""What writing detections as a run goes costs and gives: peak memory over many images, and runs that are killed.

python benchmarks/shards.py [--images 1000 10000 100000] [--kills 20]

The model is a stand-in that finds the same 20 boxes in every image, with its own scores, so that the figures are those
of reading images and writing detections; the images are hard links to a few JPEGs of 32×32 pixels. Every run
is a process of its own; its memory is the peak of its resident set. "memory" is the same run without pyarrow, which
keeps every detection until the end.

Kills: `odtk infer`'s job on two processes, a shard for each batch of eight images; the whole process group gets SIGKILL
after a random number of further shards and up to 50 ms. It is started again until it ends, and the file compared.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from odtk.categories import Category
from odtk.config import InferConfig, LoaderConfig, PostprocessConfig
from odtk.inference import infer, resume, shards
from odtk.inference.backends import Backend
from odtk.launch import launch
from odtk.postprocess import BatchDetections

FOUND = 20  # boxes in every image
ORIGINALS = 50  # image files that the others are links to
BATCH = 8  # per process
KILLED_IMAGES = 2000  # of the runs that are killed
PAUSE = 0.05  # seconds that a batch of these takes more, so that the kills come while it works


class StandIn(Backend):
    """Finds the same boxes everywhere; the scores follow from the pixels."""

    name, size, stride, classes, rotated = "stand-in", (32, 32), 32, 2, False
    categories = (Category(1, "one"), Category(2, "two"))
    precision, thresholds = "fp32", PostprocessConfig(detections=FOUND)

    def __init__(self, *_: object, **__: object) -> None:
        generator = torch.Generator().manual_seed(0)
        low = torch.rand(FOUND, 2, generator=generator) * 16
        self.boxes = torch.cat([low, low + 1 + torch.rand(FOUND, 2, generator=generator) * 14], dim=1)
        self.places = torch.linspace(0.9, 0.1, FOUND)

    def compute(self, images: torch.Tensor) -> BatchDetections:
        n = len(images)
        shade = images.float().mean(dim=(1, 2, 3)).sigmoid()[:, None]  # [N, 1]
        return BatchDetections(
            shade * self.places, self.boxes.expand(n, -1, -1), (torch.arange(FOUND) % 2).expand(n, -1)
        )


class Slow(StandIn):
    def compute(self, images: torch.Tensor) -> BatchDetections:
        time.sleep(PAUSE)
        return super().compute(images)


def config(folder: str, output: str) -> InferConfig:
    data = LoaderConfig(folder, loader="torch", batch=BATCH, size=(32, 32), skip_damaged=True)
    return InferConfig(sys.executable, data, output=(output,), returns=False)  # the hash of any file will do


def draw(folder: Path, count: int) -> None:
    from PIL import Image

    folder.mkdir()
    generator = np.random.default_rng(0)
    for i in range(count):
        path = folder / f"{i:07}.jpg"
        if i < ORIGINALS:
            Image.fromarray(generator.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(path)
        else:
            os.link(folder / f"{i % ORIGINALS:07}.jpg", path)


def alone(folder: str, output: str, kind: str) -> None:
    """One run in this process, and its peak."""
    torch.set_num_threads(1)
    infer.open_backend = StandIn  # type: ignore[assignment]
    if kind == "memory":
        resume.importlib.util.find_spec = nothing  # type: ignore[assignment,attr-defined]
    started = time.perf_counter()
    infer.infer(config(folder, output))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(f"{peak:.0f} MiB, {time.perf_counter() - started:.0f} s (processor {time.process_time():.0f} s)")


def nothing(*_: object) -> None:
    """Stands in for find_spec."""


def job(config: InferConfig, rank: int, world: int) -> None:
    shards.SHARD_ROWS = 0
    infer.open_backend = Slow  # type: ignore[assignment]
    infer.infer(config, rank, world)


def memory(folder: Path, counts: list[int]) -> None:
    for count in counts:
        draw(folder / str(count), count)
        for kind in ("shards", "memory"):
            output = folder / f"{kind}{count}.json"
            argv = [sys.executable, __file__, "--alone", str(folder / str(count)), str(output), kind]
            run = subprocess.run(argv, check=True, capture_output=True, text=True)
            print(f"{count} images, {kind}: {run.stdout.splitlines()[-1]}", flush=True)
        same = (folder / f"shards{count}.json").read_bytes() == (folder / f"memory{count}.json").read_bytes()
        print(f"{count} images: {'the same bytes' if same else 'DIFFERENT'}", flush=True)


def kills(folder: Path, number: int, seed: int) -> None:
    generator = random.Random(seed)
    draw(folder / "killed", KILLED_IMAGES)

    def start(output: str) -> subprocess.Popen[bytes]:
        argv = [sys.executable, __file__, "--two", str(folder / "killed"), str(folder / output)]
        return subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)

    assert start("whole.json").wait() == 0
    whole = (folder / "whole.json").read_bytes()
    parts = folder / "out.json.parts"
    done = finished = 0
    at: list[int] = []  # images that were done at each kill
    while done < number:
        before = len(list(parts.glob("*.parquet")))
        further = generator.randint(1, KILLED_IMAGES // BATCH // 4)  # where fewer are left, the run ends
        run = start("out.json")
        while run.poll() is None and len(list(parts.glob("*.parquet"))) < before + further:
            time.sleep(0.002)
        time.sleep(generator.uniform(0, 0.05))
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
            run.wait()
            done += 1
            at.append(sum(shard.images for rank in range(2) for shard in shards.shards_of(parts, rank)))
            print(f"killed at {at[-1]}", file=sys.stderr, flush=True)
        else:
            finished += check(run, folder, whole)
    run = start("out.json")
    run.wait()
    finished += check(run, folder, whole)
    print(f"{done} kills with {at} of {KILLED_IMAGES} images done, {finished} runs that ended: all the same bytes")


def check(run: subprocess.Popen[bytes], folder: Path, whole: bytes) -> int:
    """Compares the output of a run that ended, and removes it."""
    assert run.returncode == 0, run.returncode
    assert (folder / "out.json").read_bytes() == whole and not (folder / "out.json.parts").exists()
    (folder / "out.json").unlink()
    return 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="*", default=[1000, 10_000, 100_000])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--alone", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--two", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.alone:
        return alone(*args.alone)
    if args.two:
        return launch(job, config(args.two[0], args.two[1]), devices="cpu:2")
    with tempfile.TemporaryDirectory() as folder:
        memory(Path(folder), args.images)
        if args.kills:
            kills(Path(folder), args.kills, args.seed)


if __name__ == "__main__":
    main()
