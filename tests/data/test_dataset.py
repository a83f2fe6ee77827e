"""One test for each rule of data/coco.py: what is fixed is counted; what is refused names file, id and reason."""

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PILImage
from PIL import ImageOps

from odtk.categories import Category
from odtk.config import OdtkError
from odtk.data.check import check
from odtk.data.coco import CocoReader, load_json, prepare_ground_truth
from odtk.data.convert import convert
from odtk.data.dataset import Dataset, read
from odtk.data.images import ImageError, decode, read_header
from odtk.data.missing import NearestFiles
from odtk.data.records import DAMAGED

SIZE = (40, 30)  # width, height


@pytest.fixture
def coco(tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """Writes a folder with a.jpg and b.jpg and annotations with the given lists replaced."""

    def write(**changes: Any) -> tuple[Path, Path]:
        folder = tmp_path / "images"
        folder.mkdir(exist_ok=True)
        for name in ("a.jpg", "b.jpg"):
            if not (folder / name).exists():
                PILImage.new("RGB", SIZE, (200, 40, 90)).save(folder / name)
        content = {
            "images": [image(7, "a.jpg"), image(3, "b.jpg")],
            "annotations": [box(1, 7, 90, [5, 5, 10, 10]), box(2, 7, 4, [0, 0, 20, 20])],
            "categories": [{"id": 90, "name": "cat"}, {"id": 4, "name": "dog"}],
        } | changes
        path = tmp_path / "annotations.json"
        path.write_text(json.dumps(content))
        return path, folder

    return write


def image(id: Any, name: str, **more: Any) -> dict[str, Any]:
    return {"id": id, "file_name": name, "width": SIZE[0], "height": SIZE[1]} | more


def box(id: Any, image_id: Any, category_id: Any, bbox: Any, **more: Any) -> dict[str, Any]:
    return {"id": id, "image_id": image_id, "category_id": category_id, "bbox": bbox} | more


def refusal(paths: tuple[Path, Path], **options: Any) -> str:
    with pytest.raises(OdtkError) as caught:
        Dataset.load(*paths, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_categories_are_sorted_by_id_and_images_keep_the_order_of_the_file(coco) -> None:
    dataset = Dataset.load(*coco(), training=True)
    assert dataset.categories == (Category(4, "dog"), Category(90, "cat"))
    assert [i.id for i in dataset.images] == [7, 3]
    assert dataset.images[0].labels.tolist() == [1, 0]
    assert dataset.images[0].boxes.tolist() == [[5, 5, 10, 10], [0, 0, 20, 20]]
    assert dataset.images[1].boxes.shape == (0, 4)  # an image without annotations is kept
    assert dataset.warnings() == []


@pytest.mark.parametrize(
    ("bbox", "kept", "rule"),
    [
        ([5, 5, 0, 10], None, "degenerate"),
        ([5, 5, 10, -1], None, "degenerate"),
        ([5, 5, float("nan"), 10], None, "degenerate"),
        ([5, 5, float("inf"), 10], None, "degenerate"),
        ([-5, -5, 15, 15], [0, 0, 10, 10], "clipped"),
        ([30, 20, 20, 20], [30, 20, 10, 10], "clipped"),
        ([50, 5, 10, 10], None, "outside"),
        ([39.5, 5, 1, 5], [39.5, 5, 0.5, 5], None),  # clipped by half a pixel, which is not worth a warning
    ],
)
def test_odd_boxes_are_fixed_with_one_counted_warning(coco, bbox, kept, rule) -> None:
    dataset = Dataset.load(*coco(annotations=[box(1, 7, 4, bbox), box(2, 7, 4, bbox), box(3, 7, 90, [1, 1, 5, 5])]))
    assert dataset.images[0].boxes[:-1].tolist() == ([kept, kept] if kept else [])
    assert len(dataset.warnings()) == (rule is not None)
    if rule:
        assert rule in dataset.warnings()[0] and "(2 ×" in dataset.warnings()[0]
        assert "annotation 1" in dataset.warnings()[0]


def test_crowd_is_not_used(coco) -> None:
    crowd = box(3, 3, 4, [1, 1, 5, 5], iscrowd=1)
    dataset = Dataset.load(*coco(annotations=[box(1, 7, 4, [1, 1, 5, 5]), crowd]))
    assert [len(i.boxes) for i in dataset.images] == [1, 0]
    assert "crowd" in dataset.warnings()[0]


def test_duplicate_annotation_ids_are_kept(coco) -> None:
    dataset = Dataset.load(*coco(annotations=[box(1, 7, 4, [1, 1, 5, 5]), box(1, 3, 90, [2, 2, 5, 5])]))
    assert [len(i.boxes) for i in dataset.images] == [1, 1]
    assert "duplicate annotation id" in dataset.warnings()[0]


def test_missing_sizes_and_categories_are_filled_in(coco) -> None:
    bare = {"id": 7, "file_name": "a.jpg"}
    dataset = Dataset.load(*coco(images=[bare]))
    assert (dataset.images[0].width, dataset.images[0].height) == SIZE
    assert "taken from the file" in dataset.warnings()[0]
    path, folder = coco()
    content = json.loads(path.read_text())
    del content["categories"]
    for without in (content, content | {"categories": []}):
        path.write_text(json.dumps(without))
        dataset = Dataset.load(path, folder)
        assert dataset.categories == (Category(4, "4"), Category(90, "90"))
        assert "made from" in dataset.warnings()[0]
    content["annotations"][0]["category_id"] = [4]
    path.write_text(json.dumps(content))
    assert "annotation 1: its category_id [4] is not among" in refusal((path, folder))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"images": [image(7, "gone.jpg")]}, ["gone.jpg", "image 7", "missing"]),
        ({"images": [image(7, "a.jpg"), image(7, "b.jpg")]}, ["image 7", "duplicate image id"]),
        ({"images": [image("x", "a.jpg")], "annotations": []}, ["image 'x'", "not a 64-bit integer"]),
        ({"images": [image(2**63, "a.jpg")], "annotations": []}, ["image 9223372036854775808", "64-bit integer"]),
        ({"images": [image(7, "a.jpg", width=50)]}, ["image 7", "50×30", "a.jpg is 40×30"]),
        ({"images": [{"id": 7, "width": 1, "height": 1}]}, ["image 7", "no 'file_name'"]),
        ({"annotations": [box(1, 8, 4, [1, 1, 5, 5])]}, ["annotation 1", "image_id 8"]),
        ({"annotations": [box(1, 7, 5, [1, 1, 5, 5])]}, ["annotation 1", "category_id 5"]),
        ({"annotations": [box(1, 7, 4, [1, 1, 5])]}, ["annotation 1", "bbox is not a list of four numbers"]),
        ({"annotations": [box(1, 7, 4, None)]}, ["annotation 1", "bbox is not"]),
        ({"annotations": [box(1, 7, 4, [1, 1, 5, "5"])]}, ["annotation 1", "bbox is not"]),
        ({"annotations": [box(1, 7, 4, [1, 1, 5, 5, 0.3])]}, ["annotation 1", "--rotated-bbox"]),
        ({"categories": [{"id": 4}, {"id": 4}, {"id": 90}]}, ["category 4", "duplicate category id"]),
        ({"categories": [{"id": "4"}, {"id": 4}, {"id": 90}]}, ["category '4'", "not a 64-bit integer"]),
        ({"categories": [{"id": 4}, {"id": 90}, {"id": 2**63}]}, ["category 9223372036854775808", "64-bit integer"]),
    ],
)
def test_refused_before_the_run(coco, changes, words) -> None:
    sentence = refusal(coco(**changes))
    assert all(word in sentence for word in words), sentence


def test_a_refusal_counts_the_other_faults(coco) -> None:
    paths = coco(annotations=[box(i, 99, 4, [1, 1, 5, 5]) for i in range(4)])
    assert "(3 more faults: `odtk check` lists all)" in refusal(paths)
    two = coco(annotations=[box(i, 99, 4, [1, 1, 5, 5]) for i in range(2)])
    assert "(1 more fault: " in refusal(two)


def test_a_category_without_annotations_keeps_its_place_and_training_needs_some_boxes(coco) -> None:
    categories = [{"id": id, "name": str(id)} for id in (1, 4, 90)]
    paths = coco(categories=categories, annotations=[box(1, 7, 4, [1, 1, 5, 5])])
    dataset = Dataset.load(*paths, training=True)
    assert [c.id for c in dataset.categories] == [1, 4, 90] and dataset.images[0].labels.tolist() == [1]
    (warning,) = dataset.warnings()
    assert "category without annotations: it keeps its place" in warning and "(2 ×, first " in warning
    assert "category 1)" in warning and check(*paths).refused == 0
    assert Dataset.load(*paths).warnings() == []  # only training cares
    empty = coco(annotations=[])
    assert "there are no usable boxes" in refusal(empty, training=True) and check(*empty).refused == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"images": [\n }', ["not valid JSON", "line 2, column 2"]),
        ("[]", ["not a COCO annotation file"]),
        ('{"images": {}}', ['no list "images"']),
        ('{"images": [1]}', ["entry that is not an object"]),
        ('{"images": [], "annotations": 3}', ['"annotations" is not a list']),
        ('{"images": []}', ["lists no images"]),
    ],
)
def test_a_broken_file_is_one_sentence(tmp_path, text, words) -> None:
    (tmp_path / "x.json").write_text(text)
    sentence = refusal((tmp_path / "x.json", tmp_path))
    assert all(word in sentence for word in ["x.json", *words]), sentence


def test_missing_files_are_one_sentence(coco, tmp_path) -> None:
    path, folder = coco()
    assert "does not exist" in refusal((tmp_path / "none.json", folder))
    assert "--images" in refusal((path, tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(OdtkError, match="has no images"):
        Dataset.load(None, tmp_path / "empty")


def test_a_file_given_as_the_folder_of_images_is_said(coco) -> None:
    path, folder = coco()
    with pytest.raises(OdtkError, match=r"a\.jpg is a file: with --annotations, --images takes the folder"):
        read(path, folder / "a.jpg")


def test_rotated_boxes(coco) -> None:
    entries = [
        box(1, 7, 4, [5, 5, 10, 6, 0.5]),
        box(2, 7, 90, [5, 5, 10, 6]),
        box(3, 7, 4, [-4, -2, 12, 6, 1.0]),  # leaves the image, but its center is inside: kept as it is
        box(4, 7, 4, [38, 5, 10, 6, 1.0]),
    ]
    dataset = Dataset.load(*coco(annotations=entries), rotated=True, training=True)
    assert dataset.images[0].boxes.tolist() == [[5, 5, 10, 6, 0.5], [5, 5, 10, 6, 0], [-4, -2, 12, 6, 1]]
    assert [w.split(" (")[0] for w in dataset.warnings()] == [
        "axis-aligned box in a rotated run: theta is 0",
        "box with its center outside the image dropped",
    ]
    assert "must be in radians" in refusal(coco(annotations=[box(1, 7, 4, [5, 5, 10, 6, 45])]), rotated=True)


@pytest.mark.parametrize("cut", [0, 100, 0.5, -9])
def test_truncated_jpeg_and_png_are_refused(coco, cut) -> None:
    path, folder = coco()
    pixels = np.random.default_rng(0).integers(0, 255, (SIZE[1], SIZE[0], 3)).astype(np.uint8)
    for name in ("a.jpg", "a.png"):
        PILImage.fromarray(pixels).save(folder / name)
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: int(cut * len(whole)) if isinstance(cut, float) else cut])
        sentence = refusal(coco(images=[image(7, name)]))
        assert name in sentence and "1 damaged image" in sentence and "--skip-damaged" in sentence
        before = (folder / name).read_bytes()
        assert [f.id for f in check(path, folder).faults if not f.fixed] == ["image 7"]  # no further fault from it
        assert (folder / name).read_bytes() == before


def test_bytes_after_the_end_of_a_jpeg_are_not_a_truncation(coco) -> None:
    path, folder = coco()
    with open(folder / "a.jpg", "ab") as file:
        file.write(b"\0" * 500)
    assert Dataset.load(path, folder).warnings() == []


def test_damage_inside_is_found_by_check(coco) -> None:
    path, folder = coco()
    noise = np.random.default_rng(0).integers(0, 255, (SIZE[1], SIZE[0], 3)).astype(np.uint8)
    PILImage.fromarray(noise).save(folder / "a.png")
    data = bytearray((folder / "a.png").read_bytes())
    data[200:260] = bytes(60)
    (folder / "a.png").write_bytes(data)
    paths = coco(images=[image(7, "a.png")])
    Dataset.load(*paths)
    report = check(*paths)
    assert "cannot be read" in str(report.faults[0]) and report.damaged == 1
    assert report.refused == 0  # as training, whose scan does not see it, does not stop


def image_of_kind(kind: str) -> tuple[PILImage.Image, str, dict[str, Any]]:
    """An image of an unusual kind whose left and right halves have different colors."""
    halves = np.zeros((SIZE[1], SIZE[0], 3), np.uint8)
    halves[:, :20], halves[:, 20:] = (220, 220, 220), (60, 60, 60)
    rgb = PILImage.fromarray(halves)
    if kind == "16-bit":
        gray = (np.asarray(rgb.convert("L")).astype(np.uint16) << 8) + 99
        return PILImage.fromarray(gray), ".png", {}
    alpha = rgb.convert("RGBA")
    alpha.putalpha(7)
    kinds: dict[str, tuple[PILImage.Image, str, dict[str, Any]]] = {
        "grayscale": (rgb.convert("L"), ".jpg", {"quality": 95}),
        "CMYK": (rgb.convert("CMYK"), ".jpg", {"quality": 95}),
        "palette": (rgb.quantize(4), ".png", {}),
        "alpha": (alpha, ".png", {}),
        "animation": (rgb, ".gif", {"save_all": True, "append_images": [rgb.rotate(180)]}),
    }
    return kinds[kind]


@pytest.mark.parametrize("kind", ["grayscale", "CMYK", "palette", "alpha", "16-bit", "animation"])
def test_odd_images_become_rgb(coco, kind) -> None:
    picture, suffix, options = image_of_kind(kind)
    path, folder = coco()
    picture.save(folder / f"odd{suffix}", **options)
    dataset = Dataset.load(*coco(images=[image(7, f"odd{suffix}")]))
    assert len(dataset.warnings()) == 1 and kind in dataset.warnings()[0]
    pixels = decode(folder / f"odd{suffix}")
    assert pixels.shape == (SIZE[1], SIZE[0], 3) and pixels.dtype == np.uint8
    assert abs(pixels[:, :18].astype(int) - 220).max() < 4 and abs(pixels[:, 22:].astype(int) - 60).max() < 4
    assert read_header(folder / f"odd{suffix}").plain == (kind == "grayscale")


def save_turned(path: Path, orientation: int) -> None:
    exif = PILImage.Exif()
    exif[0x0112] = orientation
    PILImage.new("RGB", SIZE, (9, 9, 9)).save(path, exif=exif)


def test_exif_turns_only_where_the_annotated_size_says_so(coco) -> None:
    path, folder = coco()
    save_turned(folder / "c.jpg", 6)
    stored = Dataset.load(*coco(images=[image(7, "c.jpg")]))
    assert stored.images[0].orientation == 1 and stored.images[0].width == 40 and "ignored" in stored.warnings()[0]
    turned = Dataset.load(*coco(images=[image(7, "c.jpg", width=30, height=40)]))
    assert turned.images[0].orientation == 6 and turned.images[0].width == 30 and "turned" in turned.warnings()[0]
    assert decode(folder / "c.jpg", 6).shape == (40, 30, 3)
    save_turned(folder / "c.jpg", 3)  # the size does not tell: used as stored
    assert Dataset.load(*coco(images=[image(7, "c.jpg")])).images[0].orientation == 1
    assert "wrong" not in refusal(coco(images=[image(7, "c.jpg", width=30, height=40)]))  # 180° keeps the sides


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_as_pillow_does(tmp_path, orientation) -> None:
    exif = PILImage.Exif()
    exif[0x0112] = orientation
    pixels = np.random.default_rng(0).integers(0, 255, (6, 9, 3)).astype(np.uint8)
    PILImage.fromarray(pixels).save(tmp_path / "x.png", exif=exif)
    with PILImage.open(tmp_path / "x.png") as opened:
        expected = np.asarray(ImageOps.exif_transpose(opened))
    assert read_header(tmp_path / "x.png").orientation == orientation
    assert (decode(tmp_path / "x.png", orientation) == expected).all()


def test_a_folder_without_annotations(coco) -> None:
    _, folder = coco()
    (folder / "notes.txt").write_text("not an image")
    (folder / "deeper").mkdir()
    save_turned(folder / "deeper" / "c.jpg", 6)
    dataset = Dataset.load(None, folder)
    assert [(i.id, i.path.name) for i in dataset.images] == [(1, "a.jpg"), (2, "b.jpg"), (3, "c.jpg")]
    assert [i.width for i in dataset.images] == [40, 40, 30]
    (folder / "a.jpg").write_bytes(b"no image")
    with pytest.raises(OdtkError, match="a.jpg.*not an image of a known format"):
        Dataset.load(None, folder)


def test_check_reports_every_fault_and_a_summary(coco) -> None:
    entries = [box(1, 7, 4, [5, 5, 0, 3]), box(2, 99, 4, [1, 1, 2, 2]), box(3, 7, 4, [1, 1, 9, 9])]
    report = check(*coco(annotations=entries, images=[image(7, "a.jpg"), image(3, "gone.jpg")]))
    assert report.refused == 2  # the missing file, the unknown image
    assert sorted(f.id for f in report.faults) == ["annotation 1", "annotation 2", "category 90", "image 3"]
    text = "\n".join(report.summary(60, 100))
    assert "1 usable image, 0 of them" in text and "category 4 dog: 1 box" in text and "1 box: small" in text
    assert "images: width 40…40 (median 40), height 30…30 (median 30) pixels in the file" in text
    assert "images: width 80…80 (median 80), height 60…60 (median 60) pixels in the network's input" in text
    assert "boxes: width 18…18 (median 18), height 18…18 (median 18) pixels in the network's input" in text
    assert "width 50…50" in "\n".join(report.summary(60, 50))  # what --max-size caps

    sizes = [9] * 9 + [100]  # 1 - 0.9 - 0.1 is below 0
    entries = [box(i, 7, 4, [0, 0, s, s]) for i, s in enumerate(sizes)]
    path, folder = coco(annotations=entries, images=[image(7, "large.png", width=120, height=120)])
    PILImage.new("RGB", (120, 120)).save(folder / "large.png")
    text = "\n".join(check(path, folder).summary(60, 100))
    assert "small (below 32² pixels of the file) 90%, medium 0%, large (96² or more) 10%" in text


def test_unreadable_pixels_have_a_reason(tmp_path) -> None:
    PILImage.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(ImageError, match="float"):
        decode(tmp_path / "float.tif")


def damage(folder: Path, *names: str) -> None:
    """Cuts the end of image files off."""
    for name in names:
        file = folder / name
        PILImage.effect_noise(SIZE, 50).convert("RGB").save(file)
        file.write_bytes(file.read_bytes()[:-99])


def test_damaged_images_are_listed_and_left_out_on_request(coco) -> None:
    path, folder = coco()
    names = [f"{i:02}.jpg" for i in range(12)]
    damage(folder, *names)
    entries = [image(i, name) for i, name in enumerate(names)] + [image(20, "a.jpg")]
    paths = coco(images=entries, annotations=[box(1, 20, 4, [1, 1, 9, 9]), box(2, 3, 90, [1, 1, 9, 9])])
    sentence = refusal(paths, training=True)
    assert "12 damaged images: " in sentence and "09.jpg (the file is truncated" in sentence
    assert "10.jpg" not in sentence and "and 2 more" in sentence and "--skip-damaged" in sentence
    dataset = Dataset.load(*paths, training=True, skip_damaged=True)
    assert [i.id for i in dataset.images] == [20]
    assert [w for w in dataset.warnings() if "12 damaged images: " in w and "and 2 more" in w]
    entries.append(image(21, "gone.jpg"))  # a missing image is no damaged one
    assert "gone.jpg" in refusal(coco(images=entries, annotations=[]), skip_damaged=True)
    assert "No image is left" in refusal(coco(images=entries[:12], annotations=[]), skip_damaged=True)


def test_damaged_images_of_a_folder_are_left_out_and_the_others_keep_their_numbers(coco) -> None:
    _, folder = coco()
    damage(folder, "a.jpg")
    dataset = Dataset.load(None, folder, skip_damaged=True)
    assert [(i.id, i.path.name) for i in dataset.images] == [(2, "b.jpg")]
    assert [f.rule for f in dataset.faults] == [DAMAGED] and "a.jpg" in dataset.warnings()[0]
    report = check(None, folder)
    assert (report.damaged, len(report.dataset.images)) == (1, 1)
    assert "1 usable image" in report.summary(60, 100)


@pytest.mark.parametrize(
    ("wanted", "there"),
    [
        ("upper.jpg", "upper.JPG"),
        ("photo.jpg", "photo.png"),
        ("images/many.jpg", "many.jpg"),
        ("few.jpg", "deep/er/few.jpg"),
        ("caf\u0065\u0301.jpg", "caf\u00e9.jpg"),
    ],
)
def test_the_nearest_name_is_offered_for_a_missing_file(coco, wanted, there) -> None:
    _, folder = coco()
    (folder / there).parent.mkdir(parents=True, exist_ok=True)
    PILImage.new("RGB", SIZE).save(folder / there)
    paths = coco(images=[image(7, "a.jpg"), image(3, wanted)])
    (fault,) = [f for f in read(*paths).faults if not f.fixed]
    assert fault.id == "image 3" and fault.reason == f"the file is missing (did you mean {there}?)"
    assert NearestFiles(folder).find("C:\\data\\" + wanted.replace("/", "\\")) == there
    paths = coco(images=[image(7, "a.jpg"), image(3, "nothing like it.jpg")])
    assert "the file is missing." in refusal(paths)


def test_a_folder_without_any_of_the_images_is_one_fault(coco) -> None:
    path, folder = coco()
    entries = [image(i, f"{i}.jpg") for i in range(20)]
    paths = coco(images=entries, annotations=[box(1, 0, 4, [1, 1, 5, 5]), box(2, 9, 90, [1, 1, 5, 5])])
    report = check(*paths)
    assert len(report.faults) == 1 and report.refused == 1 and not report.dataset.images
    expected = f"none of 20 images found under {folder}: looked for 0.jpg, 1.jpg, 2.jpg, …"
    assert expected in report.faults[0].reason and "--images" in report.faults[0].reason
    (folder / "deeper").mkdir()
    PILImage.new("RGB", SIZE).save(folder / "deeper" / "0.jpg")
    assert f"give --images {folder / 'deeper'}" in refusal(paths)
    PILImage.new("RGB", SIZE).save(folder.parent / "0.jpg")
    assert f"give --images {folder.resolve().parent}" in refusal(paths)


FORMATS = {
    "xywh": lambda x, y, w, h: [x, y, w, h],
    "xyxy": lambda x, y, w, h: [x, y, x + w, y + h],
    "cxcywh": lambda x, y, w, h: [x + w / 2, y + h / 2, w, h],
    "normalized": lambda x, y, w, h: [x / SIZE[0], y / SIZE[1], w / SIZE[0], h / SIZE[1]],
}


def boxes_in(format: str, count: int, *, sloppy: float = 0.0) -> list[dict[str, Any]]:
    """Random boxes of 4 to 14 pixels in image 7, written in a format; sloppy: deviation of their corners in pixels."""
    generator = np.random.default_rng(count)
    found = []
    for i in range(count):
        w, h = generator.uniform(4, 14, 2)
        x, y = generator.random(2) * (SIZE[0] - w, SIZE[1] - h) + generator.normal(0, 1, 2) * sloppy
        found.append(box(i, 7, 4, [float(v) for v in FORMATS[format](x, y, w, h)]))
    return found


@pytest.mark.parametrize("count", [30, 300])
@pytest.mark.parametrize("format", ["xyxy", "cxcywh", "normalized"])
def test_boxes_in_another_format_are_refused_with_the_command_that_converts_them(coco, format, count) -> None:
    path, folder = coco(annotations=boxes_in(format, count))
    for options in ({"training": True}, {}):
        sentence = refusal((path, folder), **options)
        target = path.with_name("annotations-xywh.json")
        assert f"`odtk convert {path} {target} --to coco --from {format}`" in sentence
    assert len(read(path, folder, training=True).faults) == 1  # not one for each box
    report = check(path, folder)
    assert report.refused == 1 and report.summary(60, 100) == []  # not "2 usable images, 2 of them without boxes"
    with pytest.raises(OdtkError, match=f"--from {format}`"):  # scoring sees it too
        prepare_ground_truth(json.loads(path.read_text()), str(path))


@pytest.mark.parametrize("count", [1, 2, 3, 5, 20, 300])
@pytest.mark.parametrize("sloppy", [0.0, 3.0, 10.0])
def test_correct_boxes_are_not_taken_for_another_format(coco, count, sloppy) -> None:
    faults = read(*coco(annotations=boxes_in("xywh", count, sloppy=sloppy))).faults
    assert not [f for f in faults if not f.fixed]


def test_one_large_object_in_each_image_is_not_taken_for_another_format(coco) -> None:
    generator = np.random.default_rng(0)
    for count in (1, 4, 30):
        entries = []
        for i in range(count):
            w, h = generator.uniform(0.6, 1, 2) * SIZE
            x, y = generator.random(2) * (SIZE[0] - w, SIZE[1] - h)
            entries.append(box(i, 7, 4, [x, y, w, h]))
        assert not [f for f in read(*coco(annotations=entries)).faults if not f.fixed]


def test_a_rotated_set_may_leave_its_images_but_must_be_in_pixels(coco) -> None:
    leaving = [box(i, 7, 4, [15 - i, 10, 30, 25, 0.5]) for i in range(10)]  # as x1 y1 x2 y2 they would fit
    assert read(*coco(annotations=leaving), rotated=True).images[0].boxes.shape == (10, 5)
    assert "--from xyxy" in refusal(coco(annotations=[entry | {"bbox": entry["bbox"][:4]} for entry in leaving]))
    small = [box(i, 7, 4, [0.3, 0.2, 0.5, 0.25, 1.5]) for i in range(10)]
    assert "--from normalized" in refusal(coco(annotations=small), rotated=True)


@pytest.mark.parametrize("count", [12, 100])
def test_rotated_boxes_that_are_corners_are_refused(coco, count, tmp_path) -> None:
    def turned(format: str) -> list[dict[str, Any]]:
        return [entry | {"bbox": [*entry["bbox"], 0.1 * i % 3]} for i, entry in enumerate(boxes_in(format, count))]

    path, folder = coco(annotations=turned("xyxy"))
    sentence = refusal((path, folder), rotated=True)
    assert "x1 y1 x2 y2 theta" in sentence and "--from xyxy`" in sentence
    convert(str(path), str(tmp_path / "mended.json"), "coco", box_format="xyxy")  # the command that it names
    mended = json.loads((tmp_path / "mended.json").read_text())["annotations"]
    assert [entry["bbox"] for entry in mended] == [pytest.approx(entry["bbox"]) for entry in turned("xywh")]
    assert not [fault for fault in read(tmp_path / "mended.json", folder, rotated=True).faults if not fault.fixed]


def test_faults_are_shown_at_the_source_of_their_entry(tmp_path) -> None:
    PILImage.new("RGB", SIZE).save(tmp_path / "a.jpg")
    content = {
        "images": [image(1, "a.jpg", source="a.xml"), image(2, "a.jpg", width=50, source="b.xml")],
        "annotations": [
            box(1, 1, 4, [5, 5, 0, 1], source="labels/a.txt, line 3"),
            box(2, 9, 4, [5, 5, 5, 1], source="labels/a.txt, line 4"),
            box(3, 1, 4, [5, 5, 5, 5]),
        ],
        "categories": [{"id": 4, "name": "x"}],
    }
    _, _, faults = CocoReader(content, tmp_path / "data.yaml", tmp_path, False, True).read()
    assert sorted(str(f).partition(": ")[0] for f in faults) == [
        "b.xml",
        "labels/a.txt, line 3",
        "labels/a.txt, line 4",
    ]
    assert "first labels/a.txt, line 3)" in Dataset([], (), faults).warnings()[0]
    _, _, faults = CocoReader(content, tmp_path / "x.json", tmp_path, False, True).read()  # a user's own key
    assert {f.file for f in faults} == {str(tmp_path / "x.json")}


def test_check_shows_one_line_for_each_kind_of_finding(coco) -> None:
    path, folder = coco()
    for i in range(3):
        PILImage.effect_noise(SIZE, 50 + i).convert("L").save(folder / f"{i}.png")
    entries = [image(i, f"{i}.png") for i in range(3)] + [image(9, "gone.jpg"), image(10, "gone2.jpg")]
    annotations = [box(i, i % 3, 4, [i, 1, 9, 9]) for i in range(15)]
    report = check(*coco(images=entries, annotations=annotations, categories=[{"id": 4, "name": "dog"}]))
    refused, fixed = report.lines(verbose=False)
    assert refused.startswith(f"REFUSED 2 × missing image, first {folder / 'gone.jpg'}: image 9 (the file is missing")
    assert fixed.startswith("fixed   3 × grayscale image") and fixed.endswith("0.png: image 0")
    assert len(report.lines(verbose=True)) == 5


def test_check_remarks_on_what_may_be_a_mistake(coco) -> None:
    path, folder = coco()
    (folder / "copy.jpg").write_bytes((folder / "a.jpg").read_bytes())
    PILImage.new("RGB", SIZE, (1, 2, 3)).save(folder / "other.png")
    entries = [image(1, "a.jpg"), image(2, "copy.jpg"), image(3, "other.png")]
    twice = [box(i, 1, 4, [1, 1, 9, 9]) for i in range(2)]
    many = [box(10 + i, 3, 5, [i, 1, 9, 9]) for i in range(10)]
    categories = [{"id": 4, "name": "Dog"}, {"id": 5, "name": "cat"}, {"id": 7, "name": "dog "}]
    paths = coco(images=entries, annotations=[*twice, *many], categories=categories)
    remarks = {fault.rule: str(fault) for fault in check(*paths).remarks}
    assert set(remarks) == {
        "the same image twice",
        "identical annotations",
        "two categories of one name",
        "category with fewer than 10 boxes",
    }
    assert remarks["the same image twice"].endswith("copy.jpg: image 2: its file has the bytes of image 1, a.jpg")
    assert "image 1: 2 annotations of 'Dog' with the box [1, 1, 9, 9]" in remarks["identical annotations"]
    assert remarks["two categories of one name"].startswith("category 7: category 4 is called 'dog '")
    assert remarks["category with fewer than 10 boxes"].startswith("category 4: 'Dog' has only 2 boxes")
    assert "the same image twice" not in {f.rule for f in check(*paths, pixels=False).remarks}
    clean = coco(images=[entries[2]], annotations=many, categories=[categories[1]])
    assert check(*clean).remarks == ()


@pytest.mark.filterwarnings("error")
def test_whole_numbers_too_large_for_a_float_are_refused_and_large_floats_are_not(coco) -> None:
    huge = coco(annotations=[box(1, 7, 4, [1e308, -1e308, 1e308, 1e308]), box(2, 7, 4, [1, 1, 10**300, 5])])
    assert [f.rule for f in read(*huge).faults] == ["box outside the image dropped", "box clipped to the image"]
    assert "bbox is not a list" in refusal(coco(annotations=[box(1, 7, 4, [1, 1, 10**400, 5])]))


ODD: list[Any] = [None, True, -1, 0, 1.5, 1e308, float("nan"), float("-inf"), 10**400, 2**63, "", "..", "/", "\0", "x"]
ODD += [
    "a\0.jpg",
    "C:\\x\\a.jpg",
    "../images/a.jpg",
    [],
    {},
    [0.1, 0.2, 0.3, 0.4],
    [1e308] * 4,
    [5e-324] * 4,
    "é" * 300,
]


def mutated(generator: random.Random, content: dict[str, Any]) -> dict[str, Any]:
    """A copy of annotations with one to four changes."""
    content = copy.deepcopy(content)
    for _ in range(generator.randint(1, 4)):
        name = generator.choice(list(content))
        entries, odd = content[name], copy.deepcopy(generator.choice(ODD))
        entry = generator.choice(entries) if isinstance(entries, list) and entries else None
        what = generator.random()
        if not entry or what < 0.1:
            content[name] = odd
        elif what < 0.2:
            entries.append(copy.deepcopy(entry))
        elif what < 0.3 or not isinstance(entry, dict):
            entries[generator.randrange(len(entries))] = odd
        elif what < 0.6 and entry.get("bbox") and isinstance(entry["bbox"], list):
            entry["bbox"][generator.randrange(len(entry["bbox"]))] = odd
        else:
            entry[generator.choice([*entry, "source", "iscrowd"])] = odd
    return content


@pytest.mark.filterwarnings("error")
def test_mutated_annotations_give_a_dataset_or_one_sentence(coco) -> None:
    path, folder = coco()
    content, generator = json.loads(path.read_text()), random.Random(0)
    read_whole = 0
    for _ in range(150):
        path.write_text(json.dumps(mutated(generator, content)))
        try:
            report = check(path, folder)
            assert report.lines(verbose=False) is not None and report.summary(80, 100)
            Dataset.load(path, folder, training=True, skip_damaged=True)
            prepare_ground_truth(load_json(path), str(path))
            read_whole += 1
        except OdtkError as error:
            assert str(error).endswith(".")
    assert 10 < read_whole < 140


def test_bccd_is_clean(bccd) -> None:
    dataset = read(bccd / "val.json", bccd / "val", training=True)
    assert dataset.faults == [] and len(dataset.images) == 87
    assert sum(len(i.boxes) for i in dataset.images) == 1138


def test_a_file_name_that_leads_out_of_the_folder_is_said(coco, tmp_path: Path) -> None:
    paths = coco()
    (tmp_path / "images" / "sub").mkdir()
    (tmp_path / "images" / "a.jpg").rename(tmp_path / "outside.jpg")
    content = json.loads(paths[0].read_text())
    content["images"][0]["file_name"] = "sub/../../outside.jpg"
    paths[0].write_text(json.dumps(content))
    dataset = Dataset.load(*paths)
    said = [fault for fault in dataset.faults if "leads out of the image folder" in fault.reason]
    assert len(said) == 1 and said[0].fixed and len(dataset.images) == len(content["images"])
    content["images"][0]["file_name"] = "sub/../b.jpg"
    paths[0].write_text(json.dumps(content))
    assert not any("leads out" in fault.reason for fault in Dataset.load(*paths).faults)
