"""Which errors cost how much AP: each wrong detection and each object that was not found gets one of six kinds.

Source: D. Bolya, S. Foley, J. Hays and J. Hoffman, TIDE: A General Toolbox for Identifying Object Detection Errors,
2020, arXiv 2008.08115, sections 2.2 and 2.3. AP is that at IoU 0.5 here, as in the paper. What a kind costs is the AP
that would be gained if its errors alone were put right, so the costs do not add up to what is missing from 100.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from .bootstrap import RESAMPLES, CategoryMatches, Interval, Matches, average_precision, interval, resamples

FOREGROUND_IOU = 0.5  # a detection is right if it overlaps an object of its category by so much (the paper's t_f)
BACKGROUND_IOU = 0.1  # a detection that overlaps no object by so much lies on background (t_b)
RIGHT, CLASS, LOCATION, BOTH, DUPLICATE, BACKGROUND, MISSED = range(7)
KINDS = {
    CLASS: ("wrong class", "overlaps an object of another class by IoU 0.5 or more"),
    LOCATION: ("badly placed", "overlaps an object of its class by IoU 0.1 to 0.5 only"),
    BOTH: ("wrong class and badly placed", "overlaps an object of another class by IoU 0.1 to 0.5 only"),
    DUPLICATE: ("doubled", "the object already has a detection with a higher score"),
    BACKGROUND: ("background", "overlaps no object by IoU 0.1"),
    MISSED: ("missed", "an object without a detection, not even one of a wrong class or badly placed"),
}


@dataclass(frozen=True)
class Judgments:
    """What became of every detection and every object of a set, at IoU 0.5, with COCO's rules of matching.

    Objects are annotations that are no crowds. Categories and images are given as indices of params.catIds and
    params.imgIds. Of D detections (at most 100 per image and category, as COCO counts them) and G objects:

    Attributes:
        images, categories: how many there are.
        recalls: [R] recalls at which precision is read.
        detection, object: [D], [G] int, the place among the annotations of cocoDt and of cocoGt.
        image, category: [D] int, of each detection.
        score: [D].
        kind: [D] int, RIGHT or the kind of the error.
        ignored: [D] bool, the detection counts neither as right nor as wrong (crowds).
        target: [D] int, the object that a detection found, or that a CLASS or LOCATION error is about, as its index in
            ``object``; else −1.
        object_image, object_category: [G] int.
        found: [G] bool, a detection of its category is right.
        missed: [G] bool, it was not found, and no CLASS or LOCATION error is about it.
        overlaps: [P, 2] int and overlap: [P], the pairs (detection, object) with IoU of 0.5 or more, of any categories.
    """

    images: int
    categories: int
    recalls: np.ndarray
    detection: np.ndarray
    image: np.ndarray
    category: np.ndarray
    score: np.ndarray
    kind: np.ndarray
    ignored: np.ndarray
    target: np.ndarray
    object: np.ndarray
    object_image: np.ndarray
    object_category: np.ndarray
    found: np.ndarray
    missed: np.ndarray
    overlaps: np.ndarray
    overlap: np.ndarray


@dataclass(frozen=True)
class Cost:
    """What one kind of error costs.

    Attributes:
        count: number of errors.
        points: of AP50 (0…100) that would be gained without them.
    """

    count: int
    points: Interval


def judge(coco_eval: COCOeval) -> Judgments:
    """The judgments of an evaluation (evaluate.run_cocoeval), whose first IoU threshold is 0.5."""
    parts: dict[str, list[np.ndarray]] = {name: [] for name in Judgments.__dataclass_fields__}
    detections = objects = 0
    for found in judge_images(coco_eval):
        found["target"] = np.where(found["target"] >= 0, found["target"] + objects, -1)
        found["overlaps"] = found["overlaps"] + [detections, objects]
        detections += len(found["score"])
        objects += len(found["found"])
        for name, values in found.items():
            parts[name].append(values)
    whole = {"ignored": bool, "found": bool, "missed": bool, "score": float, "overlap": float}
    arrays = {
        name: np.concatenate(values) if values else np.zeros((0, 2) if name == "overlaps" else 0, whole.get(name, int))
        for name, values in parts.items()
        if name not in ("images", "categories", "recalls")
    }
    params = coco_eval.params
    return Judgments(len(params.imgIds), len(params.catIds), np.asarray(params.recThrs), **arrays)


def judge_images(coco_eval: COCOeval) -> Iterator[dict[str, np.ndarray]]:
    """The judgments of each image that has a detection or an object; numbers of objects count from 0 in each image."""
    params = coco_eval.params
    images, categories = len(params.imgIds), list(params.catIds)
    pooled = without_categories(coco_eval)
    category_of = {id: k for k, id in enumerate(categories)}
    for i, image in enumerate(params.imgIds):
        entries = [coco_eval.evalImgs[k * len(params.areaRng) * images + i] for k in range(len(categories))]
        counted: dict[int, tuple[int, bool]] = {}  # id of each detection that counts → the object's, and if ignored
        for entry in entries:
            if entry is None:
                continue
            matched, skipped = entry["dtMatches"][0].astype(int).tolist(), entry["dtIgnore"][0].astype(bool).tolist()
            counted.update(zip(entry["dtIds"], zip(matched, skipped, strict=True), strict=True))
        all_objects = pooled._gts[image, 0]
        all_detections = sorted(pooled._dts[image, 0], key=lambda d: -d["score"])
        kept_objects = [g for g, entry in enumerate(all_objects) if not entry["ignore"]]
        kept = [d for d, entry in enumerate(all_detections) if entry["id"] in counted]
        if not kept and not kept_objects:
            continue
        iou = np.zeros((len(kept), len(kept_objects)))
        if iou.size:
            iou = np.asarray(pooled.computeIoU(image, 0), float)[kept][:, kept_objects]
        own = [all_detections[d] for d in kept]
        truth = [all_objects[g] for g in kept_objects]
        index = {g["id"]: number for number, g in enumerate(truth)}
        ignored = np.array([counted[d["id"]][1] for d in own], bool)
        hit = np.array([index.get(counted[d["id"]][0], -1) for d in own], int)  # a crowd has no index
        right = (hit >= 0) & ~ignored
        category = np.array([category_of[d["own_category"]] for d in own], int)
        object_category = np.array([category_of[g["own_category"]] for g in truth], int)
        kind, target = kinds_of(iou, category[:, None] == object_category[None, :], right | ignored)
        target = np.where(right, hit, target)
        numbers = np.arange(len(truth))
        found = np.isin(numbers, hit[right])
        pairs = np.argwhere(iou >= FOREGROUND_IOU).reshape(-1, 2)
        yield {
            "detection": np.array([d["id"] - 1 for d in own], int),
            "image": np.full(len(own), i),
            "category": category,
            "score": np.array([d["score"] for d in own], float),
            "kind": kind,
            "ignored": ignored,
            "target": target,
            "object": np.array([g["id"] - 1 for g in truth], int),
            "object_image": np.full(len(truth), i),
            "object_category": object_category,
            "found": found,
            "missed": ~np.isin(numbers, target),
            "overlaps": pairs,
            "overlap": iou[pairs[:, 0], pairs[:, 1]],
        }


def without_categories(coco_eval: COCOeval) -> Any:
    """An evaluation of the same entries as if all were of one category, 0, so that it overlaps all with all."""
    indices, categories = [], set(coco_eval.params.catIds)
    for coco in (coco_eval.cocoGt, coco_eval.cocoDt):
        pooled = COCO()
        entries = [{**e, "own_category": e["category_id"], "category_id": 0} for e in coco.dataset["annotations"]]
        known = [e for e in entries if e["own_category"] in categories]
        pooled.dataset = {**coco.dataset, "annotations": known, "categories": [{"id": 0, "name": ""}]}
        pooled.imgs = coco.imgs
        for entry in known:
            pooled.anns[entry["id"]] = entry
            pooled.imgToAnns[entry["image_id"]].append(entry)
        pooled.cats = {0: {"id": 0}}
        indices.append(pooled)
    evaluation: Any = type(coco_eval)(*indices, coco_eval.params.iouType)
    evaluation.params = copy.copy(coco_eval.params)
    evaluation.params.catIds = [0]
    evaluation.params.maxDets = [len(coco_eval.cocoDt.dataset["annotations"])]
    evaluation._prepare()
    return evaluation


def kinds_of(iou: np.ndarray, same: np.ndarray, fine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The kind of each detection of an image, and the object that the error is about, or −1 (see Judgments).

    Where a detection fits several kinds it is, in this order: badly placed, of a wrong class, doubled.

    Args:
        iou: [D, G] of each detection with each object.
        same: [D, G] bool, both have the same category.
        fine: [D] bool, the detection is right or ignored.
    """
    kind, target = np.full(len(iou), RIGHT), np.full(len(iou), -1)
    if not iou.shape[1]:
        kind[~fine] = BACKGROUND
        return kind, target
    of_class, of_others = np.where(same, iou, 0.0), np.where(same, 0.0, iou)
    best_of_class, best_of_others = of_class.max(axis=1), of_others.max(axis=1)
    placed = best_of_class >= FOREGROUND_IOU
    kind = np.select(
        [
            fine,
            (best_of_class >= BACKGROUND_IOU) & ~placed,
            best_of_others >= FOREGROUND_IOU,
            placed,
            iou.max(axis=1) < BACKGROUND_IOU,
        ],
        [RIGHT, LOCATION, CLASS, DUPLICATE, BACKGROUND],
        BOTH,
    )
    target = np.where(kind == LOCATION, of_class.argmax(axis=1), target)
    return kind, np.where(kind == CLASS, of_others.argmax(axis=1), target)


def costs(judged: Judgments, number: int = RESAMPLES) -> tuple[Interval, dict[int, Cost]]:
    """AP50 in points, and what each kind of error costs, with their bootstrap intervals of ``number`` resamples."""
    counts = resamples(judged.images, number)
    base = 100 * average_precision(matches_without(judged, RIGHT), counts)
    found = {}
    for kind in KINDS:
        gained = 100 * average_precision(matches_without(judged, kind), counts) - base
        made = judged.missed if kind == MISSED else judged.kind == kind
        found[kind] = Cost(int(made.sum()), interval(gained))
    return interval(base), found


def matches_without(judged: Judgments, kind: int) -> Matches:
    """The matches at IoU 0.5, had the detector not made the errors of one kind (the paper's oracles); RIGHT: as it is.

    A wrong class or place is put right. Where that gives an object a second detection, and with all other kinds, the
    wrong detection is taken away. A missed object is one less to find.
    """
    right = (judged.kind == RIGHT) & ~judged.ignored
    ignored, category = judged.ignored.copy(), judged.category.copy()
    objects = np.zeros((judged.categories, judged.images), int)
    to_find = ~judged.missed if kind == MISSED else np.ones(len(judged.found), bool)
    np.add.at(objects, (judged.object_category[to_find], judged.object_image[to_find]), 1)
    if kind not in (RIGHT, MISSED):
        wrong = np.flatnonzero(judged.kind == kind)
        ignored[wrong] = True
        if kind in (CLASS, LOCATION):
            wrong = wrong[~judged.found[judged.target[wrong]]]
            wrong = wrong[np.argsort(-judged.score[wrong], kind="stable")]
            _, first = np.unique(judged.target[wrong], return_index=True)  # the highest score of each object
            fixed = wrong[first]
            right[fixed], ignored[fixed] = True, False
            category[fixed] = judged.object_category[judged.target[fixed]]
    order = np.argsort(-judged.score, kind="stable")
    entries = []
    for k in range(judged.categories):
        own = order[category[order] == k]
        entries.append(CategoryMatches(judged.image[own], right[own][None], ignored[own][None], objects[k]))
    return Matches(judged.images, judged.recalls, tuple(entries))
