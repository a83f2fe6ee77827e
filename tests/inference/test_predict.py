"""Prediction from Python: what `odtk infer` finds, to the bit; every kind of image, coordinates, damage, threads."""

from __future__ import annotations

import io
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import odtk
from odtk.categories import Category
from odtk.config import ROTATED_ANGLES, ExportConfig, ModelConfig, OdtkError, PostprocessConfig
from odtk.exporting import export
from odtk.inference.predict import Detections, Model, pixels_of
from tests.random_models import detector_of, save

CONFIG = ModelConfig(backbones=("ResNet18C4",), classes=2)
CATEGORIES = (Category(3, "cat"), Category(7, "dog"))
SIZES = [(64, 48), (48, 64), (80, 40), (64, 48), (33, 57)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A checkpoint, an FCOS one (its head has GroupNorm), a rotated one, and an export of the first at 48×64."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("plain", "fcos", "rotated")}
    found = {
        "pth": save(detector_of(CONFIG, bias=0.0), folders["plain"], CATEGORIES),
        "fcos": save(
            detector_of(ModelConfig(backbones=("ResNet18C4",), classes=2, head="fcos"), bias=0.0), folders["fcos"]
        ),
        "rotated": save(
            detector_of(ModelConfig(backbones=("ResNet18C4",), classes=2, angles=ROTATED_ANGLES), bias=0.0),
            folders["rotated"],
            CATEGORIES,
        ),
        "onnx": str(folders["plain"] / "model.onnx"),
    }
    limits = PostprocessConfig(detections=30)
    export.export(
        ExportConfig(found["pth"], found["onnx"], size=(48, 64), precision="fp32", opset=18, postprocess=limits)
    )
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five images of four sizes and kinds: PNG, JPEG, one to be turned by its EXIF orientation, one gray, one WebP."""
    path = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    names = ("0.png", "1.jpg", "2.jpg", "3.png", "sub/4.webp")
    (path / "sub").mkdir()
    for i, (name, (w, h)) in enumerate(zip(names, SIZES, strict=True)):
        image = Image.fromarray(random.integers(0, 255, (h, w, 3), dtype=np.uint8))
        exif = Image.Exif()
        if i == 2:
            exif[0x0112] = 6
        more: dict[str, Any] = {"lossless": True} if i == 4 else {}
        (image.convert("L") if i == 3 else image).save(path / name, exif=exif, **more)
    return path


SIZE: dict[str, Any] = {"resize": 48, "max_size": 80}


def load(files: dict[str, str], name: str = "pth", **more: Any) -> Model:
    return odtk.load(files[name], device="cpu", **({} if name == "onnx" else SIZE), **more)


def paths_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_what_a_model_says_of_itself(files: dict[str, str]) -> None:
    model = load(files)
    assert model.names == ["cat", "dog"] and model.categories == CATEGORIES and not model.rotated
    assert repr(model) == "<Model model.pth (PyTorch): 2 classes, images shorter side 48, longer at most 80, fp32>"
    assert "fitted inside 48×64" in repr(load(files, "onnx"))


# ---------------------------------------------------------------------------------------------------------------------
# The detections of `odtk infer`


@pytest.mark.parametrize("loader", ["dali", "torch"])
@pytest.mark.parametrize("name", ["pth", "onnx", "fcos", "rotated"])
def test_the_detections_are_those_of_infer_to_the_bit(
    files: dict[str, str], folder: Path, tmp_path: Path, name: str, loader: str
) -> None:
    sizes = {} if name == "onnx" else SIZE
    expected = odtk.infer(
        files[name],
        images=str(folder),
        output=[str(tmp_path / "out.json")],
        devices="cpu",
        loader=loader,
        score_threshold=0.3,
        **sizes,
    )
    assert expected and {d["image_id"] for d in expected} == {1, 2, 3, 4, 5}
    model = load(files, name, threshold=0.3, loader=loader)
    for given in (folder, str(folder), paths_of(folder)):
        assert [d for found in model.predict(given) for d in found.to_coco()] == expected
    # The pixels of the same files from memory, in batches as above.
    in_memory = [pixels_of(path) for path in paths_of(folder)]
    if loader == "torch":
        assert [d for found in model.predict(in_memory) for d in found.to_coco()] == expected
        assert [d for found in model.predict(iter(in_memory), stream=True) for d in found.to_coco()] == expected


def test_batches_are_made_as_infer_makes_them(files: dict[str, str], folder: Path, tmp_path: Path) -> None:
    """With GroupNorm the padding of a batch changes the scores: what is alone is not what is in company."""
    model = load(files, "fcos")
    settings: dict[str, Any] = {"images": str(folder), "output": [str(tmp_path / "o.json")], "devices": "cpu", **SIZE}
    for batch in (1, 3):
        expected = odtk.infer(files["fcos"], batch=batch, **settings)
        assert [d for found in model.predict(folder, batch=batch) for d in found.to_coco()] == expected
    alone, together = model.predict(folder / "0.png"), model.predict(folder, batch=3)[0]
    assert not np.array_equal(alone.scores[:20], together.scores[:20])


def test_a_second_prediction_reuses_the_loader_and_finds_the_same(files: dict[str, str], folder: Path) -> None:
    model = load(files)
    first, second = model.predict(folder), model.predict(folder)
    [[loader]] = model._idle.values()
    assert loader.sampler.dataset.images == []  # it keeps no pixels
    for a, b in zip(first, second, strict=True):
        assert np.array_equal(a.rows, b.rows) and len(a)


# ---------------------------------------------------------------------------------------------------------------------
# Kinds of images


def test_every_kind_of_image_gives_the_same(files: dict[str, str], folder: Path) -> None:
    model, path = load(files, loader="torch"), folder / "0.png"
    pil = Image.open(path)
    array = np.array(pil)
    expected = model.predict(path)
    assert isinstance(expected, Detections) and expected.size == (64, 48) and len(expected) > 5
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    views = np.repeat(array, 2, axis=1)[:, ::2]  # not contiguous
    for image in (str(path), path.read_bytes(), bytearray(path.read_bytes()), pil, array, tensor, views):
        before = np.array(image) if isinstance(image, np.ndarray) else None
        found = model.predict(image)
        assert np.array_equal(found.rows, expected.rows) and found.size == (64, 48)
        assert before is None or np.array_equal(before, image)  # type: ignore[arg-type]
    mixed = model.predict([path, array, path.read_bytes()], batch=1)
    assert [found.image_id for found in mixed] == [1, 2, 3] and [found.path for found in mixed] == [path, None, None]
    assert all(np.array_equal(found.rows, expected.rows) for found in mixed)


def test_arrays_are_rgb(files: dict[str, str], folder: Path) -> None:
    model, array = load(files), np.array(Image.open(folder / "0.png"))
    assert not np.array_equal(model.predict(array).scores, model.predict(array[:, :, ::-1]).scores)


def test_a_file_and_its_bytes_are_turned_by_exif_and_a_pil_image_is_not(files: dict[str, str], folder: Path) -> None:
    model, path = load(files, loader="torch"), folder / "2.jpg"  # stored as 80×40
    of_file, of_bytes, of_pil = (model.predict(image) for image in (path, path.read_bytes(), Image.open(path)))
    assert of_file.size == of_bytes.size == (40, 80) and of_pil.size == (80, 40)
    assert np.array_equal(of_file.rows, of_bytes.rows)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros((8, 8, 3), dtype=np.float32), r"RGB, uint8 \[H, W, 3\], not float32 \[8, 8, 3\]"),
        (np.zeros((8, 8), dtype=np.uint8), r"not uint8 \[8, 8\]"),
        (np.zeros((2, 8, 8, 3), dtype=np.uint8), r"not uint8 \[2, 8, 8, 3\]"),
        (np.zeros((0, 8, 3), dtype=np.uint8), r"not uint8 \[0, 8, 3\]"),
        (torch.zeros(8, 8, 3, dtype=torch.uint8), r"RGB, uint8 \[3, H, W\], not uint8 \[8, 8, 3\]"),
        (torch.zeros(3, 8, 8), r"not float32 \[3, 8, 8\]"),
        (5, "Not an image, but of type int: give a path"),
        ([None], "Not an image, but of type NoneType"),
        ("nowhere.png", r"nowhere\.png does not exist: give the right one\.$"),
        ("x" * 5000, "does not exist"),
        ("~nobody-here/x.png", "does not exist"),
        ("", r"is empty: give a folder or files\.$"),
        ([str(Path(__file__).parent)], "inference is a folder: predict takes it alone"),
        (["nowhere.png"], "Cannot read nowhere.png: the file is missing"),
        ("nothing/*.png", r"No image matches .*, or another pattern\.$"),
        (b"no image", "Cannot read image 1: the image cannot be read"),
    ],
)
def test_what_is_no_image_is_named(files: dict[str, str], image: Any, words: str) -> None:
    with pytest.raises(OdtkError, match=words):
        load(files).predict(image)


def test_a_batch_of_nothing(files: dict[str, str], folder: Path) -> None:
    model = load(files)
    assert model.predict([]) == [] and list(model.predict([], stream=True)) == []
    wrong: list[Any] = [0, 1.5, True]
    for batch in wrong:
        with pytest.raises(OdtkError, match="batch: "):
            model.predict(folder, batch=batch)


def test_a_pattern_gives_a_list_and_a_stream_takes_a_batch_at_a_time(files: dict[str, str], folder: Path) -> None:
    model = load(files)
    assert [found.path for found in model.predict(str(folder / "*.png"))] == [folder / "0.png", folder / "3.png"]
    taken: list[int] = []

    def camera() -> Any:
        for number in range(1000):
            taken.append(number)
            yield np.full((48, 64, 3), number % 256, dtype=np.uint8)

    stream = model.predict(camera(), stream=True, batch=3)
    assert [next(stream).image_id for _ in range(4)] == [1, 2, 3, 4] and len(taken) == 6
    [one] = model.predict(folder / "0.png", stream=True)
    assert one.image_id == 1


# ---------------------------------------------------------------------------------------------------------------------
# Damage


@pytest.fixture
def damaged(folder: Path, tmp_path: Path) -> Path:
    """1.png is good, 2.jpg lacks its end, 3.png is damaged inside, 4.png is good."""
    good = (folder / "0.png").read_bytes()
    inside = bytearray(good)
    inside[len(good) // 2 : len(good) // 2 + 200] = bytes(200)
    whole = (folder / "1.jpg").read_bytes()
    for name, content in {"1.png": good, "2.jpg": whole[: len(whole) // 2], "3.png": inside, "4.png": good}.items():
        (tmp_path / name).write_bytes(bytes(content))
    return tmp_path


def test_a_damaged_image_is_an_error_that_names_it(files: dict[str, str], damaged: Path) -> None:
    model = load(files)
    with pytest.raises(OdtkError, match=r"2\.jpg: the file is truncated.*skip_damaged=True"):
        model.predict(damaged)
    with pytest.raises(OdtkError, match=r"Cannot read .*3\.png: the image cannot be read"):
        model.predict([damaged / "1.png", damaged / "3.png"])
    with pytest.raises(OdtkError, match="Cannot read image 2: the file is truncated"):
        model.predict([(damaged / "1.png").read_bytes(), (damaged / "2.jpg").read_bytes()])


def test_damaged_images_are_skipped_in_their_places(files: dict[str, str], damaged: Path, tmp_path: Path) -> None:
    model = load(files)
    found = model.predict(damaged, skip_damaged=True)
    assert [one.image_id for one in found] == [1, 2, 3, 4]
    assert [len(one) > 0 for one in found] == [True, False, False, True]
    assert [one.path.name for one in found if one.error and one.path] == ["2.jpg", "3.png"]
    assert found[1].size == (0, 0) and "truncated" in str(found[1].error) and found[1].to_coco() == []
    assert repr(found[1]).endswith("is missing>") and len(found[2].boxes) == 0
    expected = odtk.infer(files["pth"], images=str(damaged), output=[str(tmp_path / "o.json")], devices="cpu", **SIZE)
    assert [d for one in found for d in one.to_coco()] == expected  # infer leaves them out too
    again = model.predict(damaged / "4.png", batch=2)
    assert len(again) and again.error is None  # the loader that met the damage serves on


# ---------------------------------------------------------------------------------------------------------------------
# What was found


def test_boxes_are_continuous_and_in_pixels_of_the_image() -> None:
    rows = np.array([[1, 0.9, 10.0, 20.0, 30.0, 5.0], [0, 0.5, 0.0, 0.0, 64.0, 48.0]])
    found = Detections(rows, CATEGORIES, (64, 48))
    assert found.boxes.tolist() == [[10, 20, 40, 25], [0, 0, 64, 48]]
    assert found.labels.tolist() == [1, 0] and found.scores.tolist() == [0.9, 0.5] and found.names == ["dog", "cat"]
    assert found.rotated_boxes.tolist() == [[25, 22.5, 30, 5, 0], [32, 24, 64, 48, 0]]
    assert found.polygons[0].tolist() == [[10, 20], [40, 20], [40, 25], [10, 25]]
    assert found.to_coco(5)[0] == {
        "image_id": 5,
        "category_id": 7,
        "category": "dog",
        "bbox": [10, 20, 30, 5],
        "score": 0.9,
    }
    assert found.above(0.5).names == ["dog"] and len(found) == 2


def test_rotated_boxes_their_polygons_and_what_encloses_them(files: dict[str, str], folder: Path) -> None:
    model = load(files, "rotated")
    found = model.predict(folder / "0.png")
    assert model.rotated and found.rotated and found.rotated_boxes.shape == (len(found), 5)
    assert np.abs(found.rotated_boxes[:, 4]).max() > 0.1
    for polygon, box in zip(found.polygons, found.boxes, strict=True):
        assert [*polygon.min(axis=0), *polygon.max(axis=0)] == pytest.approx(box, abs=1e-6)
    # The angle turns counterclockwise on the screen: the polygon made anew from it is the same.
    x, y, w, h, theta = found.rotated_boxes[0]
    corner = np.array([-w / 2, -h / 2])
    turned = [x + np.cos(theta) * corner[0] + np.sin(theta) * corner[1]]
    turned += [y - np.sin(theta) * corner[0] + np.cos(theta) * corner[1]]
    assert turned == pytest.approx(found.polygons[0][0])
    result = found.to_coco()[0]
    assert len(result["bbox"]) == 5 and result["segmentation"][0] == pytest.approx(found.polygons[0].ravel(), abs=0.01)


def test_to_supervision(files: dict[str, str], folder: Path) -> None:
    supervision = pytest.importorskip("supervision")
    found = load(files).predict(folder / "0.png")
    theirs = found.to_supervision()
    assert isinstance(theirs, supervision.Detections) and len(theirs) == len(found)
    assert theirs.xyxy == pytest.approx(found.boxes, abs=1e-4) and theirs.class_id.tolist() == found.labels.tolist()
    assert theirs.data["class_name"].tolist() == found.names
    assert len(found.above(1.0).to_supervision()) == 0
    rotated = load(files, "rotated").predict(folder / "0.png")
    assert rotated.to_supervision().data["xyxyxyxy"] == pytest.approx(rotated.polygons, abs=1e-4)


def test_without_supervision_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(OdtkError, match="pip install supervision"):
        Detections(np.zeros((0, 6)), CATEGORIES, (4, 4)).to_supervision()


def test_pictures_have_the_size_of_the_image_and_the_boxes_in_their_places(tmp_path: Path) -> None:
    path = tmp_path / "gray.png"
    Image.new("RGB", (200, 100), (128, 128, 128)).save(path)
    found = Detections(np.array([[0, 0.9, 50.0, 40.0, 100.0, 50.0]]), CATEGORIES, (200, 100), path=path)
    for picture in (found.draw(), found.draw(Image.open(path)), found.draw(np.array(Image.open(path)))):
        assert picture.size == (200, 100)
        changed = (np.abs(np.asarray(picture).astype(int) - 128) > 60).any(axis=2)
        assert changed[88:92, 60:140].any() and not changed[:, :45].any() and not changed[:, 155:].any()
    with pytest.raises(OdtkError, match="another image than the one predicted on: this one has 10×10"):
        found.draw(Image.new("RGB", (10, 10)))
    with pytest.raises(OdtkError, match="needs the image"):
        Detections(np.zeros((0, 6)), CATEGORIES, (4, 4)).draw()
    with pytest.raises(OdtkError, match="Cannot draw on .*missing.png"):
        found.draw(tmp_path / "missing.png")


# ---------------------------------------------------------------------------------------------------------------------
# Threads


def test_threads_share_a_model(files: dict[str, str], folder: Path) -> None:
    model, paths = load(files, loader="torch"), paths_of(folder)
    expected = [model.predict(path).rows for path in paths]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: model.predict(paths[i % 5]).rows, range(40)))
    assert all(np.array_equal(rows, expected[i % 5]) for i, rows in enumerate(found))


def test_a_stream_that_is_not_read_to_its_end_disturbs_nothing(files: dict[str, str], folder: Path) -> None:
    model = load(files)
    expected = [found.rows for found in model.predict(folder)]
    stream = model.predict(folder, stream=True)
    first = next(stream)
    again = model.predict(folder)
    assert np.array_equal(first.rows, expected[0])
    assert all(np.array_equal(a.rows, rows) for a, rows in zip(again, expected, strict=True))
    assert [np.array_equal(found.rows, rows) for found, rows in zip(stream, expected[1:], strict=True)] == [True] * 4


def test_an_image_of_a_kind_that_pillow_cannot_convert(files: dict[str, str]) -> None:
    with pytest.raises(OdtkError, match="Cannot read image 1: its pixels are floats"):
        load(files).predict(Image.fromarray(np.zeros((8, 8), dtype=np.float32)))
    truncated = io.BytesIO()
    Image.effect_noise((64, 48), 60).convert("RGB").save(truncated, "PNG")
    with pytest.raises(OdtkError, match="Cannot read image 1: the image cannot be read"):
        load(files).predict(Image.open(io.BytesIO(truncated.getvalue()[:2000])))
