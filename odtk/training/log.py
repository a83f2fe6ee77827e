"""The log of a training run: the terminal, TensorBoard, LOGDIR/metrics.jsonl, HTTP."""

from __future__ import annotations

import itertools
import json
import math
import os
import queue
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import OdtkError, TrainConfig
from ..evaluation.evaluate import STATS, Metrics

POST_TIMEOUT = 3.0  # seconds that the server of --post-metrics has for an answer
PRINT_SECONDS = 10  # between printed lines if there is no terminal, and so no progress bar


class Meter:
    """Adds up losses on the device, so that no step waits for them, and notes the first that is not finite.

    The values that are added are sums over all ranks, so all ranks read the same numbers.

    Attributes:
        not_finite_at: iteration (from 1) of the first loss that was not finite, as of the last read(); or None.
    """

    def __init__(self, device: torch.device) -> None:
        self.first_bad = torch.full((), math.inf, device=device)  # iteration; infinite while all losses are finite
        self.not_finite_at: int | None = None
        self.start()

    def start(self) -> None:
        """Begins a new interval."""
        self.sums: Tensor | None = None
        self.batches, self.images, self.started = 0, 0, time.monotonic()

    def speed(self) -> float:
        """Images per second since start()."""
        return self.images / (time.monotonic() - self.started)

    def add(self, values: Tensor, iteration: int, images: int) -> None:
        """Adds the losses [terms] of one batch of ``images`` images, of an iteration counted from 1."""
        self.sums = values if self.sums is None else self.sums + values
        self.batches += 1
        self.images += images
        bad = torch.where(torch.isfinite(values).all(), math.inf, float(iteration))
        self.first_bad = torch.minimum(self.first_bad, bad)

    def read(self, names: list[str]) -> dict[str, float]:
        """The mean of the loss (``loss``) and of each of its terms since start(), by name. Waits for the device."""
        assert self.sums is not None
        *means, first_bad = torch.cat([self.sums / self.batches, self.first_bad[None]]).tolist()
        self.not_finite_at = None if first_bad == math.inf else int(first_bad)
        return {"loss": sum(means), **dict(zip(names, means, strict=True))}


class RunLog:
    """Logs a run, on rank 0: a progress bar or lines on the terminal, TensorBoard, LOGDIR/metrics.jsonl, HTTP.

    A line of metrics.jsonl, and the body of a POST, is a flat JSON object: ``iteration``, ``time`` (seconds since the
    epoch), and either ``loss``, its terms, ``lr`` and ``images_per_second``, or the validation metrics (see
    evaluate.STATS).

    Args:
        start: iterations done so far.
        iters: iterations of the whole run.

    Raises:
        OdtkError: config.logdir cannot be written.
    """

    def __init__(self, config: TrainConfig, start: int, iters: int) -> None:
        self.start, self.iters, self.began, self.printed_at = start, iters, time.monotonic(), -math.inf
        self.poster = MetricsPoster(config.post_metrics) if config.post_metrics else None
        self.warned = False  # that metrics.jsonl cannot be written
        self.tensorboard: Any = None
        self.metrics_file: Any = None
        if config.logdir:
            self.open_logs(Path(config.logdir))
        self.bar: Any = progress_bar(start, iters) if sys.stdout.isatty() else None

    def open_logs(self, folder: Path) -> None:
        from tensorboardX import SummaryWriter

        try:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / "metrics.jsonl"
            if not self.start and path.exists():  # a new run keeps the log of another
                number = next(n for n in itertools.count(1) if not (folder / f"metrics.{n}.jsonl").exists())
                path.rename(folder / f"metrics.{number}.jsonl")
            self.metrics_file = path.open("a", buffering=1)
        except OSError as error:
            raise OdtkError(f"Cannot write in --logdir {folder}: {error.strerror}.") from error
        self.tensorboard = SummaryWriter(str(folder))

    def __enter__(self) -> RunLog:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()
        if self.poster is not None:
            self.poster.close()
        if self.tensorboard is not None:
            self.tensorboard.close()
            self.metrics_file.close()

    def training(self, iteration: int, losses: dict[str, float], rate: float, speed: float) -> None:
        """Logs the mean losses since the last call, the learning rate, and the speed in images per second."""
        left = (time.monotonic() - self.began) / (iteration - self.start) * (self.iters - iteration)
        text = "  ".join(f"{name} {value:.4f}" for name, value in losses.items())
        text += f"  lr {rate:.2e}  {speed:.1f} im/s"
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=iteration, text=text)
        elif time.monotonic() - self.printed_at > PRINT_SECONDS or iteration == self.iters:
            self.printed_at = time.monotonic()
            clock = timedelta(seconds=round(left))
            print_line(f"[{iteration}/{self.iters}]  {text}  {clock} left")
        self.record(iteration, {**losses, "lr": rate, "images_per_second": speed})

    def validation(self, iteration: int, metrics: Metrics, pictures: list[np.ndarray]) -> None:
        """Logs metrics, and RGB pictures, uint8 [H, W, 3]."""
        text = f"[{iteration}/{self.iters}]  validation: AP {metrics.ap:.3f}  AP50 {metrics.ap50:.3f}"
        if self.bar is not None:
            self.bar.console.print(text)
        else:
            print_line(text)
        self.record(iteration, dict(zip(STATS, metrics.stats, strict=True)))
        if self.tensorboard is not None:
            for number, picture in enumerate(pictures):
                self.tensorboard.add_image(f"validation/{number}", picture, iteration, dataformats="HWC")

    def record(self, iteration: int, values: dict[str, float]) -> None:
        """Writes values to metrics.jsonl and TensorBoard, and posts them."""
        entry = {"iteration": iteration, "time": round(time.time(), 3), **values}
        if self.metrics_file is not None:
            try:
                self.metrics_file.write(json.dumps(entry) + "\n")
            except OSError as error:  # a full disk, say: training goes on until it has to save
                if not self.warned:
                    warning = f"Warning: cannot write {self.metrics_file.name}: {error.strerror}; training goes on."
                    print(warning, file=sys.stderr)
                self.warned = True
            for name, value in values.items():
                self.tensorboard.add_scalar(name.replace(" ", "_"), value, iteration)
        if self.poster is not None:
            self.poster.send(entry)


def print_line(text: str) -> None:
    """Prints a line. If the reader of the output is gone (a `| tee` that died), nothing is printed from then on."""
    try:
        print(text, flush=True)
    except OSError:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())


def progress_bar(start: int, iters: int) -> Any:
    """A progress bar of rich, with one task that has a field ``text``."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(bar_width=20), MofNCompleteColumn(), TextColumn("{task.fields[text]}"), TimeRemainingColumn())
    bar = Progress(*columns)
    bar.add_task("", total=iters, completed=start, text="")
    return bar


class MetricsPoster:
    """Sends metrics as JSON by HTTP POST, from its own thread, so that no server can delay or stop the training."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.waiting: queue.Queue[dict[str, Any] | None] = queue.Queue(maxsize=100)
        self.thread = threading.Thread(target=self.post_all, daemon=True)
        self.thread.start()

    def send(self, entry: dict[str, Any]) -> None:
        """Queues metrics to be posted; drops them if a hundred are waiting."""
        with suppress(queue.Full):
            self.waiting.put_nowait(entry)

    def post_all(self) -> None:
        """The thread: posts until close(); warns of the first failure only."""
        import requests

        warned = False
        while (entry := self.waiting.get()) is not None:
            try:
                requests.post(self.url, json=entry, timeout=POST_TIMEOUT).raise_for_status()
            except requests.RequestException as error:
                if not warned:
                    print(f"Warning: --post-metrics {self.url} fails ({type(error).__name__}).", file=sys.stderr)
                warned = True

    def close(self) -> None:
        """Waits at most POST_TIMEOUT seconds for the last metrics to be posted."""
        with suppress(queue.Full):
            self.waiting.put_nowait(None)
        self.thread.join(POST_TIMEOUT)
