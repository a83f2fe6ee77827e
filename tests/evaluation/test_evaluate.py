"""COCO figures against bare pycocotools and against counts made by hand; bad input."""

import contextlib
import copy
import io
import json
import math
import random
import sys
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from odtk.config import OdtkError
from odtk.data.coco import prepare_ground_truth
from odtk.evaluation.evaluate import STATS, evaluate, filter_categories, metrics_of, print_metrics, run_cocoeval
from odtk.settings import EvaluateSettings


def dataset(images: int = 6, seed: int = 0) -> dict:
    """Two categories with ids that are not contiguous, and a third without annotations; images of 200×300."""
    draw = random.Random(seed)
    truth: dict = {
        "images": [{"id": 10 + i, "file_name": f"{i}.jpg", "width": 300, "height": 200} for i in range(images)],
        "categories": [{"id": 3, "name": "cell"}, {"id": 7, "name": "plate"}, {"id": 90, "name": "never"}],
        "annotations": [],
    }
    for image in truth["images"]:
        for _ in range(draw.randint(0, 5)):
            w, h = draw.uniform(8, 120), draw.uniform(8, 120)
            box = [draw.uniform(0, 300 - w), draw.uniform(0, 200 - h), w, h]
            truth["annotations"].append(
                {
                    "id": len(truth["annotations"]),
                    "image_id": image["id"],
                    "category_id": draw.choice([3, 7]),
                    "bbox": box,
                    "area": w * h,
                    "iscrowd": 0,
                }
            )
    return truth


def results(truth: dict, *, shift: float = 0.0, seed: int = 1) -> list[dict]:
    """A detection per annotation, moved by up to `shift` pixels, and as many wrong ones."""
    draw = random.Random(seed)
    found = []
    for entry in truth["annotations"]:
        x, y, *rest = entry["bbox"]
        box = [x + draw.uniform(-shift, shift), y + draw.uniform(-shift, shift), *rest]
        found.append(
            {
                "image_id": entry["image_id"],
                "category_id": entry["category_id"],
                "bbox": box,
                "score": draw.uniform(0.3, 1),
            }
        )
        if shift:
            wrong = [draw.uniform(0, 200), draw.uniform(0, 100), 40, 40, *rest[2:]]
            found.append(found[-1] | {"bbox": wrong, "score": draw.uniform(0.1, 0.8)})
    return found


def with_angle(entries: list[dict], theta: float) -> list[dict]:
    return [entry | {"bbox": [*entry["bbox"], theta]} for entry in entries]


def test_figures_are_those_of_pycocotools() -> None:
    truth = dataset(20)
    for i, entry in enumerate(truth["annotations"]):
        entry["id"] = i + 1  # pycocotools itself fails on an id of 0
        entry["iscrowd"] = int(i % 9 == 0)
    found = results(truth, shift=8)
    with contextlib.redirect_stdout(io.StringIO()):
        gt = COCO()
        gt.dataset = json.loads(json.dumps(truth))
        gt.createIndex()
        peer = COCOeval(gt, gt.loadRes(json.loads(json.dumps(found))), "bbox")
        peer.evaluate()
        peer.accumulate()
        peer.summarize()
    metrics = evaluate(found, truth)
    assert 0.2 < metrics.ap < 0.9
    assert metrics.stats == pytest.approx(list(peer.stats), abs=1e-12)
    assert metrics.ap == metrics.stats[STATS.index("AP")] and metrics.ap50 == metrics.stats[STATS.index("AP50")]


def test_perfect_detections_although_an_annotation_has_id_0(capsys) -> None:
    truth = dataset()
    before = json.dumps(truth)
    metrics = evaluate(results(truth), truth)
    assert metrics.ap == pytest.approx(1) and metrics.ap50 == pytest.approx(1)
    assert json.dumps(truth) == before
    assert capsys.readouterr().out == ""


def test_table_per_class(capsys) -> None:
    truth = dataset()
    only_cells = [d for d in results(truth) if d["category_id"] == 3]
    metrics = evaluate(only_cells, truth)
    cell, plate, never = metrics.classes
    assert (cell.id, cell.name, cell.ap) == (3, "cell", pytest.approx(1))
    assert (plate.ap, plate.ap50) == (0, 0)
    assert (never.ap, never.ap50, never.images, never.instances) == (-1, -1, 0, 0)
    boxes = [a for a in truth["annotations"] if a["category_id"] == 3]
    assert (cell.instances, cell.images) == (len(boxes), len({a["image_id"] for a in boxes}))
    assert metrics.ap == pytest.approx(0.5)  # the category without annotations does not count
    print_metrics(metrics)
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("AP small", "cell", "plate", "never", "–", "1.000", "0.500"))


@pytest.mark.parametrize("segmentation", [False, True])
def test_no_detections_and_no_annotations(segmentation: bool) -> None:
    truth = dataset()
    assert evaluate([], truth, segmentation=segmentation).ap == 0
    assert evaluate([], truth | {"annotations": []}, segmentation=segmentation).ap == -1
    found = results(truth)
    assert evaluate(found, truth | {"annotations": []}, segmentation=segmentation).ap == -1


def test_annotations_without_area_crowd_or_categories_and_with_a_degenerate_box() -> None:
    truth = dataset()
    for entry in truth["annotations"]:
        del entry["area"], entry["iscrowd"]
    del truth["categories"]
    found = results(truth)
    truth["annotations"].append({"image_id": 10, "category_id": 3, "bbox": [5, 5, 0, 10]})
    metrics = evaluate(found, truth)
    assert metrics.ap == pytest.approx(1)  # the box without an area is not expected to be found
    assert [c.name for c in metrics.classes] == ["3", "7"]
    assert filter_categories(found, truth) == found  # infer filters before it evaluates


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("numbers", [4, 5])
def test_a_box_that_is_not_finite_is_dropped_as_in_training(value: float, numbers: int) -> None:
    truth = dataset()
    found = results(truth)
    truth["annotations"].append({"image_id": 10, "category_id": 3, "bbox": [5, 5, 9, 9, 0][: numbers - 1] + [value]})
    assert evaluate(found, truth).ap == pytest.approx(1)


def test_null_area_and_iscrowd_are_absent() -> None:
    truth = dataset()
    found = results(truth, shift=6)
    plain = evaluate(found, truth)
    for entry in truth["annotations"]:
        entry["area"] = entry["iscrowd"] = None
    assert evaluate(found, truth) == plain


def test_ids_of_64_bits_are_told_apart() -> None:
    truth = dataset()
    found = results(truth, shift=6)
    plain = evaluate(found, truth)
    for entry in (*truth["annotations"], *found):
        entry["image_id"] += 10**18
    for image in truth["images"]:
        image["id"] += 10**18
    assert evaluate(found, truth).stats == plain.stats


# ---------------------------------------------------------------------------------------------------------------------
# Rotated boxes


def test_rotated_boxes_overlap_by_their_polygons() -> None:
    truth = dataset()
    truth["annotations"] = [a | {"bbox": [*a["bbox"][:2], 60, 20, 0.0]} for a in truth["annotations"]]
    found = results(truth)
    assert evaluate(found, truth).ap == pytest.approx(1)
    # The same rectangle with its sides exchanged and turned by a quarter.
    swapped = [d | {"bbox": [d["bbox"][0] + 20, d["bbox"][1] - 20, 20, 60, math.pi / 2]} for d in found]
    assert evaluate(swapped, truth).ap == pytest.approx(1)
    # Turned by a quarter about its center it is another box: two crossed bars of 60×20 share 400 of 2000 pixels.
    crossed = [d | {"bbox": [*d["bbox"][:4], math.pi / 2]} for d in found]
    assert evaluate(crossed, truth).ap < 0.1
    # Between axis-aligned boxes the angle is ignored.
    assert evaluate(crossed, truth, rotated=False).ap == pytest.approx(1)


def test_rotated_evaluation_of_boxes_without_angle_is_the_plain_one() -> None:
    truth = dataset(12)
    for i, entry in enumerate(truth["annotations"]):
        entry["iscrowd"] = int(i % 5 == 0)
    found = results(truth, shift=6)
    plain = evaluate(found, truth)
    turned = evaluate(with_angle(found, 0.0), truth | {"annotations": with_angle(truth["annotations"], 0.0)})
    assert 0.2 < plain.ap < 0.95
    assert turned.stats == pytest.approx(plain.stats, abs=1e-6)


def test_masks_of_rotated_boxes_agree_with_their_polygons() -> None:
    truth = dataset(12)
    found = with_angle(results(truth, shift=6), 0.5)
    truth["annotations"] = with_angle(truth["annotations"], 0.5)
    polygons, masks = evaluate(found, truth), evaluate(found, truth, segmentation=True)
    assert masks.ap == pytest.approx(polygons.ap, abs=0.03)  # masks are whole pixels
    for image in truth["images"]:
        del image["width"], image["height"]
    assert evaluate(found, truth, segmentation=True).ap == pytest.approx(masks.ap, abs=0.03)


# ---------------------------------------------------------------------------------------------------------------------
# Files and bad input


def test_files_are_read_and_the_form_of_odtk_02_too(tmp_path) -> None:
    truth = dataset()
    found = results(truth)
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    for name, content in (("a.json", found), ("b.json", {"annotations": found, "images": truth["images"]})):
        (tmp_path / name).write_text(json.dumps(content))
        assert evaluate(str(tmp_path / name), str(tmp_path / "truth.json")).ap == pytest.approx(1)


def test_categories_that_only_the_model_has_are_left_out() -> None:
    truth = dataset()
    found = [*results(truth), {"image_id": 10, "category_id": 5, "bbox": [0, 0, 9, 9], "score": 0.9}]
    assert evaluate(filter_categories(found, truth), truth).ap == pytest.approx(1)
    with pytest.raises(OdtkError, match="category_id 5 is not among the categories"):
        evaluate(found, truth)


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ({"image_id": 99, "category_id": 3, "bbox": [0, 0, 1, 1], "score": 1}, "image_id 99 is not among the images"),
        (
            {"image_id": 10, "category_id": 3, "bbox": [0, 0, 1], "score": 1},
            "not a list of four or five numbers",
        ),
        ({"image_id": 10, "category_id": 3, "bbox": [0, 0, 1, math.nan], "score": 1}, "bbox is not finite"),
        ({"image_id": [10], "category_id": 3, "bbox": [0, 0, 1, 1], "score": 1}, r"image_id \[10\] is not among"),
        ({"image_id": 10, "category_id": {}, "bbox": [0, 0, 1, 1], "score": 1}, r"category_id \{\} is not among"),
        ({"image_id": 10, "bbox": [0, 0, 1, 1], "score": 1}, "no 'category_id'"),
        ({"image_id": 10, "category_id": 3, "bbox": [0, 0, 1, 1]}, "score"),
        ("box", "not a dictionary"),
    ],
)
def test_a_malformed_detection_is_named(entry, sentence: str) -> None:
    truth = dataset()
    with pytest.raises(OdtkError, match=rf"Detection \d+: .*{sentence}"):
        evaluate([*results(truth), entry], truth)


@pytest.mark.parametrize("key", ["images", "categories"])
@pytest.mark.parametrize("id", [None, [1], "1", 1.5, 2**63])
def test_an_entry_without_an_integer_id_is_refused(key: str, id) -> None:
    truth = dataset()
    truth[key][0]["id"] = id
    with pytest.raises(OdtkError, match="its id is not a 64-bit integer"):
        evaluate([], truth)


@pytest.mark.parametrize("listed", [True, False])
def test_an_annotation_without_category_is_named_with_its_file(tmp_path, listed: bool) -> None:
    truth = dataset()
    del truth["annotations"][2]["category_id"]
    truth["annotations"][2]["id"] = 1234
    if not listed:
        del truth["categories"]
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    with pytest.raises(OdtkError, match=r"Annotation 1234 of .*truth\.json: it has no 'category_id'"):
        evaluate([], str(tmp_path / "truth.json"))


SQUARE = [10.0, 10.0, 30.0, 10.0, 30.0, 30.0, 10.0, 30.0]


@pytest.mark.parametrize(
    "mask",
    [
        "polygon",
        7,
        SQUARE,
        [SQUARE, None],
        [SQUARE, [1, 2]],
        [[*SQUARE, 5]],
        [["a"] * 6],
        [[*SQUARE[:-1], math.nan]],
        {"size": [200, 300]},
        {"counts": [60000]},
        {"size": [200, 300], "counts": [5]},
        {"size": [200, 300], "counts": [60001, -1]},
        {"size": [200], "counts": "abc"},
        [[*SQUARE[:-1], 1e9]],
        [[*SQUARE[:-1], -(10**400)]],
        {"size": [10**9, 10**9], "counts": "abc"},
    ],
)
def test_a_malformed_mask_is_named_where_masks_are_scored(mask) -> None:
    truth = dataset()
    found = results(truth)
    truth["annotations"][2]["segmentation"] = mask
    assert evaluate(found, truth).ap == pytest.approx(1)  # boxes are scored: it is not checked
    with pytest.raises(OdtkError, match=r"Annotation 2: .*'segmentation'"):
        evaluate(found, truth, segmentation=True)
    del truth["annotations"][2]["segmentation"]
    found[1]["segmentation"] = mask
    with pytest.raises(OdtkError, match=r"Detection 1: .*'segmentation'"):
        evaluate(found, truth, segmentation=True)


@pytest.mark.parametrize("mask", [None, [], [SQUARE], {"size": [200, 300], "counts": [2010, 400, 57590]}])
def test_masks_of_each_form_are_scored(mask) -> None:
    truth = dataset(1)
    truth["annotations"] = [{"id": 1, "image_id": 10, "category_id": 3, "bbox": [10, 10, 20, 20], "segmentation": mask}]
    found = [{"image_id": 10, "category_id": 3, "bbox": [10, 10, 20, 20], "segmentation": mask, "score": 0.5}]
    assert evaluate(found, truth, segmentation=True).ap == pytest.approx(1)


def test_preparing_prepared_annotations_changes_nothing() -> None:
    truth = prepare_ground_truth(dataset())
    assert prepare_ground_truth(truth) == truth


def test_an_annotation_of_an_unknown_image_is_named() -> None:
    truth = dataset()
    truth["annotations"][2]["image_id"] = 12345
    with pytest.raises(OdtkError, match="Annotation 2: .*image_id 12345"):
        evaluate([], truth)


@pytest.mark.parametrize("content", ["{", "[1, 2", "", '"text"', "{}"])
def test_broken_files_are_refused_in_one_sentence(tmp_path, content: str) -> None:
    (tmp_path / "broken.json").write_text(content)
    (tmp_path / "truth.json").write_text(json.dumps(dataset()))
    with pytest.raises(OdtkError, match="JSON|list"):
        evaluate(str(tmp_path / "broken.json"), str(tmp_path / "truth.json"))
    with pytest.raises(OdtkError):
        evaluate([], str(tmp_path / "broken.json"))
    with pytest.raises(OdtkError, match=r"nowhere\.json"):
        evaluate(str(tmp_path / "nowhere.json"), str(tmp_path / "truth.json"))


def test_sizes_and_boxes_that_no_mask_can_have() -> None:
    truth = dataset()
    found = results(truth)
    expected = evaluate(found, truth, segmentation=True)
    for width, height in (("80", -64), (10**9, 10**9), (None, 1.5)):
        changed = copy.deepcopy(truth)
        for image in changed["images"]:
            image |= {"width": width, "height": height}
        assert evaluate(found, changed, segmentation=True).ap == pytest.approx(expected.ap, abs=0.02)
    truth["annotations"][1]["bbox"] = [0, 0, 1e9, 5]
    with pytest.raises(OdtkError, match="Annotation 1: its 'bbox' reaches beyond 65535 pixels"):
        evaluate(found, truth, segmentation=True)
    evaluate(found, truth)


def overlapping_set(seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Thirty images with objects of three categories and sizes, crowds, and more than 100 detections in one image."""
    draw = np.random.default_rng(seed)
    truth: dict[str, Any] = {
        "images": [{"id": i, "width": 400, "height": 400} for i in range(1, 31)],
        "categories": [{"id": i, "name": str(i)} for i in (2, 5, 9)],
        "annotations": [],
    }
    found = []
    for image in range(1, 31):
        for _ in range(int(draw.integers(0, 9))):
            side = float(draw.choice([20.0, 60.0, 150.0]))
            box = [*draw.uniform(0, 200, 2).tolist(), *(side * draw.uniform(0.7, 1.3, 2)).tolist()]
            entry = {"image_id": image, "category_id": int(draw.choice([2, 5, 9])), "bbox": box}
            number = len(truth["annotations"]) + 1
            crowd = {"iscrowd": int(draw.random() < 0.05), "area": box[2] * box[3]}
            truth["annotations"].append({**entry, **crowd, "id": number})
            for _ in range(60 if image == 7 else 2):
                moved = [*(np.array(box) + draw.normal(0, 0.1 * side, 4) * [1, 1, 0.3, 0.3]).tolist()]
                found.append({**entry, "bbox": moved, "score": round(float(draw.random()), 2)})  # some are equal
    return truth, found


@pytest.mark.parametrize("segmentation", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_faster_coco_eval_gives_the_figures_of_pycocotools(seed: int, segmentation: bool) -> None:
    pytest.importorskip("faster_coco_eval")
    truth, found = overlapping_set(seed)
    expected, figures = (
        metrics_of(run_cocoeval(found, truth, segmentation=segmentation, evaluator=evaluator))
        for evaluator in ("pycocotools", "faster-coco-eval")
    )
    assert min(expected.stats) > 0.02
    np.testing.assert_allclose(figures.stats, expected.stats, rtol=0, atol=1e-12)
    for one, other in zip(figures.classes, expected.classes, strict=True):
        assert (one.ap, one.ap50) == pytest.approx((other.ap, other.ap50), abs=1e-12)
        assert (one.name, one.images, one.instances) == (other.name, other.images, other.instances)


def test_what_faster_coco_eval_cannot_do_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    truth, found = overlapping_set(0)
    turned = [{**d, "bbox": [*d["bbox"], 0.1]} for d in found]
    with pytest.raises(OdtkError, match="knows no rotated boxes"):
        run_cocoeval(turned, truth, evaluator="faster-coco-eval")
    with pytest.raises(OdtkError, match="--report needs --evaluator pycocotools"):
        EvaluateSettings(detections="d", annotations="a", report="r.html", evaluator="faster-coco-eval")
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(OdtkError, match=r"pip install 'odtk\[fast\]'"):
        run_cocoeval(found, truth, evaluator="faster-coco-eval")
