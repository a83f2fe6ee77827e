"""Pre-training: a backbone learns to classify images, and its file is what `odtk train --backbone-weights` starts from.

The loop, and what resumes it, are those of a detector (train.py, run.py); this file holds what differs.
"""

from __future__ import annotations

import os
import shlex
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..categories import Category
from ..config import OdtkError, PretrainConfig, best_path
from ..data.batch import Batch
from ..data.dataset import Dataset
from ..data.labeled import list_labeled, read_labeled
from ..data.loader import create_loader
from ..evaluation.classification import TOP, Classification, measure, table_lines
from ..evaluation.classification_page import Answers, classification_page
from ..files import atomic_write, check_writable, write_json
from ..launch import exit_on_stop_signals
from ..model.checkpoint import Checkpoint, load, load_weights, weights_hash
from ..model.classifier import Classifier
from ..model.detector import Renormalize
from ..model.weights import backbone_flags, load_backbone
from ..ranks import CpuGroup, gather
from ..text import plural, printable
from .log import Validated, print_line
from .memory import freed_memory_kept
from .optimizer import EMA, autocast_type, create_optimizer, create_scaler
from .run import (
    Run,
    dataset_hash,
    find_run,
    own_files,
    refuse_other_data,
    refuse_other_teacher,
    trained_weights,
)
from .train import announce, distributed, take_up, train_loop

LISTED = 10  # classes in a line


def pretrain(config: PretrainConfig, rank: int = 0, world: int = 1) -> None:
    """Trains a classifier and writes it to ``config.path``, or resumes the run that is in that file; then prints what
    the best weights are worth on the validation set, and writes it to ``config.report`` and ``config.output``.

    Args:
        config: the run; ``data.batch`` is per process, ``data.device`` is this rank's device.
        rank, world: this process and the number of processes; with several, all are members of torch.distributed.

    Raises:
        OdtkError: bad data or settings, a file that cannot be read or written or that another run writes, a loss that
            is not finite.
        SystemExit: 128 + signal, after SIGTERM, SIGINT or SIGHUP, once the run is saved.
    """
    with own_files(config.path) if rank == 0 else nullcontext():
        with exit_on_stop_signals() if rank == 0 else nullcontext():  # so that the lock is removed
            for path in (config.report, config.output):
                if rank == 0 and path:
                    check_writable(path)
            run = set_up(config, rank, world)
        with freed_memory_kept() if run.device.type == "cpu" else nullcontext():
            train_loop(run, rank, world)
        if run.validation is not None:
            conclude(run, run.validation)


@dataclass(kw_only=True)
class ClassifierRun(Run):
    """The training run of a classifier.

    Attributes:
        teacher: whose answers are learned too; None: only the labels are.
    """

    config: PretrainConfig
    network: Classifier
    validation: ClassValidation | None
    teacher: Teacher | None = None

    def losses(self, images: Tensor, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        with self.autocast:
            logits = self.model(images)
            taught = None if self.teacher is None else self.teacher(images)
        labels = batch.labels[:, 0]  # [N, 1] → [N]
        return answer_losses(logits.float(), labels, None if taught is None else taught.float(), self.config)

    def what(self) -> str:
        side = self.config.data.square
        return f"{self.config.model.backbones[0]} as a classifier of {side}×{side} pixels"

    def closing(self) -> str:
        path, model = best_of(self), self.config.model
        known = path != self.config.path
        said = f"{path} is the best of the run: top-1 {self.best_score:.3f}" if known else f"{path} is trained"
        if self.validation is None:
            said += "; --val-images would say how well"
        backbone = " ".join([model.backbones[0], *(f"{flag} {value}" for flag, value in backbone_flags(model).items())])
        next_command = f"odtk train MODEL.pth --annotations PATH --backbone {backbone} --backbone-weights"
        return printable(f"{said}. Next: {next_command} {shlex.quote(path)}")


def best_of(run: Run) -> str:
    """The file of the best weights: that of the highest score, else the newest."""
    best = best_path(run.config.path)
    return best if run.best_score >= 0 and os.path.exists(best) else run.config.path


# ---------------------------------------------------------------------------------------------------------------------
# The loss


def answer_losses(
    logits: Tensor, labels: Tensor, taught: Tensor | None, config: PretrainConfig
) -> dict[str, tuple[Tensor, Tensor]]:
    """The losses of a batch as (sum over its images, number of images), without the weightless padding of damaged ones.

    Labels: cross entropy with label smoothing (https://arxiv.org/abs/1512.00567 section 7). A teacher, as DeiT has it
    (https://arxiv.org/abs/2012.12877 section 3): with hard labels the cross entropy of its first answer, with soft ones
    τ² · KL(teacher ‖ student) of the probabilities at temperature τ; its share is ``teacher_weight``.

    Args:
        logits: float32 [N, K].
        labels: int64 [N], −1 for an image that counts nothing.
        taught: the teacher's logits, float32 [N, K]; None: there is no teacher.
    """
    count = (labels >= 0).sum().float()
    cross_entropy = F.cross_entropy(
        logits, labels, ignore_index=-1, label_smoothing=config.label_smoothing, reduction="sum"
    )
    if taught is None:
        return {"labels": (cross_entropy, count)}
    if config.teacher_labels == "hard":
        distance = F.cross_entropy(logits, taught.argmax(1).where(labels >= 0, -1), ignore_index=-1, reduction="sum")
    else:
        t = config.teacher_temperature
        log_student, log_teacher = F.log_softmax(logits / t, 1), F.log_softmax(taught / t, 1)
        of_image = F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(1)  # [N, K] → [N]
        distance = t * t * of_image[labels >= 0].sum()
    weight = config.teacher_weight
    return {"labels": ((1 - weight) * cross_entropy, count), "teacher": (weight * distance, count)}


class Teacher(nn.Module):
    """A trained classifier, in eval mode and without gradients, that takes the student's images.

    Attributes:
        hash: of its weights.
    """

    def __init__(self, network: Classifier, student: PretrainConfig) -> None:
        super().__init__()
        self.network, self.hash = network.eval().requires_grad_(False), weights_hash(network.state_dict())
        self.renormalize = Renormalize(student.model, network.config)

    def train(self, mode: bool = True) -> Teacher:
        """As nn.Module.train(), but it stays in eval mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Images [N, 3, H, W] as the student takes them → logits [N, K]."""
        return self.network(self.renormalize(images).contiguous(memory_format=torch.channels_last))


def load_teacher(config: PretrainConfig, categories: tuple[Category, ...]) -> Teacher:
    """The teacher that a run names, on the run's device.

    Raises:
        OdtkError: the file cannot be read, or its classifier knows other classes.
    """
    assert config.teacher is not None
    try:
        found = load(config.teacher, "classifier")
    except OdtkError as error:
        raise OdtkError(f"--teacher: {error}{config.if_moved('--teacher')}") from error
    if found.categories != categories:
        names = ", ".join(category.name for category in found.categories or ())
        raise OdtkError(f"--teacher {config.teacher} knows other classes ({names}) than the images to train on have.")
    network = Classifier(found.model)
    load_weights(network, found.state_dict)
    teacher = Teacher(network, config)
    return teacher.to(config.data.device, memory_format=torch.channels_last)  # type: ignore[call-overload]


# ---------------------------------------------------------------------------------------------------------------------
# Before the loop


def set_up(config: PretrainConfig, rank: int, world: int) -> ClassifierRun:
    """Everything that the loop needs, new or as config.path has it; rank 0 prints what is about to happen."""
    device = torch.device(config.data.device)
    torch.manual_seed(config.seed)
    listing = list_labeled(str(config.data.images), config.data.annotations)
    dataset = read_labeled(listing).accepted(config.data.skip_damaged)
    if config.model.classes != len(dataset.categories):
        raise OdtkError(f"The classes in {listing.source} have just changed: begin anew.")
    if len(dataset.categories) < 2:
        raise OdtkError(f"{listing.source} has only one class: there is nothing to tell apart.")
    resumed = find_run(config, dataset.categories)
    data_hash = dataset_hash(dataset)
    teacher = None if config.teacher is None else load_teacher(config, dataset.categories)
    if resumed is not None:
        refuse_other_data(config, resumed, data_hash)
        refuse_other_teacher(config, resumed, None if teacher is None else teacher.hash)
    ranks = CpuGroup(world)
    network, model = create_model(config, resumed, ranks, rank, world)
    dtype = autocast_type(config.precision, device)
    data = replace(config.data, training=True, stride=network.stride, rank=rank, world=world, **config.model.pixels)
    facts = {"data": data_hash, **({} if teacher is None else {"teacher_hash": teacher.hash})}
    run = ClassifierRun(
        config=config,
        categories=dataset.categories,
        device=device,
        iters=round(config.iters * config.schedule),
        ranks=ranks,
        network=network,
        model=model,
        ema=None if config.ema is None else EMA(network, config.ema),
        optimizer=create_optimizer(network, config),
        autocast=torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32),
        scaler=create_scaler(dtype, device),
        loader=create_loader(dataset, data),
        settings=None if config.settings is None else {**config.settings, **facts},
        validation=None if config.val_data is None else ClassValidation(config, dataset, network.stride, ranks),
        teacher=teacher,
    )
    take_up(run, resumed)
    if rank == 0:
        announce(run, dtype, world)
        print_line(classes_line(dataset))
    return run


def classes_line(dataset: Dataset) -> str:
    """How many images there are of each class, the largest first."""
    counts = Counter(int(image.labels[0]) for image in dataset.images).most_common()
    parts = [f"{printable(dataset.categories[label].name)} {count}" for label, count in counts[:LISTED]]
    more = f" and {len(counts) - LISTED} more" if len(counts) > LISTED else ""
    return f"{plural(len(dataset.images), 'image')} of {len(counts)} classes: {', '.join(parts)}{more}."


def create_model(
    config: PretrainConfig, resumed: Checkpoint | None, ranks: CpuGroup, rank: int, world: int
) -> tuple[Classifier, nn.Module]:
    """The classifier on its device, and the module to call in training; all ranks begin with the weights of rank 0.

    Its batch norms take their statistics over all processes, so that the number of processes changes nothing.
    """
    network = Classifier(config.model)
    if resumed is not None:
        load_weights(network, trained_weights(resumed))
    elif rank == 0:
        network.initialize()
        if config.backbone_weights != "none":
            load_backbone(config.model.backbones[0], network.features, config.backbone_weights, config.model)
    network.to(torch.device(config.data.device), memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network, distributed(network, network, ranks, world)


# ---------------------------------------------------------------------------------------------------------------------
# Validation


class ClassValidation:
    """Measures a classifier on the validation set, whose images are divided among all ranks.

    Raises:
        OdtkError: the validation set cannot be read, or has classes that are not trained.
    """

    def __init__(self, config: PretrainConfig, trained: Dataset, stride: int, ranks: CpuGroup) -> None:
        assert config.val_data is not None
        data = config.data
        own = replace(config.val_data, training=False, stride=stride, **config.model.pixels)
        own = replace(own, rank=data.rank, world=data.world, device=data.device)
        self.names = [category.name for category in trained.categories]
        listing = list_labeled(str(own.images), own.annotations, part="val-")
        self.dataset = read_labeled(listing, self.names).accepted(own.skip_damaged)
        self.source, self.ranks = str(listing.source), ranks
        self.loader = create_loader(self.dataset, own)

    def run(self, network: nn.Module, autocast: torch.autocast) -> Validated | None:
        """Validates a classifier, which is not changed. All ranks must call this.

        Returns:
            On rank 0 what was found; None on the other ranks.
        """
        said = self.answers(network, autocast)
        if said is None:
            return None
        found = measure(said.labels, said.answers, self.names)
        return Validated(found.top1, found.line(), found.values())

    @torch.no_grad()
    def answers(self, network: nn.Module, autocast: torch.autocast) -> Answers | None:
        """What a classifier says of every image but damaged ones, on rank 0 by the images' ids; None on other ranks."""
        training = network.training
        network.eval()
        parts = []
        for batch in self.loader:
            with autocast:
                logits = network(batch.images.contiguous(memory_format=torch.channels_last))
            scores, answers = logits.float().softmax(1).topk(min(TOP, len(self.names)))
            whole = batch.labels[:, 0].cpu() >= 0
            rows = (batch.ids, batch.labels[:, 0].cpu(), answers.cpu(), scores.cpu())
            parts.append(tuple(row[whole].numpy() for row in rows))
        network.train(training)
        gathered = [part for of_rank in gather(parts, self.ranks.group) for part in of_rank]
        if not gathered:
            return None
        ids, labels, answers_, scores_ = (np.concatenate(column) for column in zip(*gathered, strict=True))
        order = np.argsort(ids)
        by_id = {image.id: image for image in self.dataset.images}
        return Answers([by_id[i] for i in ids[order].tolist()], labels[order], answers_[order], scores_[order])


def conclude(run: ClassifierRun, validation: ClassValidation) -> None:
    """Measures the best weights once more: prints a table, and writes the page and the figures. All ranks must call it.

    Raises:
        OdtkError: a file cannot be written.
    """
    config = run.config
    weights = run.ranks.from_first(lambda: load(best_of(run), config.KIND).state_dict)
    load_weights(run.network, weights)
    said = validation.answers(run.network, run.autocast)
    if said is None or config.data.rank != 0:
        return
    found = measure(said.labels, said.answers, validation.names)
    for line in table_lines(found):
        print_line(line)
    print_line(headline(found, len(said.labels)))
    if config.output:
        write_json(found.to_dict(), config.output)
        print_line(f"Wrote {config.output}")
    if config.report:
        title = f"{os.path.basename(best_of(run))} on {validation.source}"
        with atomic_write(config.report) as file:
            file.write(classification_page(found, said, title).encode())
        print_line(f"Wrote {config.report}")


def headline(found: Classification, images: int) -> str:
    """The figures over all classes, in a line."""
    top5 = "" if found.top5 is None else f", top-5 {found.top5:.3f}"
    return f"top-1 {found.top1:.3f}{top5} of {plural(images, 'image')}"
