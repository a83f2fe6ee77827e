"""The log of a training run: the terminal, and a list of writers (files, the page, HTTP, MLflow, W&B)."""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import queue
import re
import shlex
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..config import OdtkError, RunConfig
from ..evaluation.evaluate import Metrics
from ..files import append, has_module
from ..text import printable
from .run_page import RunPage

POST_TIMEOUT = 3.0  # seconds that the server of --post-metrics has for an answer
CLOSE_SECONDS = 3.0  # that the end of a run waits for what is still to be logged
PAGE_SECONDS = 10.0  # the same for the page
TRACKER_SECONDS = 30.0  # the same for MLflow and W&B, which take seconds to start
WAITING = 100  # entries that wait to be logged; more are dropped
SLOW_SECONDS = 60.0  # that writing a checkpoint takes only where something is wrong
PRINT_SECONDS = 10  # between printed lines if there is no terminal, and so no progress bar
SHOWN_CLASSES = 8  # in a line

Item = tuple[dict[str, float], Sequence[np.ndarray]]  # an entry, and RGB pictures, uint8 [H, W, 3]


@dataclass(frozen=True)
class Validated:
    """What a validation has found.

    Attributes:
        score: RunConfig.SCORE, the higher the better; negative where nothing could be measured.
        text: for people, in a line.
        values: for the log, by name.
        pictures: RGB, uint8 [H, W, 3] each.
    """

    score: float
    text: str
    values: dict[str, float]
    pictures: Sequence[np.ndarray] = ()


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
    """Logs a run, on rank 0: a progress bar or lines on the terminal, and what open_writers returns.

    A line of metrics.jsonl, and the body of a POST, is a flat JSON object: ``iteration``, ``time`` (seconds since the
    epoch), and either ``loss``, its terms, ``lr`` and ``images_per_second``, or what validation has found.

    Args:
        start: iterations done so far.
        iters: iterations of the whole run.

    Raises:
        OdtkError: config.logdir cannot be written, or a package is missing.
    """

    def __init__(self, config: RunConfig, start: int, iters: int) -> None:
        self.start, self.iters, self.began, self.printed_at = start, iters, time.monotonic(), -math.inf
        self.score = config.SCORE
        self.writers = open_writers(config, start, iters)
        self.bar: Any = progress_bar(start, iters) if sys.stdout.isatty() else None

    def __enter__(self) -> RunLog:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            with suppress(OSError):  # the terminal is gone
                self.bar.stop()
        began = time.monotonic()
        for writer in self.writers:
            writer.end(began)
        for writer in self.writers:
            writer.wait(began)

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

    def validation(self, iteration: int, found: Validated, ema: float | None = None) -> None:
        """Logs what a validation has found.

        Args:
            ema: score of the EMA, where this is that of the trained weights, as theirs is higher.
        """
        text = f"[{iteration}/{self.iters}]  validation: {found.text}"
        text += "" if ema is None else f"  without the average of the weights, whose {self.score} is {ema:.3f}"
        self.line(text)
        self.record(iteration, found.values, found.pictures)

    def ends_early(self, why: str) -> None:
        """Has the page say why the run ends before its last iteration."""
        for place in self.writers:
            if isinstance(place.writer, RunPage):
                place.writer.why = why

    def line(self, text: str) -> None:
        """Prints a line above the progress bar."""
        if self.bar is not None:
            with suppress(OSError):  # the terminal is gone
                # The names of classes may look like rich's tags.
                self.bar.console.print(printable(text), markup=False, highlight=False, soft_wrap=True)
        else:
            print_line(text)

    def record(self, iteration: int, values: dict[str, float], pictures: Sequence[np.ndarray] = ()) -> None:
        """Hands values and pictures to the writers; waits for nothing."""
        entry = {"iteration": iteration, "time": round(time.time(), 3), **values}
        for writer in self.writers:
            writer.send((entry, pictures))


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

    def write(self, item: Item) -> None:
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


class Writer(Protocol):
    """Where a log goes. Its methods are called in a thread of its own; they may raise, and may never return."""

    def write(self, item: Item) -> None:
        """Writes one entry."""

    def close(self) -> None:
        """Is called after the last entry."""


class Background:
    """Hands entries to a writer in a thread of its own, so that no disk or server can delay or stop the training.

    What fails is lost; the first failure, and the first entry that is dropped, is said on stderr.

    Args:
        label: what fails then, for the warning.
        seconds: that the end of a run waits for it.
    """

    def __init__(self, writer: Writer, label: str, seconds: float | None = None) -> None:
        self.writer, self.label, self.seconds = writer, printable(label), seconds or CLOSE_SECONDS
        self.warned: set[str] = set()
        self.waiting: queue.Queue[Item | None] = queue.Queue(maxsize=WAITING)
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def send(self, entry: Item) -> None:
        """Queues an entry; drops it if WAITING others wait."""
        try:
            self.waiting.put_nowait(entry)
        except queue.Full:
            self.warn("slow", "takes no more entries, which are lost until it does again; training goes on")

    def run(self) -> None:
        """The thread: until end()."""
        while (entry := self.waiting.get()) is not None:
            self.attempt(self.writer.write, entry)
        self.attempt(self.writer.close)

    def attempt(self, call: Callable[..., None], *arguments: Any) -> None:
        try:
            call(*arguments)
        except Exception as error:  # whatever it is, the next entry may succeed
            self.warn("fails", f"fails ({describe(error)}); training goes on")

    def warn(self, kind: str, text: str) -> None:
        """Says something on stderr, the first time only."""
        if kind not in self.warned:
            self.warned.add(kind)
            with suppress(OSError, ValueError):  # stderr is gone
                print(f"Warning: {self.label} {text}.", file=sys.stderr)

    def end(self, began: float) -> None:
        """Queues the end, at most until half of its seconds since ``began`` have passed."""
        with suppress(queue.Full):
            self.waiting.put(None, timeout=max(0.0, began + self.seconds / 2 - time.monotonic()))

    def wait(self, began: float) -> None:
        """Waits for the last entries, at most until its seconds since ``began`` have passed."""
        self.thread.join(max(0.0, began + self.seconds - time.monotonic()))


def describe(error: BaseException) -> str:
    """The operating system's reason for an error, or else its type."""
    if isinstance(error, OdtkError) and error.__cause__ is not None:
        error = error.__cause__
    return getattr(error, "strerror", None) or type(error).__name__


# ---------------------------------------------------------------------------------------------------------------------
# The writers besides LogFiles and the page


def open_writers(config: RunConfig, start: int, iters: int) -> list[Background]:
    """Every place that a run is logged to.

    Raises:
        OdtkError: config.logdir cannot be written, or a package is missing.
    """
    found = []
    if config.post_metrics:
        found.append(Background(MetricsPoster(config.post_metrics), f"--post-metrics {config.post_metrics}"))
    for name in config.log_to:
        if not has_module(name):
            raise OdtkError(f"--log-to {name} needs its package: pip install 'odtk[{name}]'.")
    if config.logdir:
        found.append(Background(LogFiles(config.logdir, new=not start), f"--logdir {config.logdir}"))
        page = RunPage(config, start, iters)
        found.append(Background(page, f"the page {page.path}", PAGE_SECONDS))
    found += [Background(TRACKERS[name](config), f"--log-to {name}", TRACKER_SECONDS) for name in config.log_to]
    return found


class MetricsPoster:
    """Sends metrics as JSON by HTTP POST."""

    def __init__(self, url: str) -> None:
        self.url = url

    def write(self, item: Item) -> None:
        import requests

        requests.post(self.url, json=item[0], timeout=POST_TIMEOUT).raise_for_status()

    def close(self) -> None:
        pass


class MlflowWriter:
    """MLflow: the server of MLFLOW_TRACKING_URI, or else LOGDIR/mlflow.db."""

    def __init__(self, config: RunConfig) -> None:
        self.config, self.run = config, ""
        self.client: Any = None

    def open(self) -> Any:
        """Starts a run in the experiment "odtk"; the first time it takes seconds."""
        from mlflow import MlflowClient
        from mlflow.entities import Param

        folder = Path(self.config.logdir or ".").resolve()
        client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder / 'mlflow.db'}")
        known = client.get_experiment_by_name("odtk")
        local = None if "MLFLOW_TRACKING_URI" in os.environ else (folder / "mlflow").as_uri()
        experiment = known.experiment_id if known else client.create_experiment("odtk", artifact_location=local)
        self.run = client.create_run(experiment, run_name=os.path.basename(self.config.path)).info.run_id
        settings = [Param(name, str(value)[:500]) for name, value in (self.config.settings or {}).items()]
        client.log_batch(self.run, params=settings[:100])
        return client

    def write(self, item: Item) -> None:
        from mlflow.entities import Metric

        self.client = self.client or self.open()
        entry, pictures = item
        stamp, step = int(1000 * entry["time"]), int(entry["iteration"])
        names = {name: re.sub(r"[^\w\-. /:]", "_", name) for name in entry if name not in ("iteration", "time")}
        self.client.log_batch(self.run, [Metric(names[name], entry[name], stamp, step) for name in names])
        for i, one in enumerate(pictures):
            self.client.log_image(self.run, one, artifact_file=f"validation/{i}/{step:08}.png")

    def close(self) -> None:
        if self.client is not None:
            self.client.set_terminated(self.run)


class WandbWriter:
    """Weights & Biases: offline in LOGDIR/wandb (`wandb sync` sends it), or as WANDB_MODE says."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.run: Any = None

    def write(self, item: Item) -> None:
        import wandb

        if self.run is None:
            self.run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "odtk"),
                name=os.path.basename(self.config.path),
                dir=self.config.logdir,
                config=self.config.settings,
                mode=os.environ.get("WANDB_MODE", "offline"),
                settings=wandb.Settings(silent=True, console="off"),
            )
        entry, pictures = item
        values = {name: value for name, value in entry.items() if name not in ("iteration", "time")}
        images = {f"validation/{i}": wandb.Image(one) for i, one in enumerate(pictures)}
        self.run.log({**values, **images}, step=int(entry["iteration"]))

    def close(self) -> None:
        if self.run is not None:
            self.run.finish()


TRACKERS: dict[str, Callable[[RunConfig], Writer]] = {"mlflow": MlflowWriter, "wandb": WandbWriter}


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
