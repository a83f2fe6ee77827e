"""What a run tells of itself: progress, TensorBoard, LOGDIR/metrics.jsonl, HTTP."""

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

POST_SECONDS = 3.0  # until a server of --post-metrics counts as failing
LINE_SECONDS = 10  # between printed lines where there is no terminal for a progress bar


class Meter:
    """Adds up losses on the device, so that no step waits for it, and remembers where one was not finite.

    The values are those of all ranks, so all ranks read the same.

    Attributes:
        not_finite_at: iteration (from 1) of the first loss that was not finite, as of the last read().
    """

    def __init__(self, device: torch.device) -> None:
        self.bad_at = torch.full((), math.inf, device=device)
        self.not_finite_at: int | None = None
        self.start()

    def start(self) -> None:
        """Begins a new interval."""
        self.sums: Tensor | None = None
        self.parts, self.images, self.since = 0, 0, time.monotonic()

    def speed(self) -> float:
        """Images per second since start()."""
        return self.images / (time.monotonic() - self.since)

    def add(self, values: Tensor, iteration: int, images: int) -> None:
        """values: [terms] of one batch of ``images`` images."""
        self.sums = values if self.sums is None else self.sums + values
        self.parts += 1
        self.images += images
        here = torch.where(torch.isfinite(values).all(), math.inf, float(iteration))
        self.bad_at = torch.minimum(self.bad_at, here)

    def read(self, names: list[str]) -> dict[str, float]:
        """The mean of each term over the interval, by name, and of the whole loss. Waits for the device."""
        assert self.sums is not None
        *means, bad_at = torch.cat([self.sums / self.parts, self.bad_at[None]]).tolist()
        self.not_finite_at = None if bad_at == math.inf else int(bad_at)
        return {"loss": sum(means), **dict(zip(names, means, strict=True))}


class Report:
    """What rank 0 tells of a run: a progress bar or lines, TensorBoard, LOGDIR/metrics.jsonl, HTTP.

    A record is a flat object: ``iteration``, ``time`` (seconds since the epoch) and either ``loss``, the terms, ``lr``
    and ``images_per_second``, or the validation figures by their names (evaluate.STATS).
    """

    def __init__(self, config: TrainConfig, start: int, iters: int) -> None:
        self.start, self.iters, self.began, self.printed = start, iters, time.monotonic(), -math.inf
        self.poster = Poster(config.post_metrics) if config.post_metrics else None
        self.warned = False
        self.board: Any = None
        self.lines: Any = None
        if config.logdir:
            self.open_logs(Path(config.logdir))
        self.bar: Any = progress_bar(start, iters) if sys.stdout.isatty() else None

    def open_logs(self, folder: Path) -> None:
        from tensorboardX import SummaryWriter

        try:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / "metrics.jsonl"
            if not self.start and path.exists():  # of another run
                number = next(n for n in itertools.count(1) if not (folder / f"metrics.{n}.jsonl").exists())
                path.rename(folder / f"metrics.{number}.jsonl")
            self.lines = path.open("a", buffering=1)
        except OSError as error:
            raise OdtkError(f"--logdir {folder}: {error.strerror}.") from error
        self.board = SummaryWriter(str(folder))

    def __enter__(self) -> Report:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()
        if self.poster is not None:
            self.poster.close()
        if self.board is not None:
            self.board.close()
            self.lines.close()

    def training(self, iteration: int, losses: dict[str, float], rate: float, speed: float) -> None:
        """Losses since the last record, learning rate, images per second."""
        left = (time.monotonic() - self.began) / (iteration - self.start) * (self.iters - iteration)
        text = "  ".join(f"{name} {value:.4f}" for name, value in losses.items())
        text += f"  lr {rate:.2e}  {speed:.1f} im/s"
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=iteration, text=text)
        elif time.monotonic() - self.printed > LINE_SECONDS or iteration == self.iters:
            self.printed = time.monotonic()
            clock = timedelta(seconds=round(left))
            say(f"[{iteration}/{self.iters}]  {text}  {clock} left")
        self.record(iteration, {**losses, "lr": rate, "images_per_second": speed})

    def validation(self, iteration: int, metrics: Metrics, pictures: list[np.ndarray]) -> None:
        """Figures and pictures [H, W, 3]."""
        text = f"[{iteration}/{self.iters}]  validation: AP {metrics.ap:.3f}  AP50 {metrics.ap50:.3f}"
        if self.bar is not None:
            self.bar.console.print(text)
        else:
            say(text)
        self.record(iteration, dict(zip(STATS, metrics.stats, strict=True)))
        if self.board is not None:
            for number, picture in enumerate(pictures):
                self.board.add_image(f"validation/{number}", picture, iteration, dataformats="HWC")

    def record(self, iteration: int, values: dict[str, float]) -> None:
        entry = {"iteration": iteration, "time": round(time.time(), 3), **values}
        if self.lines is not None:
            try:
                self.lines.write(json.dumps(entry) + "\n")
            except OSError as error:  # a full disk, which spares the training until it has to save
                if not self.warned:
                    print(f"Warning: {self.lines.name}: {error.strerror}.", file=sys.stderr)
                self.warned = True
            for name, value in values.items():
                self.board.add_scalar(name.replace(" ", "_"), value, iteration)
        if self.poster is not None:
            self.poster.send(entry)


def say(text: str) -> None:
    """Prints a line, and nothing from then on where nobody reads (a `| tee` that died): training goes on."""
    try:
        print(text, flush=True)
    except OSError:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())


def progress_bar(start: int, iters: int) -> Any:
    """Of rich, with one task that has a field ``text``."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(bar_width=20), MofNCompleteColumn(), TextColumn("{task.fields[text]}"), TimeRemainingColumn())
    bar = Progress(*columns)
    bar.add_task("", total=iters, completed=start, text="")
    return bar


class Poster:
    """Sends records as JSON by HTTP POST, from a thread of its own: no server can hold up or stop the training."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.waiting: queue.Queue[dict[str, Any] | None] = queue.Queue(maxsize=100)
        self.thread = threading.Thread(target=self.work, daemon=True)
        self.thread.start()

    def send(self, entry: dict[str, Any]) -> None:
        """Takes a record; drops it if a hundred are waiting."""
        with suppress(queue.Full):
            self.waiting.put_nowait(entry)

    def work(self) -> None:
        import requests

        warned = False
        while (entry := self.waiting.get()) is not None:
            try:
                requests.post(self.url, json=entry, timeout=POST_SECONDS).raise_for_status()
            except requests.RequestException as error:
                if not warned:
                    print(f"Warning: --post-metrics {self.url} fails ({type(error).__name__}).", file=sys.stderr)
                warned = True

    def close(self) -> None:
        """Waits a moment for the last records."""
        with suppress(queue.Full):
            self.waiting.put_nowait(None)
        self.thread.join(POST_SECONDS)
