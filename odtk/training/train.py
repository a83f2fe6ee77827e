"""Training: one loop that reads from top to bottom, and below it the parts it names.

What a checkpoint holds of a run (Checkpoint.training):
    iteration    optimizer steps done
    optimizer    SGD's momentum
    scaler       GradScaler's state
    schedule     lr, iters … that it ran with, to read; the rate is a function of the iteration and the flags given
    average      the raw weights, where ``state_dict`` holds their moving average, else None
    best         greatest validation AP so far, -1 before the first validation
    rng          state of rank 0's torch generator (the loader draws from its own seed)
    loader       position in the data
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import queue
import re
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..config import ModelConfig, OdtkError, TrainConfig
from ..data.dataset import Category, Dataset, load_json
from ..data.images import ImageError, decode
from ..data.loader import create_loader
from ..evaluation.evaluate import STATS, Metrics, evaluate, usable
from ..inference.infer import check_folder, detect, patient_group
from ..model.backbones.catalog import TORCHVISION_URLS
from ..model.checkpoint import Checkpoint, load, load_weights, read, save
from ..model.detector import Detector, load_matching
from ..postprocess import Detections, postprocess
from .loss import detection_loss

READ_EVERY = {"cuda": 20, "cpu": 1}  # iterations between readings of the losses, for which the host waits
POST_SECONDS = 3.0  # until a server of --post-metrics counts as failing
LINE_SECONDS = 10  # between printed lines where there is no terminal for a progress bar
PICTURES = 4  # validation images drawn for TensorBoard
MAY_CHANGE = {"freeze_at", "norm_eval", "grad_checkpoint", "zero_init"}  # model settings that a resumed run may change

SCHEDULE = ("lr", "iters", "schedule", "warmup", "milestones", "gamma")  # what the learning rate depends on


def train(config: TrainConfig, rank: int = 0, world: int = 1) -> None:
    """Trains a detector into ``config.path``, or goes on with the run that is in that file.

    Args:
        config: the run; ``data.batch`` is per process, ``data.device`` this rank's device.
        rank, world: of this process, which is a member of torch.distributed if there are several.

    Raises:
        OdtkError: bad data or settings, a file that cannot be read or written, a loss that is not finite.
        SystemExit: 128 + signal, after SIGTERM or SIGINT, when all is saved.
    """
    device = torch.device(config.data.device)
    iters = round(config.iters * config.schedule)
    torch.manual_seed(config.seed)

    # Data and the file to write
    dataset = Dataset.load(config.data.annotations, config.data.images, rotated=config.model.rotated, training=True)
    check_classes(config, dataset.categories)
    resumed = open_run(config, dataset.categories)

    # Model: the weights of rank 0 go to all
    peers = Peers(world)
    detector = Detector(config.model)
    if resumed is not None:
        load_weights(detector, resumed.training["average"] or resumed.state_dict)  # type: ignore[index]
    elif rank == 0:
        initialize(detector, config)
    detector.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    model: nn.Module = detector
    peers.wait()  # rank 0 may have downloaded weights
    if world > 1:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # broadcast_buffers has a successor that older torch lacks
            model = DistributedDataParallel(detector, broadcast_buffers=False, gradient_as_bucket_view=True)
        peers.share_buffers(detector)  # frozen norms are buffers, which DDP then does not copy even once
    anchors = [level.to(device) for level in detector.anchors()]
    average = None if config.ema is None else Average(detector, config.ema)

    # Optimizer. The scaler also keeps a gradient that is not finite from the weights; beyond fp16 its scale stays 1.
    # Frozen parameters are in it, and passed over: a resumed run may thaw them.
    optimizer = torch.optim.SGD(
        detector.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay, fused=True
    )
    for parameter in detector.parameters():
        # Made here: a first step that fp16's scaler skips would leave the fused update's own one uninitialised.
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    dtype = autocast_type(config.precision, device)
    autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
    scaler = torch.amp.GradScaler(device.type)
    if dtype != torch.float16:
        scaler = torch.amp.GradScaler(device.type, init_scale=1.0, growth_interval=2**31 - 1)

    # Where the run stands
    data = replace(config.data, training=True, stride=detector.stride, rank=rank, world=world)
    loader = create_loader(dataset, data)
    validation = None if config.val_data is None else Validation(config, dataset.categories, detector.stride, peers)
    iteration, best = 0, -1.0  # best validation AP
    if resumed is not None:
        state: dict[str, Any] = resumed.training  # type: ignore[assignment]
        iteration, best = state["iteration"], state["best"]
        optimizer.load_state_dict(state["optimizer"])
        for group in optimizer.param_groups:  # flags stand above the file, as those of the schedule do
            group.update(momentum=config.momentum, weight_decay=config.weight_decay)
        if state["scaler"]["growth_interval"] == scaler.get_growth_interval():  # else: resumed in another precision
            scaler.load_state_dict(state["scaler"])
        loader.restore(state["loader"])
        torch.set_rng_state(state["rng"])
        if average is not None:
            load_weights(average.detector, resumed.state_dict)
    if peers.agree(iteration, -iteration) != [iteration, -iteration]:
        raise OdtkError(f"Not every machine has the same {config.path}: keep it on storage that all of them share.")
    if rank == 0:
        say(opening(config, iteration, iters, dtype, world))

    def checkpoint() -> Checkpoint:
        weights = detector.state_dict()
        return Checkpoint(
            model=config.model,
            categories=dataset.categories,
            state_dict=weights if average is None else average.detector.state_dict(),
            training={
                "iteration": iteration,
                "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict(),
                "schedule": {name: getattr(config, name) for name in SCHEDULE},
                "average": None if average is None else weights,
                "best": best,
                "rng": torch.get_rng_state(),
                "loader": loader.state(),
            },
        )

    read_every = READ_EVERY[device.type]
    saved_at, last_save = iteration, time.monotonic()
    report = Report(config, iteration, iters) if rank == 0 else None
    meter = Meter(device)
    batches = iter(loader)
    model.train()

    with stop_signals() as signals, report or nullcontext():
        while iteration < iters:
            rate = learning_rate(iteration, config)
            for group in optimizer.param_groups:
                group["lr"] = rate

            for part in range(config.accumulate):
                batch = next(batches)
                images = batch.images.contiguous(memory_format=torch.channels_last)
                last = part == config.accumulate - 1
                with nullcontext() if last or world == 1 else model.no_sync():  # type: ignore[operator]
                    with autocast:
                        logits, boxes = model(images)
                    terms = detection_loss(
                        logits,
                        boxes,
                        batch.boxes,
                        batch.labels,
                        anchors=anchors,
                        strides=detector.strides,
                        model=config.model,
                        loss=config.loss,
                    )
                    loss, values = normalize(terms, world)
                    scaler.scale(loss / config.accumulate).backward()
                meter.add(values, iteration + 1, len(images) * world)

            if config.clip_grad is not None:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(detector.parameters(), config.clip_grad)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            iteration += 1
            if average is not None:
                average.update(iteration)

            # All ranks do the same: stop (a signal's number), save (rank 0's clock, the schedule), validate, read
            overdue = rank == 0 and time.monotonic() - last_save > config.save_seconds
            stop, save_now = peers.agree(max(signals, default=0), overdue)
            scheduled = iteration == iters or iteration % config.val_iters == 0
            if not (stop or save_now or scheduled or iteration % read_every == 0):
                continue

            # Here the host waits for the device
            losses, speed = meter.read(list(terms)), meter.speed()
            if meter.not_finite_at is not None:
                raise OdtkError(diverged(config, meter.not_finite_at, saved_at))
            if stop or save_now or scheduled:  # first, so that nothing below can cost the run
                if rank == 0:
                    save(config.path, checkpoint())
                peers.wait()
                saved_at, last_save = iteration, time.monotonic()
            if report is not None:
                report.training(iteration, losses, rate, speed)
            if scheduled and validation is not None and not stop:
                scored = detector if average is None else average.detector
                peers.share_buffers(scored)
                result = validation.run(scored, autocast)
                if report is not None and result is not None:
                    if result[0].ap > best:
                        best = result[0].ap
                        for path in (best_path(config.path), config.path):  # a resumed run knows the best figure
                            save(path, checkpoint())
                    report.validation(iteration, *result)
            if stop and iteration < iters:
                if rank == 0:
                    say(f"{signal.Signals(stop).name}: saved {config.path} at iteration {iteration}.")
                raise SystemExit(128 + stop)
            meter.start()


def opening(config: TrainConfig, iteration: int, iters: int, dtype: torch.dtype, world: int) -> str:
    """What is about to happen, in a line."""
    name = str(dtype).removeprefix("torch.")
    batch = config.data.batch * world * config.accumulate
    begin = f"Resuming {config.path} at iteration {iteration} of {iters}" if iteration else f"Training {config.path}"
    if iteration >= iters:
        return f"{config.path} is trained: {iteration} iterations are done; raise --iters to go on."
    device = config.data.device.partition(":")[0]
    return (
        f"{begin}: {'+'.join(config.model.backbones)}, {config.model.classes} classes, {iters} iterations, "
        f"batch {batch} on {world} × {device}, {name}, learning rate {config.lr:g}, warm-up {config.warmup}."
    )


# ---------------------------------------------------------------------------------------------------------------------
# Losses


def normalize(terms: dict[str, tuple[Tensor, Tensor]], world: int) -> tuple[Tensor, Tensor]:
    """The loss to differentiate, and the value of each term over all ranks.

    A term is the sum over all ranks by the normalizers of all ranks. DistributedDataParallel averages gradients over
    the ranks, hence the factor ``world``: several processes give the gradients of one with the whole batch.

    Returns:
        loss: scalar of this rank; values: [terms], detached, equal on all ranks.
    """
    sums = torch.stack([total for total, _ in terms.values()])  # [terms]
    normalizers = torch.stack([normalizer for _, normalizer in terms.values()])  # [terms]
    everywhere = torch.cat([sums.detach(), normalizers])
    if world > 1:
        dist.all_reduce(everywhere)
    totals, normalizers = everywhere.chunk(2)
    normalizers = normalizers.clamp(min=1)
    return (sums / normalizers).sum() * world, totals / normalizers


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


def diverged(config: TrainConfig, iteration: int, saved_at: int) -> str:
    """The sentence for a loss that is not finite, at an iteration counted from 1."""
    rate = learning_rate(iteration - 1, config)
    last = f"{config.path} is of iteration {saved_at}" if saved_at else "nothing was saved yet"
    return (
        f"The loss is not finite at iteration {iteration} (learning rate {rate:g}): lower --lr, lengthen --warmup, or "
        f"check the data with `odtk check`; {last}."
    )


# ---------------------------------------------------------------------------------------------------------------------
# Schedule, precision, averaging


def learning_rate(iteration: int, config: TrainConfig) -> float:
    """Rate of a step, counted from 0: linear warm-up from a tenth, then by gamma at each milestone."""
    rate = config.lr
    if iteration < config.warmup:
        rate *= 0.1 + 0.9 * iteration / config.warmup
    return rate * config.gamma ** sum(iteration >= round(m * config.schedule) for m in config.milestones)


def autocast_type(precision: str, device: torch.device) -> torch.dtype:
    """mixed is fp16 on GPUs and bf16 on CPUs."""
    if precision == "mixed":
        precision = "fp16" if device.type == "cuda" else "bf16"
    return {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[precision]


class Average:
    """Exponential moving average of weights and statistics: a ← a + (1 − d)·(w − a) after every step.

    The decay d rises to the given one as min(decay, (1 + n) / (10 + n)) at step n, so that the start is soon forgotten
    (TensorFlow's ExponentialMovingAverage with num_updates).
    """

    def __init__(self, detector: Detector, decay: float) -> None:
        self.detector, self.decay = copy.deepcopy(detector).requires_grad_(False).eval(), decay
        pairs = zip(self.detector.state_dict().values(), detector.state_dict().values(), strict=True)
        self.averages, self.values = zip(*((a, w) for a, w in pairs if a.is_floating_point()), strict=True)

    @torch.no_grad()
    def update(self, iteration: int) -> None:
        decay = min(self.decay, (1 + iteration) / (10 + iteration))
        torch._foreach_lerp_(self.averages, self.values, 1 - decay)


# ---------------------------------------------------------------------------------------------------------------------
# Where the weights come from


def check_classes(config: TrainConfig, categories: tuple[Category, ...]) -> None:
    if config.model.classes != len(categories):
        raise OdtkError(
            f"--classes {config.model.classes}: {config.data.annotations} has {len(categories)} categories; leave the "
            "flag out to take them."
        )


def open_run(config: TrainConfig, categories: tuple[Category, ...]) -> Checkpoint | None:
    """The run that is in config.path; None if a new one is to begin there.

    Raises:
        OdtkError: the file is not a run of this model and these categories, or could not be written later.
    """
    check_folder(config.path)
    if config.override or not os.path.exists(config.path):
        return None
    found = load(config.path)
    advice = "pass --override to start anew over it, or another file name"
    if found.training is None:
        raise OdtkError(f"{config.path} holds a model but no run to go on with: {advice} with --fine-tune.")
    for name in (field.name for field in fields(ModelConfig) if field.name not in MAY_CHANGE):
        theirs, ours = getattr(found.model, name), getattr(config.model, name)
        if theirs != ours:
            flag = f"pass --norm {theirs} to go on, or " if name == "norm" else ""  # its default depends on others
            raise OdtkError(f"{config.path} was trained with {name} {theirs}, not {ours}: {flag}{advice}.")
    if found.categories != categories:
        raise OdtkError(f"{config.path} was trained on other categories than {config.data.annotations}'s: {advice}.")
    if (found.training["average"] is None) != (config.ema is None):
        raise OdtkError(f"{config.path} was trained {'with' if config.ema is None else 'without'} --ema: {advice}.")
    return found


def initialize(detector: Detector, config: TrainConfig) -> None:
    """Random weights, and over them those of --fine-tune, or the pretrained ones of the backbones."""
    detector.initialize()
    if config.fine_tune is not None:
        taken, left = load_matching(detector, load(config.fine_tune).state_dict)
        print_taken(config.fine_tune, taken, left)
    elif config.backbone_weights != "none":
        for name, trunk in detector.trunks().items():
            path = config.backbone_weights
            weights = imagenet_weights(name) if path is None else backbone_weights(path)
            taken, left = load_matching(trunk, weights)
            if not taken:
                source = path or "The file of torchvision"
                raise OdtkError(f"{source} has no tensor of {name}: give its own with --backbone-weights.")
            print_taken(path or f"ImageNet, for {name}", taken, left)


def print_taken(source: str, taken: list[str], left: list[str]) -> None:
    """The two lists, by module."""
    for text, names in ((f"Taken from {source}", taken), ("Initialised", left)):
        modules = sorted({name.rpartition(".")[0] for name in names})
        print(f"{text} ({len(names)} tensors): {', '.join(modules) or 'nothing'}.", flush=True)


def backbone_weights(path: str) -> dict[str, Tensor]:
    """Tensors by name from a file of weights, bare or under "state_dict"."""
    content = read(path)
    content = content.get("state_dict", content)
    return {name.removeprefix("module."): value for name, value in content.items() if isinstance(value, Tensor)}


def imagenet_weights(backbone: str) -> dict[str, Tensor]:
    """torchvision's weights of a trunk, by URL (kept in torch's cache)."""
    trunk = re.sub("(FPN|C4)$", "", backbone)
    ways_out = "pass --backbone-weights PATH (a file of torchvision's), or none to train from scratch"
    if trunk not in TORCHVISION_URLS:
        raise OdtkError(f"No pretrained weights are published for {backbone}: {ways_out}.")
    url = TORCHVISION_URLS[trunk]
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)
    try:
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:  # no network; a download that does not match its hash
        raise OdtkError(f"The weights {url} could not be fetched ({error}): {ways_out}.") from error
    finally:
        socket.setdefaulttimeout(patience)


# ---------------------------------------------------------------------------------------------------------------------
# Other processes, signals


class Peers:
    """The ranks of the run, and what all have to decide alike: over CPU tensors, so that no device is waited for."""

    def __init__(self, world: int) -> None:
        self.group = patient_group(world)

    def agree(self, *wishes: int) -> list[int]:
        """The greatest wish of any rank, for each of the wishes."""
        if self.group is None:
            return list(wishes)
        tensor = torch.tensor(wishes, dtype=torch.int64)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group)
        return tensor.tolist()

    def wait(self) -> None:
        """Until all ranks are here."""
        self.agree(0)

    def share_buffers(self, detector: Detector) -> None:
        """Rank 0's buffers to all: pretrained statistics at the start, and later those that each rank gathered."""
        if self.group is not None:
            for buffer in detector.buffers():
                dist.broadcast(buffer, 0)


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """SIGTERM and SIGINT end up in the list instead of ending the process."""
    received: list[int] = []
    numbers = (signal.SIGTERM, signal.SIGINT)
    former = [signal.signal(number, lambda number, _: received.append(number)) for number in numbers]
    try:
        yield received
    finally:
        for number, handler in zip(numbers, former, strict=True):
            signal.signal(number, handler)


# ---------------------------------------------------------------------------------------------------------------------
# Validation


class Validation:
    """COCO figures of a detector on the validation set, its images shared out over all ranks."""

    def __init__(self, config: TrainConfig, categories: tuple[Category, ...], stride: int, peers: Peers) -> None:
        assert config.val_data is not None
        train_data, self.config, self.categories, self.peers = config.data, config, categories, peers
        data = replace(
            config.val_data,
            training=False,
            stride=stride,
            rank=train_data.rank,
            world=train_data.world,
            device=train_data.device,
        )
        self.dataset = Dataset.load(data.annotations, data.images, rotated=config.model.rotated)
        if not set(categories) <= set(self.dataset.categories):
            raise OdtkError(
                f"{data.annotations} has other categories than {train_data.annotations}: validation needs the same "
                "ids and names."
            )
        path = str(data.annotations)
        self.truth = usable(load_json(Path(path)), path)  # what is wrong is refused now, not after an hour
        self.loader = create_loader(self.dataset, data)

    def run(self, detector: Detector, autocast: torch.autocast) -> tuple[Metrics, list[np.ndarray]] | None:
        """On rank 0 the figures and a few pictures [H, W, 3]; None on the others. The detector is left as it is."""
        folded = detector.fold().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        anchors = [level.to(self.config.data.device) for level in detector.anchors()]

        def backend(images: Tensor) -> Detections:
            with autocast:
                logits, boxes = folded(images.contiguous(memory_format=torch.channels_last))
            return postprocess(
                logits,
                boxes,
                anchors=anchors,
                strides=detector.strides,
                model=self.config.model,
                config=self.config.postprocess,
            )

        detections = detect(backend, self.loader, self.categories, group=self.peers.group)
        if self.config.data.rank != 0:
            return None
        metrics = evaluate(detections, self.truth, rotated=self.config.model.rotated)
        return metrics, self.pictures(detections) if self.config.logdir else []

    def pictures(self, detections: list[dict[str, Any]]) -> list[np.ndarray]:
        """The first images with the boxes that score above one half; not one that the loader found damaged."""
        drawn = []
        for image in self.dataset.images[:PICTURES]:
            try:
                picture = Image.fromarray(decode(image.path, image.orientation))
            except ImageError:
                continue
            for detection in detections:
                if detection["image_id"] == image.id and detection["score"] > 0.5:
                    x, y, w, h = detection["bbox"][:4]
                    corners = detection.get("segmentation", [[x, y, x + w, y, x + w, y + h, x, y + h]])[0]
                    ImageDraw.Draw(picture).polygon(corners, outline=(255, 0, 0), width=2)
            drawn.append(np.asarray(picture))  # [H, W, 3]
        return drawn


def best_path(path: str) -> str:
    """MODEL.pth → MODEL.best.pth"""
    stem, extension = os.path.splitext(path)
    return f"{stem}.best{extension}"


# ---------------------------------------------------------------------------------------------------------------------
# Report


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
