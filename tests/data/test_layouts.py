"""Annotations as tools write them: the folder of the images and the split are found without a word from the user."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as PILImage

from odtk import commands
from odtk.cli import main
from odtk.config import OdtkError
from odtk.data.dataset import Dataset
from odtk.data.layouts import find_images, image_folder, load_annotations, with_split
from odtk.evaluation.evaluate import evaluate
from odtk.settings import TrainSettings
from odtk.training.plan import plan
from odtk.training.rules import Machine

MACHINE = Machine("cpu", 1, cores=1, memory=8 << 30)


@pytest.fixture
def layout(tmp_path: Path) -> Callable[[str, str, str], Path]:
    """Writes an image, and a COCO file that lists it under a name; returns the path of the COCO file."""

    def write(annotations: str, image: str, name: str) -> Path:
        path, file = tmp_path / annotations, tmp_path / image
        for folder in (path.parent, file.parent):
            folder.mkdir(parents=True, exist_ok=True)
        PILImage.new("RGB", (40, 30)).save(file)
        content: dict[str, Any] = {
            "images": [{"id": 5, "file_name": name, "width": 40, "height": 30}],
            "categories": [{"id": 2, "name": "cat"}],
            "annotations": [{"id": 1, "image_id": 5, "category_id": 2, "bbox": [1, 2, 10, 12]}],
        }
        path.write_text(json.dumps(content))
        return path

    return write


@pytest.mark.parametrize(
    ("annotations", "image", "name"),
    [
        ("train/_annotations.coco.json", "train/a.jpg", "a.jpg"),  # Roboflow
        ("annotations/instances_default.json", "images/a.jpg", "a.jpg"),  # CVAT
        ("annotations/instances_default.json", "images/default/a.jpg", "a.jpg"),
        ("annotations/instances_train2017.json", "train2017/a.jpg", "a.jpg"),  # COCO
        ("annotations/instances_train2017.json", "images/train2017/a.jpg", "a.jpg"),
        ("result.json", "images/1.jpg", "images\\1.jpg"),  # Label Studio
        ("result.json", "images/1.jpg", "images/1.jpg"),
        ("result.json", "images/1.jpg", "C:\\label studio\\upload\\images\\1.jpg"),
        ("result.json", "images/1.jpg", "/label-studio/data/media/upload/3/1.jpg"),
        ("result.json", "images/1.jpg", "../../media/upload/3/1.jpg"),
        ("train.json", "train/a.jpg", "a.jpg"),  # odtk synth
        ("labels/val.json", "images/val/a.jpg", "a.jpg"),
        ("a.json", "images/deeper/a.jpg", "deeper/a.jpg"),
        ("a.json", "JPEGImages/a.jpg", "a.jpg"),
    ],
)
def test_images_are_found_where_tools_put_them(layout, tmp_path: Path, annotations: str, image: str, name: str) -> None:
    path = layout(annotations, image, name)
    folder = load_annotations(path).images
    assert image_folder(path) == str(folder)
    (found,) = Dataset.load(path, folder, training=True).images
    assert found.path.resolve() == (tmp_path / image).resolve() and found.id == 5
    if "\\" in name or name[0] in "/.":  # of another machine: understood also where --images is given
        (found,) = Dataset.load(path, (tmp_path / image).parent, training=True).images
        assert found.path.resolve() == (tmp_path / image).resolve()
    before = json.loads(path.read_text())["images"][0]["file_name"]
    assert before == name, "the user's file is as it was"


def test_the_place_with_most_images_wins(tmp_path: Path) -> None:
    for name in ("a.jpg", "images/a.jpg", "images/b.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert find_images(tmp_path / "x.json", ["a.jpg", "b.jpg"]) == tmp_path / "images"
    assert find_images(tmp_path / "x.json", ["a.jpg"]) == tmp_path
    assert find_images(tmp_path / "x.json", ["c.jpg"]) == tmp_path


@pytest.mark.parametrize(
    "annotations",
    ["_annotations.coco.json", "result.json", "annotations/instances_default.json", "mine.json", "annotations/x.json"],
)
def test_a_folder_stands_for_the_one_file_in_it(layout, tmp_path: Path, annotations: str) -> None:
    path = layout(annotations, "images/a.jpg", "a.jpg")
    content, images, found, _ = load_annotations(tmp_path)
    assert found == path and len(content["images"]) == 1 and images.name == "images"


@pytest.mark.parametrize(
    ("train", "val"),
    [
        ("train/_annotations.coco.json", "valid/_annotations.coco.json"),
        ("train.json", "val.json"),
        ("annotations/instances_train2017.json", "annotations/instances_val2017.json"),
    ],
)
def test_training_takes_train_and_measuring_takes_val(layout, tmp_path: Path, train: str, val: str) -> None:
    paths = [layout(name, f"images/{name[0]}.jpg", f"{name[0]}.jpg") for name in (train, val)]
    assert load_annotations(tmp_path).path == load_annotations(f"{tmp_path}:train").path == paths[0]
    assert load_annotations(with_split(str(tmp_path), "val")).path == paths[1]
    assert with_split(f"{tmp_path}:train", "val") == f"{tmp_path}:train", "what is named stays"
    assert with_split(str(paths[0]), "val") == str(paths[0]), "a file is one split"
    for name in ("valid", "validation"):
        assert load_annotations(f"{tmp_path}:{name}").path == paths[1]
    with pytest.raises(OdtkError, match=r"has no split 'test': give .*:train or .*:val\."):
        load_annotations(f"{tmp_path}:test")
    with pytest.raises(OdtkError, match=r"is not divided into splits: give it without :val\."):
        load_annotations(f"{paths[0]}:val")


def test_every_command_takes_the_split_that_is_meant_for_it(layout, tmp_path: Path) -> None:
    for name in ("train", "val"):
        layout(f"{name}.json", f"{name}/{name}.jpg", f"{name}.jpg")
    settings = TrainSettings(
        model="m.pth", annotations=str(tmp_path), val_annotations=str(tmp_path), devices="cpu", head="retinanet"
    )
    config = plan(settings, MACHINE).config
    assert config.data.annotations == str(tmp_path) and config.data.images == str(tmp_path / "train")
    assert config.val_data is not None
    assert config.val_data.annotations == f"{tmp_path}:val" and config.val_data.images == str(tmp_path / "val")
    assert commands.measured(str(tmp_path)) == f"{tmp_path}:val" and commands.measured(None) is None
    assert commands.images_of(None, f"{tmp_path}:val") == str(tmp_path / "val")


def test_the_only_split_is_taken_but_not_to_validate_on(layout, tmp_path: Path) -> None:
    path = layout("train/_annotations.coco.json", "train/a.jpg", "a.jpg")
    assert load_annotations(tmp_path).path == path
    assert commands.measured(str(tmp_path)) == str(tmp_path)
    folder = str(tmp_path)
    settings = TrainSettings.of(
        {"model": "m.pth", "annotations": folder, "val_annotations": folder, "head": "retinanet"}
    )
    with pytest.raises(OdtkError, match=r"has no split 'val': give .*:train\."):
        plan(settings, MACHINE)


def test_a_folder_without_one_meaning_is_explained(layout, tmp_path: Path) -> None:
    with pytest.raises(OdtkError, match=r"has no annotations: no COCO JSON, no data\.yaml and no XML file"):
        load_annotations(tmp_path)
    for name in ("a.json", "b.json"):
        layout(name, "a.jpg", "a.jpg")
    with pytest.raises(OdtkError, match=r"has several JSON files, a\.json, b\.json …: name one"):
        load_annotations(tmp_path)
    with pytest.raises(OdtkError, match=r"is one image's annotation: give the folder"):
        load_annotations(tmp_path / "a.xml")
    with pytest.raises(OdtkError, match=r"gone\.json does not exist"):
        load_annotations(tmp_path / "gone.json")


def test_a_byte_order_mark_is_skipped(layout, tmp_path: Path, capsys) -> None:
    path = layout("a.json", "a.jpg", "a.jpg")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(Dataset.load(path, tmp_path).images) == 1
    results = tmp_path / "results.json"
    found = [{"image_id": 5, "category_id": 2, "bbox": [1, 2, 10, 12], "score": 0.9}]
    results.write_bytes(b"\xef\xbb\xbf" + json.dumps(found).encode())
    assert evaluate(str(results), str(path)).stats[0] == pytest.approx(1)


def test_check_needs_no_folder_of_images(layout, tmp_path: Path, capsys) -> None:
    path = layout("annotations/instances_default.json", "images/a.jpg", "a.jpg")
    assert main(["check", "--annotations", str(path), "--headers-only"]) == 0
    assert "1 usable image" in capsys.readouterr().out
