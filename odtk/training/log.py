"""The log of a training run: the terminal, TensorBoard, LOGDIR/metrics.jsonl, HTTP."""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import queue
import shlex
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import OdtkError, TrainConfig
from ..evaluation.evaluate import STATS, Metrics
from ..files import append
from ..text import printable

POST_TIMEOUT = 3.0  # seconds that the server of --post-metrics has for an answer
CLOSE_SECONDS = 3.0  # that the end of a run waits for what is still to be logged
WAITING = 100  # entries that wait to be logged; more are dropped
SLOW_SECONDS = 60.0  # that writing a checkpoint takes only where something is wrong
PRINT_SECONDS = 10  # between printed lines if there is no terminal, and so no progress bar
SHOWN_CLASSES = 8  # in a line


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
    evaluate.STATS) and ``AP/NAME`` of every class.

    Args:
        start: iterations done so far.
        iters: iterations of the whole run.

    Raises:
        OdtkError: config.logdir cannot be written.
    """

    def __init__(self, config: TrainConfig, start: int, iters: int) -> None:
        self.start, self.iters, self.began, self.printed_at = start, iters, time.monotonic(), -math.inf
        self.poster = MetricsPoster(config.post_metrics) if config.post_metrics else None
        self.files: Background | None = None
        if config.logdir:
            files = LogFiles(config.logdir, new=not start)
            self.files = Background(files.write, f"--logdir {config.logdir}", files.close)
        self.bar: Any = progress_bar(start, iters) if sys.stdout.isatty() else None

    def __enter__(self) -> RunLog:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            with suppress(OSError):  # the terminal is gone
                self.bar.stop()
        for logger in (self.poster, self.files):
            if logger is not None:
                logger.close()

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

    def validation(
        self, iteration: int, metrics: Metrics, pictures: list[np.ndarray], ema: float | None = None
    ) -> None:
        """Logs metrics, and RGB pictures, uint8 [H, W, 3].

        Args:
            ema: AP of the EMA, where the metrics are those of the trained weights, as theirs is higher.
        """
        text = f"[{iteration}/{self.iters}]  validation: AP {metrics.ap:.3f}  AP50 {metrics.ap50:.3f}"
        text += f"  ({classes})" if (classes := classes_line(metrics)) else ""
        text += "" if ema is None else f"  without the average of the weights, whose AP is {ema:.3f}"
        self.line(text)
        values = dict(zip(STATS, metrics.stats, strict=True))
        self.record(iteration, {**values, **{f"AP/{c.name}": c.ap for c in metrics.classes if c.ap >= 0}}, pictures)

    def line(self, text: str) -> None:
        """Prints a line above the progress bar."""
        if self.bar is not None:
            with suppress(OSError):  # the terminal is gone
                # The names of classes may look like rich's tags.
                self.bar.console.print(printable(text), markup=False, highlight=False, soft_wrap=True)
        else:
            print_line(text)

    def record(self, iteration: int, values: dict[str, float], pictures: Sequence[np.ndarray] = ()) -> None:
        """Hands values to metrics.jsonl, TensorBoard and the server, and pictures to TensorBoard; waits for nothing."""
        entry = {"iteration": iteration, "time": round(time.time(), 3), **values}
        if self.files is not None:
            self.files.send((entry, pictures))
        if self.poster is not None:
            self.poster.send(entry)


def classes_line(metrics: Metrics) -> str:
    """AP of every class, or of the worst of many, for a line of the log; empty for a single class."""
    classes = [c for c in metrics.classes if c.ap >= 0]
    if len(classes) < 2:
        return ""
    if len(classes) <= SHOWN_CLASSES:
        return ", ".join(f"{c.name} {c.ap:.3f}" for c in classes)
    worst = sorted(classes, key=lambda c: c.ap)[:SHOWN_CLASSES]
    return f"worst of {len(classes)} classes: " + ", ".join(f"{c.name} {c.ap:.3f}" for c in worst)


class LogFiles:
    """LOGDIR/metrics.jsonl, and the events file that TensorBoard reads.

    Each entry is written whole or not at all, so that the files stay readable when the disk was full for a while.
    tensorboardX makes the events, but does not write them: its writer stops for good at the first error, and its queue
    then blocks whoever logs, also at exit. The files have no buffer, as the interpreter would wait at exit for the lock
    of one whose disk does not answer.

    Args:
        folder: LOGDIR, made if it is missing.
        new: the run is not resumed, so the metrics.jsonl of another is kept under another name.

    Raises:
        OdtkError: it cannot be written.
    """

    def __init__(self, folder: str, *, new: bool) -> None:
        from tensorboardX.proto.event_pb2 import Event

        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            path = Path(folder, "metrics.jsonl")
            if new and path.exists():
                number = next(n for n in itertools.count(1) if not Path(folder, f"metrics.{n}.jsonl").exists())
                path.rename(Path(folder, f"metrics.{number}.jsonl"))
            self.metrics = open_to_append(path)
            name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}"
            self.events = open_to_append(Path(folder, name))
            append(self.events, tensorboard_record(Event(wall_time=time.time(), file_version="brain.Event:2")))
        except OSError as error:
            raise OdtkError(f"Cannot write in --logdir {folder}: {error.strerror}.") from error

    def write(self, item: tuple[dict[str, float], Sequence[np.ndarray]]) -> None:
        """Writes an entry, and RGB pictures, uint8 [H, W, 3].

        Raises:
            OSError: neither file is damaged by it.
        """
        from tensorboardX import summary
        from tensorboardX.proto.event_pb2 import Event

        entry, pictures = item
        append(self.metrics, json.dumps(entry).encode() + b"\n")
        values = {name.replace(" ", "_"): value for name, value in entry.items() if name not in ("iteration", "time")}
        summaries = [summary.scalar(name, value) for name, value in values.items()]
        summaries += [summary.image(f"validation/{i}", p, dataformats="HWC") for i, p in enumerate(pictures)]
        stamp = {"wall_time": entry["time"], "step": int(entry["iteration"])}
        records = [tensorboard_record(Event(summary=one, **stamp)) for one in summaries]
        append(self.events, b"".join(records))

    def close(self) -> None:
        self.metrics.close()
        self.events.close()


def open_to_append(path: Path) -> io.FileIO:
    return open(path, "ab", buffering=0)


def tensorboard_record(event: Any) -> bytes:
    """An event as a TFRecord: length, its checksum, content, its checksum (TensorFlow's tfrecord.md)."""
    from tensorboardX.record_writer import masked_crc32c

    content = event.SerializeToString()
    length = struct.pack("<Q", len(content))
    return b"".join(
        [length, struct.pack("<I", masked_crc32c(length)), content, struct.pack("<I", masked_crc32c(content))]
    )


def print_line(text: str) -> None:
    """Prints a line. If the reader of the output is gone (a `| tee` that died), nothing is printed from then on."""
    try:
        print(printable(text), flush=True)
    except OSError:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())


@contextmanager
def notice_if_slow(what: str) -> Iterator[None]:
    """Says on stderr that the block, which is ``what``, has taken SLOW_SECONDS and still goes on."""
    text = f"Warning: {printable(what)} takes more than {SLOW_SECONDS:g} s: does the storage answer?"
    timer = threading.Timer(SLOW_SECONDS, print, (text,), {"file": sys.stderr, "flush": True})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def progress_bar(start: int, iters: int) -> Any:
    """A progress bar of rich, with one task that has a field ``text``."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(bar_width=20), MofNCompleteColumn(), TextColumn("{task.fields[text]}"), TimeRemainingColumn())
    bar = Progress(*columns)
    bar.add_task("", total=iters, completed=start, text="")
    return bar


class Background:
    """Hands entries to a function in a thread of its own, so that no disk or server can delay or stop the training.

    What fails is lost; the first failure, and the first entry that is dropped, is said on stderr.

    Args:
        handle: writes one entry; it may raise anything, and may never return.
        label: what fails then, for the warning.
        finish: called in the thread after the last entry.
    """

    def __init__(self, handle: Callable[[Any], None], label: str, finish: Callable[[], None] = lambda: None) -> None:
        self.handle, self.label, self.finish = handle, printable(label), finish
        self.warned: set[str] = set()
        self.waiting: queue.Queue[Any] = queue.Queue(maxsize=WAITING)
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def send(self, entry: Any) -> None:
        """Queues an entry; drops it if WAITING others wait."""
        try:
            self.waiting.put_nowait(entry)
        except queue.Full:
            self.warn("slow", "takes no more entries, which are lost until it does again; training goes on")

    def run(self) -> None:
        """The thread: until close()."""
        while (entry := self.waiting.get()) is not None:
            try:
                self.handle(entry)
            except Exception as error:  # whatever it is, the next entry may succeed
                self.warn("fails", f"fails ({describe(error)}); training goes on")
        self.finish()

    def warn(self, kind: str, text: str) -> None:
        """Says something on stderr, the first time only."""
        if kind not in self.warned:
            self.warned.add(kind)
            with suppress(OSError, ValueError):  # stderr is gone
                print(f"Warning: {self.label} {text}.", file=sys.stderr)

    def close(self) -> None:
        """Waits at most CLOSE_SECONDS for the last entries."""
        with suppress(queue.Full):
            self.waiting.put(None, timeout=CLOSE_SECONDS / 2)
        self.thread.join(CLOSE_SECONDS / 2)


def describe(error: Exception) -> str:
    """The operating system's reason for an error, or else its type."""
    return getattr(error, "strerror", None) or type(error).__name__


class MetricsPoster(Background):
    """Sends metrics as JSON by HTTP POST."""

    def __init__(self, url: str) -> None:
        self.url = url
        super().__init__(self.post, f"--post-metrics {url}")

    def post(self, entry: dict[str, Any]) -> None:
        import requests

        requests.post(self.url, json=entry, timeout=POST_TIMEOUT).raise_for_status()


def closing_line(path: str, best: str | None, ap: float) -> str:
    """What to do with a trained model, in one line.

    Args:
        path: of the newest weights.
        best: of those with the highest validation AP; None if there is no such file.
        ap: that AP, 0…1; −1 without validation.
    """
    chosen, output = best or path, os.path.splitext(path)[0] + ".onnx"
    said = f"{best} is the best: AP {ap:.3f}" if best else f"{path} is trained"
    if best and ap == 0:
        said += "; no object of the validation set was found yet, train longer"
    if ap < 0:
        said += "; --val-annotations, or --val-share 0.2, would say its AP"
    return printable(f"{said}. Next: odtk export {shlex.quote(chosen)} {shlex.quote(output)}")
