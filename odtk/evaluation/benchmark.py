"""Speed and memory of a model, and the machine on which they were measured."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import BenchmarkConfig, LoaderConfig
from ..data.batch import Loader
from ..data.dataset import Dataset
from ..data.loader import create_loader
from ..data.sampler import round_up
from ..files import check_writable, write_json
from ..inference.backends import Backend, open_backend
from ..inference.detect import detect_batches, start_copy
from ..inference.infer import loader_config
from ..model.detector import normalize
from ..ranks import gather, silent
from ..text import plural, printable

DEFAULT_SIZE = (800, 1280)  # H, W for a model that takes any size
PERCENTILES = (50, 90, 99)


def benchmark(config: BenchmarkConfig, rank: int = 0, world: int = 1) -> dict[str, Any]:
    """Times a model on random images, and from files if config.data.images is set.

    The runs are, each on batches of config.data.batch and those of one image too:
      ``model``: images are where the model reads them; on CUDA, latency is taken between events of the stream, so that
          the CPU may run ahead as it does in use;
      ``with copies``: from images to detections in the CPU's memory, one batch after the other;
      ``from files``: as `odtk infer` works, with the loader ahead of the model; latency is the time between batches;
      ``from files, one at a time``: from a file to its detections, with nothing prepared ahead.
    Latency is that of one batch. Throughput is that of all timed batches together. Random images leave few candidates
    for NMS: on real images it takes longer.

    Returns:
        On rank 0 the figures, which it also prints and writes to config.output: the throughput of all ranks together,
        the latencies of rank 0. On the other ranks an empty dictionary.
    """
    if config.output:
        check_writable(config.output)
    device = torch.device(config.data.device)
    backend = open_backend(config.path, device=str(device), precision=config.precision, thresholds=None)
    data = loader_config(config.data, backend, print if rank == 0 else silent)
    height, width = data.size or backend.input_size or round_up(DEFAULT_SIZE, backend.stride)
    data = dataclasses.replace(data, size=(height, width))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    steps: dict[str, Callable[[], int]] = {}
    for batch in dict.fromkeys((data.batch, 1)):
        images = random_images(backend, batch, (height, width), pinned=device.type == "cuda")
        steps[run_name("model", batch, data)] = functools.partial(run_model, backend, backend.place(images.to(device)))
        steps[run_name("with copies", batch, data)] = functools.partial(run_with_copies, backend, images, device)
    if data.images:
        dataset = Dataset.load(data.annotations, data.images, rotated=data.rotated)
        steps["from files"] = functools.partial(next, pass_after_pass(backend, create_loader(dataset, data)))
        single = create_loader(dataset, dataclasses.replace(data, batch=1))
        steps["from files, one at a time"] = functools.partial(run_one_file, backend, single, itertools.count())
    on_device = ("model", "model, batch 1")
    runs = {
        name: measure(step, config.iters, config.warmup, device, events=name in on_device and device.type == "cuda")
        for name, step in steps.items()
    }
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
        "input type": backend.input_type,
        "devices": world,
        "runs": runs,
        "memory": memory_usage(device),
        "machine": describe_machine(),
    }
    print_report(figures)
    if config.output:
        write_json(figures, config.output)
    return figures


def run_name(what: str, batch: int, data: LoaderConfig) -> str:
    """The name of a run, with its batch size if that is not the one asked for."""
    return what if batch == data.batch else f"{what}, batch {batch}"


def random_images(backend: Backend, batch: int, size: tuple[int, int], *, pinned: bool) -> Tensor:
    """Images of noise in the CPU's memory, as loaders give them to the backend."""
    pixels = torch.randint(0, 256, (batch, 3, *size), dtype=torch.uint8)
    images = normalize(pixels, backend.mean, backend.std) if backend.input_type == "normalized" else pixels
    images = images.float() if backend.input_type == "float32" else images
    return images.pin_memory() if pinned else images


def run_model(backend: Backend, images: Tensor) -> int:
    """Enqueues one batch, and gives its number of images."""
    backend(images)
    return len(images)


def run_with_copies(backend: Backend, images: Tensor, device: torch.device) -> int:
    """One batch from the CPU's memory to detections there; gives its number of images."""
    found = backend(images.to(device, non_blocking=True))
    for values in (found.scores, found.boxes, found.classes):
        values.cpu()
    return len(images)


def pass_after_pass(backend: Backend, loader: Loader) -> Iterator[int]:
    """The number of images of each batch whose detections have arrived, in one pass over the files after the other."""
    while True:
        for batch, _ in detect_batches(backend, loader):
            yield len(batch.images)


def run_one_file(backend: Backend, loader: Loader, numbers: Iterator[int]) -> int:
    """One image from its file to its detections; gives 1."""
    batch = loader.batch(next(numbers) % len(loader))
    start_copy(backend(batch.images), batch)()
    return 1


@torch.inference_mode()
def measure(
    step: Callable[[], int], iters: int, warmup: int, device: torch.device, *, events: bool = False
) -> dict[str, Any]:
    """Images per second, and percentiles of the latency in milliseconds per step.

    Args:
        step: runs one batch and gives its number of images.
        iters: number of timed steps.
        warmup: number of steps before these.
        events: latency is the time between events of the current CUDA stream, not that until the step returns.
    """
    for _ in range(warmup):
        step()
    synchronize(device)
    spans: list[tuple[Any, Any]] = []
    images = 0
    start = time.perf_counter()
    for _ in range(iters):
        begin = timestamp(events)
        images += step()
        spans.append((begin, timestamp(events)))
    synchronize(device)
    seconds = time.perf_counter() - start
    latencies = [b.elapsed_time(e) if events else (e - b) * 1e3 for b, e in spans]
    return {
        "images per second": images / seconds,
        "latency ms": {f"p{p}": float(np.percentile(latencies, p)) for p in PERCENTILES},
        "batches": iters,
        "warm-up batches": warmup,
    }


def timestamp(events: bool) -> Any:
    """This point in time: an event on the current CUDA stream, or seconds of the CPU's clock."""
    if not events:
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
    title = (
        f"{printable(figures['model'])}: {figures['backend']}, {figures['precision']}, {shape} {figures['input type']}"
    )
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
