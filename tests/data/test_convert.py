"""`odtk convert`: there and back again, what would be lost, and files that stay as they are."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image as PILImage

from odtk.cli import main
from odtk.config import LoaderConfig, OdtkError
from odtk.data.convert import convert
from odtk.data.dataset import Dataset
from odtk.data.layouts import load_annotations
from odtk.data.loader import create_loader

SIZE = (64, 48)  # width, height


def write_coco(folder: Path, **changes: Any) -> Path:
    """A COCO file with three images, one of them in a subfolder and one without boxes."""
    images = folder / "images"
    (images / "deeper").mkdir(parents=True, exist_ok=True)
    names = ("deeper/c.jpg", "a.jpg", "b.png")
    for name in names:
        PILImage.effect_noise(SIZE, 60).convert("RGB").save(images / name)
    content: dict[str, Any] = {
        "images": [
            {"id": id, "file_name": name, "width": SIZE[0], "height": SIZE[1]}
            for id, name in zip((30, 10, 20), names, strict=True)
        ],
        "categories": [{"id": 4, "name": "dog & cat"}, {"id": 9, "name": "élan"}],
        "annotations": [
            box(1, 30, 9, [1.25, 2.5, 10.1, 20.3]),
            box(2, 10, 4, [0, 0, 64, 48]),
            box(3, 10, 9, [7 / 3, 11 / 7, 13.37, math.pi]),
        ],
    } | changes
    path = folder / "truth.json"
    path.write_text(json.dumps(content))
    return path


def box(id: int, image: int, category: int, bbox: list[float], **more: Any) -> dict[str, Any]:
    return {"id": id, "image_id": image, "category_id": category, "bbox": bbox, **more}


def boxes_of(annotations: Path | str, *, nearly: bool = False) -> dict[str, list[Any]]:
    """(category id, name, box) of every annotation, by file name; the boxes to compare exactly or nearly."""
    content = load_annotations(annotations).content
    names = {category["id"]: category["name"] for category in content["categories"]}
    files = {image["id"]: image["file_name"] for image in content["images"]}
    found: dict[str, list[Any]] = {file: [] for file in files.values()}
    for entry in content["annotations"]:
        id = entry["category_id"]
        found[files[entry["image_id"]]].append(
            (id, names[id], pytest.approx(entry["bbox"], abs=1e-8) if nearly else entry["bbox"])
        )
    return found


@pytest.mark.parametrize("to", ["yolo", "voc"])
def test_there_and_back_again(tmp_path: Path, to: str) -> None:
    path = write_coco(tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    lines = convert(str(path), str(tmp_path / "there"), to)
    assert "3 images, 3 boxes, 2 categories" in lines[0] and f"link to {tmp_path / 'images'}" in lines[0]
    assert any("numbered by name" in line for line in lines)
    convert(str(tmp_path / "there"), str(tmp_path / "back.json"), "coco", images=str(tmp_path / "images"))
    back, truth = boxes_of(tmp_path / "back.json"), boxes_of(path, nearly=True)
    if to == "voc":  # which has no ids of categories: they are numbered by name
        ids = {4: 1, 9: 2}
        truth = {file: [(ids[id], *more) for id, *more in entries] for file, entries in truth.items()}
    assert back == truth
    content = json.loads((tmp_path / "back.json").read_text())
    assert [(image["id"], image["file_name"]) for image in content["images"]] == [
        (1, "a.jpg"),
        (2, "b.png"),
        (3, "deeper/c.jpg"),
    ]
    assert not any("source" in entry for entry in (*content["images"], *content["annotations"]))
    assert {file: file.read_bytes() for file in before} == before


def test_rotated_boxes_there_and_back_again(tmp_path: Path) -> None:
    turned = [[10, 12, 20, 8, 0.4], [30, 20, 9, 14, -2.9], [5, 5, 10, 10, 0.0]]
    path = write_coco(tmp_path, annotations=[box(i, 10, 4, bbox) for i, bbox in enumerate(turned)])
    convert(str(path), str(tmp_path / "there"), "yolo")
    convert(str(tmp_path / "there"), str(tmp_path / "back.json"), "coco")
    assert boxes_of(tmp_path / "back.json") == boxes_of(path, nearly=True)
    images = load_annotations(tmp_path / "there").images
    dataset = Dataset.load(tmp_path / "there", images, rotated=True)
    assert dataset.images[0].boxes == pytest.approx(np.array(turned))


def test_the_loader_gives_the_same_boxes_for_the_three_formats(tmp_path: Path) -> None:
    path = write_coco(tmp_path)
    for to in ("yolo", "voc"):
        convert(str(path), str(tmp_path / to), to)
    batches = []
    for annotations in (path, tmp_path / "yolo" / "data.yaml", tmp_path / "voc"):
        images = str(load_annotations(annotations).images)
        data = LoaderConfig(
            images=images, annotations=str(annotations), batch=3, training=True, jitter=(40, 60), loader="torch"
        )
        dataset = Dataset.load(annotations, images, training=True)
        dataset.images.sort(key=lambda image: image.path.name)  # COCO's order is that of the file
        batches.append(next(iter(create_loader(dataset, data))))
    assert (batches[0].labels >= 0).sum() == 3
    for other in batches[1:]:
        assert (other.images == batches[0].images).all() and (other.labels == batches[0].labels).all()
        assert other.boxes.numpy() == pytest.approx(batches[0].boxes.numpy(), abs=1e-4)


def test_classes_of_yolo_are_ids_where_they_can_be(tmp_path: Path) -> None:
    path = write_coco(tmp_path, categories=[{"id": 1, "name": "b"}, {"id": 0, "name": "a"}], annotations=[])
    convert(str(path), str(tmp_path / "there"), "yolo")
    written = yaml.safe_load((tmp_path / "there" / "data.yaml").read_text())
    assert written == {"train": "train.txt", "names": {0: "a", 1: "b"}}
    assert (tmp_path / "there" / "labels" / "deeper" / "c.txt").read_text() == ""


def test_a_split_is_converted_by_its_name(tmp_path: Path) -> None:
    path = write_coco(tmp_path)
    convert(str(path), str(tmp_path / "there"), "yolo")
    data = tmp_path / "there" / "data.yaml"
    data.write_text(data.read_text() + "val: images/deeper\n")
    with pytest.raises(
        OdtkError, match=r"holds several splits, .*: give one of .*data\.yaml:train, .*data\.yaml:val\."
    ):
        convert(str(data), str(tmp_path / "back.json"), "coco")
    convert(f"{data}:val", str(tmp_path / "val.json"), "coco")
    assert [image["file_name"] for image in json.loads((tmp_path / "val.json").read_text())["images"]] == ["c.jpg"]


@pytest.mark.parametrize(
    ("to", "changes", "words", "left"),
    [
        ("yolo", {"iscrowd": 1}, "1 crowd", 0),
        ("voc", {"iscrowd": 1}, "1 crowd", 0),
        ("yolo", {"segmentation": [[1, 1, 9, 1, 5, 9]]}, "1 mask", 1),
        ("voc", {"keypoints": [1, 1, 2]}, "1 set of key points", 1),
        ("voc", {"bbox": [5, 5, 10, 4, 0.3]}, "1 rotated box", 1),
        ("voc", {"category_id": 9}, "1 category without boxes", 1),
    ],
)
def test_what_would_be_lost_is_refused_unless_asked_for(tmp_path: Path, to, changes, words, left) -> None:
    more = [] if "category_id" in changes else [box(2, 20, 9, [1, 1, 5, 5])]
    path = write_coco(
        tmp_path, annotations=[box(1, 10, 4, [5, 5, 10, 4]) | changes, *more, box(3, 20, 9, [0, 0, 9, 9])]
    )
    if changes.get("iscrowd"):
        content = json.loads(path.read_text())
        content["annotations"].append(box(4, 20, 4, [3, 3, 5, 5]))
        path.write_text(json.dumps(content))
    with pytest.raises(OdtkError) as caught:
        convert(str(path), str(tmp_path / "there"), to)
    assert words in str(caught.value) and "--lossy" in str(caught.value)
    assert not (tmp_path / "there").exists()
    lines = convert(str(path), str(tmp_path / "there"), to, lossy=True)
    assert any(line.startswith("Lost: ") and words in line for line in lines)
    found = boxes_of(tmp_path / "there")
    assert len(found["a.jpg"]) == left
    if len(changes.get("bbox", ())) == 5:
        sin, cos = math.sin(0.3), math.cos(0.3)
        w, h = 10 * cos + 4 * sin, 10 * sin + 4 * cos
        assert found["a.jpg"][0][2] == pytest.approx([10 - w / 2, 7 - h / 2, w, h])


def test_a_mask_that_only_repeats_the_box_is_no_loss(tmp_path: Path) -> None:
    outline = [[5, 5, 15, 5, 15, 9, 5, 9, 5, 5]]  # as Roboflow writes it
    path = write_coco(tmp_path, annotations=[box(1, 10, 4, [5, 5, 10, 4], segmentation=outline)])
    assert not any(line.startswith("Lost") for line in convert(str(path), str(tmp_path / "there"), "yolo"))


def test_masks_of_one_outline_are_kept_as_outlines_of_yolo(tmp_path: Path) -> None:
    masks: dict[tuple[float, ...], list[float]] = {
        (1.0, 2.0, 8.0, 9.5): [1, 2, 9, 4, 5, 11.5],
        (10.0, 10.0, 20.0, 20.0): [20, 10, 30, 20, 20, 30, 10, 20],  # a square on its corner, which is no rotated box
    }
    for chosen in (masks, dict(list(masks.items())[1:])):
        entries = [box(i, 10, 4, list(bbox), segmentation=[mask]) for i, (bbox, mask) in enumerate(chosen.items())]
        path = write_coco(tmp_path, annotations=entries)
        target = tmp_path / f"there{len(chosen)}"
        assert not any("Lost" in line for line in convert(str(path), str(target), "yolo"))
        assert boxes_of(target) == boxes_of(path, nearly=True)
        back = load_annotations(target).content["annotations"]
        assert [entry["segmentation"][0][: len(mask)] for entry, mask in zip(back, chosen.values(), strict=True)] == [
            pytest.approx(mask) for mask in chosen.values()
        ]


def test_a_file_of_yolo_has_outlines_or_boxes_never_both(tmp_path: Path) -> None:
    masked = box(1, 10, 4, [1, 2, 8, 9.5], segmentation=[[1, 2, 9, 4, 5, 11.5]])
    other = box(3, 20, 4, [5, 5, 10, 4])
    path = write_coco(tmp_path, annotations=[masked, box(2, 10, 4, [20, 20, 8, 6]), other])
    convert(str(path), str(tmp_path / "there"), "yolo")
    rows = [text.read_text().splitlines() for text in sorted((tmp_path / "there" / "labels").rglob("*.txt"))]
    assert sorted(sorted(len(row.split()) for row in file) for file in rows if file) == [[5], [7, 11]]
    assert boxes_of(tmp_path / "there") == boxes_of(path, nearly=True)


@pytest.mark.parametrize(
    "changed",
    [
        {"segmentation": [[1, 2, 9, 4, 5, 11], [1, 2, 9, 4, 5, 11.5]]},  # two outlines
        {"segmentation": [[1, 2, 9, 4, 5, 11.51]]},  # which would give another box
        {"segmentation": {"size": [48, 64], "counts": [0, 48 * 64]}},
        {"bbox": [1, 2, 8, 9.5, 0.0]},  # then all boxes are written as four corners
    ],
)
def test_other_masks_are_lost_to_yolo(tmp_path: Path, changed: dict[str, Any]) -> None:
    entry = box(1, 10, 4, [1, 2, 8, 9.5], segmentation=[[1, 2, 9, 4, 5, 11.5]]) | changed
    path = write_coco(tmp_path, annotations=[entry])
    with pytest.raises(OdtkError, match=r"YOLO cannot hold 1 mask of "):
        convert(str(path), str(tmp_path / "there"), "yolo")
    convert(str(path), str(tmp_path / "there"), "yolo", lossy=True)
    (kept,) = load_annotations(tmp_path / "there").content["annotations"]
    assert kept["bbox"][:4] == pytest.approx([1, 2, 8, 9.5])


def test_difficult_objects_of_voc_stay_difficult(tmp_path: Path) -> None:
    hard = box(1, 10, 4, [5, 5, 10, 4], iscrowd=1, difficult=1, truncated=1)
    path = write_coco(tmp_path, annotations=[hard, box(2, 20, 9, [1, 1, 5, 5])])
    convert(str(path), str(tmp_path / "there"), "voc")
    entry = load_annotations(tmp_path / "there").content["annotations"][0]
    assert (entry["iscrowd"], entry["difficult"], entry["truncated"]) == (1, 1, 1)


@pytest.mark.parametrize(
    ("name", "bbox"),
    [
        ("xyxy", [10, 20, 30, 44]),
        ("cxcywh", [20, 32, 20, 24]),
        ("normalized", [10 / 64, 20 / 48, 20 / 64, 24 / 48]),
    ],
)
def test_boxes_of_another_format_are_mended(tmp_path: Path, name: str, bbox: list[float]) -> None:
    outline = [[0.25, 0.5, 0.5, 0.5, 0.5, 0.75]] if name == "normalized" else []
    path = write_coco(tmp_path, annotations=[box(7, 10, 4, bbox, segmentation=outline, mine="kept")], info={"year": 1})
    before = path.read_bytes()
    good = tmp_path / "good.json"
    assert main(["convert", str(path), str(good), "--to", "coco", "--from", name]) == 0
    content = json.loads(good.read_text())
    (entry,) = content["annotations"]
    assert entry["bbox"] == pytest.approx([10, 20, 20, 24])
    assert (entry["id"], entry["mine"], content["info"]) == (7, "kept", {"year": 1})
    if outline:
        assert entry["segmentation"] == [[16, 24, 32, 24, 32, 36]]
    else:
        assert entry["area"] == pytest.approx(480)
    assert content["images"] == json.loads(before)["images"] and path.read_bytes() == before


def test_nothing_is_overwritten_and_nothing_stays_of_a_failure(tmp_path: Path, capsys, monkeypatch) -> None:
    path = write_coco(tmp_path)
    for target in (path, tmp_path / "images"):
        before = sorted(tmp_path.rglob("*")), path.read_bytes()
        for to in ("coco", "yolo", "voc"):
            assert main(["convert", str(path), str(target), "--to", to]) == 1
            assert "exists already" in capsys.readouterr().err
        assert (sorted(tmp_path.rglob("*")), path.read_bytes()) == before
    before_failure = sorted(tmp_path.iterdir())
    monkeypatch.setattr("os.symlink", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert main(["convert", str(path), str(tmp_path / "there"), "--to", "voc"]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before_failure


def test_folders_above_a_new_folder_are_made(tmp_path: Path) -> None:
    source = write_coco(tmp_path)
    convert(str(source), str(tmp_path / "a" / "b" / "yolo"), to="yolo", lossy=True)
    assert sum(map(len, boxes_of(tmp_path / "a" / "b" / "yolo", nearly=True).values())) == 3
    with pytest.raises(OdtkError, match="Cannot make the folder"):
        convert(str(source), str(source / "b" / "yolo"), to="yolo", lossy=True)


@pytest.mark.parametrize(
    ("to", "changes", "words"),
    [
        ("yolo", {"annotations": [box(1, 99, 4, [1, 1, 2, 2])]}, "Annotation 1 of .*its image_id 99"),
        ("yolo", {"annotations": [box(1, 10, 4, [1, 1, 2])]}, "Annotation 1 of .*its bbox is not a list"),
        ("voc", {"images": [{"id": 1}], "annotations": []}, "Image 1 of .*it has no 'file_name'"),
        ("coco", {"images": [{"id": "x", "file_name": "a.jpg"}], "annotations": []}, "Image 'x' of .*not a 64-bit"),
        (
            "yolo",
            {"images": [{"id": 10, "file_name": "gone.jpg", "width": 1, "height": 1}], "annotations": []},
            "--images",
        ),
        (
            "voc",
            {
                "images": [{"id": i, "file_name": f"{name}.jpg"} for i, name in enumerate(("a", "gone"))],
                "annotations": [],
            },
            "size is not stated, and the file",
        ),
    ],
)
def test_what_cannot_be_converted_is_named(tmp_path: Path, to: str, changes: dict[str, Any], words: str) -> None:
    path = write_coco(tmp_path, **changes)
    target = tmp_path / ("there.json" if to == "coco" else "there")
    with pytest.raises(OdtkError, match=words):
        convert(str(path), str(target), to, lossy=True)
    assert not target.exists()


def test_two_images_of_one_label_file_are_refused(tmp_path: Path) -> None:
    images = [{"id": i, "file_name": name, "width": 64, "height": 48} for i, name in enumerate(("a.jpg", "a.png"))]
    path = write_coco(tmp_path, images=images, annotations=[])
    with pytest.raises(OdtkError, match="Two images are called a, with different endings: YOLO has one file for both"):
        convert(str(path), str(tmp_path / "there"), "yolo")


def test_boxes_of_an_image_as_stored_are_refused_where_yolo_would_turn_it(tmp_path: Path) -> None:
    path = write_coco(tmp_path)
    exif = PILImage.Exif()
    exif[0x0112] = 6
    PILImage.new("RGB", SIZE).save(tmp_path / "images" / "a.jpg", exif=exif)
    with pytest.raises(OdtkError, match=r"a\.jpg is shown turned by its EXIF orientation, and its boxes are not"):
        convert(str(path), str(tmp_path / "there"), "yolo")
    convert(str(path), str(tmp_path / "voc"), "voc")
    turned = Dataset.load(tmp_path / "voc", tmp_path / "voc" / "JPEGImages").images[0]
    assert (turned.path.name, turned.width, turned.height, turned.orientation) == ("a.jpg", *SIZE, 1)


def test_from_is_for_coco(tmp_path: Path) -> None:
    convert(str(write_coco(tmp_path)), str(tmp_path / "there"), "yolo")
    with pytest.raises(OdtkError, match="--from xyxy is for the boxes of a COCO file"):
        convert(str(tmp_path / "there"), str(tmp_path / "back.json"), "coco", box_format="xyxy")
