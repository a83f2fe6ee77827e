"""How fast a backend is, how much memory it takes, and what this machine is."""

from __future__ import annotations

import dataclasses
import itertools
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import BenchmarkConfig
from ..data.dataset import Dataset
from ..data.loader import create_loader
from ..data.sampler import round_up
from ..files import write_json
from ..inference.backends import Backend, open_backend
from ..inference.infer import loader_config
from ..launch import gather, silent

SIZE = (800, 1280)  # H, W of a model that takes any size
PERCENTILES = (50, 90, 99)


def benchmark(config: BenchmarkConfig, rank: int = 0, world: int = 1) -> dict[str, Any]:
    """Times a model on random images that lie on the device, and with config.data.images behind its loader too.

    Latency is that of one batch, from images to Detections; on CUDA between events of the stream, so that the host may
    run ahead as it does in use. Throughput is counted over the whole of the timed batches. Random images leave few
    candidates for the NMS: with real images its share is larger.

    Returns:
        On rank 0 the figures (throughput summed over the ranks, latencies of rank 0), which it also prints and writes
        to config.output; on the others nothing.
    """
    device = torch.device(config.data.device)
    backend = open_backend(config.path, device=str(device), precision=config.precision, postprocess=None)
    data = loader_config(config.data, backend, print if rank == 0 else silent)
    height, width = data.size or round_up(SIZE, backend.stride)
    data = dataclasses.replace(data, size=(height, width))
    images = torch.randn(data.batch, 3, height, width, device=device)  # starts CUDA where the backend has not
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    alone = measure(backend, itertools.repeat(images), config.iters, config.warmup, device)
    runs = {"model": alone}
    if data.images:
        dataset = Dataset.load(data.annotations, data.images, rotated=data.rotated)
        batches = endless(lambda: (batch.images for batch in create_loader(dataset, data)))
        runs["loader and model"] = measure(backend, batches, config.iters, config.warmup, device)
    shards = gather({name: run["images per second"] for name, run in runs.items()})
    if rank:
        return {}
    for name, run in runs.items():
        run["images per second"] = sum(shard[name] for shard in shards)
    figures = {
        "model": config.path,
        "backend": backend.name,
        "precision": backend.precision,
        "input": [data.batch, 3, height, width],
        "devices": world,
        "runs": runs,
        "memory": memory(device),
        "machine": machine(),
    }
    report(figures)
    if config.output:
        write_json(figures, config.output)
    return figures


def endless(passes: Callable[[], Iterable[Tensor]]) -> Iterator[Tensor]:
    while True:
        yield from passes()


@torch.inference_mode()
def measure(
    backend: Backend, batches: Iterable[Tensor], iters: int, warmup: int, device: torch.device
) -> dict[str, Any]:
    """Images per second and latency percentiles (milliseconds per batch) over `iters` batches after `warmup`."""
    source = iter(batches)
    for _ in range(warmup):
        backend(next(source))
    synchronize(device)
    marks: list[tuple[Any, Any]] = []
    images = 0
    start = time.perf_counter()
    for _ in range(iters):
        batch = next(source)
        begin = mark(device)
        backend(batch)
        marks.append((begin, mark(device)))
        images += len(batch)
    synchronize(device)
    seconds = time.perf_counter() - start
    latencies = [b.elapsed_time(e) if device.type == "cuda" else (e - b) * 1e3 for b, e in marks]
    return {
        "images per second": images / seconds,
        "latency ms": {f"p{p}": float(np.percentile(latencies, p)) for p in PERCENTILES},
        "batches": iters,
        "warm-up batches": warmup,
    }


def mark(device: torch.device) -> Any:
    """A point in time: an event on the current stream, or seconds."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory(device: torch.device) -> dict[str, float]:
    """MiB: peak of this process, and on CUDA the peak of torch's tensors and what is in use on the whole device."""
    unit = 1 << 20 if sys.platform == "darwin" else 1 << 10  # ru_maxrss is in bytes there, in KiB on Linux
    found = {"process peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit}
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        found["device, torch's peak"] = torch.cuda.max_memory_allocated(device) / (1 << 20)
        found["device, in use by all"] = (total - free) / (1 << 20)
    return found


def report(figures: dict[str, Any]) -> None:
    """Prints the figures as a table."""
    from rich.console import Console
    from rich.table import Table

    shape = "×".join(map(str, figures["input"]))
    title = f"{figures['model']}: {figures['backend']}, {figures['precision']}, {shape}"
    table = Table(title=title, title_justify="left")
    columns = ["what is timed", "images/s", *(f"p{p} ms" for p in PERCENTILES)]
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    for name, run in figures["runs"].items():
        latencies = [f"{ms:.2f}" for ms in run["latency ms"].values()]
        table.add_row(name, f"{run['images per second']:.1f}", *latencies)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    console.print("Memory: " + ", ".join(f"{name} {mib:.0f} MiB" for name, mib in figures["memory"].items()))
    console.print(f"On {figures['machine']}", highlight=False)


# ---------------------------------------------------------------------------------------------------------------------
# The machine


def machine() -> str:
    """Processor, GPUs and versions in one line, to stand beside a figure."""
    parts = [f"{cpu_name()}, {os.cpu_count()} cores", *gpus(), f"torch {torch.__version__}", time.strftime("%Y-%m-%d")]
    return "; ".join(parts)


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def gpus() -> list[str]:
    """Name, compute capability and memory of each visible GPU."""
    found = []
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        p = torch.cuda.get_device_properties(i)
        found.append(f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB")
    return found
