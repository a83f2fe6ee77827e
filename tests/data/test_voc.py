"""Pascal VOC datasets: what is read from them, which place a fault names, and that XML is read safely."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PILImage

from odtk.categories import Category
from odtk.config import OdtkError
from odtk.data.dataset import Dataset, read
from odtk.data.layouts import load_annotations
from odtk.evaluation.evaluate import evaluate

SIZE = (40, 30)  # width, height
OBJECT = """  <object>
    <name>{name}</name>{more}
    <bndbox><xmin>{box[0]}</xmin><ymin>{box[1]}</ymin><xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox>
  </object>
"""


def xml(image: str, *objects: str) -> str:
    size = f"<size><width>{SIZE[0]}</width><height>{SIZE[1]}</height><depth>3</depth></size>"
    return f"<annotation>\n  <filename>{image}</filename>\n  {size}\n{''.join(objects)}</annotation>\n"


def thing(name: str, *box: float, more: str = "") -> str:
    return OBJECT.format(name=name, box=box, more=more)


@pytest.fixture
def voc(tmp_path: Path) -> Callable[..., Path]:
    """Writes a.jpg, b.jpg and their XML files: in one folder, or in VOC's own layout. Returns the folder."""

    def write(a: str = "", *, own: bool = False) -> Path:
        folder = tmp_path / "set"
        images, texts = (folder / "JPEGImages", folder / "Annotations") if own else (folder, folder)
        for place in (images, texts):
            place.mkdir(parents=True, exist_ok=True)
        for name in "ab":
            PILImage.new("RGB", SIZE, (200, 40, 90)).save(images / f"{name}.jpg")
        (texts / "b.xml").write_text(xml("b.jpg", thing("dog", 1, 1, 40, 30), thing("cat", 3, 4, 12, 13)))
        (texts / "a.xml").write_text(a or xml("a.jpg", thing("dog", 6, 11, 15, 20)))
        return folder

    return write


def faults_of(folder: Path) -> list[str]:
    return [str(fault) for fault in read(folder, load_annotations(folder).images).faults]


@pytest.mark.parametrize("own", [False, True])
def test_pixels_are_counted_from_one(voc, own: bool) -> None:
    folder = voc(own=own)
    content, images, *_ = load_annotations(folder)
    assert images == (folder / "JPEGImages" if own else folder)
    dataset = Dataset.load(folder, images, training=True)
    assert dataset.categories == (Category(1, "cat"), Category(2, "dog"))
    assert [(image.id, image.path.name) for image in dataset.images] == [(1, "a.jpg"), (2, "b.jpg")]
    assert dataset.images[0].boxes.tolist() == [[5, 10, 10, 10]]
    assert dataset.images[1].boxes.tolist() == [[0, 0, 40, 30], [2, 3, 10, 10]]
    assert dataset.images[1].labels.tolist() == [1, 0]
    assert dataset.warnings() == []
    assert [entry["id"] for entry in content["annotations"]] == [1, 2, 3]


def test_a_split_of_vocs_own_layout_has_the_categories_of_all(voc) -> None:
    folder = voc(own=True)
    lists = folder / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("b\n")
    (lists / "val.txt").write_text("a  1\n")  # lists of one class have a second column
    assert [image["file_name"] for image in load_annotations(folder).content["images"]] == ["b.jpg"]
    content = load_annotations(f"{folder}:val").content
    assert [image["file_name"] for image in content["images"]] == ["a.jpg"]
    assert [category["name"] for category in content["categories"]] == ["cat", "dog"]
    (lists / "val.txt").write_text("a\ngone\n")
    with pytest.raises(OdtkError, match=r"val\.txt, line 2: there is no annotation file gone\.xml"):
        load_annotations(f"{folder}:val")
    with pytest.raises(OdtkError, match=r"has no split 'test': give .*set:train or .*set:val\."):
        load_annotations(f"{folder}:test")


def test_the_image_is_found_by_the_name_of_its_xml_too(voc) -> None:
    folder = voc(xml("0001.png", thing("dog", 6, 11, 15, 20)))  # renamed, as Roboflow does
    assert [image["file_name"] for image in load_annotations(folder).content["images"]] == ["a.jpg", "b.jpg"]


def test_difficult_objects_are_neither_learned_nor_scored(voc) -> None:
    folder = voc(xml("a.jpg", thing("dog", 6, 11, 15, 20, more="<difficult>1</difficult>"), thing("cat", 1, 1, 5, 5)))
    dataset = Dataset.load(folder, folder, training=True)
    assert dataset.images[0].boxes.tolist() == [[0, 0, 5, 5]]
    assert "crowd: not used in training" in dataset.warnings()[0]
    found = [
        {"image_id": entry["image_id"], "category_id": entry["category_id"], "bbox": entry["bbox"], "score": 0.9}
        for entry in load_annotations(folder).content["annotations"]
        if not entry["iscrowd"]
    ]
    assert evaluate(found, str(folder)).stats[0] == pytest.approx(1)


@pytest.mark.parametrize(
    ("object", "words"),
    [
        ("<object><name>dog</name></object>", "its object has no <bndbox>"),
        ("<object><name>dog</name><robndbox/></object>", "its box is rotated"),
        ("<object><bndbox/></object>", "its object has no <name>"),
        ("<object><name>dog</name><bndbox><xmin>1</xmin></bndbox></object>", "has no number <ymin>"),
        (thing("dog", 1, 2, 3, 4).replace(">4<", ">four<").strip(), "its <ymax> 'four' is not a number"),
    ],
)
def test_a_fault_names_the_file_and_the_line(voc, object: str, words: str) -> None:
    folder = voc(xml("a.jpg", thing("dog", 6, 11, 15, 20), f"\n{object}\n"))
    (fault,) = faults_of(folder)
    line = xml("a.jpg", thing("dog", 6, 11, 15, 20)).count("\n") + 1
    assert fault.startswith(f"{folder / 'a.xml'}, line {line}: ") and words in fault
    with pytest.raises(OdtkError) as caught:
        evaluate([], str(folder))
    assert str(caught.value).startswith(f"{folder / 'a.xml'}, line {line}: ")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("<annotation><object></annotation>", "is not valid XML: mismatched tag at line 1, column 23"),
        ("<html/>", "its root is <html>"),
        ('<!DOCTYPE a [<!ENTITY x "y">]><annotation>&x;</annotation>', "a document type, which is not read for safety"),
        ('<?xml version="1.0" encoding="klingon"?><annotation/>', "unknown encoding"),
        (" ", "no element found"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(voc, text: str, words: str) -> None:
    folder = voc(text)
    (fault,) = faults_of(folder)
    assert fault.startswith(f"{folder / 'a.xml'}: ") and words in fault
    with pytest.raises(OdtkError) as caught:
        evaluate([], str(folder))
    assert str(caught.value).startswith(f"{folder / 'a.xml'}: ") and words in str(caught.value)


def test_coco_rules_apply_with_the_line_as_the_place(voc) -> None:
    folder = voc(xml("a.jpg", thing("dog", 6, 11, 5, 20), thing("dog", 31, 1, 60, 9)))
    dataset = Dataset.load(folder, folder)
    assert dataset.images[0].boxes.tolist() == [[30, 0, 10, 9]]
    assert [fault.file for fault in dataset.faults] == [f"{folder / 'a.xml'}, line {line}" for line in (4, 8)]
    folder = voc(xml("a.jpg").replace(f">{SIZE[0]}<", ">50<"))
    with pytest.raises(OdtkError, match=r"a\.xml: the annotations say 50×30, a\.jpg is 40×30"):
        Dataset.load(folder, folder)


def test_damaged_files_are_errors_of_ours_or_datasets(voc) -> None:
    generator = np.random.default_rng(0)
    folder = voc()
    kept = (folder / "a.xml").read_bytes()
    outcomes = set()
    for _ in range(150):
        data = bytearray(kept)
        for _ in range(int(generator.integers(1, 3))):
            at = int(generator.integers(len(data)))
            data[at : at + int(generator.integers(0, 3))] = bytes(generator.integers(32, 256, generator.integers(0, 3)))
        (folder / "a.xml").write_bytes(data)
        try:
            content, images, *_ = load_annotations(folder)
            Dataset.load(folder, images, rotated=bool(generator.integers(2)))
            evaluate([], str(folder))
            outcomes.add("read")
        except OdtkError as error:
            assert "\n" not in str(error)
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}
