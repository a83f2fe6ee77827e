"""A backend over a loader → COCO results of all processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ..boxes import coco_to_corners, corners, corners_to_coco
from ..categories import Category
from ..data.batch import Batch
from ..launch import gather
from ..postprocess import Detections

Progress = Callable[[int], None]  # called after each batch with the number of images that it held
Rows = tuple[np.ndarray, np.ndarray]  # see to_rows


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
