"""What `odtk check` says of anchors: counted by training's rule, and the values it names do help."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from odtk.boxes import iou
from odtk.categories import Category
from odtk.config import ROTATED_ANGLES, LoaderConfig, LossConfig, ModelConfig
from odtk.data.dataset import Dataset, read
from odtk.data.records import Image
from odtk.data.sampler import Sampler
from odtk.model.anchors import base_anchors, place_anchors
from odtk.training.anchor_advice import anchor_advice, best_iou, more_anchors, unlearned
from odtk.training.assign import assign

STRIDES = (8, 16, 32)
MODEL, LOSS = ModelConfig(classes=1), LossConfig()


def dataset_of(boxes: np.ndarray, *, size: tuple[int, int] = (200, 160), images: int = 3) -> Dataset:
    """Images of ``size`` (width, height), which share the boxes [n, 4 or 5] among them."""
    parts = np.array_split(boxes, images)
    listed = [Image(i, Path(f"{i}.jpg"), *size, part, np.zeros(len(part), np.int64)) for i, part in enumerate(parts)]
    return Dataset(listed, (Category(1, "x"),), rotated=boxes.shape[1] == 5)


def random_boxes(count: int, least: float, most: float, size: tuple[int, int] = (200, 160)) -> np.ndarray:
    generator = np.random.default_rng(0)
    sides = np.exp(generator.uniform(np.log(least), np.log(most), (count, 2)))
    return np.concatenate([generator.random((count, 2)) * np.maximum(size - sides, 0), sides], axis=1)


@pytest.mark.parametrize("rotated", [False, True])
def test_the_count_is_that_of_training_with_all_anchors(rotated: bool) -> None:
    boxes = random_boxes(60, 4, 100)
    if rotated:
        boxes = np.column_stack([boxes[:12], np.linspace(-1, 1, 12)])
    model = replace(MODEL, angles=ROTATED_ANGLES) if rotated else MODEL
    dataset = dataset_of(boxes)
    found = unlearned(dataset, model, LOSS, STRIDES, padding=32, resize=160, max_size=200)
    sampler = Sampler(dataset, LoaderConfig("", resize=160, max_size=200, rotated=rotated))
    expected = []
    for number in range(3):
        plan = sampler.plan(number)
        cells = [(plan.height // s, plan.width // s) for s in STRIDES]
        anchors = place_anchors([base_anchors(s, model) for s in STRIDES], STRIDES, cells, torch.device("cpu"))
        sample = plan.samples[0]
        truth, labels = torch.from_numpy(sample.boxes)[None], torch.from_numpy(sample.labels)[None]
        assigned, index = assign(anchors, truth, labels, background_iou=0.4, foreground_iou=0.5)
        learned = set(index[assigned >= 0].tolist())
        expected += [i not in learned for i in range(len(sample.boxes))]
    assert found.missed.tolist() == expected and 3 < sum(expected) < len(boxes) - 3


def test_a_box_that_loses_all_its_anchors_to_another_is_counted() -> None:
    dataset = dataset_of(np.array([[32, 32, 64, 64.0], [32, 32, 64, 64.0]]), images=1)
    found = unlearned(dataset, MODEL, LOSS, STRIDES, padding=32, resize=160, max_size=200)
    assert found.missed.tolist() == [False, True]  # each alone would match


def test_the_best_iou_against_a_direct_search() -> None:
    boxes = random_boxes(60, 3, 150)
    cells = [(26, 32) for _ in STRIDES]
    anchors = place_anchors([base_anchors(s, MODEL) for s in STRIDES], STRIDES, cells, torch.device("cpu"))
    corners = torch.from_numpy(np.column_stack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:] - 1]))
    expected = iou(corners, anchors.double()).max(1).values.numpy()
    assert np.allclose(best_iou(boxes, MODEL, STRIDES), expected, atol=1e-6)


def values(line: str, flag: str) -> tuple[float, ...]:
    """The numbers after a flag in a line of advice."""
    found = re.search(rf"--{flag}((?: [0-9.]+)+)", line)
    assert found, line
    return tuple(map(float, found[1].split()))


def test_the_values_that_are_named_leave_as_many_boxes_as_is_said() -> None:
    dataset = dataset_of(random_boxes(90, 8, 60))
    options = {"padding": 32, "resize": 160, "max_size": 200}
    lines = anchor_advice(dataset, MODEL, LOSS, STRIDES, **options)
    count = int(lines[0].split()[0])
    assert lines[0].startswith(f"{count} of 90 boxes without a matching anchor at IoU 0.5: their median size is ")
    anchors, size = lines[1:]
    better = replace(MODEL, scales=values(anchors, "anchor-scales"))
    if "--anchor-ratios" in anchors:
        better = replace(better, ratios=values(anchors, "anchor-ratios"))
    left = unlearned(dataset, better, LOSS, STRIDES, **options).missed.sum()
    assert anchors.endswith(f"would leave {left}") and left < count / 2
    (resize,), (max_size,) = values(size, "resize"), values(size, "max-size")
    assert resize > 160 and max_size >= resize * 200 / 160  # the cap does not undo it
    options = {"padding": 32, "resize": int(resize), "max_size": int(max_size)}
    left = unlearned(dataset, MODEL, LOSS, STRIDES, **options).missed.sum()
    assert f"would leave {left}, at {(resize / 160) ** 2:.1f} × the work" in size and left < count / 2


def test_sizes_are_told_in_the_file_and_in_the_input() -> None:
    dataset = dataset_of(np.array([[10.0, 10, 8, 6]] * 3))
    lines = anchor_advice(dataset, MODEL, LOSS, STRIDES, padding=32, resize=320, max_size=400)
    assert "their median size is 16×12 pixels in the network's input, 8×6 in the file" in lines[0]


def test_large_boxes_are_not_advised_to_grow() -> None:
    dataset = dataset_of(np.array([[0.0, 0, 199, 20], [0, 50, 199, 22], [0, 80, 190, 19]]))
    lines = anchor_advice(dataset, MODEL, LOSS, (8,), padding=32, resize=160, max_size=200)
    assert lines[0].startswith("3 of 3") and not any("--resize" in line for line in lines)
    assert "--anchor-ratios 1 2 0.5 0.1 would leave" in lines[1]


def test_nothing_to_say_and_nothing_that_helps() -> None:
    settings = {"padding": 32, "resize": 160, "max_size": 200}
    fitting = dataset_of(np.array([[32.0, 32, 40, 40]] * 3))
    lines = anchor_advice(fitting, MODEL, LOSS, STRIDES, **settings)
    assert lines == ["every box has an anchor that matches it at IoU 0.5"]
    assert anchor_advice(dataset_of(np.zeros((0, 4))), MODEL, LOSS, STRIDES, **settings) == []
    twice = dataset_of(np.array([[32.0, 32, 40, 40]] * 2), images=1)  # no anchor can learn two boxes
    lines = anchor_advice(twice, MODEL, LOSS, STRIDES, **settings)
    assert lines[0].startswith("1 of 2") and "--anchor-ious" in lines[1]


def test_many_images_are_sampled_evenly(monkeypatch) -> None:
    monkeypatch.setattr("odtk.training.anchor_advice.MAX_IMAGES", 2)
    dataset = dataset_of(np.array([[32.0, 32, 40, 40]] * 6), images=6)
    lines = anchor_advice(dataset, MODEL, LOSS, STRIDES, padding=32, resize=160, max_size=200)
    assert lines == ["every box has an anchor that matches it at IoU 0.5 (counted in 2 of 6 images)"]


def test_scales_are_only_added_where_they_help_enough() -> None:
    fitting = np.array([[32.0, 32, 40, 40]])
    boxes = np.concatenate([np.repeat(fitting, 1499, axis=0), [[50.0, 50, 12, 12]]])
    dataset = dataset_of(boxes, images=1500)
    found = unlearned(dataset, MODEL, LOSS, STRIDES, padding=32, resize=160, max_size=200)
    assert found.missed.sum() == 1 and more_anchors(found, MODEL, LOSS, STRIDES) == MODEL  # one of 1500
    few = dataset_of(boxes[-3:])
    found = unlearned(few, MODEL, LOSS, STRIDES, padding=32, resize=160, max_size=200)
    assert found.missed.sum() == 1 and more_anchors(found, MODEL, LOSS, STRIDES) != MODEL  # one of three


def test_bccd_counts_as_training_does(bccd) -> None:
    dataset = read(bccd / "train.json", bccd / "train", training=True)
    found = unlearned(dataset, MODEL, LOSS, (8, 16, 32, 64, 128), padding=32, resize=240, max_size=320)
    assert (int(found.missed.sum()), len(found.missed)) == (176, 2805)
