"""Training: one loop that reads from top to bottom, and below it the parts that it names."""

from __future__ import annotations

import os
import signal
import time
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..categories import Category
from ..config import OdtkError, TrainConfig, best_path
from ..data.batch import Batch
from ..data.loader import create_loader
from ..data.padding import padding_facts
from ..data.sampler import input_size
from ..data.strong_view import strong_view
from ..launch import catch_stop_signals, exit_on_stop_signals
from ..model.checkpoint import Checkpoint, load_weights, save
from ..model.detector import Detector
from ..model.weights import initialize_weights
from ..ranks import CpuGroup
from ..text import plural
from .distill import Student, Teacher, feature_loss, load_teacher
from .log import Meter, RunLog, closing_line, notice_if_slow, print_line
from .loss import detection_loss, normalize
from .memory import freed_memory_kept
from .optimizer import EMA, autocast_type, create_optimizer, create_scaler, learning_rate
from .run import (
    Run,
    Validator,
    dataset_hash,
    find_run,
    own_files,
    refuse_other_data,
    refuse_other_teacher,
    refuse_other_unlabeled,
    trained_weights,
)
from .sync_batch_norm import synchronize_batch_norms
from .training_set import TrainingSet
from .unlabeled import entropy_loss, open_unlabeled, pseudo_label_loss
from .validation import Validation

OPTIMIZERS = {"sgd": "SGD", "adamw": "AdamW"}
READ_EVERY = {"cuda": 20, "cpu": 1}  # iterations between readings of the losses, for which the host waits


def train(config: TrainConfig, rank: int = 0, world: int = 1, source: TrainingSet | None = None) -> None:
    """Trains a detector and writes it to ``config.path``, or resumes the run that is in that file.

    Args:
        config: the run; ``data.batch`` is per process, ``data.device`` is this rank's device.
        rank, world: this process and the number of processes; with several, all are members of torch.distributed.
        source: the images to train on, which may have been read for the plan; None reads them.

    Raises:
        OdtkError: bad data or settings, a file that cannot be read or written or that another run writes, a loss that
            is not finite.
        SystemExit: 128 + signal, after SIGTERM, SIGINT or SIGHUP, once the run is saved.
    """
    with own_files(config.path) if rank == 0 else nullcontext():
        with exit_on_stop_signals() if rank == 0 else nullcontext():  # so that the lock is removed
            source = source or TrainingSet.of(config)
            run = set_up(config, rank, world, source)
            source.forget()
        with freed_memory_kept() if run.device.type == "cpu" else nullcontext():
            train_loop(run, rank, world)


def train_loop(run: Run, rank: int, world: int) -> None:
    """The loop, from where the run stands to its end."""
    config = run.config
    log = RunLog(config, run.iteration, run.iters) if rank == 0 else None
    meter = Meter(run.device)
    batches = iter(run.loader)
    run.model.train()

    with catch_stop_signals() as signals, log or nullcontext():
        while run.iteration < run.iters and not run.ended:
            for group in run.optimizer.param_groups:
                group["lr"] = learning_rate(run.iteration, config)

            terms = step(run, batches, meter, world)

            # All ranks take the same branch: a signal to any of them stops all, and rank 0's clock says when to save.
            overdue = rank == 0 and time.monotonic() - run.save_time > config.save_seconds
            stop, save_now = run.ranks.all_max(max(signals, default=0), overdue)
            scheduled = run.iteration == run.iters or run.iteration % config.val_iters == 0
            if stop or save_now or scheduled or run.iteration % READ_EVERY[run.device.type] == 0:
                finish_interval(run, meter, log, terms, stop=stop, save_now=bool(save_now), scheduled=scheduled)
        if run.ended and log is not None:
            log.ends_early(run.why_ended())
    if rank == 0:
        print_line(run.closing())


def step(run: Run, batches: Iterator[Batch], meter: Meter, world: int) -> list[str]:
    """One iteration: the gradients of its batches, a step of the optimizer and of the EMA.

    Returns:
        The names of the losses that the meter has added up.
    """
    config = run.config
    for part in range(config.accumulate):
        beside, seen = learn_beside(run, world)
        batch = next(batches)
        images = batch.images.contiguous(memory_format=torch.channels_last)
        last = part == config.accumulate - 1  # the ranks' gradients are averaged in its backward pass only
        with nullcontext() if last or world == 1 else run.model.no_sync():  # type: ignore[operator]
            terms = run.losses(images, batch)
            loss, values = normalize(terms, world)
            run.scaler.scale(loss / config.accumulate).backward()
        meter.add(torch.cat([values, beside]), run.iteration + 1, (len(images) + seen) * world)

    if config.clip_grad is not None:
        run.scaler.unscale_(run.optimizer)
        nn.utils.clip_grad_norm_(run.model.parameters(), config.clip_grad)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    run.iteration += 1
    if run.ema is not None:
        run.ema.update(run.iteration)
    return [*terms, "unlabeled"] if run.learns_beside else list(terms)


def learn_beside(run: Run, world: int) -> tuple[Tensor, int]:
    """Adds the gradients of a batch of unlabeled images; the labeled batch after it averages them over the ranks.

    Returns:
        The sum of its losses [1], 0 in burn-in, or none [0] in a run without such losses; and the number of images.
    """
    with nullcontext() if world == 1 else run.model.no_sync():  # type: ignore[operator]
        terms, seen = run.losses_beside()
        if not terms:
            return torch.zeros(int(run.learns_beside), device=run.device), 0
        loss, values = normalize(terms, world)
        run.scaler.scale(loss / run.config.accumulate).backward()
    return values.sum()[None], seen


# ---------------------------------------------------------------------------------------------------------------------
# Before the loop


@dataclass(kw_only=True)
class DetectorRun(Run):
    """The training run of a detector.

    Attributes:
        anchors: per level [A, 4 or 5], see model.anchors.base_anchors; on the device.
        teacher, student: whose features are learned, and the detector with its adapters; None without distillation.
    """

    config: TrainConfig
    network: Detector
    validation: Validation | None
    anchors: list[Tensor]
    teacher: Teacher | None = None
    student: Student | None = None

    def losses(self, images: Tensor, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        if self.unlabeled is not None:
            images = self.unlabeled.lend_colors(images, self.config.unlabeled_colors)
        with self.autocast:
            logits, boxes, *features = self.model(images)
            taught = self.taught(images)
        terms = detection_loss(
            logits,
            boxes,
            batch.boxes,
            batch.labels,
            anchors=self.anchors,
            strides=self.network.strides,
            model=self.config.model,
            loss=self.config.loss,
        )
        if taught:
            terms["teacher"] = self.distance(features[0], taught)
        return terms

    @property
    def learns_beside(self) -> bool:
        return self.unlabeled is not None and self.config.unlabeled_loss != "none"

    def losses_beside(self) -> tuple[dict[str, tuple[Tensor, Tensor]], int]:
        config, unlabeled = self.config, self.unlabeled
        if unlabeled is None:
            return {}, 0
        learns = self.learns_beside and self.iteration >= config.burn_in
        if learns or config.unlabeled_colors:
            images = seen = unlabeled.next_images()
        if not learns:
            return {}, 0
        with self.autocast:
            if config.unlabeled_loss == "pseudo-labels":
                assert self.ema is not None
                with torch.no_grad():
                    said = self.ema.network(images.contiguous(memory_format=torch.channels_last))[0]
                seen = strong_view(images, unlabeled.loader.config, unlabeled.first)
            seen = seen.contiguous(memory_format=torch.channels_last)
            logits, _, *features = self.model(seen)
            taught = self.taught(seen)
        if config.unlabeled_loss == "pseudo-labels":
            terms = pseudo_label_loss(logits, said, unlabeled.share, config.model)
        else:
            terms = entropy_loss(logits, unlabeled.share, config.model)
        terms = {name: (config.unlabeled_weight * total, count) for name, (total, count) in terms.items()}
        if taught:
            terms["teacher"] = self.distance(features[0], taught)
        return terms, len(images)

    def distance(self, features: list[Tensor], taught: list[Tensor]) -> tuple[Tensor, Tensor]:
        """What the teacher adds to the loss, as (sum, normalizer)."""
        distance, normalizer = feature_loss(features, taught, self.loader.config.world)
        return self.config.teacher_weight * distance, normalizer

    def taught(self, images: Tensor) -> list[Tensor]:
        """The teacher's features of images, one for each that the student gives; none without a teacher."""
        if self.teacher is None or self.student is None:
            return []
        features = self.teacher(images)
        return [features[other] for _, other in self.student.pairs]

    def what(self) -> str:
        return "+".join(self.config.model.backbones)

    def closing(self) -> str:
        best = best_path(self.config.path)
        kept = best if self.best_score >= 0 and os.path.exists(best) else None
        return closing_line(self.config.path, kept, self.best_score)


def set_up(config: TrainConfig, rank: int, world: int, source: TrainingSet, *, quiet: bool = False) -> DetectorRun:
    """Everything that the loop needs, new or as config.path has it; rank 0 prints what is about to happen."""
    device = torch.device(config.data.device)
    torch.manual_seed(config.seed)
    check_classes(config, source.dataset.categories)
    dataset = source.dataset.part(config.held_out, rest=True)
    resumed = find_run(config, dataset.categories)
    hashes = {"data": dataset_hash(dataset)}
    if (teacher := load_teacher(config) if config.teacher else None) is not None:
        hashes["teacher_hash"] = teacher.hash
    if resumed is not None:
        refuse_other_data(config, resumed, hashes["data"])
        refuse_other_teacher(config, resumed, hashes.get("teacher_hash"))
    ranks = CpuGroup(world)
    detector, student, model = create_model(config, resumed, teacher, ranks, rank, world)
    ema = None if config.ema is None else EMA(detector, config.ema)
    dtype = autocast_type(config.precision, device)
    data = replace(config.data, training=True, stride=detector.stride, rank=rank, world=world, **config.model.pixels)
    size = input_size(dataset, data.resize, data.max_size, detector.stride)
    loader = create_loader(dataset, data)
    validation = None if config.val_data is None else Validation(config, source, detector.stride, ranks)
    unlabeled = None
    if config.unlabeled:
        unlabeled = open_unlabeled(config, data, dataset, None if validation is None else validation.dataset, detector)
        hashes["unlabeled_data"] = dataset_hash(unlabeled.loader.sampler.dataset)
    if resumed is not None:
        refuse_other_unlabeled(config, resumed, hashes.get("unlabeled_data"))
    facts = {"input_size": list(size), **hashes, **padding_facts(loader.sampler)}
    run = DetectorRun(
        config=config,
        categories=dataset.categories,
        device=device,
        iters=round(config.iters * config.schedule),
        ranks=ranks,
        network=detector,
        model=model,
        anchors=[level.to(device) for level in detector.anchors()],
        ema=ema,
        teacher=teacher,
        student=student,
        adapters=None if student is None else student.adapters,
        optimizer=create_optimizer(detector, config, () if student is None else student.adapters.parameters()),
        autocast=torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32),
        scaler=create_scaler(dtype, device),
        loader=loader,
        unlabeled=unlabeled,
        settings=None if config.settings is None else {**config.settings, **facts},
        validation=validation,
    )
    take_up(run, resumed)
    if rank == 0 and not quiet:
        announce(run, dtype, world)
        if not run.ended and run.iteration < run.iters:
            if student is not None and teacher is not None and config.teacher is not None:
                print_line(student.line(config.teacher, teacher))
            if unlabeled is not None:
                print_line(unlabeled.line(config))
    return run


def take_up(run: Run, resumed: Checkpoint | None) -> None:
    """Puts a run where its file has it; all ranks must call this.

    Raises:
        OdtkError: what the file holds is damaged, or not the same for every rank.
    """
    if resumed is not None:
        run.restore(resumed)
    if run.ranks.all_max(run.iteration, -run.iteration) != [run.iteration, -run.iteration]:
        raise OdtkError(
            f"Not every machine finds the same {run.config.path}: keep that file on storage that all machines share."
        )
    run.saved_at, run.save_time = run.iteration, time.monotonic()


def announce(run: Run, dtype: torch.dtype, world: int) -> None:
    """Prints what is about to happen."""
    print_line(opening_line(run, dtype, world))
    if (factors := run.loader.sampler.factors) is not None:
        print_line(
            f"Images with rare classes come up to {factors.max():.1f} times as often: an epoch has "
            f"{factors.sum():.0f} images instead of {len(factors)}."
        )


def check_classes(config: TrainConfig, categories: tuple[Category, ...]) -> None:
    if config.model.classes != len(categories):
        raise OdtkError(
            f"--classes {config.model.classes}: {config.data.annotations} has "
            f"{plural(len(categories), 'category', 'categories')}; leave the flag out to use that number."
        )


def create_model(
    config: TrainConfig, resumed: Checkpoint | None, teacher: Teacher | None, ranks: CpuGroup, rank: int, world: int
) -> tuple[Detector, Student | None, nn.Module]:
    """The detector on its device, as a student if there is a teacher, and the module to call in training.

    All ranks begin with the weights of rank 0.
    """
    detector = Detector(config.model)
    if resumed is not None:
        load_weights(detector, trained_weights(resumed))
    elif rank == 0:
        initialize_weights(detector, fine_tune=config.fine_tune, backbone_weights=config.backbone_weights)
    student = None if teacher is None else Student(detector, teacher)
    model: nn.Module = student or detector
    model.to(torch.device(config.data.device), memory_format=torch.channels_last)  # type: ignore[call-overload]
    # A backbone's batch norms are meant to be frozen with small batches.
    return detector, student, distributed(model, detector.head, ranks, world)


def distributed(model: nn.Module, synchronized: nn.Module, ranks: CpuGroup, world: int) -> nn.Module:
    """A module as several processes train it, with the weights and buffers of rank 0; itself for a single process.

    Args:
        synchronized: the part whose batch norms take their statistics over all processes.
    """
    ranks.barrier()  # rank 0 may have spent minutes on a download
    if world == 1:
        return model
    synchronize_batch_norms(synchronized)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # older versions of torch lack broadcast_buffers' successor
        parallel = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
    ranks.broadcast_buffers(model)  # frozen norms are buffers, and with that setting DDP never copies those
    return parallel


def opening_line(run: Run, dtype: torch.dtype, world: int) -> str:
    """What is about to happen, in one line."""
    config, iteration, iters = run.config, run.iteration, run.iters
    if run.ended:
        return (
            f"{config.path} is trained: it ended at iteration {iteration} of {iters}, as {config.SCORE} had stopped "
            "rising; raise --patience to continue."
        )
    if iteration >= iters:
        done = f"{plural(iteration, 'iteration')} {'is' if iteration == 1 else 'are'} done"
        return f"{config.path} is trained: {done}; raise --iters to continue."
    begin = f"Resuming {config.path} at iteration {iteration} of {iters}" if iteration else f"Training {config.path}"
    batch = config.data.batch * world * config.accumulate
    return (
        f"{begin}: {run.what()}, {plural(config.model.classes, 'class', 'classes')}, "
        f"{plural(iters, 'iteration')}, batch {batch} on {world} × {run.device.type}, "
        f"{str(dtype).removeprefix('torch.')}, {OPTIMIZERS[config.optimizer]}, learning rate {config.lr:g}, "
        f"warm-up {config.warmup}."
    )


# ---------------------------------------------------------------------------------------------------------------------
# The rare branch of the loop


def finish_interval(
    run: Run, meter: Meter, log: RunLog | None, terms: list[str], *, stop: int, save_now: bool, scheduled: bool
) -> None:
    """Waits for the device, then checks, saves, logs and validates what is due, and begins a new interval.

    Args:
        terms: names of the losses that the meter has added up.
        stop: number of the signal that ends the run here, unless it is over anyway; 0: it continues.
        save_now: the last checkpoint is too old.
        scheduled: validation is due, and a checkpoint with it.

    Raises:
        OdtkError: a loss was not finite, or a checkpoint could not be written.
        SystemExit: after a signal.
    """
    losses, speed = meter.read(terms), meter.speed()
    if meter.not_finite_at is not None:
        raise OdtkError(not_finite_message(run, meter.not_finite_at))
    if stop or save_now or scheduled:  # first, so that no failure below can lose iterations
        if log is not None:
            with notice_if_slow(f"saving {run.config.path}"):
                save(run.config.path, run.checkpoint())
        run.ranks.barrier()
        run.saved_at, run.save_time = run.iteration, time.monotonic()
    if log is not None:
        log.training(run.iteration, losses, run.optimizer.param_groups[0]["lr"], speed)
    ends_here = bool(stop) and run.iteration < run.iters
    if scheduled and run.validation is not None and not ends_here:
        validate(run, run.validation, log)
        end_early(run, log)
    if ends_here:
        if log is not None:
            print_line(f"{signal.Signals(stop).name}: saved {run.config.path} at iteration {run.iteration}.")
        raise SystemExit(128 + stop)
    meter.start()


def validate(run: Run, validation: Validator, log: RunLog | None) -> None:
    """Validates the weights and their EMA; rank 0 saves the better one if it is the best so far, and logs it."""
    results = []
    for network in (run.network,) if run.ema is None else (run.ema.network, run.network):
        run.ranks.broadcast_buffers(network)
        results.append(validation.run(network, run.autocast))
    found = [result for result in results if result is not None]
    if log is None or not found:
        return
    chosen = max(range(len(found)), key=lambda i: found[i].score)  # of equals the EMA
    score = found[chosen].score
    if score >= max(0, run.best_score):  # the later of equals is trained longer; no ground truth gives −1
        run.best_score, run.best_at = score, run.iteration
        best = best_path(run.config.path)
        for path, raw in ((best, chosen == 1), (run.config.path, False)):  # both, so that a resumed run knows the best
            with notice_if_slow(f"saving {path}"):
                save(path, run.checkpoint(raw=raw))
    log.validation(run.iteration, found[chosen], ema=found[0].score if chosen else None)


def end_early(run: Run, log: RunLog | None) -> None:
    """Ends the run if validation has stopped improving; rank 0 decides, and notes it in the checkpoint."""
    over = log is not None and run.iteration < run.iters and run.is_over()
    run.ended = bool(run.ranks.all_max(over)[0])
    if run.ended and log is not None:
        with notice_if_slow(f"saving {run.config.path}"):
            save(run.config.path, run.checkpoint())
        log.line(f"Ended at iteration {run.iteration}: {run.why_ended()}.")


def not_finite_message(run: Run, iteration: int) -> str:
    """What to do about a loss that is not finite, at an iteration counted from 1."""
    rate = learning_rate(iteration - 1, run.config)
    saved = f"{run.config.path} holds iteration {run.saved_at}" if run.saved_at else "nothing was saved yet"
    return (
        f"The loss is not finite at iteration {iteration} (learning rate {rate:g}): lower --lr, lengthen --warmup, or "
        f"check the data with `odtk check`; {saved}."
    )
