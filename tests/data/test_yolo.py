"""YOLO datasets: what is read from them, which place a fault names, and that damaged files are errors of ours."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image as PILImage

from odtk.categories import Category
from odtk.config import OdtkError
from odtk.data.check import STRAY_LABELS, check
from odtk.data.dataset import Dataset, read
from odtk.data.layouts import image_folder, load_annotations
from odtk.data.records import DAMAGED
from odtk.data.yolo import corners_of, rectangle_around
from odtk.evaluation.evaluate import evaluate

SIZE = (40, 30)  # width, height
NAMES = ["cat", "dog"]


@pytest.fixture
def yolo(tmp_path: Path) -> Callable[..., Path]:
    """Writes data.yaml, images/train/{a,b}.jpg, images/val/c.jpg and the given labels of a (b and c have one box)."""

    def write(labels: str = "0 0.5 0.5 0.25 0.2\n", **changes: Any) -> Path:
        for name in ("train/a", "train/b", "val/c"):
            path = tmp_path / "images" / f"{name}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            PILImage.new("RGB", SIZE, (200, 40, 90)).save(path)
            text = tmp_path / "labels" / f"{name}.txt"
            text.parent.mkdir(parents=True, exist_ok=True)
            text.write_text(labels if name == "train/a" else "1 0.25 0.5 0.5 0.4\n")
        content = {"train": "images/train", "val": "images/val", "names": NAMES} | changes
        (tmp_path / "data.yaml").write_text(yaml.safe_dump(content))
        return tmp_path / "data.yaml"

    return write


def boxes_of(path: Path | str, **options: Any) -> list[list[float]]:
    """The boxes of image a."""
    folder = load_annotations(path).images
    return Dataset.load(path, folder, **options).images[0].boxes.tolist()


def test_a_split_becomes_images_boxes_and_categories(yolo) -> None:
    path = yolo("1 0.5 0.5 0.25 0.2\n\n0 0.25 0.5 0.1 0.2\n")
    dataset = Dataset.load(path, path.parent / "images" / "train", training=True)
    assert dataset.categories == (Category(0, "cat"), Category(1, "dog"))
    assert [(image.id, image.path.name) for image in dataset.images] == [(1, "a.jpg"), (2, "b.jpg")]
    assert dataset.images[0].boxes == pytest.approx(np.array([[15, 12, 10, 6], [8, 12, 4, 6]]))
    assert dataset.images[0].labels.tolist() == [1, 0]
    assert dataset.warnings() == []
    val = load_annotations(f"{path}:val")
    assert [image["file_name"] for image in val.content["images"]] == ["c.jpg"]
    assert val.images == path.parent / "images" / "val" and image_folder(f"{path}:val") == str(val.images)


@pytest.mark.parametrize(
    "changes",
    [
        {"names": {0: "cat", 1: "dog"}},
        {"path": ".", "train": ["images/train"]},
        {"path": "/nowhere/on/this/machine"},
        {"train": "../images/train"},  # as Roboflow writes it
        {"train": "list.txt"},
    ],
)
def test_the_ways_to_write_a_data_yaml(yolo, changes) -> None:
    path = yolo(**changes)
    (path.parent / "list.txt").write_text("./images/train/b.jpg\nimages/train/a.jpg\n")
    annotations = load_annotations(path)
    assert [image["file_name"] for image in annotations.content["images"]] == ["a.jpg", "b.jpg"]
    assert [entry["category_id"] for entry in annotations.content["annotations"]] == [0, 1]
    assert [category["name"] for category in annotations.content["categories"]] == NAMES


def test_labels_beside_the_images_and_images_elsewhere(yolo, tmp_path: Path) -> None:
    path = yolo()
    for text in (path.parent / "labels" / "train").iterdir():
        text.rename(path.parent / "images" / "train" / text.name)
    assert len(load_annotations(path).content["annotations"]) == 2
    elsewhere = tmp_path / "elsewhere"
    (path.parent / "images").rename(elsewhere)
    with pytest.raises(OdtkError, match=r"data\.yaml finds no images for train: 'images/train'; give their folder"):
        load_annotations(path)
    content, folder, *_ = load_annotations(path, elsewhere / "train")
    assert folder == elsewhere / "train" and len(content["annotations"]) == 2


def test_an_outline_becomes_the_box_around_it_and_a_mask(yolo) -> None:
    path = yolo("0 0.1 0.2 0.5 0.1 0.3 0.6\n")
    assert boxes_of(path) == [pytest.approx([4, 3, 16, 15])]
    entry = load_annotations(path).content["annotations"][0]
    assert entry["segmentation"] == [pytest.approx([4, 6, 20, 3, 12, 18])]


def test_four_corners_are_a_rotated_box_in_a_rotated_run_and_else_the_box_around_it(yolo) -> None:
    turned = [10, 8, 16, 6, 0.5]
    corners = (corners_of(turned) / SIZE).reshape(-1).tolist()  # [4, 2] → [8]
    path = yolo(f"0 {' '.join(map(str, corners))}\n")
    assert boxes_of(path, rotated=True) == [pytest.approx(turned)]
    low, high = corners_of(turned).min(axis=0), corners_of(turned).max(axis=0)
    assert boxes_of(path) == [pytest.approx([*low, *(high - low)])]
    dataset = Dataset.load(path, path.parent / "images" / "train", rotated=True)
    assert dataset.images[1].boxes.tolist() == [pytest.approx([0, 9, 20, 12, 0])]
    assert "theta is 0" in dataset.warnings()[0]
    # Where no run says whether boxes are rotated, all labels together do.
    assert len(load_annotations(path).content["annotations"][0]["bbox"]) == 4
    (path.parent / "labels" / "train" / "b.txt").unlink()
    assert len(load_annotations(path).content["annotations"][0]["bbox"]) == 5


def test_the_rectangle_around_corners_is_the_smallest() -> None:
    """Against a search over all angles; of a rectangle the corners' own order is kept."""
    generator = np.random.default_rng(0)
    angles = np.linspace(0, math.pi / 2, 721)
    along, across = np.array([np.cos(angles), -np.sin(angles)]), np.array([np.sin(angles), np.cos(angles)])
    for _ in range(200):
        box = [*generator.uniform(0, 50, 2), *generator.uniform(3, 40, 2), generator.uniform(-3.1, 3.1)]
        assert rectangle_around(corners_of(box)) == pytest.approx(box)
        corners = generator.uniform(0, 100, (4, 2))
        found = rectangle_around(corners)
        inner = (corners - corners_of(found).mean(axis=0)) @ [
            [math.cos(found[4]), math.sin(found[4])],
            [-math.sin(found[4]), math.cos(found[4])],
        ]
        assert (np.abs(inner) <= np.array(found[2:4]) / 2 + 1e-6).all(), "the corners are inside"
        smallest = (np.ptp(corners @ along, axis=0) * np.ptp(corners @ across, axis=0)).min()
        assert found[2] * found[3] <= smallest * 1.011
    assert rectangle_around(np.full((4, 2), 3.0)) == [3, 3, 0, 0, 0]


def test_boxes_of_an_image_that_is_shown_turned_are_of_the_turned_image(yolo) -> None:
    path = yolo()
    exif = PILImage.Exif()
    exif[0x0112] = 6
    PILImage.new("RGB", SIZE).save(path.parent / "images" / "train" / "a.jpg", exif=exif)
    dataset = Dataset.load(path, path.parent / "images" / "train")
    assert (dataset.images[0].width, dataset.images[0].height, dataset.images[0].orientation) == (30, 40, 6)
    assert dataset.images[0].boxes.tolist() == [pytest.approx([11.25, 16, 7.5, 8])]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("0 0.5 0.5 0.2", "it has 3 numbers after the class"),
        ("0 0.5 0.5 0.2 0.2 0.9", "it has 5 numbers after the class"),
        ("2 0.5 0.5 0.2 0.2", 'its class 2 is not in "names"'),
        ("0.5 0.5 0.5 0.2 0.2", 'its class 0.5 is not in "names"'),
        ("cat 0.5 0.5 0.2 0.2", "it is not a class and its numbers"),
    ],
)
def test_a_fault_names_the_file_and_the_line(yolo, line, words) -> None:
    path = yolo(f"0 0.5 0.5 0.2 0.2\n{line}\n")
    place = f"{path.parent / 'labels' / 'train' / 'a.txt'}, line 2: "
    (fault,) = read(path, path.parent / "images" / "train").faults
    assert str(fault).startswith(place) and words in str(fault) and not fault.fixed
    with pytest.raises(OdtkError) as caught:
        evaluate([], str(path))
    assert str(caught.value).startswith(place) and words in str(caught.value)


def test_coco_rules_apply_with_the_line_as_the_place(yolo) -> None:
    path = yolo("0 0.5 0.5 0 0.2\n0 0.9 0.5 0.4 0.2\n0 0.5 0.5 0.2 0.2\n")
    dataset = Dataset.load(path, path.parent / "images" / "train")
    assert [len(image.boxes) for image in dataset.images] == [2, 1]
    assert [f.file for f in dataset.faults] == [
        f"{path.parent / 'labels' / 'train' / 'a.txt'}, line {number}" for number in (1, 2)
    ]


def test_a_damaged_image_is_one_fault_and_is_left_out_on_request(yolo) -> None:
    path = yolo()
    (path.parent / "images" / "train" / "b.jpg").write_bytes(b"no image")
    images = path.parent / "images" / "train"
    assert [fault.rule for fault in read(path, images).faults] == [DAMAGED]
    assert [image.id for image in Dataset.load(path, images, skip_damaged=True).images] == [1]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("names: [a", "is not valid YAML"),
        ("- 1", 'it has no "names"'),
        ("train: images/train\nnames: 3", '"names" is neither'),
        ("train: images/train\nnames: [no, cat]", "the name False of class 0"),
        ("train: images/train\nnames: {cat: 0}", "the class 'cat'"),
        ("train: [3]\nnames: [a]", "data.yaml, train: 3 is not a path"),
        ("train: images/train\nnames: [a, b]\ncategory_ids: [1]", '"category_ids" is not a list of 2'),
        ("val: images/val\ntest: images/val\nnames: [a]", "has no split 'train': give"),
    ],
)
def test_a_wrong_data_yaml_is_explained(yolo, text, words) -> None:
    path = yolo()
    path.write_text(text)
    with pytest.raises(OdtkError) as caught:
        load_annotations(path)
    assert "data.yaml" in str(caught.value) and words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "place", ["names: [*i]\ntrain: images/train", "names: [a]\ntrain: [*i]", "train: *i\nnames: [*i]"]
)
def test_a_short_file_that_unfolds_without_bound_is_refused_at_once(yolo, place: str) -> None:
    path = yolo()
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in itertools.pairwise("abcdefghi"))
    path.write_text(bomb + place)
    with pytest.raises(OdtkError) as caught:
        load_annotations(path)
    assert "a list is not a" in str(caught.value) or "the name a list of class 0" in str(caught.value)


def test_images_without_any_labels_are_explained(yolo) -> None:
    path = yolo()
    for text in (path.parent / "labels" / "train").iterdir():
        text.unlink()
    with pytest.raises(OdtkError, match=r"None of the 2 images .* has labels: that of .*a\.jpg would be .*a\.txt"):
        load_annotations(path)


def test_damaged_files_are_errors_of_ours_or_datasets(yolo) -> None:
    generator = np.random.default_rng(0)
    path = yolo("0 0.5 0.5 0.25 0.2\n1 0.1 0.2 0.5 0.1 0.3 0.6\n1 0.1 0.1 0.4 0.1 0.4 0.4 0.1 0.4\n")
    files = [path, path.parent / "labels" / "train" / "a.txt"]
    kept = [file.read_bytes() for file in files]
    outcomes = set()
    for _ in range(150):
        which = int(generator.integers(2))
        data = bytearray(kept[which])
        for _ in range(int(generator.integers(1, 4))):
            at = int(generator.integers(len(data)))
            data[at : at + int(generator.integers(0, 4))] = bytes(generator.integers(0, 256, generator.integers(0, 3)))
        files[which].write_bytes(data)
        try:
            content, folder, *_ = load_annotations(path)
            Dataset.load(path, folder, rotated=bool(generator.integers(2)))
            evaluate([], str(path))
            outcomes.add("read")
        except OdtkError as error:
            assert "\n" not in str(error)
            outcomes.add("refused")
        files[which].write_bytes(kept[which])
    assert outcomes == {"read", "refused"}


def labels_of(boxes: np.ndarray) -> str:
    """Lines of class 0 with the given numbers [n, k]."""
    return "".join("0 " + " ".join(f"{value:.6f}" for value in row) + "\n" for row in boxes)


def corners_in(count: int) -> np.ndarray:
    """Random boxes [n, 4], x1 y1 x2 y2 in fractions."""
    generator = np.random.default_rng(count)
    size = generator.uniform(0.05, 0.4, (count, 2))
    low = generator.random((count, 2)) * (1 - size)
    return np.concatenate([low, low + size], axis=1)


@pytest.mark.parametrize("count", [10, 28, 200])
def test_labels_that_are_corners_are_refused(yolo, count) -> None:
    path = yolo(labels_of(corners_in(count)))
    (path.parent / "labels" / "train" / "b.txt").write_text("")
    with pytest.raises(OdtkError, match=r"these are x1 y1 x2 y2; YOLO wants cx cy w h as fractions of the image\.$"):
        load_annotations(path)


@pytest.mark.parametrize("count", [1, 2, 5, 28, 200])
@pytest.mark.parametrize("size", [0.2, 0.9, 1.0])
def test_correct_labels_are_not_taken_for_corners(yolo, count, size) -> None:
    generator = np.random.default_rng(count)
    sizes = size * generator.uniform(0.8, 1, (count, 2))
    centers = sizes / 2 + generator.random((count, 2)) * (1 - sizes)
    noise = generator.normal(0, 0.01, (count, 4))  # boxes drawn a little beyond the image
    path = yolo(labels_of(np.concatenate([centers, sizes], axis=1) + noise))
    assert len(load_annotations(path).content["annotations"]) == count + 1


def test_outlines_are_not_judged_as_boxes(yolo) -> None:
    corners = corners_in(30)
    path = yolo(labels_of(corners[:, [0, 1, 2, 1, 2, 3, 0, 3]]))
    assert len(load_annotations(path).content["annotations"]) == 31


@pytest.mark.parametrize("line", ["0 20 15 10 6", "0 5 5 20 5 20 15 5 15"])
def test_labels_in_pixels_are_refused(yolo, line) -> None:
    path = yolo(f"{line}\n" * 2)
    with pytest.raises(OdtkError, match=r"2 of 3 objects with numbers above 1: these are pixels, YOLO wants fractions"):
        load_annotations(path)
    path = yolo(f"{line}\n" + "0 0.5 0.5 0.2 0.2\n" * 3)  # one mistake is not a format
    assert len(load_annotations(path).content["annotations"]) == 5


def test_labels_without_an_image_are_noted(yolo, tmp_path: Path) -> None:
    path = yolo()
    folder = path.parent / "images" / "train"
    labels = path.parent / "labels" / "train"
    (labels / "classes.txt").write_text("cat\ndog\n")  # of a tool's
    assert STRAY_LABELS not in {remark.rule for remark in check(path, folder).remarks}
    for name in ("gone", "lost"):
        (labels / f"{name}.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    report = check(path, folder)
    found = [line for line in report.lines(verbose=False) if STRAY_LABELS in line]
    assert found == [f"note    2 × {STRAY_LABELS}, first {labels / 'gone.txt'}"] and not report.refused


def test_labels_of_another_split_or_of_an_unlisted_image_are_of_an_image(yolo) -> None:
    path = yolo(train="train.txt", val="val.txt")
    (path.parent / "train.txt").write_text("images/train/a.jpg\n")
    folder = path.parent / "images" / "train"
    for val in ("images/train/b.jpg\n", "images/val/c.jpg\n"):
        (path.parent / "val.txt").write_text(val)
        assert STRAY_LABELS not in {remark.rule for remark in check(path, folder).remarks}
