"""The detections of a model on a dataset or a folder, as COCO results, over one or several processes."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from ..categories import Category
from ..config import InferConfig, LoaderConfig, OdtkError, TilesConfig
from ..data.batch import Loader
from ..data.dataset import Dataset
from ..data.images import ImageError
from ..data.loader import create_loader
from ..data.padding import padded_share
from ..data.records import DAMAGED, Image
from ..data.sampler import round_up
from ..files import check_writable, open_output
from ..ranks import CpuGroup, silent
from ..text import plural, printable, say
from .backends import Backend, open_backend
from .collect import Part, Total
from .detect import Rows, coco_results, detect_batches
from .resume import describe_run, open_collector
from .shards import SUFFIX, ParquetFile, parquet
from .tiles import detect_tiles

PROGRESS_SECONDS = 10.0  # between lines of progress where the output is not a terminal


def infer(config: InferConfig, rank: int = 0, world: int = 1) -> list[dict[str, Any]]:
    """Detects objects in this rank's share of the images; rank 0 writes the detections of all ranks to config.output.

    A run that was killed goes on where it stopped, see resume.py.

    Returns:
        As detect: on rank 0 the COCO results of all images, if ``config.returns``; otherwise, and on the other ranks,
        an empty list.

    Raises:
        OdtkError: a file cannot be read or written, an image is damaged and not to be skipped, thresholds or size are
            not the exported file's, the annotations have other categories than the model, or an earlier run that did
            not end was another one.
    """
    ranks = CpuGroup(world)
    for path in config.output:
        check_writable(path)
        if path.endswith(SUFFIX):
            parquet(path)
    backend = open_backend(
        config.path,
        device=config.data.device,
        precision=config.precision,
        thresholds=config.postprocess,
        explicit=config.explicit,
    )
    log = say if rank == 0 else silent
    data = loader_config(as_trained(config, backend, log), backend, log)
    dataset = Dataset.load(data.annotations, data.images, rotated=data.rotated, skip_damaged=data.skip_damaged)
    categories = match_categories(backend, dataset.categories, log)
    loader = create_loader(dataset, data)
    if warning := backend.padding_warning(padded_share(loader.sampler)):
        log(warning)
    total = len(dataset.images)
    log(
        f"{backend.name} on {world} × {data.device.partition(':')[0]}: {plural(total, 'image')}, "
        f"batch {data.batch * world}, {describe_size(data, config.tiles)}, precision {backend.precision}."
    )
    run = functools.partial(describe_run, config, data, backend, categories, dataset.images)
    width = 5 if backend.rotated else 4
    with open_collector(config, run, categories, width=width, total=total, ranks=ranks, log=log) as collector:
        own = dataset.images[rank::world]
        if config.tiles is None:
            parts = batch_parts(backend, loader, collector.units)
        else:
            parts = tiled_parts(backend, loader, own[collector.units :], config.tiles)
        with image_progress(total, world, collector.images) if rank == 0 else contextlib.nullcontext() as progress:
            for part in parts:
                collector.add(part)
                if progress is not None:
                    progress(len(part.ids))
        found = collector.finish()
        if found is None:
            return []
        if found.damaged and not data.skip_damaged:
            first = next(image.path for image in dataset.images if image.id == found.damaged[0])
            number = plural(len(found.damaged), "such image")
            raise OdtkError(f"{first} is damaged ({number}): mend it, or omit --strict.")
        for output in config.output:
            write_results(collector.windows(), categories, output, width)
        log(describe_result(config, dataset, found))
        results = []
        if config.returns:
            results = [one for window in collector.windows() for one in coco_results(*window, categories)]
        collector.remove()
    return results


def write_results(windows: Iterable[Rows], categories: Sequence[Category], path: str, width: int) -> None:
    """Writes detections window by window: as COCO results, or as Parquet where the name ends in .parquet.

    Raises:
        OdtkError: the disk is full, for instance; an earlier file is as it was.
    """
    with open_output(path) as file:
        if path.endswith(SUFFIX):
            with ParquetFile(file, categories, width, {}) as writer:
                for window in windows:
                    writer.write(window)
            return
        before = "["
        for window in windows:
            for result in coco_results(*window, categories):
                file.write((before + json.dumps(result)).encode())
                before = ", "
        file.write(b"[]" if before == "[" else b"]")


def describe_result(config: InferConfig, dataset: Dataset, found: Total) -> str:
    """What a run has found, and where it was written."""
    unread = sum(fault.rule == DAMAGED for fault in dataset.faults)
    total = plural(len(dataset.images) + unread, "image")
    summary = f"{plural(found.detections, 'detection')} in {found.found} of {total}"
    if damaged := unread + len(found.damaged):
        summary += f" ({plural(damaged, 'damaged one')} without detections)"
    return ", ".join([summary, *config.output])


def batch_parts(backend: Backend, loader: Loader, first: int) -> Iterator[Part]:
    """The parts of this rank's work, one for each batch from number ``first`` on."""
    loader.start_at(first)
    for batch, rows in detect_batches(backend, loader):
        damaged = [] if batch.damaged is None else batch.ids[batch.damaged].tolist()
        yield Part(batch.ids.tolist(), rows, damaged)


def tiled_parts(backend: Backend, loader: Loader, images: Sequence[Image], tiles: TilesConfig) -> Iterator[Part]:
    """The parts of this rank's work, one for each image in tiles; those that are damaged are named."""
    for image, rows in detect_tiles(backend, loader, images, tiles):
        damaged = []
        if isinstance(rows, ImageError):
            damaged.append(image.id)
            print(f"Warning: {printable(image.path)} (image {image.id}) gets no detections: {rows}.", file=sys.stderr)
            rows = np.zeros((0, 7 if backend.rotated else 6))
        yield Part([image.id], (np.full(len(rows), image.id, dtype=np.int64), rows), damaged)


def as_trained(config: InferConfig, backend: Backend, log: Callable[[str], None] = say) -> LoaderConfig:
    """config.data at the size that the model was trained at, where no other is asked for; a difference is logged."""
    data = config.data
    if backend.resize is None or data.size is not None or backend.size is not None:
        resize, max_size = config.resize or data.resize, config.max_size or data.max_size
        if data.size is not None and backend.input_size is not None and backend.size is None:
            trained = "×".join(map(str, backend.input_size))
            log(f"--size {data.size[0]} {data.size[1]}: the model was trained at {trained}.")
        return dataclasses.replace(data, resize=resize, max_size=max_size)
    assert backend.max_size is not None
    resize, max_size = config.resize or backend.resize, config.max_size or backend.max_size
    if (resize, max_size) != (backend.resize, backend.max_size):
        log(
            f"--resize {resize} --max-size {max_size}: the model was trained with --resize {backend.resize} "
            f"--max-size {backend.max_size}."
        )
    return dataclasses.replace(data, resize=resize, max_size=max_size)


def loader_config(data: LoaderConfig, backend: Backend, log: Callable[[str], None] = say) -> LoaderConfig:
    """The loader settings that a backend needs: its size, stride, kind of pixels and of boxes, at most its batch.

    Args:
        log: takes a message where a size or a batch is not the one asked for.

    Raises:
        OdtkError: a size is asked for that is not the exported file's.
    """
    asked = round_up(data.size, backend.stride) if data.size else None
    if asked and backend.size and asked != tuple(backend.size):
        sizes = f"{asked[0]}×{asked[1]} contradicts the {backend.size[0]}×{backend.size[1]}"
        raise OdtkError(f"--size {sizes} of {backend.name}: omit it, or export the model again.")
    if data.size and asked and asked != tuple(data.size):
        sizes = f"{data.size[0]} {data.size[1]} becomes {asked[0]} {asked[1]}"
        log(f"--size {sizes}: both must be multiples of {backend.stride}.")
    if backend.max_batch and data.batch > backend.max_batch:
        log(f"{backend.name} takes at most {plural(backend.max_batch, 'image')} at a time, not {data.batch}.")
    return dataclasses.replace(
        data,
        training=False,
        size=backend.size or asked,
        stride=backend.stride,
        mean=backend.mean,
        std=backend.std,
        padding=backend.padding,
        input_type=backend.input_type,
        rotated=backend.rotated,
        batch=min(data.batch, backend.max_batch or data.batch),
    )


def describe_size(data: LoaderConfig, tiles: TilesConfig | None = None) -> str:
    """How images are cut and resized, for a message."""
    cut = f"tiles of {tiles.size[0]}×{tiles.size[1]} that overlap by {tiles.overlap:.0%}, each " if tiles else ""
    if data.size:
        return f"{cut}fitted inside {data.size[0]}×{data.size[1]}"
    return f"{cut}shorter side {data.resize}, longer at most {data.max_size}"


def match_categories(
    backend: Backend, annotated: Sequence[Category], log: Callable[[str], None] = say
) -> tuple[Category, ...]:
    """The categories of a model, in the order of its class indices, compared with those of the annotations.

    They are the model's own, after a check that no id has another name in the annotations. A model without categories
    (ODTK 0.2) gets those of the annotations, and without annotations its class indices serve as ids.

    Args:
        annotated: the categories of the annotations; empty without annotations.
        log: takes a warning about categories that only one side has.

    Raises:
        OdtkError: an id has two names, no id is common to both, or a model without categories has another number of
            classes. Equal names under other ids are said to be so, but not matched: results hold ids.
    """
    if backend.categories is None:
        if not annotated:
            log("The model has no categories: the category ids of its detections are class indices, from 0.")
            return tuple(Category(c, f"class {c}") for c in range(backend.classes))
        if len(annotated) != backend.classes:
            raise OdtkError(
                f"The model has {plural(backend.classes, 'class', 'classes')} and the annotations "
                f"{plural(len(annotated), 'category', 'categories')}: they do not belong to the same dataset."
            )
        return tuple(annotated)
    own = {c.id: c.name for c in backend.categories}
    theirs = {c.id: c.name for c in annotated}
    if renumbered := same_names(own, theirs):
        name, mine, other = renumbered
        raise OdtkError(
            f"The model and the annotations have the same category names under other ids ('{name}' is {mine} in the "
            f"model, {other} in the annotations): use annotations with the ids of those that the model was trained on."
        )
    for id in own.keys() & theirs.keys():
        if own[id] != theirs[id]:
            raise OdtkError(
                f"Category {id} is '{own[id]}' in the model and '{theirs[id]}' in the annotations: "
                "they do not belong to the same dataset."
            )
    if theirs and not own.keys() & theirs.keys():
        raise OdtkError(
            f"The category ids of the model ({format_categories(own)}) and of the annotations "
            f"({format_categories(theirs)}) have nothing in common: they do not belong to the same dataset."
        )
    if unknown := theirs.keys() - own.keys():
        names = format_categories({i: theirs[i] for i in unknown})
        log(f"Warning: the annotations have categories that the model does not detect: {names}.")
    if theirs and (extra := own.keys() - theirs.keys()):
        names = format_categories({i: own[i] for i in extra})
        log(f"Warning: the model detects categories that the annotations do not have and that are not scored: {names}.")
    return tuple(backend.categories)


def same_names(own: dict[int, str], theirs: dict[int, str]) -> tuple[str, int, int] | None:
    """The first name with its two ids, where both have the same names, each once, but not under the same ids."""
    mine, other = ({name: id for id, name in names.items()} for names in (own, theirs))
    if own == theirs or mine.keys() != other.keys() or not len(own) == len(theirs) == len(mine):
        return None
    return next((name, id, other[name]) for name, id in mine.items() if id != other[name])


def format_categories(names: dict[int, str]) -> str:
    """Up to five ids with their names, for a message."""
    shown = [f"{id} {name}" for id, name in sorted(names.items())[:5]]
    return ", ".join(shown) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


@contextlib.contextmanager
def image_progress(total: int, world: int = 1, before: int = 0) -> Iterator[Callable[[int], None]]:
    """Progress over ``total`` images: a bar on a terminal, elsewhere a line every PROGRESS_SECONDS.

    Rank 0 shows it, and counts each of its images for ``world`` ranks, whose shares are equal; ``before`` of its
    images were done by an earlier run.
    """
    start = last = time.monotonic()
    done = before = min(total, before * world)
    if sys.stdout.isatty():
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]:.1f} im/s"), TimeRemainingColumn())
        with Progress(*columns) as bar:
            task = bar.add_task("", total=total, completed=before, rate=0.0)

            def advance(images: int) -> None:
                nonlocal done
                done = min(total, done + images * world)
                bar.update(task, completed=done, rate=(done - before) / (time.monotonic() - start))

            yield advance
        return

    def print_line(images: int) -> None:
        nonlocal done, last
        done = min(total, done + images * world)
        now = time.monotonic()
        if done == total or now - last > PROGRESS_SECONDS:
            last = now
            print(f"{done}/{total} images, {(done - before) / (now - start):.1f} im/s", flush=True)

    yield print_line
