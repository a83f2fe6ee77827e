"""Images in tiles: where they lie, what becomes of objects on their edges, and supervision's slicer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import odtk
from odtk.categories import Category
from odtk.cli import main
from odtk.config import ROTATED_ANGLES, LoaderConfig, ModelConfig, OdtkError, PostprocessConfig, TilesConfig
from odtk.inference import tiles
from odtk.inference.backends import Backend
from odtk.inference.predict import Model
from odtk.inference.tiles import is_cut, merge, pieces, windows_of
from odtk.postprocess import BatchDetections
from tests.random_models import detector_of, save

SIZE: dict[str, Any] = {"device": "cpu", "resize": 48, "max_size": 80}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    config = ModelConfig(backbones=("ResNet18C4",), classes=2)
    categories = Category(3, "cell"), Category(8, "plate")
    return save(detector_of(config, bias=0.0), tmp_path_factory.mktemp("model"), categories)


def noise(width: int, height: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# Where tiles lie


def test_tiles_have_one_size_and_cover_the_image() -> None:
    assert windows_of(100, 70, TilesConfig((40, 60), 0.25)) == [
        *((0, 0, 60, 40), (40, 0, 100, 40)),
        *((0, 30, 60, 70), (40, 30, 100, 70)),
    ]
    assert windows_of(50, 30, TilesConfig((40, 60))) == [(0, 0, 50, 30)], "an image smaller than a tile is one"
    assert windows_of(61, 40, TilesConfig((40, 60), 0.0)) == [(0, 0, 60, 40), (1, 0, 61, 40)]
    random = np.random.default_rng(0)
    for _ in range(50):
        width, height, h, w = random.integers(1, 200, 4).tolist()
        config = TilesConfig((h, w), float(random.uniform(0, 0.95)))
        seen = np.zeros((height, width), dtype=bool)
        for x1, y1, x2, y2 in windows_of(width, height, config):
            assert (x2 - x1, y2 - y1) == (min(w, width), min(h, height))
            seen[y1:y2, x1:x2] = True
        assert seen.all()


# ---------------------------------------------------------------------------------------------------------------------
# Merging


def row(x: float, y: float, w: float, h: float, score: float = 0.9, label: int = 0) -> list[float]:
    return [label, score, x, y, w, h]


WINDOWS = [(0, 0, 100, 100), (80, 0, 180, 100)]  # of an image of 180×100


def test_an_object_that_two_tiles_show_is_one() -> None:
    found = merge([np.array([row(84, 10, 12, 20, 0.8)]), np.array([row(4, 10, 12, 20, 0.9)])], WINDOWS, 0.5)
    np.testing.assert_allclose(found, [row(84, 10, 12, 20, 0.9)], rtol=1e-6)
    two = merge([np.array([row(84, 10, 12, 20)]), np.array([row(4, 10, 12, 20, label=1)])], WINDOWS, 0.5)
    assert len(two) == 2, "of another class"


def test_a_piece_goes_even_where_it_scores_higher() -> None:
    whole, piece = row(85, 10, 40, 20, 0.6), row(85, 10, 15, 20, 0.9)
    found = merge([np.array([piece]), np.array([[0, 0.6, 5, 10, 40, 20]])], WINDOWS, 0.5)
    np.testing.assert_allclose(found, [whole], rtol=1e-6)


def test_a_whole_object_inside_another_stays() -> None:
    found = merge([np.array([row(10, 10, 60, 60), row(30, 30, 10, 10)]), np.zeros((0, 6))], WINDOWS, 0.5)
    assert len(found) == 2


def test_only_edges_within_the_image_cut() -> None:
    rows = np.array([row(0, 10, 20, 20), row(80, 10, 20, 20), row(10, 80, 20, 20), row(10, 0, 20, 20)])
    assert is_cut(rows, WINDOWS[0], WINDOWS).tolist() == [False, True, False, False]
    assert is_cut(rows, WINDOWS[1], WINDOWS).tolist() == [True, False, False, False]
    four = [(0, 0, 100, 100), (0, 80, 100, 180)]
    assert is_cut(rows, four[0], four).tolist() == [False, False, True, False]
    assert is_cut(rows, four[1], four).tolist() == [False, False, False, True]


def test_of_two_pieces_none_goes() -> None:
    """An object larger than the overlap is cut everywhere: what there is of it stays."""
    rows = np.array([row(0, 0, 100, 50), row(20, 0, 80, 50)])
    assert not pieces(rows, np.array([True, True]), 0.5).any()
    assert pieces(rows, np.array([False, True]), 0.5).tolist() == [False, True]


def test_nothing_found() -> None:
    assert merge([np.zeros((0, 6)), np.zeros((0, 6))], WINDOWS, 0.5).shape == (0, 6)
    assert merge([np.zeros((0, 7)), np.zeros((0, 7))], WINDOWS, 0.5).shape == (0, 7)


# ---------------------------------------------------------------------------------------------------------------------
# Planted objects: a detector that finds bright rectangles exactly


class Bright(Backend):
    """Finds rectangles that are brighter than the middle of a batch's values, each of its own gray background."""

    name, stride, classes, categories = "bright", 32, 1, (Category(5, "spot"),)
    size, rotated, precision, thresholds = None, False, "fp32", PostprocessConfig(detections=40)
    largest = 0

    def __call__(self, images: Tensor) -> BatchDetections:
        from scipy.ndimage import find_objects, label

        self.largest = max(self.largest, len(images))
        found = BatchDetections(
            torch.zeros(len(images), 40), torch.zeros(len(images), 40, 4), torch.zeros(len(images), 40).long()
        )
        values = images.float().mean(1)
        middle = (values.min() + values.max()) / 2
        if values.max() == values.min():
            return found
        for i, image in enumerate(values):
            for k, (rows, columns) in enumerate(find_objects(label((image > middle).numpy())[0])):
                box = [columns.start, rows.start, columns.stop - 1, rows.stop - 1]
                found.scores[i, k], found.boxes[i, k] = 0.9 - 0.01 * k, torch.tensor(box).float()
        return found


def test_tiny_objects_of_a_large_image_are_each_found_once() -> None:
    pytest.importorskip("scipy")
    pixels = np.zeros((330, 500, 3), dtype=np.uint8)
    expected = []
    for x in range(3, 480, 23):  # on edges of tiles, in overlaps, everywhere
        for y in range(2, 315, 29):
            pixels[y : y + 9, x : x + 11] = 255
            expected.append((x, y, x + 11, y + 9))
    backend = Bright()
    data = LoaderConfig("", resize=96, max_size=128, padding="black", loader="torch")
    model = Model(backend, data, backend.categories, TilesConfig((96, 128), 0.2))
    found = model.predict(pixels, batch=3)
    assert backend.largest == 3, "tiles go through the backend in batches"
    assert sorted(map(tuple, np.round(found.boxes).astype(int).tolist())) == sorted(expected)
    np.testing.assert_allclose(found.boxes, np.round(found.boxes), atol=1e-3)
    assert len(found) == len(expected) > 40, "the limit of detections is that of a tile"


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs


def test_supervision_finds_the_same(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    supervision = pytest.importorskip("supervision")
    monkeypatch.setattr(
        tiles, "pieces", lambda rows, cut, threshold: np.zeros(len(rows), dtype=bool)
    )  # it has no such rule
    pixels = noise(150, 110)
    whole = odtk.load(model, **SIZE)
    slicer = supervision.InferenceSlicer(
        callback=lambda image: whole.predict(np.ascontiguousarray(image), batch=1).to_supervision(),
        slice_wh=(64, 48),
        overlap_wh=(16, 12),
        iou_threshold=0.5,
    )
    reference = slicer(pixels)
    reference = reference[np.argsort(-reference.confidence, kind="stable")]
    found = odtk.load(model, **SIZE, tiles=(48, 64), overlap=0.25).predict(pixels)
    assert len(found) == len(reference) > 50
    np.testing.assert_allclose(found.scores, reference.confidence, atol=1e-5)
    np.testing.assert_array_equal(found.labels, reference.class_id)
    np.testing.assert_allclose(found.boxes, reference.xyxy, atol=2e-3)


def test_one_tile_is_the_whole_image(model: str) -> None:
    pixels = noise(64, 48)
    found, same = (odtk.load(model, **SIZE, tiles=size).predict(pixels) for size in ((64, 64), None))
    np.testing.assert_allclose(found.rows, same.rows, atol=1e-3)


def test_rotated_boxes_in_tiles(tmp_path: Path) -> None:
    config = ModelConfig(backbones=("ResNet18C4",), classes=2, angles=ROTATED_ANGLES)
    path = save(detector_of(config, bias=0.0), tmp_path)
    pixels = noise(64, 48)
    found, same = (odtk.load(path, **SIZE, tiles=size).predict(pixels) for size in ((64, 64), None))
    assert found.rows.shape == same.rows.shape and found.rotated
    np.testing.assert_allclose(found.rotated_boxes, same.rotated_boxes, atol=1e-3)
    assert len(odtk.load(path, **SIZE, tiles=(40, 40)).predict(noise(90, 70))) > len(found)


def infer(model: str, folder: Path, out: Path, *more: Any) -> int:
    argv = ["infer", model, "--images", folder, "--output", out, "--resize", 48, "--max-size", 80, *more]
    return main([str(a) for a in argv])


def test_infer_finds_what_predict_finds_and_names_damage(
    model: str, coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(noise(150, 110)).save(coco / "0.png")
    content = (coco / "1.jpg").read_bytes()
    (coco / "1.jpg").write_bytes(content[:400] + bytes(200) + content[600:])  # found out when it is decoded
    out = tmp_path / "o.json"
    argv = ["--tiles", 40, 50, "--overlap", 0.3, "--devices", "cpu"]
    assert infer(model, coco, out, *argv) == 0
    printed = capsys.readouterr()
    assert "in tiles" in printed.out or "tiles of 40×50 that overlap by 30%, each shorter side 48" in printed.out
    loaded = odtk.load(model, **SIZE, tiles=(40, 50), overlap=0.3)
    expected = loaded.predict(coco, stream=False, skip_damaged=True)
    assert json.loads(out.read_text()) == [d for one in expected for d in one.to_coco()]
    assert {d["image_id"] for d in json.loads(out.read_text())} >= {1, 3}


def test_a_truncated_file_in_tiles(model: str, coco: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    from odtk.data.images import ImageError
    from odtk.data.records import Image as Record

    whole = Record.decode

    def decode(self: Record) -> np.ndarray:
        if self.path.name == "1.jpg":
            raise ImageError("the image cannot be read (it ends early)")
        return whole(self)

    monkeypatch.setattr(Record, "decode", decode)
    argv = ["--tiles", 40, "--devices", "cpu"]
    assert infer(model, coco, tmp_path / "o.json", *argv) == 0
    printed = capsys.readouterr()
    assert "1.jpg (image 1) gets no detections: the image cannot be read (it ends early)." in printed.err
    assert "(1 damaged one without detections)" in printed.out
    assert {d["image_id"] for d in json.loads((tmp_path / "o.json").read_text())} == {2}
    assert infer(model, coco, tmp_path / "strict.json", *argv, "--strict") == 1
    assert "1.jpg is damaged (1 such image)" in capsys.readouterr().err and not (tmp_path / "strict.json").exists()


def test_with_annotations_tiles_are_scored(model: str, coco: Path, tmp_path: Path, capsys) -> None:
    argv = ["--annotations", coco / "truth.json", "--tiles", 40, "--devices", "cpu"]
    assert infer(model, coco, tmp_path / "o.json", *argv) == 0
    assert "AP50" in (printed := capsys.readouterr().out) and "tiles of 40×40" in printed


@pytest.mark.slow
def test_tiles_over_two_processes(model: str, coco: Path, tmp_path: Path) -> None:
    for i in range(3, 6):
        Image.fromarray(noise(60 + 10 * i, 70)).save(coco / f"{i}.png")
    outs = [tmp_path / "one.json", tmp_path / "two.json"]
    for out, devices in zip(outs, ("cpu", "cpu:2"), strict=True):
        assert infer(model, coco, out, "--tiles", 40, "--devices", devices, "--batch", 2) == 0
    one, two = (json.loads(out.read_text()) for out in outs)
    assert [(d["image_id"], d["category_id"]) for d in one] == [(d["image_id"], d["category_id"]) for d in two]
    assert len({d["image_id"] for d in one}) == 5
    np.testing.assert_allclose([d["bbox"] for d in one], [d["bbox"] for d in two], atol=1e-3)


def test_settings_of_tiles(model: str) -> None:
    for more, words in (
        ({"overlap": 0.5}, "--overlap needs --tiles"),
        ({"tiles": 64, "overlap": 1}, "--overlap 1: tiles must share less"),
        ({"tiles": [1, 2, 3]}, "--tiles takes 1 to 2 values"),
    ):
        with pytest.raises(OdtkError, match=words):
            odtk.infer(model, **more)
    assert "tiles of 64×32 that overlap by 20%" in repr(odtk.load(model, **SIZE, tiles=(64, 32)))
