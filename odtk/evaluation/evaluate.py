"""COCO figures of detections: axis-aligned boxes, rotated boxes, or masks. Never runs a model.

The protocol is pycocotools' (https://cocodataset.org/#detection-eval): AP is the mean over IoU 0.50…0.95 by 0.05 and
over 101 recall points. A figure for which nothing was to be found (no object of that size, say) is -1, as there.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ..boxes import area, coco_to_corners, corners
from ..config import OdtkError
from ..data.coco import categories_of, is_degenerate, is_id, is_number, load_json
from ..ops import rotated_iou

STATS = (
    "AP",
    "AP50",
    "AP75",
    "AP small",
    "AP medium",
    "AP large",
    "AR 1",
    "AR 10",
    "AR 100",
    "AR small",
    "AR medium",
    "AR large",
)


@dataclass(frozen=True)
class ClassMetrics:
    """Figures of one category: ``images`` hold at least one of its ``instances`` (crowds are not counted)."""

    id: int
    name: str
    ap: float
    ap50: float
    images: int
    instances: int


@dataclass(frozen=True)
class Metrics:
    """The twelve COCO figures in the order of STATS (0…1, -1 where nothing was to be found), and those per class."""

    stats: tuple[float, ...]
    classes: tuple[ClassMetrics, ...]

    @property
    def ap(self) -> float:
        return self.stats[0]

    @property
    def ap50(self) -> float:
        return self.stats[1]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "stats": dict(zip(STATS, self.stats, strict=True)),
            "classes": [vars(c) for c in self.classes],
        }


def evaluate(
    detections: list[dict[str, Any]] | str,
    annotations: dict[str, Any] | str,
    *,
    rotated: bool | None = None,
    segmentation: bool = False,
) -> Metrics:
    """Scores detections against annotations.

    Args:
        detections: COCO results (or the path of their JSON file), boxes [x, y, w, h] or [x, y, w, h, theta] in pixels
            of the original images, theta in radians, anticlockwise; further keys are not looked at.
        annotations: COCO ground truth, or the path of its JSON file; never modified.
        rotated: overlap is the IoU of the rotated boxes; None: when an annotation or a detection has five numbers.
        segmentation: overlap is the IoU of masks ("segm"): of the polygons given, or of the rotated boxes.

    Raises:
        OdtkError: for an unreadable file, a malformed entry, or an id that the annotations do not have.
    """
    truth = load_json(Path(annotations)) if isinstance(annotations, str) else annotations
    results = read_detections(detections) if isinstance(detections, str) else detections
    file, results_file = (given if isinstance(given, str) else "" for given in (annotations, detections))
    truth = prepare_ground_truth(truth, file, segmentation=segmentation)
    check_detections(results, truth, results_file, segmentation=segmentation)
    if rotated is None:
        rotated = any(len(entry["bbox"]) == 5 for entry in (*truth["annotations"], *results))
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints at every step
        numbers = 5 if rotated else 4
        gt, dt = (coco_index(truth, entries, numbers) for entries in (truth["annotations"], results))
        if segmentation:
            add_polygons([gt, dt])
        coco_eval = (RotatedEval if rotated and not segmentation else COCOeval)(
            gt, dt, "segm" if segmentation else "bbox"
        )
        coco_eval.evaluate()
        coco_eval.accumulate()
        coco_eval.summarize()
    return Metrics(tuple(float(s) for s in coco_eval.stats), class_metrics(coco_eval, gt))


class RotatedEval(COCOeval):
    """COCOeval in which the overlap of two boxes is their rotated IoU."""

    def computeIoU(self, imgId: int, catId: int) -> Any:  # noqa: N802 (names of the base class)
        gt = self._gts[imgId, catId]
        dt = sorted(self._dts[imgId, catId], key=lambda d: -d["score"])[: self.params.maxDets[-1]]
        if not gt or not dt:
            return []
        a, b = corner_boxes(dt), corner_boxes(gt)
        iou = rotated_iou(a, b)  # [detections, truth]
        # A crowd's overlap is intersection / area of the detection (COCO); intersection = IoU · (a + b) / (1 + IoU).
        area_a, area_b = area(a)[:, None], area(b)[None, :]
        of_detection = iou * (area_a + area_b) / (1 + iou) / area_a.clamp(min=1e-9)
        crowd = torch.tensor([bool(g["iscrowd"]) for g in gt])
        return torch.where(crowd[None, :], of_detection, iou).numpy()


def corner_boxes(entries: Sequence[dict[str, Any]]) -> torch.Tensor:
    """COCO boxes [x, y, w, h(, theta)] of entries → [n, 5] of boxes.py."""
    return coco_to_corners(torch.tensor([(*e["bbox"], 0.0)[:5] for e in entries], dtype=torch.float64))


def coco_index(truth: dict[str, Any], entries: Iterable[dict[str, Any]], numbers: int) -> COCO:
    """pycocotools' index of annotations or results, of which it gets copies with the fields that it needs.

    Boxes get that many numbers: without the angle (4), or with one (5).

    Entries are numbered from 1: pycocotools takes a ground truth of id 0 for unmatched. An area that is no number
    (null, say) is that of the box.
    """
    coco = COCO()
    copies = []
    for number, entry in enumerate(entries, 1):
        box = [*entry["bbox"], 0.0][:numbers]
        own = entry.get("area")
        size = own if is_number(own) and math.isfinite(own) else box[2] * box[3]
        copies.append({**entry, "id": number, "bbox": box, "area": size, "iscrowd": int(bool(entry.get("iscrowd")))})
    coco.dataset = {"images": truth["images"], "categories": truth["categories"], "annotations": copies}
    coco.createIndex()
    return coco


def add_polygons(indices: Sequence[COCO]) -> None:
    """Gives entries without a mask the polygon of their box, and images without a size one that holds every polygon."""
    extent: dict[int, tuple[float, float]] = defaultdict(lambda: (1.0, 1.0))
    for coco in indices:
        for entry in coco.dataset["annotations"]:
            if not entry.get("segmentation"):
                entry["segmentation"] = corners(corner_boxes([entry])).reshape(1, 8).tolist()  # [1, 4, 2] -> [1, 8]
            if isinstance(entry["segmentation"], list):
                xs = [v for p in entry["segmentation"] for v in p[0::2]]
                ys = [v for p in entry["segmentation"] for v in p[1::2]]
                w, h = extent[entry["image_id"]]
                extent[entry["image_id"]] = (max([w, *xs]), max([h, *ys]))
    for coco in indices:
        coco.imgs = {
            i: {
                **image,
                "width": image.get("width") or math.ceil(extent[i][0]),
                "height": image.get("height") or math.ceil(extent[i][1]),
            }
            for i, image in coco.imgs.items()
        }


def class_metrics(coco_eval: COCOeval, gt: COCO) -> tuple[ClassMetrics, ...]:
    """AP and AP50 of each category, all sizes, 100 detections per image."""
    precision = coco_eval.eval["precision"][:, :, :, 0, -1]  # [IoU, recall, category]
    rows = []
    for k, category_id in enumerate(int(i) for i in coco_eval.params.catIds):
        objects = [a for a in gt.dataset["annotations"] if a["category_id"] == category_id and not a["iscrowd"]]
        rows.append(
            ClassMetrics(
                id=category_id,
                name=str(gt.cats[category_id].get("name", category_id)),
                ap=mean_precision(precision[:, :, k]),
                ap50=mean_precision(precision[:1, :, k]),
                images=len({a["image_id"] for a in objects}),
                instances=len(objects),
            )
        )
    return tuple(rows)


def mean_precision(precision: np.ndarray) -> float:
    """Mean over IoU and recall, -1 where the category has no objects."""
    known = precision[precision > -1]
    return float(known.mean()) if known.size else -1.0


def read_detections(path: str) -> list[dict[str, Any]]:
    """COCO results: a list, or (as ODTK 0.2 wrote them) a dictionary that holds it under ``annotations``."""
    try:
        with open(path, encoding="utf-8") as file:
            values = json.load(file)
    except OSError as error:
        raise OdtkError(f"Cannot read the detections {path}: {error.strerror}.") from error
    except ValueError as error:
        raise OdtkError(f"{path} is not valid JSON: {error}.") from error
    return values.get("annotations", values) if isinstance(values, dict) else values


def filter_categories(detections: list[dict[str, Any]], truth: dict[str, Any]) -> list[dict[str, Any]]:
    """The detections of categories that the annotations have: a model may know more than is to be scored."""
    ids = {category["id"] for category in categories_of(truth)}
    return [d for d in detections if d["category_id"] in ids]


def prepare_ground_truth(truth: dict[str, Any], file: str = "", *, segmentation: bool = False) -> dict[str, Any]:
    """A copy of annotations with the lists that COCO files may lack, and without degenerate boxes.

    The rules are those of data/dataset.py: what a run or `odtk check` accepts, this does too.

    Args:
        truth: what load_json gives.
        file: its name, for the sentence of an error.
        segmentation: masks are to be scored, so they are looked at too.

    Raises:
        OdtkError: for the first entry that makes them unusable.
    """
    of = f" of {file}" if file else ""
    boxes, categories = truth.get("annotations", []), categories_of(truth)
    for what, entries in (("an image", truth["images"]), ("a category", categories)):
        for entry in entries:
            if not is_id(entry.get("id")):
                raise OdtkError(f"The annotations{of} have {what} without an integer id: {entry.get('id')!r}.")
    image_ids, category_ids = {image["id"] for image in truth["images"]}, {category["id"] for category in categories}
    for i, entry in enumerate(boxes):
        name = f"Annotation {entry.get('id', f'at position {i}')}{of}"
        check_entry(entry, name, image_ids, category_ids, segmentation)
    kept = [a for a in boxes if not is_degenerate(a["bbox"])]
    return {"images": truth["images"], "categories": categories, "annotations": kept}


def check_detections(detections: Any, truth: dict[str, Any], file: str = "", *, segmentation: bool = False) -> None:
    """One sentence for the first detection (of ``file``) that cannot be scored against a prepared ground truth."""
    of = f" of {file}" if file else ""
    if not isinstance(detections, list):
        raise OdtkError(
            f"The detections{of} are not a list: COCO results are [{{image_id, category_id, bbox, score}}, …]."
        )
    image_ids, category_ids = ({entry["id"] for entry in truth[key]} for key in ("images", "categories"))
    for i, entry in enumerate(detections):
        name = f"Detection {i}{of}"
        check_entry(entry, name, image_ids, category_ids, segmentation)
        if not all(math.isfinite(v) for v in entry["bbox"]):
            raise OdtkError(f"{name} (image {entry['image_id']}) has a box that is not finite: {entry['bbox']}.")
        if not is_number(entry.get("score")) or not math.isfinite(entry["score"]):
            raise OdtkError(f"{name} has no finite 'score'.")


def check_entry(entry: Any, name: str, image_ids: set[int], category_ids: set[int], segmentation: bool) -> None:
    """An annotation or a detection: known ids, a box of four or five numbers and, if asked for, a mask."""
    if not isinstance(entry, dict):
        raise OdtkError(f"{name} is not a dictionary.")
    for what, ids in (("image", image_ids), ("category", category_ids)):
        id = entry.get(f"{what}_id")
        if id is None:
            raise OdtkError(f"{name} has no '{what}_id'.")
        if not is_number(id) or id not in ids:
            raise OdtkError(f"{name} is of {what} {id}, which the annotations do not list.")
    box = entry.get("bbox")
    if not isinstance(box, list) or len(box) not in (4, 5) or not all(is_number(v) for v in box):
        raise OdtkError(f"{name} (image {entry['image_id']}) has no box of four or five numbers.")
    if segmentation and entry.get("segmentation") and not is_mask(entry["segmentation"]):
        raise OdtkError(
            f"{name} (image {entry['image_id']}) has a 'segmentation' that is neither a list of polygons "
            "[x, y, x, y, x, y, …] in pixels nor an RLE mask {size, counts}."
        )


def is_mask(value: Any) -> bool:
    """Whether pycocotools can draw a "segmentation". It does not look itself: a NaN, say, costs it all memory."""
    if isinstance(value, list):
        return all(
            isinstance(polygon, list)
            and len(polygon) >= 6
            and len(polygon) % 2 == 0
            and all(is_number(v) and math.isfinite(v) for v in polygon)
            for polygon in value
        )
    if not isinstance(value, dict):
        return False
    size, counts = value.get("size"), value.get("counts")
    if not isinstance(size, list) or len(size) != 2 or not all(is_id(side) and side > 0 for side in size):
        return False
    if isinstance(counts, list):  # of runs, which fill the mask
        return all(is_id(run) and run >= 0 for run in counts) and sum(counts) == size[0] * size[1]
    return isinstance(counts, (str, bytes))


def report(metrics: Metrics) -> None:
    """Prints the twelve figures and the table per class."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=120)  # a file or a pipe has no width to keep to
    figures = Table(title="COCO figures", title_justify="left")
    for name in STATS:
        figures.add_column(name, justify="right")
    figures.add_row(*(shown(s) for s in metrics.stats))
    console.print(figures)
    table = Table(title="Per class", title_justify="left")
    for name, justify in (
        ("id", "right"),
        ("class", "left"),
        ("AP", "right"),
        ("AP50", "right"),
        ("images", "right"),
        ("instances", "right"),
    ):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for c in metrics.classes:
        table.add_row(str(c.id), c.name, shown(c.ap), shown(c.ap50), str(c.images), str(c.instances))
    console.print(table)


def shown(value: float) -> str:
    return "–" if value < 0 else f"{value:.3f}"
