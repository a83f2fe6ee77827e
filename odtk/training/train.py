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

import os
import signal
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields, replace
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..categories import Category
from ..config import ModelConfig, OdtkError, TrainConfig
from ..data.dataset import Dataset
from ..data.loader import create_loader
from ..files import check_writable
from ..launch import HostGroup
from ..model.checkpoint import Checkpoint, load, load_weights, save
from ..model.detector import Detector
from ..model.weights import initialize
from .log import Meter, Report, say
from .loss import detection_loss, normalize
from .optimizer import EMA, autocast_type, learning_rate
from .validation import Validation

READ_EVERY = {"cuda": 20, "cpu": 1}  # iterations between readings of the losses, for which the host waits
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
    ranks = HostGroup(world)
    detector = Detector(config.model)
    if resumed is not None:
        load_weights(detector, resumed.training["average"] or resumed.state_dict)  # type: ignore[index]
    elif rank == 0:
        initialize(detector, config)
    detector.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    model: nn.Module = detector
    ranks.barrier()  # rank 0 may have downloaded weights
    if world > 1:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # broadcast_buffers has a successor that older torch lacks
            model = DistributedDataParallel(detector, broadcast_buffers=False, gradient_as_bucket_view=True)
        ranks.broadcast_buffers(detector)  # frozen norms are buffers, which DDP then does not copy even once
    anchors = [level.to(device) for level in detector.anchors()]
    average = None if config.ema is None else EMA(detector, config.ema)

    # Optimizer. The scaler also keeps a gradient that is not finite from the weights; beyond fp16 its scale stays 1.
    # Frozen parameters are in it, and passed over: a resumed run may thaw them.
    optimizer = torch.optim.SGD(
        detector.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay, fused=True
    )
    for parameter in detector.parameters():
        # Made here: a first step that fp16's scaler skips would leave the fused update's own one uninitialized.
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    dtype = autocast_type(config.precision, device)
    autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
    scaler = torch.amp.GradScaler(device.type)
    if dtype != torch.float16:
        scaler = torch.amp.GradScaler(device.type, init_scale=1.0, growth_interval=2**31 - 1)

    # Where the run stands
    data = replace(config.data, training=True, stride=detector.stride, rank=rank, world=world)
    loader = create_loader(dataset, data)
    validation = None if config.val_data is None else Validation(config, dataset.categories, detector.stride, ranks)
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
    if ranks.all_max(iteration, -iteration) != [iteration, -iteration]:
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
            stop, save_now = ranks.all_max(max(signals, default=0), overdue)
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
                ranks.barrier()
                saved_at, last_save = iteration, time.monotonic()
            if report is not None:
                report.training(iteration, losses, rate, speed)
            if scheduled and validation is not None and not stop:
                scored = detector if average is None else average.detector
                ranks.broadcast_buffers(scored)
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


def diverged(config: TrainConfig, iteration: int, saved_at: int) -> str:
    """The sentence for a loss that is not finite, at an iteration counted from 1."""
    rate = learning_rate(iteration - 1, config)
    last = f"{config.path} is of iteration {saved_at}" if saved_at else "nothing was saved yet"
    return (
        f"The loss is not finite at iteration {iteration} (learning rate {rate:g}): lower --lr, lengthen --warmup, or "
        f"check the data with `odtk check`; {last}."
    )


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
    check_writable(config.path)
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


def best_path(path: str) -> str:
    """MODEL.pth → MODEL.best.pth"""
    stem, extension = os.path.splitext(path)
    return f"{stem}.best{extension}"
