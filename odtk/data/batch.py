"""Batch, and the Loader that prepares batches ahead of their use."""

from __future__ import annotations

import dataclasses
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import LoaderConfig, scale_and_shift
from ..text import plural, printable
from .dataset import Dataset
from .images import ImageError
from .render import render
from .sampler import BatchPlan, Sample, Sampler
from .tars import read_members

PREFETCH = 2  # batches prepared ahead of the one in use
READ_AHEAD = 6  # batches whose images are read ahead of those, where they are in tar files
READERS = 4  # batches that are read at once; the images of each are
SLOW_SECONDS = 60.0  # that a batch takes only where something is wrong


@dataclass
class Batch:
    """Images, boxes and labels of one step.

    Attributes:
        images: RGB [N, 3, H, W], float32 and normalized or as ``LoaderConfig.input_type`` says, padded at the right
            and the bottom (padding_value); on ``LoaderConfig.device``.
        boxes: float32 [N, M, 4] (x1, y1, x2, y2) or [N, M, 5] (… theta), pixels of ``images``, inclusive corners,
            zeros where there is no box, M ≥ 1; on the same device.
        labels: int64 [N, M], index of the category, −1 where there is no box; on the same device.
        ids: int64 [N], the dataset's image ids; on the CPU.
        scales: float32 [N, 2], network pixels per image pixel (sx, sy); on the CPU.
        damaged: bool [N], whether the image could not be decoded, so that it is padding without boxes; on the CPU.
            None: no image is.
        sizes: float32 [N, 2], (width, height) of each whole image in network pixels, without the padding; on the CPU.
            None: nothing is padded.
    """

    images: Tensor
    boxes: Tensor
    labels: Tensor
    ids: Tensor
    scales: Tensor
    damaged: Tensor | None = None
    sizes: Tensor | None = None


def padding_value(config: LoaderConfig) -> np.ndarray:
    """The RGB [3] of pixels beyond an image: uint8 if ``config.input_type`` is, else float32."""
    black = config.padding == "black"
    if config.input_type == "normalized":
        _, shift = scale_and_shift(config.mean, config.std)
        return np.array(shift if black else (0, 0, 0), dtype=np.float32)
    pixels = np.zeros(3) if black else 255 * np.array(config.mean)
    return nearest_pixels(pixels) if config.input_type == "uint8" else pixels.astype(np.float32)


def to_device(values: np.ndarray, like: Tensor) -> Tensor:
    """Values as a tensor of another's type and device, without waiting for the device."""
    return torch.from_numpy(values).to(like, non_blocking=True)


def is_padding(images: Tensor, config: LoaderConfig) -> Tensor:
    """Which pixels [N, 1, H, W] of images [N, 3, H, W], as a loader with this config gives them, are padding."""
    return (images == to_device(padding_value(config), images)[:, None, None]).all(1, keepdim=True)


def nearest_pixels(values: np.ndarray) -> np.ndarray:
    """The uint8 that is nearest to each value."""
    return np.rint(values).clip(0, 255).astype(np.uint8)


class Loader:
    """Iterates over Batches: without end in training, once over this rank's images in inference.

    The sampler decides order, geometry and boxes. A subclass makes the pixels of one batch (``render_batch``); the
    loader's threads call it ahead of their use. An image that proves damaged while it is decoded (the scan before the
    run cannot find all damage) becomes padding without boxes, and its file is named once.

    Attributes:
        sampler: makes the plans of the batches.
        damaged: files that could not be decoded.
    """

    def __init__(self, dataset: Dataset, config: LoaderConfig, threads: int) -> None:
        if config.training and config.input_type == "uint8":
            raise ValueError("Training changes colors, which makes floats: batches of uint8 are for inference.")
        self.config = config
        self.sampler = Sampler(dataset, config)
        self._threads = threads
        self._copies: torch.cuda.Stream | None = None
        self._next = 0  # number of the next batch
        self.damaged: set[Path] = set()

    def __len__(self) -> int:
        """Number of batches of this rank in one epoch (training, rounded up) or one pass (inference)."""
        return len(self.sampler)

    def __iter__(self) -> Iterator[Batch]:
        pool = ThreadPoolExecutor(self._threads, thread_name_prefix="odtk-loader")
        readers = ThreadPoolExecutor(READERS, thread_name_prefix="odtk-reader")  # starts no thread before it is used
        ahead: deque[tuple[int, Future[tuple[BatchPlan, Tensor]]]] = deque()
        numbers = count(self._next) if self.config.training else iter(range(self._next, len(self)))
        reads = self._read_ahead(numbers, readers)
        try:
            while True:
                for number, contents in islice(reads, 1 + PREFETCH - len(ahead)):
                    ahead.append((number, pool.submit(self._prepare, number, contents)))
                if not ahead:
                    return
                number, prepared = ahead.popleft()
                batch = self._make_batch(*self._wait_for(prepared, number))
                if self.config.training:
                    self._next = number + 1
                yield batch
        finally:
            readers.shutdown(wait=False, cancel_futures=True)
            pool.shutdown(cancel_futures=True)

    def batch(self, number: int) -> Batch:
        """A batch by its number from 0, below ``len()`` in inference, made now: nothing is prepared ahead."""
        return self._make_batch(*self._prepare(number))

    def start_at(self, number: int) -> None:
        """Makes an iteration begin with the batch of this number."""
        self._next = number

    def state(self) -> dict[str, int]:
        """The position after the last batch given, in images over all ranks, for a checkpoint."""
        return {
            "seen": self._next * self.config.batch * self.config.world,
            "images": len(self.sampler.dataset.images),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continues after ``state``; if batch or number of ranks have changed, from the last whole batch before it.

        Rank 0 warns if the number of images has changed, as then the run is not the one that would have been.
        """
        before, now = state.get("images"), len(self.sampler.dataset.images)  # files written before lack the former
        if before not in (None, now) and self.config.rank == 0:
            print(
                f"Warning: the run to resume had {plural(before, 'image')} and now there are {now}, so their order "
                "changes: check whether files were added, lost or damaged.",
                file=sys.stderr,
            )
        self._next = int(state["seen"]) // (self.config.batch * self.config.world)

    def use(self, dataset: Dataset, *, shared: bool = True) -> None:
        """Takes the images of another dataset from now on; what the pixel engine has built is kept.

        Args:
            shared: among the ranks; otherwise all of them are this rank's.
        """
        config = self.config if shared else dataclasses.replace(self.config, rank=0, world=1)
        self.sampler = Sampler(dataset, config)
        self.damaged.clear()

    def _wait_for(self, prepared: Future[tuple[BatchPlan, Tensor]], number: int) -> tuple[BatchPlan, Tensor]:
        """The result of _prepare; says once that it takes SLOW_SECONDS and still goes on."""
        if not wait([prepared], SLOW_SECONDS).done:
            images = sorted({printable(sample.image.path) for sample in self.sampler.plan(number).samples})
            more = f" and {plural(len(images) - 1, 'other')}" if len(images) > 1 else ""
            print(
                f"Warning: rank {self.config.rank} has waited {SLOW_SECONDS:g} s for {images[0]}{more}: "
                "does the storage answer?",
                file=sys.stderr,
            )
        return prepared.result()

    def _read_ahead(
        self, numbers: Iterator[int], readers: ThreadPoolExecutor
    ) -> Iterator[tuple[int, Future[list[bytes]] | None]]:
        """Each number of a batch, and with images in tar files, their contents, which are read ahead."""
        waiting: deque[tuple[int, Future[list[bytes]] | None]] = deque()
        for number in numbers:
            if not self._in_tars:
                yield number, None
                continue
            waiting.append((number, readers.submit(self._read, number)))
            if len(waiting) > READ_AHEAD:
                yield waiting.popleft()
        yield from waiting

    @property
    def _in_tars(self) -> bool:
        return any(image.member is not None for image in self.sampler.dataset.images[:1])

    def _read(self, number: int) -> list[bytes]:
        """The content of the image of each sample of a batch."""
        members = [sample.image.member for sample in self.sampler.plan(number).samples]
        return read_members([member for member in members if member is not None])

    def _prepare(self, number: int, contents: Future[list[bytes]] | None = None) -> tuple[BatchPlan, Tensor]:
        plan = self.sampler.plan(number)
        if contents is None:
            return plan, self.render_batch(plan)
        samples = [
            dataclasses.replace(sample, image=dataclasses.replace(sample.image, content=content))
            for sample, content in zip(plan.samples, contents.result(), strict=True)
        ]
        return plan, self.render_batch(dataclasses.replace(plan, samples=samples))  # only here, as contents are large

    def render_batch(self, plan: BatchPlan) -> Tensor:
        """The images of a plan, as Batch has them, completely written, on the device or on the CPU."""
        raise NotImplementedError

    def _make_batch(self, plan: BatchPlan, images: Tensor) -> Batch:
        samples = plan.samples
        rows = max(1, *(len(sample.labels) for sample in samples))
        boxes = np.zeros((len(samples), rows, 5 if self.config.rotated else 4), dtype=np.float32)
        labels = np.full((len(samples), rows), -1, dtype=np.int64)
        for i, sample in enumerate(samples):
            if sample.image.path not in self.damaged:
                boxes[i, : len(sample.labels)] = sample.boxes
                labels[i, : len(sample.labels)] = sample.labels
        scales = torch.tensor([sample.scale for sample in samples], dtype=torch.float32)
        return Batch(
            self.to_device(images),
            self.to_device(torch.from_numpy(boxes)),
            self.to_device(torch.from_numpy(labels)),
            torch.tensor([sample.image.id for sample in samples], dtype=torch.int64),
            scales,
            torch.tensor([sample.image.path in self.damaged for sample in samples]),
            scales * torch.tensor([(sample.image.width, sample.image.height) for sample in samples]),
        )

    def to_device(self, tensor: Tensor) -> Tensor:
        """The tensor on ``LoaderConfig.device``, for the current stream.

        Copies from the CPU have a stream of their own and do not make the caller wait: while the device works on a
        batch, the next one is copied.
        """
        if self.config.device == "cpu" or tensor.is_cuda:
            return tensor
        if self._copies is None:
            self._copies = torch.cuda.Stream(self.config.device)
        pinned = tensor if tensor.is_pinned() else tensor.pin_memory()
        with torch.cuda.stream(self._copies):
            moved = pinned.to(self.config.device, non_blocking=True)
        current = torch.cuda.current_stream(moved.device)
        current.wait_stream(self._copies)
        moved.record_stream(current)  # it was allocated on the other stream
        return moved

    def render_with_torch(self, plan: BatchPlan) -> Tensor:
        """The images of a plan, as Batch has them, made by Pillow and PyTorch on the CPU."""
        # NumPy and not torch, as several of these run at once and torch would spread each over all cores.
        padding = padding_value(self.config)
        shape = (len(plan.samples), 3, plan.height, plan.width)
        kind = torch.uint8 if padding.dtype == np.uint8 else torch.float32
        # For a GPU pinned at once; torch keeps such memory, and gives it again once the copies from it are done.
        batch = torch.empty(shape, dtype=kind, pin_memory=self.config.device != "cpu")
        images = batch.numpy()
        images[:] = padding[:, None, None]
        for i, sample in enumerate(plan.samples):
            try:
                pixels = render(sample, padding)
            except ImageError as error:
                self._report_damage(sample, error)
                continue
            images[i, :, : pixels.shape[1], : pixels.shape[2]] = pixels
        return batch

    def _report_damage(self, sample: Sample, error: ImageError) -> None:
        if sample.image.path not in self.damaged:
            self.damaged.add(sample.image.path)
            counts_not = self.config.training or self.config.square is not None  # a classifier's, too
            what = "is replaced by padding and counts nothing" if counts_not else "gets no detections"
            print(
                f"Warning: {printable(sample.image.path)} (image {sample.image.id}) {what}: {error} "
                f"({plural(len(self.damaged), 'damaged image')} so far).",
                file=sys.stderr,
            )
