"""A backend over the images of a loader → the COCO results of all processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ..boxes import circumscribe, coco_to_corners, corners, corners_to_coco
from ..categories import Category
from ..data.batch import Batch
from ..postprocess import BatchDetections
from ..ranks import gather

Rows = tuple[np.ndarray, np.ndarray]  # (image ids, detections), see detection_rows


def detect(
    backend: Callable[[Tensor], BatchDetections],
    loader: Iterable[Batch],
    categories: Sequence[Category],
    *,
    group: dist.ProcessGroup | None = None,
) -> list[dict[str, Any]]:
    """Runs a backend over this process's share of the images and gathers the detections of all processes on rank 0.

    Args:
        backend: images [N, 3, H, W] → BatchDetections (boxes [N, D, 4], or [N, D, 6] with sin and cos, in pixels of the
            network's input, inclusive corners).
        loader: an inference loader, which gives each image once over all ranks.
        categories: in the order of the backend's class indices.
        group: a group of all ranks to gather over; None: the default group, whose timeout limits how far a rank may
            fall behind.

    Returns:
        On rank 0 the COCO results of all ranks, by image id and then by descending score: ``image_id``,
        ``category_id`` (the dataset's own), ``category`` (its name), ``bbox`` [x, y, w, h] in pixels of the original
        image and ``score``; for rotated boxes ``bbox`` [x, y, w, h, theta] (radians, counterclockwise) and its four
        corners as ``segmentation``. On the other ranks an empty list.
    """
    parts = ((batch.ids.tolist(), rows) for batch, rows in detect_batches(backend, loader))
    return gather_results(parts, categories, group=group)


def gather_results(
    parts: Iterable[tuple[list[int], Rows]],
    categories: Sequence[Category],
    *,
    group: dist.ProcessGroup | None = None,
) -> list[dict[str, Any]]:
    """The detections of all processes on rank 0, as detect gives them.

    Args:
        parts: of this process, as they are found: ids of some images, and their rows (detection_rows).
        categories, group: as of detect.
    """
    found: list[Rows] = []
    ids: list[int] = []
    for part_ids, part_rows in parts:
        found.append(part_rows)
        ids += part_ids
    gathered = all_rows(ids, found, group)
    return [] if gathered is None else coco_results(*gathered, categories)


def all_rows(
    ids: Sequence[int], found: Sequence[Rows], group: dist.ProcessGroup | None, total: int | None = None
) -> Rows | None:
    """The rows of all ranks on rank 0; None there if there are none, and on the other ranks.

    Args:
        ids: of this rank's images, those without detections too.
        found: their rows.
        total: images of all ranks, if that is known.

    Raises:
        RuntimeError: an image came twice, or not at all.
    """
    gathered = gather((list(ids), list(found)), group)
    all_ids = [i for rank_ids, _ in gathered for i in rank_ids]
    if len(all_ids) != len(set(all_ids)):
        raise RuntimeError("An image went through the model twice: the shares of the ranks overlap.")
    if gathered and total not in (None, len(all_ids)):
        raise RuntimeError(f"Only {len(all_ids)} of {total} images went through the model.")
    batches = [part for _, rank_rows in gathered for part in rank_rows if len(part[0])]
    return joined(batches) if batches else None


def joined(parts: Sequence[Rows]) -> Rows:
    """The rows of several parts, at least one, one after another."""
    image_ids, rows = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    return image_ids, rows


@torch.inference_mode()
def detect_batches(
    backend: Callable[[Tensor], BatchDetections], loader: Iterable[Batch]
) -> Iterator[tuple[Batch, Rows]]:
    """Runs a backend over batches and gives each with its detection_rows.

    It stays one batch behind: the device computes a batch while the detections of the one before are copied.
    """
    pending: tuple[Batch, Callable[[], Rows]] | None = None
    for batch in loader:
        copying = start_copy(backend(batch.images), batch)
        if pending is not None:
            yield pending[0], pending[1]()
        pending = batch, copying
    if pending is not None:
        yield pending[0], pending[1]()


def start_copy(detections: BatchDetections, batch: Batch) -> Callable[[], Rows]:
    """Starts to copy detections to the CPU; the function returned waits for the copy and gives its detection_rows."""
    on_cpu = BatchDetections(
        *(t.to("cpu", non_blocking=True) for t in (detections.scores, detections.boxes, detections.classes))
    )
    copied = None
    if detections.scores.is_cuda:
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(detections.scores.device))

    def rows() -> Rows:
        if copied is not None:
            copied.synchronize()
        return detection_rows(on_cpu, batch)

    return rows


def detection_rows(detections: BatchDetections, batch: Batch) -> Rows:
    """The used rows of a batch's detections; a box that lies in the padding alone is none.

    Returns:
        Image ids int64 [n], and float64 [n, 2 + 4|5]: class index, score, and COCO box in pixels of the original image.
        The ids are apart because float64 would round those beyond 2⁵³.
    """
    used = detections.scores > 0  # [N, D]
    if batch.damaged is not None:  # what is found on the zeros in place of an image is nothing
        used = used & ~batch.damaged[:, None]
    if batch.sizes is not None:
        used = used & touches_image(detections.boxes, batch.sizes)
    image = used.nonzero()[:, 0]  # [n], position in the batch
    scores, classes, boxes = (t[used].double() for t in (detections.scores, detections.classes, detections.boxes))
    boxes = corners_to_coco(boxes, batch.scales.double()[image])  # [n, 4|5]
    return batch.ids[image].numpy(), torch.cat([torch.stack([classes, scores], dim=1), boxes], dim=1).numpy()


def touches_image(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Whether some of a box lies on its image, and not all of it in the padding right of it or below.

    A network that met little padding in training may see objects in much of it: black is also the color of things.

    Args:
        boxes: [N, D, 4], or [N, D, 6] of a rotated model, inclusive corners in network pixels.
        sizes: [N, 2], (width, height) of the images in network pixels.

    Returns:
        bool [N, D].
    """
    start = boxes[..., :2] if boxes.shape[-1] == 4 else circumscribe(boxes)[..., :2]
    return (start < sizes[:, None]).all(dim=-1)


def coco_results(image_ids: np.ndarray, rows: np.ndarray, categories: Sequence[Category]) -> list[dict[str, Any]]:
    """What detection_rows gives as COCO results, by image id and then by descending score."""
    order = order_of(image_ids, rows)
    image_ids, rows = image_ids[order], rows[order]
    scores = np.round(rows[:, 1], 7).tolist()
    boxes = np.round(rows[:, 2:], 4).tolist()  # 1e-4 px
    outlines = np.round(box_outlines(rows[:, 2:]), 2).tolist() if rows.shape[1] == 7 else None
    results = []
    for i, (image_id, label) in enumerate(zip(image_ids.tolist(), rows[:, 0], strict=True)):
        category = categories[int(label)]
        result = {"image_id": image_id, "category_id": category.id, "category": category.name}
        result |= {"bbox": boxes[i], "score": scores[i]}
        if outlines is not None:
            result["segmentation"] = [outlines[i]]
        results.append(result)
    return results


def order_of(image_ids: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The order [n] of rows by image id and then by descending score; ties keep that of the postprocessing."""
    return np.lexsort((-rows[:, 1], image_ids))  # stable


def box_outlines(boxes: np.ndarray) -> np.ndarray:
    """Rotated COCO boxes [n, 5] → their corners [n, 8]: x, y of each of the four, clockwise as displayed."""
    return corners(coco_to_corners(torch.from_numpy(boxes))).reshape(-1, 8).numpy()  # [n, 4, 2] -> [n, 8]
