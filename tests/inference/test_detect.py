"""Detections of a loader's images: coordinates, ids, and no image that comes twice."""

import json
import math

import pytest
import torch

from odtk.categories import Category
from odtk.data.batch import Batch
from odtk.inference import detect
from odtk.postprocess import BatchDetections

CATEGORIES = (Category(4, "cat"), Category(9, "dog"))


def batch(ids: list[int], scale: tuple[float, float] = (1.0, 1.0)) -> Batch:
    n = len(ids)
    return Batch(
        images=torch.zeros(n, 3, 32, 32),
        boxes=torch.zeros(n, 1, 4),
        labels=torch.full((n, 1), -1),
        ids=torch.tensor(ids),
        scales=torch.tensor([scale] * n),
    )


def detections(rows: list[list[tuple]], values: int = 4, columns: int = 3) -> BatchDetections:
    """Rows of (score, class, box) per image, padded with zeros to D columns."""
    n = len(rows)
    classes = torch.zeros(n, columns, dtype=torch.long)
    found = BatchDetections(torch.zeros(n, columns), torch.zeros(n, columns, values), classes)
    for i, row in enumerate(rows):
        for j, (score, label, box) in enumerate(row):
            found.scores[i, j], found.classes[i, j], found.boxes[i, j] = score, label, torch.tensor(box)
    return found


def test_detections_are_in_original_pixels_with_the_dataset_s_ids() -> None:
    answers = iter(
        [
            detections([[(0.9, 1, (10, 20, 19, 59)), (0.5, 0, (0, 0, 1, 3))], []]),
            detections([[(0.25, 0, (8, 8, 15, 15))]]),
        ]
    )
    found = detect.detect(lambda images: next(answers), [batch([7, 3], (0.5, 2.0)), batch([5])], CATEGORIES)
    assert found == [
        {"image_id": 5, "category_id": 4, "category": "cat", "bbox": [8, 8, 8, 8], "score": 0.25},
        {"image_id": 7, "category_id": 9, "category": "dog", "bbox": [20, 10, 20, 20], "score": pytest.approx(0.9)},
        {"image_id": 7, "category_id": 4, "category": "cat", "bbox": [0, 0, 4, 2], "score": 0.5},
    ]
    json.dumps(found)


def test_rotated_detections_have_an_angle_and_corners() -> None:
    box = (10.0, 10.0, 29.0, 19.0, 0.5, 0.5)  # 20×10 about (20, 15), sin = cos: 45 degrees, whatever their length
    found = detect.detect(lambda images: detections([[(0.5, 0, box)]], 6), [batch([1], (0.5, 0.5))], CATEGORIES)
    assert found[0]["bbox"] == pytest.approx([20, 20, 40, 20, math.pi / 4], abs=1e-4)
    # Turned counterclockwise about (40, 30), the upper left corner (-20, -10) goes to ((-20 - 10), (20 - 10)) / √2.
    assert found[0]["segmentation"][0][:2] == pytest.approx([40 - 30 / math.sqrt(2), 30 + 10 / math.sqrt(2)], abs=0.01)
    assert len(found[0]["segmentation"][0]) == 8


def test_ids_of_64_bits_are_kept_to_the_last_digit() -> None:
    ids = [2**63 - 1, 10**18 + 3, 10**18 + 2, -(2**63)]
    row = [(0.5, 0, (0, 0, 1, 1))]
    found = detect.detect(lambda images: detections([row] * len(images)), [batch(ids[:3]), batch(ids[3:])], CATEGORIES)
    assert [d["image_id"] for d in found] == sorted(ids)


@pytest.mark.parametrize("loader", [[], [batch([1]), batch([2, 3])]])
def test_nothing_found_gives_an_empty_list(loader: list[Batch]) -> None:
    assert detect.detect(lambda images: detections([[]] * len(images)), loader, CATEGORIES) == []


def test_an_image_that_comes_twice_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="twice"):
        detect.detect(lambda images: detections([[]] * len(images)), [batch([1, 2]), batch([2])], CATEGORIES)


def test_nothing_is_found_in_a_damaged_image() -> None:
    answers = detections([[(0.9, 1, (0, 0, 9, 9))], [(0.8, 0, (0, 0, 9, 9)), (0.7, 0, (4, 4, 9, 9))]])
    both = batch([7, 3])
    assert [d["image_id"] for d in detect.detect(lambda images: answers, [both], CATEGORIES)] == [3, 3, 7]
    both.damaged = torch.tensor([False, True])
    assert [d["image_id"] for d in detect.detect(lambda images: answers, [both], CATEGORIES)] == [7]


def test_a_box_in_the_padding_alone_is_none() -> None:
    seen = batch([1, 2])
    seen.sizes = torch.tensor([[20.0, 32.0], [32.0, 10.0]])
    inside, across, beyond, below = (0, 0, 9, 9), (10, 0, 29, 9), (20, 0, 29, 9), (0, 10, 9, 29)
    rows = [[(0.9, 0, inside), (0.8, 0, across), (0.7, 0, beyond)], [(0.6, 0, below), (0.5, 0, beyond)]]
    ids, found = detect.detection_rows(detections(rows), seen)
    assert ids.tolist() == [1, 1, 2]
    assert found[:, 1].tolist() == pytest.approx([0.9, 0.8, 0.5])


def test_a_rotated_box_that_reaches_into_its_image_is_kept() -> None:
    seen = batch([1])
    seen.sizes = torch.tensor([[20.0, 32.0]])
    upright, turned = (22, 0, 25, 23, 0.0, 1.0), (22, 0, 25, 23, 1.0, 0.0)  # … sin θ, cos θ
    _, found = detect.detection_rows(detections([[(0.9, 0, upright), (0.8, 0, turned)]], values=6), seen)
    assert found[:, 1].tolist() == pytest.approx([0.8])
