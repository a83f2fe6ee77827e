"""The threshold of the best F1, found by trying every one, and what is drawn without it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from odtk.evaluation.operating_point import BEST_PER_IMAGE, best_f1, calibration, choose, threshold_curve


def truth_of(boxes: list[tuple[int, int, list[float]]], **more: Any) -> dict[str, Any]:
    """COCO annotations of (image, category, box)."""
    return {
        "images": [{"id": i, "width": 100, "height": 100} for i in (1, 2)],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
        "annotations": [
            {"id": i, "image_id": image, "category_id": category, "bbox": box, "iscrowd": 0, **more}
            for i, (image, category, box) in enumerate(boxes, 1)
        ],
    }


def found(image: int, category: int, box: list[float], score: float) -> dict[str, Any]:
    return {"image_id": image, "category_id": category, "bbox": box, "score": score}


A, B, C = [0.0, 0.0, 20.0, 20.0], [40.0, 40.0, 20.0, 20.0], [70.0, 0.0, 20.0, 20.0]


def test_the_threshold_lies_between_the_last_that_helps_and_the_next() -> None:
    truth = truth_of([(1, 1, A), (1, 2, B), (2, 1, A)])
    detections = [
        found(1, 1, A, 0.9),
        found(1, 1, A, 0.85),  # a second one of the same object is wrong
        found(1, 2, B, 0.8),
        found(2, 1, A, 0.6),  # until here: 3 right of 4, 3 objects: F1 6/7
        found(2, 1, C, 0.4),
        found(2, 2, A, 0.3),  # another category
    ]
    point = best_f1(detections, truth)
    assert point is not None and point.threshold == pytest.approx(0.5) and point.f1 == pytest.approx(6 / 7)


def test_it_is_the_best_of_all_thresholds() -> None:
    random = np.random.default_rng(0)
    boxes = [(1 + i % 2, 1 + i % 2, [float(5 * i), 10.0, 4.0, 4.0]) for i in range(18)]
    truth = truth_of(boxes)
    detections = [found(i, c, b, round(float(random.uniform(0.2, 1)), 1)) for i, c, b in boxes]
    detections += [found(i, c, [b[0], 50.0, 4.0, 4.0], round(float(random.uniform(0, 0.8)), 1)) for i, c, b in boxes]
    right = {id(d): d["bbox"][1] == 10 for d in detections}

    def f1(threshold: float) -> float:
        kept = [right[id(d)] for d in detections if d["score"] > threshold]
        return 2 * sum(kept) / (len(kept) + len(boxes))

    point = best_f1(detections, truth)
    assert point is not None and point.f1 == pytest.approx(max(f1(t / 1000) for t in range(1000)))
    assert f1(point.threshold) == pytest.approx(point.f1)


def test_rotated_boxes_are_matched_as_such() -> None:
    turned = [30.0, 45.0, 40.0, 10.0, 0.8]
    truth = truth_of([(1, 1, turned)])
    upright, right = found(1, 1, [*turned[:4], 0.0], 0.9), found(1, 1, turned, 0.5)
    point = best_f1([upright, right], truth)
    assert point is not None and point.f1 == pytest.approx(2 / 3) and point.threshold == pytest.approx(0.25)


def test_crowds_do_not_count() -> None:
    truth = truth_of([(1, 1, A)])
    truth["annotations"].append({"id": 2, "image_id": 1, "category_id": 1, "bbox": B, "iscrowd": 1, "area": 400})
    point = best_f1([found(1, 1, B, 0.9), found(1, 1, A, 0.5)], truth)
    assert point is not None and point.f1 == 1.0


def test_nothing_right_gives_no_threshold() -> None:
    assert best_f1([found(1, 1, C, 0.9)], truth_of([(1, 1, A)])) is None
    assert best_f1([], truth_of([(1, 1, A)])) is None
    assert best_f1([found(1, 1, A, 0.9)], truth_of([])) is None


def test_what_is_drawn_and_how_it_is_said() -> None:
    truth = truth_of([(1, 1, A)])
    detections = [found(1, 1, A, 0.9), found(1, 1, C, 0.4), found(2, 1, C, 0.3)]
    shown, words = choose(detections, truth, None)
    assert shown == detections[:1] and words == "detections that score above 0.650, which gives the best F1 (1.000)"
    shown, words = choose(detections, truth, 0.3)
    assert shown == detections[:2] and words == "detections that score above 0.3"
    many = [found(i, 1, A, 0.1 + k / 100) for i in (1, 2) for k in range(BEST_PER_IMAGE + 5)]
    for without in (None, truth_of([])):
        shown, words = choose(many, without, None)
        assert len(shown) == 2 * BEST_PER_IMAGE and min(d["score"] for d in shown) == pytest.approx(0.15)
        assert words == "the best 20 detections of each image"
    other = found(1, 99, A, 0.99)  # of a category that only the model knows: it is drawn, but does not count
    assert choose([other, *detections], truth, None)[0] == [other, detections[0]]


def test_every_threshold_has_its_precision_and_recall() -> None:
    """Against counting anew at each threshold; equal scores are above it together."""
    draw = np.random.default_rng(3)
    scores = draw.integers(1, 20, 60) / 20
    right = draw.random(60) < scores
    curve = threshold_curve(scores, right, 70)
    assert len(curve.thresholds) == len(set(scores.tolist())) and (np.diff(curve.thresholds) < 0).all()
    for i, threshold in enumerate(curve.thresholds):
        above = scores > threshold
        precision, recall = right[above].mean(), right[above].sum() / 70
        assert (curve.precision[i], curve.recall[i]) == pytest.approx((precision, recall))
        assert curve.f1[i] == pytest.approx(2 * precision * recall / (precision + recall) if precision else 0)
    nothing = threshold_curve(np.zeros(0), np.zeros(0, bool), 5)
    assert len(nothing.thresholds) == 0 and nothing.best is None


def test_scores_that_are_probabilities_are_calibrated() -> None:
    draw = np.random.default_rng(4)
    scores = draw.random(20000)
    bins, error = calibration(scores, draw.random(20000) < scores)
    assert error < 0.02 and sum(b.count for b in bins) == 20000
    assert all(abs(b.score - (b.low + b.high) / 2) < 0.01 for b in bins)
    bins, error = calibration(np.array([0.95, 1.0, 0.15]), np.array([True, False, False]))
    assert (bins[9].count, bins[9].right, bins[1].right, bins[5].count) == (2, 0.5, 0.0, 0)
    assert error == pytest.approx((2 * (0.975 - 0.5) + 0.15) / 3)
