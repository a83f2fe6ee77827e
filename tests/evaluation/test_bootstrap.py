"""The paired bootstrap: AP of resamples against pycocotools, its interval, and the verdicts."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

from odtk.evaluation.bootstrap import Comparison, Matches, average_precision, compare, interval, matches_of, resamples
from odtk.evaluation.evaluate import run_cocoeval

IMAGES = 12


def dataset(seed: int, images: int = IMAGES) -> dict[str, Any]:
    """Images of 100×100 pixels with up to six boxes of three categories, the last of them rare; one box is a crowd."""
    generator = np.random.default_rng(seed)
    annotations: list[dict[str, Any]] = []
    for image in range(images):
        for _ in range(generator.integers(0, 7)):
            x, y, w, h = (float(v) for v in generator.uniform(5, 40, 4))
            category = int(generator.choice([1, 2, 7], p=[0.6, 0.35, 0.05]))
            entry = {"id": len(annotations) + 1, "image_id": image, "category_id": category, "bbox": [x, y, w, h]}
            annotations.append({**entry, "area": w * h, "iscrowd": int(len(annotations) == 4)})
    return {
        "images": [{"id": i, "width": 100, "height": 100} for i in range(images)],
        "categories": [{"id": i, "name": str(i)} for i in (1, 2, 7)],
        "annotations": annotations,
    }


def detections(truth: dict[str, Any], seed: int, shift: float, misses: float = 0.2) -> list[dict[str, Any]]:
    """Most objects, moved by some pixels, and boxes that are wrong; no two scores are equal."""
    generator = np.random.default_rng(seed)
    found = []
    for entry in truth["annotations"]:
        for chance in (1 - misses, 0.3):  # the second time a duplicate
            if generator.random() < chance:
                box = [v + shift * float(generator.normal()) for v in entry["bbox"]]
                found.append({**entry, "bbox": box, "score": float(generator.random())})
    for image in truth["images"]:
        box = [float(v) for v in generator.uniform(5, 40, 4)]
        found.append({"image_id": image["id"], "category_id": 1, "bbox": box, "score": float(generator.random())})
    return [{key: d[key] for key in ("image_id", "category_id", "bbox", "score")} for d in found]


def matches(truth: dict[str, Any], found: list[dict[str, Any]]) -> Matches:
    return matches_of(run_cocoeval(found, truth))


def repeated(truth: dict[str, Any], found: list[dict[str, Any]], counts: np.ndarray) -> float:
    """pycocotools' AP of a set in which each image is written as often as it was drawn."""
    drawn: dict[str, Any] = {"images": [], "categories": truth["categories"], "annotations": []}
    results: list[dict[str, Any]] = []
    for image, count in enumerate(counts):
        for _ in range(count):
            new = len(drawn["images"])
            drawn["images"].append({**truth["images"][image], "id": new})
            for entries, kept in ((truth["annotations"], drawn["annotations"]), (found, results)):
                for entry in entries:
                    if entry["image_id"] == image:
                        kept.append({**copy.deepcopy(entry), "id": len(kept) + 1, "image_id": new})
    return float(run_cocoeval(results, drawn).stats[0])


@pytest.mark.parametrize("seed", range(4))
def test_the_set_itself_has_pycocotools_ap(seed: int) -> None:
    truth = dataset(seed)
    found = detections(truth, seed, 2.0)
    expected = run_cocoeval(found, truth).stats[0]
    assert 0.05 < expected < 0.9
    found_ap = average_precision(matches(truth, found), np.ones((1, IMAGES), int))
    assert found_ap[0] == pytest.approx(expected, abs=1e-12)


def test_rotated_boxes_have_their_own_overlap() -> None:
    truth = dataset(0)
    found = detections(truth, 0, 2.0)
    for entry in (*truth["annotations"], *found):
        entry["bbox"] = [*entry["bbox"], 0.3 + 0.01 * entry["image_id"]]
    expected = run_cocoeval(found, truth).stats[0]
    upright = run_cocoeval(found, truth, rotated=False).stats[0]
    ap = average_precision(matches(truth, found), np.ones((1, IMAGES), int))[0]
    assert ap == pytest.approx(expected, abs=1e-12) != pytest.approx(upright, abs=1e-3)


def test_a_resample_has_the_ap_of_its_images_written_out() -> None:
    """Images drawn twice, images not drawn, and a category that a resample lacks."""
    truth = dataset(0)
    found = detections(truth, 0, 2.0)
    counts = np.random.default_rng(0).multinomial(IMAGES, np.full(IMAGES, 1 / IMAGES), size=12)
    rare = {entry["image_id"] for entry in truth["annotations"] if entry["category_id"] == 7}
    counts[0, list(rare)] = 0
    expected = [repeated(truth, found, row) for row in counts]
    np.testing.assert_allclose(average_precision(matches(truth, found), counts), expected, atol=1e-12)


def test_no_detections_and_no_objects() -> None:
    truth = dataset(0)
    assert average_precision(matches(truth, []), np.ones((2, IMAGES), int)).tolist() == [0, 0]
    empty = {**truth, "annotations": []}
    nothing = matches(empty, detections(truth, 0, 2.0))
    assert np.isnan(average_precision(nothing, np.ones((1, IMAGES), int))).all()
    assert compare(nothing, nothing, 0.3).verdict == "cannot tell"


def test_the_same_detections_lose_nothing_for_certain() -> None:
    truth = dataset(1)
    same = matches(truth, detections(truth, 1, 2.0))
    assert compare(same, same, 0.0) == Comparison(0.0, 0.0, 0.0, IMAGES, 0.0)
    assert compare(same, same, 0.0).verdict == "within"


def test_the_interval_is_as_wide_as_losses_on_other_sets_differ() -> None:
    """Two models on 24 sets of one kind: the spread of the losses is what one set's interval says."""
    losses, widths = [], []
    for seed in range(24):
        truth = dataset(seed, 20)
        good, bad = (matches(truth, detections(truth, seed, shift)) for shift in (1.5, 2.5))
        found = compare(good, bad, 0.3, seed=seed)
        assert found.low < found.drop < found.high and found.drop > 0
        losses.append(found.drop)
        widths.append(found.high - found.low)
    assert 0.7 < np.mean(widths) / (2 * 1.96 * np.std(losses)) < 1.4


def test_pairing_narrows_the_interval_and_a_seed_fixes_it() -> None:
    truth = dataset(2, 30)
    found = detections(truth, 2, 2.0)
    nearly = [{**d, "bbox": [d["bbox"][0] + 0.3, *d["bbox"][1:]]} for d in found]
    first, second, other = (matches(truth, each) for each in (found, nearly, detections(truth, 3, 2.0)))
    paired, apart = compare(first, second, 0.3), compare(first, other, 0.3)
    assert paired.high - paired.low < 0.6 * (apart.high - apart.low)
    assert compare(first, second, 0.3) == paired != compare(first, second, 0.3, seed=1)


@pytest.mark.parametrize(
    ("drop", "low", "high", "verdict", "passed", "needed"),
    [
        (0.1, -0.1, 0.3, "within", True, None),
        (-0.2, -0.9, 0.1, "within", True, None),
        (1.2, 0.4, 2.0, "beyond", False, None),
        (0.1, -0.5, 0.7, "cannot tell", True, 783),  # 87 · (0.6 / 0.2)²
        (0.54, -0.4, 1.5, "cannot tell", False, 1400),  # 87 · (0.94 / 0.24)² = 1335
        (0.3, -0.4, 1.5, "cannot tell", True, None),
    ],
)
def test_verdicts(drop: float, low: float, high: float, verdict: str, passed: bool, needed: int | None) -> None:
    found = Comparison(drop, low, high, 87, 0.3)
    assert (found.verdict, found.passed) == (verdict, passed)
    if verdict == "cannot tell":
        assert found.images_needed == (needed if needed is None else pytest.approx(needed, abs=10))


def test_a_handful_of_images_tells_nothing() -> None:
    truth = dataset(1, 4)
    same = matches(truth, detections(truth, 1, 2.0))
    found = compare(same, same, 0.3)
    assert found.verdict == "cannot tell" and found.passed and found.images_needed is None


def test_an_interval_is_as_wide_as_ap_on_other_sets_differs() -> None:
    """One model on 24 sets of one kind: the spread of AP is what one set's interval says. Few images have none."""
    values, widths = [], []
    for seed in range(24):
        truth = dataset(seed, 20)
        found = interval(average_precision(matches(truth, detections(truth, seed, 2.0)), resamples(20)))
        assert found.low <= found.value <= found.high
        values.append(found.value)
        widths.append(found.high - found.low)
    assert 0.5 < np.mean(widths) / (2 * 1.96 * np.std(values)) < 1.6
    few = interval(average_precision(matches(dataset(0, 4), []), resamples(4)))
    assert few.value == 0 and np.isnan([few.low, few.high]).all()


@pytest.mark.parametrize(("area", "stat"), [(1, 3), (2, 4), (3, 5)])
def test_each_object_size_has_pycocotools_ap(area: int, stat: int) -> None:
    truth = dataset(3)
    for entry in truth["annotations"]:
        scale = (0.5, 1, 3)[entry["id"] % 3]
        entry["bbox"] = [scale * v for v in entry["bbox"]]
        entry["area"] = entry["bbox"][2] * entry["bbox"][3]
    evaluation = run_cocoeval(detections(truth, 3, 1.0), truth)
    assert evaluation.stats[stat] > 0.05
    ap = average_precision(matches_of(evaluation, area), np.ones((1, IMAGES), int))
    assert ap[0] == pytest.approx(evaluation.stats[stat], abs=1e-12)
