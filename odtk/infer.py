"""Loader × backend → detections in COCO result form, over one or several processes."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from .data.dataset import Category
from .data.loader import Batch
from .postprocess import Detections


class Progress(Protocol):
    """Called after each batch with the number of images that it held."""

    def __call__(self, images: int) -> None: ...


@torch.inference_mode()
def detect(
    backend: Callable[[Tensor], Detections],
    loader: Iterable[Batch],
    categories: Sequence[Category],
    *,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Runs a backend over this process's shard and gathers the detections of all processes on rank 0.

    Args:
        backend: images [N, 3, H, W] → Detections (boxes [N, D, 4] corners, or [N, D, 6] with sin and cos,
            in pixels of the network's input).
        loader: an inference loader: each image once over all ranks.
        categories: entry c names class index c of the backend.

    Returns:
        On rank 0 the COCO results of all ranks, by image id and then by falling score: ``image_id``, ``category_id``
        (the dataset's own), ``category`` (its name), ``bbox`` [x, y, w, h] in pixels of the original image and
        ``score``; for rotated boxes ``bbox`` [x, y, w, h, theta] (radians, anticlockwise) and its four corners as
        ``segmentation``. On the other ranks an empty list.
    """
    rows: list[np.ndarray] = []
    ids: list[int] = []
    pending: tuple[Detections, Batch] | None = None
    for batch in loader:
        detections = backend(batch.images)
        ids += batch.ids.tolist()
        if pending is not None:  # one batch behind, so that reading its results back does not hold up this one
            rows.append(to_rows(*pending))
        pending = (detections, batch)
        if progress is not None:
            progress(len(batch.images))
    if pending is not None:
        rows.append(to_rows(*pending))
    gathered = gather((ids, np.concatenate(rows) if rows else None))
    all_ids = [i for shard_ids, _ in gathered for i in shard_ids]
    if len(all_ids) != len(set(all_ids)):
        raise RuntimeError("An image went through the model twice: the loader's shards overlap.")
    shards = [shard for _, shard in gathered if shard is not None and len(shard)]
    return to_results(np.concatenate(shards), categories) if shards else []


def to_rows(detections: Detections, batch: Batch) -> np.ndarray:
    """The used rows of a batch as float64 [n, 3 + 4|5]: image id, class index, score, x, y, w, h(, theta) in
    pixels of the original image."""
    scores = detections.scores.cpu()  # [N, D]
    used = scores > 0
    image, _ = used.nonzero(as_tuple=True)
    boxes = detections.boxes.cpu()[used].double()  # [n, 4|6]
    scale = batch.scales.cpu().double()[image]  # [n, 2]
    top_left = boxes[:, 0:2] / scale
    extent = (boxes[:, 2:4] - boxes[:, 0:2] + 1) / scale
    columns = [batch.ids.cpu().double()[image, None], detections.classes.cpu()[used].double()[:, None]]
    columns += [scores[used].double()[:, None], top_left, extent]
    if boxes.shape[1] == 6:
        columns.append(torch.atan2(boxes[:, 4:5], boxes[:, 5:6]))
    return torch.cat(columns, dim=1).numpy()


def to_results(rows: np.ndarray, categories: Sequence[Category]) -> list[dict[str, Any]]:
    """Rows of to_rows as COCO results, by image id and then by falling score."""
    rows = rows[np.lexsort((-rows[:, 2], rows[:, 0]))]  # stable: ties keep the order of the postprocess
    scores = np.round(rows[:, 2], 7).tolist()
    boxes = np.round(rows[:, 3:], 4).tolist()  # 1e-4 px
    polygons = np.round(polygon(rows[:, 3:]), 2).tolist() if rows.shape[1] == 8 else None
    results = []
    for i, (image_id, label) in enumerate(rows[:, :2].astype(np.int64).tolist()):
        category = categories[label]
        result = {"image_id": image_id, "category_id": category.id, "category": category.name}
        result |= {"bbox": boxes[i], "score": scores[i]}
        if polygons is not None:
            result["segmentation"] = [polygons[i]]
        results.append(result)
    return results


def polygon(boxes: np.ndarray) -> np.ndarray:
    """Rotated boxes [n, 5] (x, y, w, h, theta) → their corners [n, 8] (x, y four times), clockwise on screen."""
    x, y, w, h, theta = boxes.T[:, :, None]  # each [n, 1]
    dx, dy = w / 2 * np.array([-1, 1, 1, -1]), h / 2 * np.array([-1, -1, 1, 1])  # [n, 4]
    cos, sin = np.cos(theta), np.sin(theta)
    corners = np.stack([x + w / 2 + cos * dx + sin * dy, y + h / 2 - sin * dx + cos * dy], axis=-1)  # [n, 4, 2]
    return corners.reshape(-1, 8)  # [n, 4, 2] -> [n, 8]


def gather(value: Any) -> list[Any]:
    """Every rank's value on rank 0, in order of rank; nothing on the others; [value] outside of torch.distributed."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, values, dst=0)
    return values or []
