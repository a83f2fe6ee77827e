"""COCO figures of detections: axis-aligned boxes, rotated boxes, or masks. No model is run here.

The protocol is pycocotools' (https://cocodataset.org/#detection-eval): AP is the mean over the IoU thresholds 0.50,
0.55, …, 0.95 and over 101 recall points. A figure is -1 where there is nothing to find, such as no object of its size.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ..boxes import area, coco_to_corners, corners
from ..config import OdtkError
from ..data.coco import categories_of, entry_fault, is_mask_side, is_number, prepare_ground_truth
from ..data.layouts import load_annotations
from ..files import parse_json
from ..inference.shards import SUFFIX, images_done, read_results
from ..ops import rotated_iou
from ..text import plural, printable, say

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
    """The figures of one category.

    Attributes:
        ap, ap50: 0…1, -1 where the category has no instances.
        images: number of images with at least one instance.
        instances: number of annotations; crowds are not counted.
    """

    id: int
    name: str
    ap: float
    ap50: float
    images: int
    instances: int


@dataclass(frozen=True)
class Metrics:
    """The twelve COCO figures in the order of STATS (0…1; -1 where there is nothing to find), and those per class."""

    stats: tuple[float, ...]
    classes: tuple[ClassMetrics, ...]

    @property
    def ap(self) -> float:
        return self.stats[0]

    @property
    def ap50(self) -> float:
        return self.stats[1]

    def to_dict(self) -> dict[str, Any]:
        """The figures as dictionaries and lists, for JSON."""
        return {
            "stats": dict(zip(STATS, self.stats, strict=True)),
            "classes": [vars(c) for c in self.classes],
        }


def evaluate(
    detections: list[dict[str, Any]] | str,
    annotations: dict[str, Any] | str,
    *,
    images: str | None = None,
    rotated: bool | None = None,
    segmentation: bool = False,
) -> Metrics:
    """Scores detections against annotations.

    Args:
        detections: COCO results (or the path of their JSON file), boxes [x, y, w, h] or [x, y, w, h, theta] in pixels
            of the original images, theta in radians, counterclockwise; other keys are ignored.
        annotations: COCO ground truth, or PATH or PATH:SPLIT of annotations (data/layouts.py); never modified.
        images: folder of the images, which give YOLO's boxes their size; None looks for it.
        rotated: overlap is the IoU of rotated boxes; None means: if any annotation or detection has five numbers.
        segmentation: overlap is the IoU of masks ("segm"): of "segmentation", or where there is none, of the box.

    Raises:
        OdtkError: a file cannot be read, an entry is malformed, or an id is not in the annotations.
    """
    return metrics_of(run_cocoeval(detections, annotations, images=images, rotated=rotated, segmentation=segmentation))


def run_cocoeval(
    detections: list[dict[str, Any]] | str,
    annotations: dict[str, Any] | str,
    *,
    images: str | None = None,
    rotated: bool | None = None,
    segmentation: bool = False,
    evaluator: str = "pycocotools",
) -> COCOeval:
    """An evaluation with all that it keeps; arguments as evaluate.

    Args:
        evaluator: pycocotools, whose evaluation has the matches of each image, or faster-coco-eval, which is quicker
            and has the figures only.

    Raises:
        OdtkError: as evaluate; or faster-coco-eval is not installed, or cannot evaluate rotated boxes.
    """
    results = read_detections(detections) if isinstance(detections, str) else detections
    truth = load_truth(annotations, results, images) if isinstance(annotations, str) else annotations
    file, results_file = (given if isinstance(given, str) else "" for given in (annotations, detections))
    truth = prepare_ground_truth(truth, file, segmentation=segmentation)
    check_detections(results, truth, results_file, segmentation=segmentation)
    done, total = images_done(results_file) if results_file else None, len(truth["images"])
    if done is not None and done < total:
        say(f"{done} of {plural(total, 'image')} are done; the others count as without detections.")
    if rotated is None:
        rotated = any(len(entry["bbox"]) == 5 for entry in (*truth["annotations"], *results))
    index, evaluation = evaluator_classes(evaluator, rotated=rotated and not segmentation)
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints each step
        box_values = 5 if rotated else 4
        gt, dt = (coco_index(truth, entries, box_values, index) for entries in (truth["annotations"], results))
        if segmentation:
            add_missing_masks([gt, dt])
        coco_eval = evaluation(gt, dt, "segm" if segmentation else "bbox")
        coco_eval.evaluate()
        coco_eval.accumulate()
        coco_eval.summarize()
    return coco_eval


def evaluator_classes(evaluator: str, *, rotated: bool) -> tuple[Any, Any]:
    """The classes of an evaluator: the index of a set, and the evaluation."""
    if evaluator == "pycocotools":
        return COCO, RotatedCOCOeval if rotated else COCOeval
    if rotated:
        raise OdtkError(f"--evaluator {evaluator} knows no rotated boxes: leave the flag out.")
    try:
        from faster_coco_eval import COCO as FasterCOCO
        from faster_coco_eval import COCOeval_faster
    except ImportError as error:
        raise OdtkError(f"--evaluator {evaluator} needs its package: pip install 'odtk[fast]'.") from error
    return FasterCOCO, COCOeval_faster


def metrics_of(coco_eval: COCOeval) -> Metrics:
    """The figures of an evaluation."""
    return Metrics(tuple(float(s) for s in coco_eval.stats[: len(STATS)]), class_metrics(coco_eval, coco_eval.cocoGt))


class RotatedCOCOeval(COCOeval):
    """COCOeval with the IoU of rotated boxes as the overlap."""

    def computeIoU(self, imgId: int, catId: int) -> Any:  # noqa: N802 (the names are those of the base class)
        gt = self._gts[imgId, catId]
        dt = sorted(self._dts[imgId, catId], key=lambda d: -d["score"])[: self.params.maxDets[-1]]
        if not gt or not dt:
            return []
        a, b = corner_boxes(dt), corner_boxes(gt)
        iou = rotated_iou(a, b)  # [detections, truth]
        # COCO's overlap with a crowd is intersection / area of the detection; intersection = IoU · (a + b) / (1 + IoU).
        area_a, area_b = area(a)[:, None], area(b)[None, :]
        of_detection = iou * (area_a + area_b) / (1 + iou) / area_a.clamp(min=1e-9)
        crowd = torch.tensor([bool(g["iscrowd"]) for g in gt])
        return torch.where(crowd[None, :], of_detection, iou).numpy()


def corner_boxes(entries: Sequence[dict[str, Any]]) -> torch.Tensor:
    """The boxes of COCO entries as float64 [n, 5] (x1, y1, x2, y2, theta), inclusive corners (see boxes.py)."""
    return coco_to_corners(torch.tensor([(*e["bbox"], 0.0)[:5] for e in entries], dtype=torch.float64))


def coco_index(truth: dict[str, Any], entries: Iterable[dict[str, Any]], box_values: int, index: type = COCO) -> Any:
    """pycocotools' index of annotations or results, made of copies with the fields that it needs.

    Entries are numbered from 1, as pycocotools takes a ground truth with id 0 for unmatched. An "area" that is not a
    number, such as null, is replaced by that of the box.

    Args:
        truth: gives the images and categories.
        entries: annotations or results.
        box_values: 4 for boxes without an angle, 5 for boxes with one.
        index: the class of the index, pycocotools' or one that is made like it.
    """
    coco = index()
    copies = []
    for number, entry in enumerate(entries, 1):
        box = [*entry["bbox"], 0.0][:box_values]
        stated = entry.get("area")
        size = stated if is_number(stated) and math.isfinite(stated) else box[2] * box[3]
        copies.append({**entry, "id": number, "bbox": box, "area": size, "iscrowd": int(bool(entry.get("iscrowd")))})
    coco.dataset = {"images": truth["images"], "categories": truth["categories"], "annotations": copies}
    coco.createIndex()
    return coco


def add_missing_masks(indices: Sequence[COCO]) -> None:
    """Gives entries without a mask the polygon of their box, and images without a size one that fits all polygons."""
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
                "width": own if is_mask_side(own := image.get("width")) else math.ceil(extent[i][0]),
                "height": own if is_mask_side(own := image.get("height")) else math.ceil(extent[i][1]),
            }
            for i, image in coco.imgs.items()
        }


def class_metrics(coco_eval: COCOeval, gt: COCO) -> tuple[ClassMetrics, ...]:
    """AP and AP50 of each category, over all object sizes, with at most 100 detections per image."""
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
    """Mean of precisions [IoU, recall] of one category, -1 where it has no objects."""
    known = precision[precision > -1]
    return float(known.mean()) if known.size else -1.0


def load_truth(path: str, results: Any, images: str | Sequence[str] | None = None) -> dict[str, Any]:
    """The content of annotations; YOLO's four corners are rotated boxes if a result is one, or if they look like it."""
    boxes = [entry.get("bbox") for entry in results if isinstance(entry, dict)] if isinstance(results, list) else []
    rotated = any(isinstance(box, list) and len(box) == 5 for box in boxes)
    return load_annotations(path, images, rotated=rotated or None).content


def read_detections(path: str) -> list[dict[str, Any]]:
    """The COCO results in a file: a list, or (from ODTK 0.2) a dictionary with that list under "annotations"; a Parquet
    file of `odtk infer`, or the folder with the shards of a run that has not ended.

    What is in the list is not checked (see check_detections).

    Raises:
        OdtkError: the file cannot be read, is not JSON, or is not Parquet of odtk's.
    """
    if os.path.isdir(path) or path.endswith(SUFFIX):
        return read_results(path)
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
    except OSError as error:
        raise OdtkError(f"Cannot read the detections {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise OdtkError(f"{path} is not valid JSON: {error}.") from error
    values = parse_json(text, path)
    return values.get("annotations", values) if isinstance(values, dict) else values


def filter_categories(detections: list[dict[str, Any]], truth: dict[str, Any]) -> list[dict[str, Any]]:
    """The detections whose category the annotations have: a model may know more categories than are scored."""
    ids = {category["id"] for category in categories_of(truth)}
    return [d for d in detections if d["category_id"] in ids]


def check_detections(detections: Any, truth: dict[str, Any], file: str = "", *, segmentation: bool = False) -> None:
    """Checks that detections can be scored against a ground truth.

    Args:
        detections: what a results file holds.
        truth: as prepare_ground_truth returns it; only the ids of its images and categories are used.
        file: the name of the results file for error messages.
        segmentation: masks are scored, so they are checked too.

    Raises:
        OdtkError: names the first detection that cannot be scored.
    """
    of = f" of {file}" if file else ""
    if not isinstance(detections, list):
        raise OdtkError(
            f"The detections{of} are not a list: COCO results are [{{image_id, category_id, bbox, score}}, …]."
        )
    image_ids, category_ids = ({entry["id"] for entry in truth[key]} for key in ("images", "categories"))
    for i, entry in enumerate(detections):
        fault = entry_fault(entry, image_ids, category_ids, segmentation=segmentation)
        if not fault and not all(math.isfinite(v) for v in entry["bbox"]):
            fault = f"its bbox is not finite: {entry['bbox']}"
        if not fault and not (is_number(entry.get("score")) and math.isfinite(entry["score"])):
            fault = "it has no finite 'score'"
        if fault:
            raise OdtkError(f"Detection {i}{of}: {fault}.")


def print_metrics(metrics: Metrics) -> None:
    """Prints the twelve figures and the table of classes."""
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, emoji=False)  # names are names, whatever is in them
    if not console.is_terminal:
        console = Console(markup=False, emoji=False, width=120)  # a file or a pipe does not limit the width
    figures = Table(title="COCO figures", title_justify="left")
    for name in STATS:
        figures.add_column(name, justify="right")
    figures.add_row(*(format_figure(s) for s in metrics.stats))
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
        figures_of_class = (format_figure(c.ap), format_figure(c.ap50), str(c.images), str(c.instances))
        table.add_row(str(c.id), printable(c.name), *figures_of_class)
    console.print(table)


def format_figure(value: float) -> str:
    """A figure with three decimals; a dash where there was nothing to find."""
    return "–" if value < 0 else f"{value:.3f}"
