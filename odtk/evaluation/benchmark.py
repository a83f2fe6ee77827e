"""Speed and memory of a model, and the machine on which they were measured."""

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
from ..ranks import gather, silent
from ..text import plural, printable

DEFAULT_SIZE = (800, 1280)  # H, W for a model that takes any size
PERCENTILES = (50, 90, 99)


def benchmark(config: BenchmarkConfig, rank: int = 0, world: int = 1) -> dict[str, Any]:
    """Times a model on random images in the device's memory, and together with its loader if config.data.images is set.

    Latency is the time of one batch from images to Detections; on CUDA it is taken between events of the stream, so
    that the CPU may run ahead as it does in use. Throughput is that of all timed batches together. Random images leave
    few candidates for NMS: on real images it takes longer.

    Returns:
        On rank 0 the figures, which it also prints and writes to config.output: the throughput of all ranks together,
        the latencies of rank 0. On the other ranks an empty dictionary.
    """
    device = torch.device(config.data.device)
    backend = open_backend(config.path, device=str(device), precision=config.precision, thresholds=None)
    data = loader_config(config.data, backend, print if rank == 0 else silent)
    height, width = data.size or backend.input_size or round_up(DEFAULT_SIZE, backend.stride)
    data = dataclasses.replace(data, size=(height, width))
    images = torch.randint(0, 256, (data.batch, 3, height, width), dtype=torch.uint8, device=device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    runs = {"model": measure(backend, itertools.repeat(images), config.iters, config.warmup, device)}
    if data.images:
        dataset = Dataset.load(data.annotations, data.images, rotated=data.rotated)
        batches = repeat_passes(lambda: (batch.images for batch in create_loader(dataset, data)))
        runs["loader and model"] = measure(backend, batches, config.iters, config.warmup, device)
    throughputs = gather({name: run["images per second"] for name, run in runs.items()})
    if rank:
        return {}
    for name, run in runs.items():
        run["images per second"] = sum(of_rank[name] for of_rank in throughputs)
    figures = {
        "model": config.path,
        "backend": backend.name,
        "precision": backend.precision,
        "input": [data.batch, 3, height, width],
        "devices": world,
        "runs": runs,
        "memory": memory_usage(device),
        "machine": describe_machine(),
    }
    print_report(figures)
    if config.output:
        write_json(figures, config.output)
    return figures


def repeat_passes(start_pass: Callable[[], Iterable[Tensor]]) -> Iterator[Tensor]:
    """Batches without end: a new pass over the images starts when one is over."""
    while True:
        yield from start_pass()


@torch.inference_mode()
def measure(
    backend: Backend, batches: Iterable[Tensor], iters: int, warmup: int, device: torch.device
) -> dict[str, Any]:
    """Images per second, and percentiles of the latency in milliseconds per batch.

    Args:
        batches: images [N, 3, H, W], as the backend takes them; at least warmup + iters batches.
        iters: number of timed batches.
        warmup: number of batches before these.
    """
    source = iter(batches)
    for _ in range(warmup):
        backend(next(source))
    synchronize(device)
    spans: list[tuple[Any, Any]] = []
    images = 0
    start = time.perf_counter()
    for _ in range(iters):
        batch = next(source)
        begin = timestamp(device)
        backend(batch)
        spans.append((begin, timestamp(device)))
        images += len(batch)
    synchronize(device)
    seconds = time.perf_counter() - start
    latencies = [b.elapsed_time(e) if device.type == "cuda" else (e - b) * 1e3 for b, e in spans]
    return {
        "images per second": images / seconds,
        "latency ms": {f"p{p}": float(np.percentile(latencies, p)) for p in PERCENTILES},
        "batches": iters,
        "warm-up batches": warmup,
    }


def timestamp(device: torch.device) -> Any:
    """This point in time: an event on the current CUDA stream, or seconds on the CPU."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def synchronize(device: torch.device) -> None:
    """Waits until a GPU has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory_usage(device: torch.device) -> dict[str, float]:
    """MiB: this process's peak, and on CUDA the peak of torch's tensors and what all processes use of the device."""
    unit = 1 << 20 if sys.platform == "darwin" else 1 << 10  # ru_maxrss: bytes on macOS, KiB on Linux
    usage = {"process peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit}
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        usage["device, torch's peak"] = torch.cuda.max_memory_allocated(device) / (1 << 20)
        usage["device, in use by all"] = (total - free) / (1 << 20)
    return usage


def print_report(figures: dict[str, Any]) -> None:
    """Prints the figures as a table."""
    from rich.console import Console
    from rich.table import Table

    shape = "×".join(map(str, figures["input"]))
    title = f"{printable(figures['model'])}: {figures['backend']}, {figures['precision']}, {shape}"
    table = Table(title=title, title_justify="left")
    columns = ["what is timed", "images/s", *(f"p{p} ms" for p in PERCENTILES)]
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    for name, run in figures["runs"].items():
        latencies = [f"{ms:.2f}" for ms in run["latency ms"].values()]
        table.add_row(name, f"{run['images per second']:.1f}", *latencies)
    console = Console(markup=False, emoji=False, width=None if sys.stdout.isatty() else 120)
    console.print(table)
    console.print("Memory: " + ", ".join(f"{name} {mib:.0f} MiB" for name, mib in figures["memory"].items()))
    console.print(f"On {figures['machine']}", highlight=False)


# ---------------------------------------------------------------------------------------------------------------------
# The machine


def describe_machine() -> str:
    """Devices, torch's version and the date in one line, to be stated beside a figure."""
    return "; ".join([*describe_devices(), f"torch {torch.__version__}", time.strftime("%Y-%m-%d")])


def describe_devices() -> list[str]:
    """The processor with its number of cores, then each visible GPU with its compute capability and memory."""
    devices = [f"{cpu_name()}, {plural(os.cpu_count() or 1, 'core')}"]
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        gpu = torch.cuda.get_device_properties(i)
        devices.append(f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB")
    return devices


def cpu_name() -> str:
    """The processor's name, or its architecture where the system does not give a name."""
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
