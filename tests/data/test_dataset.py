"""One test for each rule of data/coco.py: what is fixed is counted; what is refused names file, id and reason."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PILImage
from PIL import ImageOps

from odtk.categories import Category
from odtk.config import OdtkError
from odtk.data.check import check, unmatched_boxes
from odtk.data.dataset import Dataset, read
from odtk.data.images import ImageError, decode, read_header
from odtk.data.records import Image

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
    assert "(3 more faults like this" in refusal(paths)
    two = coco(annotations=[box(i, 99, 4, [1, 1, 5, 5]) for i in range(2)])
    assert "(1 more fault like this" in refusal(two)


def test_training_needs_every_category_and_some_boxes(coco) -> None:
    paths = coco(annotations=[box(1, 7, 4, [1, 1, 5, 5])])
    assert "category 90: 'cat' has no annotations" in refusal(paths, training=True)
    assert len(Dataset.load(*paths).images) == 2  # other commands may use it
    assert "there are no usable boxes" in refusal(coco(annotations=[]), training=True)


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
        assert name in sentence and "image 7" in sentence
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
    assert report.refused == 1 and "cannot be read" in str(report.faults[0])


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
    assert report.refused == 3  # the missing file, the unknown image, the category without annotations
    assert sorted(f.id for f in report.faults) == ["annotation 1", "annotation 2", "category 90", "image 3"]
    text = "\n".join(report.summary())
    assert "1 usable image, 0 of them" in text and "category 4 dog: 1 box" in text and "1 box, width 9" in text


def test_unreadable_pixels_have_a_reason(tmp_path) -> None:
    PILImage.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(ImageError, match="float"):
        decode(tmp_path / "float.tif")


def test_unmatched_boxes_against_a_direct_search() -> None:
    generator = np.random.default_rng(0)
    size = np.exp(generator.uniform(math.log(3), math.log(150), (60, 2)))
    boxes = np.concatenate([generator.random((60, 2)) * (200 - size), size], axis=1)
    dataset = Dataset([], ())
    dataset.images = [Image(1, Path("x"), 200, 200, boxes, np.zeros(60, np.int64))]
    anchors = [
        (
            stride,
            np.array(
                [
                    [stride / 2 - w / 2, stride / 2 - h / 2, stride / 2 + w / 2, stride / 2 + h / 2]
                    for w, h in ((4 * stride, 4 * stride), (6 * stride, 3 * stride))
                ]
            ),
        )
        for stride in (8, 16)
    ]
    best = np.zeros(60)
    for stride, base in anchors:
        for x in range(0, 208, stride):
            for y in range(0, 208, stride):
                for anchor in base + [x, y, x, y]:
                    low = np.maximum(boxes[:, :2], anchor[:2])
                    high = np.minimum(boxes[:, :2] + boxes[:, 2:], anchor[2:])
                    overlap = np.clip(high - low, 0, None).prod(axis=1)
                    union = size.prod(axis=1) + (anchor[2:] - anchor[:2]).prod() - overlap
                    best = np.maximum(best, overlap / union)
    count, advice = unmatched_boxes(dataset, anchors, resize=200, max_size=200, threshold=0.5)
    assert count == (best < 0.5).sum() > 5
    assert advice.startswith(f"{count} of 60 boxes")
    assert unmatched_boxes(dataset, anchors, resize=200, max_size=200, threshold=0.0) == (0, "")


def test_small_boxes_get_the_advice_to_enlarge() -> None:
    boxes = np.array([[10, 10, 4, 4.0]])
    dataset = Dataset([Image(1, Path("x"), 200, 200, boxes, np.zeros(1, np.int64))], ())
    anchors = [(8, np.array([[-12, -12, 20, 20]]))]
    assert "--resize" in unmatched_boxes(dataset, anchors, resize=200, max_size=200, threshold=0.5)[1]
    assert unmatched_boxes(dataset, anchors, resize=1600, max_size=1600, threshold=0.5)[0] == 0


def test_bccd_is_clean(bccd) -> None:
    dataset = read(bccd / "val.json", bccd / "val", training=True)
    assert dataset.faults == [] and len(dataset.images) == 87
    assert sum(len(i.boxes) for i in dataset.images) == 1138
