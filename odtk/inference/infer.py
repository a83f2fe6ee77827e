"""Loader × backend → detections in COCO result form, over one or several processes."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..categories import Category
from ..config import InferConfig, LoaderConfig, OdtkError
from ..data.dataset import Dataset
from ..data.loader import create_loader
from ..data.sampler import round_up
from ..files import check_writable, write_json
from ..launch import patient_group
from .detect import Progress, detect

if TYPE_CHECKING:
    from .backends import Backend

REPORT_EVERY = 10.0  # seconds between lines of progress where there is no terminal


def infer(config: InferConfig, rank: int = 0, world: int = 1) -> list[dict[str, Any]]:
    """Detects objects in this rank's share of the images; rank 0 writes the detections of all to config.output.

    Returns:
        As detect: COCO results of all images on rank 0, an empty list on the others.

    Raises:
        OdtkError: for a file that cannot be read or written, or annotations of other categories than the model's.
    """
    from ..launch import silent  # here, as training needs detect() and no ONNX Runtime
    from .backends import open_backend

    group = patient_group(world)
    for path in config.output:
        check_writable(path)
    backend = open_backend(
        config.path, device=config.data.device, precision=config.precision, postprocess=config.postprocess
    )
    check_explicit(config, backend)
    say = print if rank == 0 else silent
    data = loader_config(config.data, backend, say)
    dataset = Dataset.load(data.annotations, data.images, rotated=data.rotated)
    categories = resolve_categories(backend, dataset.categories, say)
    loader = create_loader(dataset, data)
    say(
        f"{backend.name} on {world} × {data.device.partition(':')[0]}: {len(dataset.images)} images, "
        f"batch {data.batch * world}, {size_line(data)}, precision {backend.precision}."
    )
    total = len(dataset.images)
    with progress_line(total, world) if rank == 0 else contextlib.nullcontext() as progress:
        detections = detect(backend, loader, categories, progress=progress, group=group)
    if rank == 0:
        for path in config.output:
            write_json(detections, path)
        found = len({d["image_id"] for d in detections})
        say(f"{len(detections)} detections in {found} of {total} images" + "".join(f", {p}" for p in config.output))
    return detections


def check_explicit(config: InferConfig, backend: Backend) -> None:
    """Refuses a threshold of the command line that a file contradicts, were it the default."""
    for name in config.explicit:
        asked, own = getattr(config.postprocess, name), getattr(backend.postprocess, name)
        if asked != own:
            flag = "--" + name.replace("_", "-")
            raise OdtkError(f"{flag} {asked:g} contradicts the {own:g} baked into {config.path}: leave it out.")


def loader_config(data: LoaderConfig, backend: Backend, say: Callable[[str], None] = print) -> LoaderConfig:
    """The loader that a backend needs: its size, stride, normalization and kind of boxes, no more than its batch.

    Raises:
        OdtkError: a size is asked for and the file has another one.
    """
    asked = round_up(data.size, backend.stride) if data.size else None
    if asked and backend.size and asked != tuple(backend.size):
        sizes = f"{asked[0]}×{asked[1]} contradicts the {backend.size[0]}×{backend.size[1]}"
        raise OdtkError(f"--size {sizes} of {backend.name}: leave it out, or export it again.")
    if data.size and asked and asked != tuple(data.size):
        sizes = f"{data.size[0]} {data.size[1]} becomes {asked[0]} {asked[1]}"
        say(f"--size {sizes}: sides are multiples of {backend.stride}.")
    if backend.max_batch and data.batch > backend.max_batch:
        say(f"{backend.name} takes {backend.max_batch} images at a time at most, not {data.batch}.")
    return dataclasses.replace(
        data,
        training=False,
        size=backend.size or asked,
        stride=backend.stride,
        mean=backend.mean,
        std=backend.std,
        rotated=backend.rotated,
        batch=min(data.batch, backend.max_batch or data.batch),
    )


def size_line(data: LoaderConfig) -> str:
    if data.size:
        return f"fitted inside {data.size[0]}×{data.size[1]}"
    return f"shorter side {data.resize}, longer at most {data.max_size}"


def resolve_categories(
    backend: Backend, annotated: Sequence[Category], say: Callable[[str], None] = print
) -> tuple[Category, ...]:
    """What the class indices of a model stand for.

    The model's own categories, once those of the annotations (if any) are seen to mean the same: one id, one name.
    Ids that only one side has are said. A model that has none (ODTK 0.2) takes the annotations', and without
    annotations its class indices.

    Raises:
        OdtkError: the two name an id differently, share no id, or differ in number where the model has none.
    """
    if backend.categories is None:
        if not annotated:
            say("The model has no category ids: detections have class indices from 0.")
            return tuple(Category(c, f"class {c}") for c in range(backend.classes))
        if len(annotated) != backend.classes:
            raise OdtkError(
                f"The model has {backend.classes} classes and the annotations {len(annotated)} categories: "
                "they are not of the same dataset."
            )
        return tuple(annotated)
    own = {c.id: c.name for c in backend.categories}
    theirs = {c.id: c.name for c in annotated}
    for id in own.keys() & theirs.keys():
        if own[id] != theirs[id]:
            raise OdtkError(
                f"Category {id} is '{own[id]}' to the model and '{theirs[id]}' in the annotations: "
                "they are not of the same dataset."
            )
    if theirs and not own.keys() & theirs.keys():
        raise OdtkError(
            f"The model's category ids ({listed(own)}) and those of the annotations ({listed(theirs)}) "
            "have nothing in common: they are not of the same dataset."
        )
    if unknown := theirs.keys() - own.keys():
        say(f"Warning: the model does not know the categories {listed({i: theirs[i] for i in unknown})}.")
    if theirs and (extra := own.keys() - theirs.keys()):
        say(f"Warning: the annotations have no categories {listed({i: own[i] for i in extra})}: they are not scored.")
    return tuple(backend.categories)


def listed(names: dict[int, str]) -> str:
    """A few ids and names for a sentence."""
    shown = [f"{id} {name}" for id, name in sorted(names.items())[:5]]
    return ", ".join(shown) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


@contextlib.contextmanager
def progress_line(total: int, world: int = 1) -> Iterator[Progress]:
    """A bar on a terminal, a line every few seconds elsewhere; rank 0 speaks for `world` equal shares."""
    start = last = time.monotonic()
    done = 0
    if sys.stdout.isatty():
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]:.1f} im/s"), TimeRemainingColumn())
        with Progress(*columns) as bar:
            task = bar.add_task("", total=total, rate=0.0)

            def advance(images: int) -> None:
                nonlocal done
                done = min(total, done + images * world)
                bar.update(task, completed=done, rate=done / (time.monotonic() - start))

            yield advance
        return

    def line(images: int) -> None:
        nonlocal done, last
        done = min(total, done + images * world)
        now = time.monotonic()
        if done == total or now - last > REPORT_EVERY:
            last = now
            print(f"{done}/{total} images, {done / (now - start):.1f} im/s", flush=True)

    yield line
