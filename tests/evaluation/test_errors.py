"""The kinds of error on planted cases, what each costs against detections that were really put right, confusion."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

from odtk.evaluation.confusion import confusion
from odtk.evaluation.errors import (
    BACKGROUND,
    BOTH,
    CLASS,
    DUPLICATE,
    KINDS,
    LOCATION,
    MISSED,
    RIGHT,
    Judgments,
    costs,
    judge,
    matches_without,
)
from odtk.evaluation.evaluate import run_cocoeval

CAT, DOG, COW = 3, 7, 9  # ids with gaps


def truth_of(boxes: list[tuple[int, int, list[float]]], images: int = 2) -> dict[str, Any]:
    """COCO annotations of (image, category, box)."""
    return {
        "images": [{"id": i, "width": 100, "height": 100} for i in range(1, images + 1)],
        "categories": [{"id": id, "name": str(id)} for id in (CAT, DOG, COW)],
        "annotations": [
            {"id": 10 * i, "image_id": image, "category_id": category, "bbox": box, "area": box[2] * box[3]}
            for i, (image, category, box) in enumerate(boxes, 1)
        ],
    }


def found(image: int, category: int, box: list[float], score: float) -> dict[str, Any]:
    return {"image_id": image, "category_id": category, "bbox": box, "score": score}


A, B, C, D = [0.0, 0.0, 20.0, 20.0], [40.0, 40.0, 20.0, 20.0], [70.0, 0.0, 20.0, 20.0], [0.0, 70.0, 20.0, 20.0]
HALF_B = [50.0, 40.0, 20.0, 20.0]  # IoU 1/3 with B
PLANTED = (
    truth_of([(1, CAT, A), (1, DOG, B), (1, CAT, C), (2, COW, A), (2, DOG, D)]),
    [
        found(1, CAT, A, 0.9),
        found(1, CAT, A, 0.8),  # doubled
        found(1, DOG, HALF_B, 0.7),  # badly placed
        found(1, COW, HALF_B, 0.65),  # both
        found(1, DOG, C, 0.6),  # wrong class
        found(2, CAT, B, 0.5),  # background
        found(2, COW, A, 0.4),
    ],  # the dog in image 2 is missed
)


def judged(truth: dict[str, Any], detections: list[dict[str, Any]], **more: Any) -> Judgments:
    return judge(run_cocoeval(detections, truth, **more))


def test_each_kind_is_told() -> None:
    truth, detections = PLANTED
    result = judged(truth, detections)
    kinds = dict(zip(result.score.round(2).tolist(), result.kind.tolist(), strict=True))
    assert kinds == {0.9: RIGHT, 0.8: DUPLICATE, 0.7: LOCATION, 0.65: BOTH, 0.6: CLASS, 0.5: BACKGROUND, 0.4: RIGHT}
    entries = [truth["annotations"][g] for g in result.object[result.missed]]
    assert [(entry["image_id"], entry["bbox"]) for entry in entries] == [(2, D)]
    assert result.found.sum() == 2
    pairs = zip(result.score, result.target, strict=True)
    about = {round(s, 2): truth["annotations"][result.object[t]]["bbox"] for s, t in pairs}
    assert about[0.7] == B and about[0.6] == C and about[0.4] == A


def test_thresholds_are_those_of_the_paper() -> None:
    """IoU of exactly 0.5 is right, of exactly 0.1 badly placed; a little less is the next kind."""
    truth = truth_of([(1, CAT, [0.0, 0.0, 30.0, 10.0])], images=1)
    for shift, kind in ((10.0, RIGHT), (10.01, LOCATION), (24.54, LOCATION), (24.6, BACKGROUND)):
        result = judged(truth, [found(1, CAT, [shift, 0.0, 30.0, 10.0], 0.9)])
        assert result.kind.tolist() == [kind], shift


def test_crowds_are_neither_objects_nor_errors() -> None:
    truth, detections = copy.deepcopy(PLANTED)
    truth["annotations"][3]["iscrowd"] = 1
    truth["annotations"][3]["category_id"] = COW
    result = judged(truth, [*detections, found(2, COW, [1.0, 1.0, 18.0, 18.0], 0.3)])
    ignored = result.score[result.ignored]
    assert sorted(ignored.round(2).tolist()) == [0.3, 0.4] and len(result.found) == 4
    assert (result.kind[result.ignored] == RIGHT).all()
    assert confusion(result, 0.2).counts[2].sum() == 0  # no cow is an object
    assert matches_without(result, RIGHT).categories[2].objects.sum() == 0


def random_set(seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Twelve images with objects of three categories that overlap, and detections with every kind of error."""
    draw = np.random.default_rng(seed)
    boxes = [
        (image, int(draw.choice([CAT, DOG, COW])), [float(v) for v in draw.uniform(5, 40, 4)])
        for image in range(1, 13)
        for _ in range(draw.integers(0, 7))
    ]
    truth, detections = truth_of(boxes, images=12), []
    for image, category, box in boxes:
        for _ in range(int(draw.choice([0, 1, 2, 3], p=[0.2, 0.4, 0.25, 0.15]))):
            moved = [v + float(draw.normal()) * float(draw.choice([1.0, 6.0])) for v in box]
            said = category if draw.random() < 0.7 else int(draw.choice([CAT, DOG, COW]))
            moved[2:] = [max(2.0, v) for v in moved[2:]]
            detections.append(found(image, said, moved, float(draw.random())))
    detections += [found(i, CAT, [70.0, 70.0, 20.0, 20.0], float(draw.random())) for i in range(1, 13, 3)]
    return truth, detections


def put_right(
    truth: dict[str, Any], detections: list[dict[str, Any]], result: Judgments, kind: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The set with the errors of one kind really put right, one detection after the other, for pycocotools."""
    fixed_truth = copy.deepcopy(truth)
    if kind == MISSED:
        gone = {int(g) for g in result.object[result.missed]}
        fixed_truth["annotations"] = [a for i, a in enumerate(truth["annotations"]) if i not in gone]
        return fixed_truth, detections
    removed: set[int] = set()
    kept = copy.deepcopy(detections)
    done = {int(t) for t, k in zip(result.target, result.kind, strict=True) if k == RIGHT}
    for d in np.argsort(-result.score, kind="stable"):
        if result.kind[d] != kind:
            continue
        place, target = int(result.detection[d]), int(result.target[d])
        if kind in (CLASS, LOCATION) and target not in done:
            done.add(target)
            entry = truth["annotations"][result.object[target]]
            kept[place].update(bbox=list(entry["bbox"]), category_id=entry["category_id"])
        else:
            removed.add(place)
    return fixed_truth, [d for i, d in enumerate(kept) if i not in removed]


@pytest.mark.parametrize("seed", range(4))
def test_a_kind_costs_what_pycocotools_says_without_it(seed: int) -> None:
    truth, detections = random_set(seed)
    result = judged(truth, detections)
    base, cost = costs(result)
    before = 100 * run_cocoeval(detections, truth).stats[1]
    assert base.value == pytest.approx(before, abs=1e-9) and base.low < base.value < base.high
    gains = []
    for kind in KINDS:
        fixed_truth, fixed = put_right(truth, detections, result, kind)
        gain = 100 * run_cocoeval(fixed, fixed_truth).stats[1] - before
        assert cost[kind].points.value == pytest.approx(gain, abs=1e-9), KINDS[kind][0]
        assert cost[kind].count > 0
        gains.append(gain)
    assert max(gains) > 1 and min(gains) > -1e-9


@pytest.mark.parametrize("seed", range(4))
def test_nothing_is_lost_or_counted_twice_in_the_confusion_matrix(seed: int) -> None:
    truth, detections = random_set(seed)
    result = judged(truth, detections)
    for threshold in (-1.0, 0.5):
        counts = confusion(result, threshold).counts
        assert counts[:3].sum() == len(truth["annotations"]) and counts[3, 3] == 0
        assert counts[:, :3].sum() == sum(d["score"] > threshold for d in detections)
        right = (result.kind == RIGHT) & (result.score > threshold)
        assert np.diag(counts)[:3].tolist() == [int((right & (result.category == k)).sum()) for k in range(3)]


def test_the_confusion_matrix_of_the_planted_set() -> None:
    expected = [[1, 1, 0, 0], [0, 0, 0, 2], [0, 0, 1, 0], [2, 1, 1, 0]]  # cat, dog, cow, background
    assert confusion(judged(*PLANTED), 0.0).counts.tolist() == expected
    above = [[1, 1, 0, 0], [0, 0, 0, 2], [0, 0, 0, 1], [1, 1, 1, 0]]
    assert confusion(judged(*PLANTED), 0.55).counts.tolist() == above


def test_rotated_boxes_overlap_as_they_are_turned() -> None:
    """A long box and the same one turned by 90° share a ninth: badly placed, where upright boxes would be equal."""
    truth = truth_of([(1, CAT, [20.0, 40.0, 50.0, 10.0, 0.0])], images=1)
    detections = [found(1, CAT, [20.0, 40.0, 50.0, 10.0, np.pi / 2], 0.9)]
    assert judged(truth, detections).kind.tolist() == [LOCATION]
    assert judged(truth, detections, rotated=False).kind.tolist() == [RIGHT]


def test_masks_overlap_as_masks() -> None:
    truth = truth_of([(1, CAT, [0.0, 0.0, 40.0, 40.0])], images=1)
    truth["annotations"][0]["segmentation"] = [[0, 0, 40, 0, 0, 40]]
    lower = {**found(1, CAT, [0.0, 0.0, 40.0, 40.0], 0.9), "segmentation": [[40, 0, 40, 40, 0, 40]]}
    assert judged(truth, [lower], segmentation=True).kind.tolist() == [BACKGROUND]
    assert judged(truth, [lower]).kind.tolist() == [RIGHT]


def test_without_detections_or_objects() -> None:
    truth, detections = PLANTED
    nothing = judged(truth, [])
    assert nothing.missed.all() and len(nothing.missed) == 5 and costs(nothing)[0].value == 0
    empty = judged({**truth, "annotations": []}, detections)
    assert (empty.kind == BACKGROUND).all() and np.isnan(costs(empty)[0].value)
    assert confusion(empty, 0.0).counts[3].tolist() == [3, 2, 2, 0]
