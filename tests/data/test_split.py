"""The validation split: shares, classes on both sides, copies together, seeds."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from odtk.categories import Category
from odtk.data.dataset import Dataset
from odtk.data.fingerprint import Fingerprint
from odtk.data.records import Image
from odtk.data.split import validation_split


def dataset_of(labels: list[list[int]], classes: int) -> Dataset:
    images = [
        Image(i, Path(f"{i}.jpg"), 10, 10, np.ones((len(own), 4)), np.array(own, dtype=np.int64))
        for i, own in enumerate(labels)
    ]
    return Dataset(images, tuple(Category(c, str(c)) for c in range(classes)))


def print_of(dataset: Dataset, groups: list[int]) -> Fingerprint:
    none = dict.fromkeys(("width", "height", "shorter", "longer", "side", "relative_side", "aspect", "per_image"), ())
    zero = dict.fromkeys(
        ("lean", "depth", "drop", "light", "contrast", "whole", "gray", "crowded", "boxes", "empty"), 0
    )
    own = {"images": len(dataset.images), "decoded": len(groups), "copies": 0, "groups": tuple(enumerate(groups))}
    return Fingerprint(classes=(), **none, **zero, **own)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(5))
def test_every_class_is_on_both_sides_with_about_its_share(seed: int) -> None:
    draw = np.random.default_rng(seed)
    labels = [draw.choice(4, size=draw.integers(0, 6), p=[0.7, 0.2, 0.08, 0.02]).tolist() for _ in range(200)]
    dataset = dataset_of(labels, 4)
    train, val = validation_split(dataset, print_of(dataset, list(range(200))), share=0.2, seed=seed)
    ids = sorted(image.id for image in (*train.images, *val.images))
    assert ids == list(range(200)) and 36 <= len(val.images) <= 60
    total, held = (Counter(c for image in part.images for c in image.labels.tolist()) for part in (dataset, val))
    for label in range(4):
        assert 0 < held[label] < total[label]
        assert 0.1 <= held[label] / total[label] <= 0.4
    assert train.categories == val.categories == dataset.categories


def test_copies_stay_together() -> None:
    dataset = dataset_of([[0]] * 60, 1)
    groups = [i // 10 * 10 for i in range(60)]
    train, val = validation_split(dataset, print_of(dataset, groups), share=0.3)
    sides = [{groups[image.id] for image in part.images} for part in (train, val)]
    assert sides[0] and sides[1] and not sides[0] & sides[1]


def test_a_class_of_one_group_stays_in_training() -> None:
    dataset = dataset_of([[0]] * 19 + [[0, 1]], 2)
    for seed in range(10):
        train, val = validation_split(dataset, print_of(dataset, list(range(20))), seed=seed)
        assert any(1 in image.labels for image in train.images) and not any(1 in image.labels for image in val.images)
        assert len(val.images) == 4


def test_images_that_were_not_looked_at_are_distinct_and_the_seed_decides() -> None:
    dataset = dataset_of([[0]] * 50, 1)
    runs = [validation_split(dataset, print_of(dataset, []), seed=seed)[1] for seed in (0, 0, 1)]
    ids = [[image.id for image in part.images] for part in runs]
    assert ids[0] == ids[1] != ids[2] and len(ids[0]) == 10
