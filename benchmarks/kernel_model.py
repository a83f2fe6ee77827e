"""The time of decode and NMS at small batches, term by term, as their code makes it.

    python benchmarks/kernel_model.py [--size 800 1280] [--classes 80] [--batch 1] [--survivors 3000] [--kept-of 500]

Counts (blocks, bytes, barriers, stages) follow csrc/cuda; latencies are ASSUMED (H100), for a GPU to correct:
benchmarks/gpu.py prints the measured time of each kernel beside the sum for it. A kernel is the sum of its terms, as
each waits for the one before; only find_candidates, which fills the GPU, is its bytes over the bandwidth.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass

STRIDES = (8, 16, 32, 64, 128)
CHUNK, TILE, SHARED_KEYS = 32768, 64, 4096  # kChunk of decode.cu; kTile and kSharedKeys of nms.cu
FIND_THREADS, BLOCK = 256, 1024  # threads of find_candidates; of merge_candidates and suppress<4>
ALIGNMENT = 256  # of the pieces of a workspace, bytes


@dataclass(frozen=True)
class Gpu:
    """Assumed speeds of an H100 (SXM), in cycles where nothing else is said."""

    clock: float = 1.755e9  # Hz
    bandwidth: float = 3.0e12  # bytes per second that a copy reaches, counting what it reads and writes
    launch: float = 1.0e-6  # s between dependent kernels of a CUDA graph
    sms: int = 132
    l2: int = 270  # a dependent load that hits the L2 cache
    shared: int = 30  # a dependent load from shared memory
    barrier: int = 40  # __syncthreads() of 1,024 threads that arrive together
    step: int = 50  # one step of suppress's serial loop: find the first bit, load a mask, clear bits


@dataclass(frozen=True)
class Term:
    """One addend: of which kernel, what it is, in microseconds, and how it comes about."""

    kernel: str
    name: str
    microseconds: float
    because: str


def cells(size: tuple[int, int]) -> list[int]:
    """Of each level, for an image of H×W pixels."""
    return [math.ceil(size[0] / stride) * math.ceil(size[1] / stride) for stride in STRIDES]


def chunks(size: tuple[int, int], channels: int) -> list[int]:
    """Blocks of find_candidates per image on each level; `channels` is A·C."""
    return [math.ceil(level * channels / CHUNK) for level in cells(size)]


def decode_workspace(size: tuple[int, int], channels: int, batch: int, top_n: int) -> int:
    """Bytes, as odtk::decode_workspace: a list of top_n keys and a count for each chunk."""
    lists = batch * sum(chunks(size, channels))
    return sum(math.ceil(piece / ALIGNMENT) * ALIGNMENT for piece in (8 * lists * top_n, 4 * lists))


def bitonic_stages(count: int) -> int:
    """Stages of sort_descending, each ended by a barrier: half of k·(k+1) for 2^k keys."""
    power = max(0, math.ceil(math.log2(count)))
    return power * (power + 1) // 2


def model(
    size: tuple[int, int] = (800, 1280),
    classes: int = 80,
    *,
    anchors: int = 9,
    batch: int = 1,
    top_n: int = 1000,
    detections: int = 100,
    survivors: int = 3000,
    kept_of: int = 500,
    value_bytes: int = 2,
    gpu: Gpu | None = None,
) -> list[Term]:
    """The terms of decode and NMS of plain boxes.

    Args:
        survivors: logits per image above the threshold, three quarters of them on the first level.
        kept_of: candidates that suppress goes through until it has kept its detections.
        value_bytes: of a logit.
    """
    g = gpu or Gpu()
    us = 1e6 / g.clock  # of a cycle
    channels = anchors * classes
    lists = chunks(size, channels)
    terms = [Term("all", "launches", 3 * g.launch * 1e6, "3 dependent kernels")]

    read = batch * sum(cells(size)) * channels * value_bytes
    blocks = batch * sum(lists)
    terms.append(Term("find", "read the logits", read / g.bandwidth * 1e6, f"{read / 1e6:.1f} MB, {blocks} blocks"))

    first = min(survivors * 3 // 4, CHUNK * lists[0])  # the first level has most lists and most survivors
    rounds = math.ceil(lists[0] / (BLOCK // 32))
    passes = 3 if first > top_n else 0
    scan = 2 * int(math.log2(BLOCK)) * g.barrier  # inclusive_scan: two barriers a step
    visit = rounds * 2 * g.l2  # a count, then its keys, list after list
    why = f"{passes + 1} visits of {rounds} lists in a row per warp, 2 dependent loads each"
    terms.append(Term("merge", "go through the lists", (passes + 1) * visit * us, why))
    terms.append(Term("merge", "radix selection", passes * (scan + 4 * g.barrier) * us, f"{passes} scans"))
    kept = min(first, top_n)
    stages = bitonic_stages(kept)
    swap = 2 * g.shared + g.barrier
    terms.append(Term("merge", "sort", stages * swap * us, f"{stages} stages of {kept} keys in shared memory"))
    terms.append(Term("merge", "write the rows", 4 * g.l2 * us, "base anchor, 4 numbers, 3 stores"))

    rows = sum(min(top_n, level * channels) for level in cells(size))
    used = min(rows, min(first, top_n) + survivors - first)
    own = math.ceil(rows / BLOCK)
    terms.append(Term("suppress", "count and pack", (2 * own * g.l2 + scan) * us, f"{rows} rows, {used} used"))
    stages, pairs = bitonic_stages(used), math.ceil(2 ** math.ceil(math.log2(used)) / 2 / BLOCK)
    where = "shared" if used <= SHARED_KEYS else "GLOBAL"
    swap = pairs * 2 * (g.shared if used <= SHARED_KEYS else g.l2) + g.barrier
    terms.append(Term("suppress", "sort", stages * swap * us, f"{stages} stages of {used} keys in {where} memory"))
    tiles = math.ceil(min(kept_of, used) / TILE)
    groups = BLOCK // TILE
    compare = sum(math.ceil(detections * t / tiles / groups) * 2 * g.l2 for t in range(tiles))
    terms.append(Term("suppress", "tiles: load", tiles * (3 * g.l2 + 4 * g.barrier) * us, f"{tiles} tiles"))
    terms.append(Term("suppress", "tiles: kept boxes", compare * us, "reloaded from global memory for each tile"))
    inside = TILE // groups * (2 * g.shared + 40)
    terms.append(Term("suppress", "tiles: among themselves", tiles * inside * us, f"{TILE // groups} pairs per thread"))
    serial = min(detections, kept_of) * g.step
    terms.append(Term("suppress", "serial loop", serial * us, f"{detections} steps of one thread"))
    return terms


def totals(terms: Sequence[Term]) -> dict[str, float]:
    """Microseconds of each kernel."""
    sums: dict[str, float] = {}
    for term in terms:
        sums[term.kernel] = sums.get(term.kernel, 0.0) + term.microseconds
    return sums


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=2, default=[800, 1280], metavar=("H", "W"))
    for name, default in (("classes", 80), ("batch", 1), ("survivors", 3000), ("kept-of", 500)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    terms = model(
        tuple(options.size),
        options.classes,
        batch=options.batch,
        survivors=options.survivors,
        kept_of=options.kept_of,
    )
    for term in terms:
        print(f"{term.kernel:9} {term.name:24} {term.microseconds:7.1f} µs  {term.because}")
    for kernel, microseconds in totals(terms).items():
        print(f"{kernel:34} {microseconds:7.1f} µs")


if __name__ == "__main__":
    main()
