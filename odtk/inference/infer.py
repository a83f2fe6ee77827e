"""Loader × backend → detections in COCO result form, over one or several processes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ..boxes import coco_to_corners, corners, corners_to_coco
from ..config import InferConfig, LoaderConfig, OdtkError
from ..data.dataset import Category, Dataset
from ..data.loader import Batch, create_loader
from ..data.sampler import round_up
from ..model.checkpoint import first_os_error, replacing
from ..postprocess import Detections

if TYPE_CHECKING:
    from .backends import Backend

REPORT_EVERY = 10.0  # seconds between lines of progress where there is no terminal
PATIENCE = timedelta(hours=6)  # that ranks which are done wait for the others

Progress = Callable[[int], None]  # called after each batch with the number of images that it held
Rows = tuple[np.ndarray, np.ndarray]  # see to_rows


def infer(config: InferConfig, rank: int = 0, world: int = 1) -> list[dict[str, Any]]:
    """Detects objects in this rank's share of the images; rank 0 writes the detections of all to config.output.

    Returns:
        As detect: COCO results of all images on rank 0, an empty list on the others.

    Raises:
        OdtkError: for a file that cannot be read or written, or annotations of other categories than the model's.
    """
    from .backends import open_backend, silent  # here, as training needs detect() and no ONNX Runtime

    group = patient_group(world)
    for path in config.output:
        check_folder(path)
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
    """The loader that a backend needs: its size, stride, normalisation and kind of boxes, no more than its batch.

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


@torch.inference_mode()
def detect(
    backend: Callable[[Tensor], Detections],
    loader: Iterable[Batch],
    categories: Sequence[Category],
    *,
    progress: Progress | None = None,
    group: dist.ProcessGroup | None = None,
) -> list[dict[str, Any]]:
    """Runs a backend over this process's shard and gathers the detections of all processes on rank 0.

    Args:
        backend: images [N, 3, H, W] → Detections (boxes [N, D, 4] corners, or [N, D, 6] with sin and cos,
            in pixels of the network's input).
        loader: an inference loader: each image once over all ranks.
        categories: entry c names class index c of the backend.
        group: all ranks, to gather over; None: the default group, whose timeout then is all that a rank may be behind.

    Returns:
        On rank 0 the COCO results of all ranks, by image id and then by falling score: ``image_id``, ``category_id``
        (the dataset's own), ``category`` (its name), ``bbox`` [x, y, w, h] in pixels of the original image and
        ``score``; for rotated boxes ``bbox`` [x, y, w, h, theta] (radians, anticlockwise) and its four corners as
        ``segmentation``. On the other ranks an empty list.
    """
    found: list[Rows] = []
    ids: list[int] = []
    pending: Callable[[], Rows] | None = None
    for batch in loader:
        reading = read_back(backend(batch.images), batch)
        ids += batch.ids.tolist()
        if pending is not None:  # one batch behind: the device has this batch to work on while the last one is read
            found.append(pending())
        pending = reading
        if progress is not None:
            progress(len(batch.images))
    if pending is not None:
        found.append(pending())
    gathered = gather((ids, found), group)
    all_ids = [i for shard_ids, _ in gathered for i in shard_ids]
    if len(all_ids) != len(set(all_ids)):
        raise RuntimeError("An image went through the model twice: the loader's shards overlap.")
    batches = [batch_rows for _, shard in gathered for batch_rows in shard if len(batch_rows[0])]
    if not batches:
        return []
    image_ids, rows = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    return to_results(image_ids, rows, categories)


def read_back(detections: Detections, batch: Batch) -> Callable[[], Rows]:
    """Starts the copy of detections to the host; the function returned waits for it and gives to_rows."""
    on_host = Detections(
        *(t.to("cpu", non_blocking=True) for t in (detections.scores, detections.boxes, detections.classes))
    )
    copied = None
    if detections.scores.is_cuda:
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(detections.scores.device))

    def rows() -> Rows:
        if copied is not None:
            copied.synchronize()
        return to_rows(on_host, batch)

    return rows


def to_rows(detections: Detections, batch: Batch) -> Rows:
    """The used rows of a batch.

    Returns:
        Image ids int64 [n], apart as float64 would round them beyond 2⁵³; and float64 [n, 2 + 4|5]: class index, score,
        COCO box in original pixels.
    """
    used = detections.scores > 0  # [N, D]
    image = used.nonzero()[:, 0]  # [n], position in the batch
    scores, classes, boxes = (t[used].double() for t in (detections.scores, detections.classes, detections.boxes))
    boxes = corners_to_coco(boxes, batch.scales.double()[image])  # [n, 4|5]
    return batch.ids[image].numpy(), torch.cat([torch.stack([classes, scores], dim=1), boxes], dim=1).numpy()


def to_results(image_ids: np.ndarray, rows: np.ndarray, categories: Sequence[Category]) -> list[dict[str, Any]]:
    """Rows of to_rows as COCO results, by image id and then by falling score."""
    order = np.lexsort((-rows[:, 1], image_ids))  # stable: ties keep the order of the postprocess
    image_ids, rows = image_ids[order], rows[order]
    scores = np.round(rows[:, 1], 7).tolist()
    boxes = np.round(rows[:, 2:], 4).tolist()  # 1e-4 px
    outlines = np.round(polygons(rows[:, 2:]), 2).tolist() if rows.shape[1] == 7 else None
    results = []
    for i, (image_id, label) in enumerate(zip(image_ids.tolist(), rows[:, 0], strict=True)):
        category = categories[int(label)]
        result = {"image_id": image_id, "category_id": category.id, "category": category.name}
        result |= {"bbox": boxes[i], "score": scores[i]}
        if outlines is not None:
            result["segmentation"] = [outlines[i]]
        results.append(result)
    return results


def polygons(boxes: np.ndarray) -> np.ndarray:
    """Rotated COCO boxes [n, 5] → their corners [n, 8]: x and y four times, clockwise on the screen."""
    return corners(coco_to_corners(torch.from_numpy(boxes))).reshape(-1, 8).numpy()  # [n, 4, 2] -> [n, 8]


def patient_group(world: int) -> dist.ProcessGroup | None:
    """All ranks of several, over CPU tensors, for waits as long as PATIENCE; each rank calls this at the same point."""
    return dist.new_group(backend="gloo", timeout=PATIENCE) if world > 1 else None


def gather(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Every rank's value on rank 0, in order of rank; nothing on the others; [value] outside of torch.distributed.

    Args:
        group: all ranks, to gather over; None: the default group.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, values, dst=0, group=group)
    return values or []


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


def check_folder(path: str) -> None:
    """Refuses, before the work is done, a path that could not be written: as write_json and replacing would."""
    if os.path.isdir(path):
        raise OdtkError(f"Cannot write {path}: it is a folder.")
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe or a device, which is not replaced
        if not os.access(path, os.W_OK):
            raise OdtkError(f"Cannot write {path}: no permission.")
        return
    folder = os.path.dirname(os.path.realpath(path))
    if not os.path.isdir(folder):
        raise OdtkError(f"Cannot write {path}: the folder {folder} does not exist.")
    if not os.access(folder, os.W_OK):
        raise OdtkError(f"Cannot write {path}: no permission to write in {folder}.")


def write_json(value: Any, path: str) -> None:
    """Writes JSON, whole or not at all; a pipe or a device (/dev/stdout, say) is written to as it is.

    Raises:
        OdtkError: the disk is full, or the folder is missing or may not be written to.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        return write_stream(value, path)
    with replacing(path) as file:
        file.write(json.dumps(value).encode())


def write_stream(value: Any, path: str) -> None:
    try:
        with open(path, "w", encoding="utf-8") as file:
            json.dump(value, file)
    except OSError as error:
        raise OdtkError(f"Cannot write {path}: {first_os_error(error)}.") from error
