"""The drawn dataset is valid COCO, its boxes are exact, and the same seed draws the same files."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from odtk.config import OdtkError
from odtk.data.check import check
from odtk.data.images import decode
from odtk.data.synthetic import ROTATED_SHAPES, SHAPES, Scene, draw_image, synthesize


@pytest.mark.parametrize("rotated", [False, True])
def test_the_dataset_is_clean(tmp_path, rotated) -> None:
    synthesize(tmp_path / "set", images=20, size=(96, 128), classes=3, rotated=rotated)
    for part, count in (("train", 16), ("val", 4)):
        report = check(tmp_path / "set" / f"{part}.json", tmp_path / "set" / part, rotated=rotated)
        assert [f for f in report.faults if "category without" not in f.rule] == []
        assert len(report.dataset.images) == count
        assert all((i.width, i.height) == (128, 96) and len(i.boxes) for i in report.dataset.images)
        assert [c.name for c in report.dataset.categories] == list(ROTATED_SHAPES if rotated else SHAPES)[:3]
    first, other = (decode(tmp_path / "set" / part / "00001.jpg") for part in ("train", "val"))
    assert (first != other).any()  # validation does not repeat training


def test_the_same_seed_draws_the_same(tmp_path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        synthesize(tmp_path / name, images=4, size=(64, 64), seed=seed)
    a, b, c = ((tmp_path / name / "train" / "00002.jpg").read_bytes() for name in "abc")
    assert a == b != c
    assert (tmp_path / "a" / "train.json").read_text() == (tmp_path / "b" / "train.json").read_text()


def polygon_mask(points: np.ndarray, height: int, width: int) -> np.ndarray:
    """Pixels whose center is inside a polygon [k, 2], by the even-odd rule."""
    y, x = np.mgrid[:height, :width] + 0.5
    inside = np.zeros((height, width), bool)
    for (x1, y1), (x2, y2) in zip(points, np.roll(points, 1, axis=0), strict=True):
        crosses = (y1 > y) != (y2 > y)
        with np.errstate(divide="ignore", invalid="ignore"):
            inside ^= crosses & (x < (x2 - x1) * (y - y1) / (y2 - y1) + x1)
    return inside


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_boxes_hold_exactly_the_drawn_shape(name, rotated) -> None:
    names = list(ROTATED_SHAPES if rotated else SHAPES)
    name = {"circle": "ellipse", "square": "rectangle"}.get(name, name) if rotated else name
    assert name in names
    generator = np.random.default_rng(5)
    for _ in range(3):
        image, (entry,) = draw_image(generator, (120, 160), [name], rotated, Scene(objects=(1, 1)))
        points = np.array(entry["segmentation"][0]).reshape(-1, 2)  # [2·k] → [k, 2]
        x, y, w, h = entry["bbox"][:4]
        if rotated:  # the box's corners, rotated counterclockwise about its center (y down)
            theta = entry["bbox"][4]
            cos, sin = math.cos(theta), math.sin(theta)
            offsets = np.array([[-w, -h], [w, -h], [w, h], [-w, h]]) / 2
            corners = offsets @ np.array([[cos, -sin], [sin, cos]]) + (x + w / 2, y + h / 2)
            assert np.allclose(corners, points, atol=0.02)
        else:
            assert np.allclose(points.min(axis=0), (x, y), atol=0.02)
            assert np.allclose(points.max(axis=0), (x + w, y + h), atol=0.02)
            pixels = np.asarray(image).astype(float)
            inside = polygon_mask(points, 120, 160)
            grown = polygon_mask((points - points.mean(axis=0)) * 1.3 + points.mean(axis=0), 120, 160)
            ring = grown & ~inside
            assert inside.any() and np.abs(pixels[inside].mean(axis=0) - pixels[ring].mean(axis=0)).sum() > 40


def test_rotated_pixels_are_inside_the_rotated_box() -> None:
    """A rectangle has its own color inside the box and another outside, which a wrong sign of theta would change."""
    generator = np.random.default_rng(1)
    for _ in range(5):
        image, (entry,) = draw_image(generator, (120, 160), ["rectangle"], True, Scene(objects=(1, 1)))
        x, y, w, h, theta = entry["bbox"]
        rows, columns = np.mgrid[:120, :160] + 0.5
        dx, dy = columns - (x + w / 2), rows - (y + h / 2)
        along, across = math.cos(theta) * dx - math.sin(theta) * dy, math.sin(theta) * dx + math.cos(theta) * dy
        distance = np.maximum(np.abs(along) - w / 2, np.abs(across) - h / 2)
        pixels = np.asarray(image).astype(float)
        fill = np.median(pixels[distance < -3], axis=0)
        near = np.abs(pixels - fill).sum(axis=2) < 70
        assert near[distance < -3].mean() > 0.9 and near[distance > 4].mean() < 0.2


def test_refusals_are_one_sentence(tmp_path) -> None:
    with pytest.raises(OdtkError, match="1 to 8, not 9"):
        synthesize(tmp_path, classes=9)
    with pytest.raises(OdtkError, match="at least 2 images"):
        synthesize(tmp_path, images=1)
    (tmp_path / "train.json").write_text(json.dumps({"images": []}))
    with pytest.raises(OdtkError, match="not drawn by odtk synth"):
        synthesize(tmp_path, images=4)
    (tmp_path / "file").write_text("")
    with pytest.raises(OdtkError, match="cannot be written"):
        synthesize(tmp_path / "file" / "set", images=4)
    assert json.loads((tmp_path / "train.json").read_text()) == {"images": []}  # untouched


def test_drawing_again_replaces_its_own(tmp_path: Path) -> None:
    synthesize(tmp_path, images=4, size=(64, 64), seed=1)
    before = (tmp_path / "train.json").read_text()
    synthesize(tmp_path, images=4, size=(64, 64), seed=2)
    assert (tmp_path / "train.json").read_text() != before


def test_images_of_the_user_are_not_drawn_over(tmp_path: Path) -> None:
    """Without a JSON of ours, everything in train/ and val/ is the user's."""
    for part in ("train", "val"):
        folder = tmp_path / part
        (folder / part).mkdir(parents=True)
        (folder / part / "00001.jpg").write_bytes(b"mine")
        with pytest.raises(OdtkError, match=f"{part} has files that were not drawn by odtk synth"):
            synthesize(folder, images=4, size=(64, 64))
        assert [p.read_bytes() for p in folder.rglob("*.*")] == [b"mine"]


def test_an_interrupted_drawing_can_be_drawn_again(tmp_path: Path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("odtk.data.synthetic._paint", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            synthesize(tmp_path, images=4, size=(64, 64))
    (tmp_path / "train" / "00001.jpg").write_bytes(b"torn")
    synthesize(tmp_path, images=4, size=(64, 64))
    assert len(list((tmp_path / "train").iterdir())) == 3


def test_scenes_are_drawn_as_asked(tmp_path) -> None:
    scene = Scene(sides=(0.03, 0.05), objects=(20, 30), imbalance=10, gray=True, clutter=15)
    synthesize(tmp_path / "set", images=20, size=(200, 300), classes=3, scene=scene)
    boxes = json.loads((tmp_path / "set" / "train.json").read_text())["annotations"]
    counts = [sum(a["category_id"] == c for a in boxes) for c in (1, 2, 3)]
    assert counts[0] > counts[1] > counts[2] > 0 and 4 < counts[0] / counts[2] < 25
    assert all(3 < math.sqrt(a["area"]) < 16 for a in boxes) and 15 < len(boxes) / 16 <= 30
    pixels = decode(tmp_path / "set" / "train" / "00001.jpg").astype(int)
    assert (pixels.max(axis=2) - pixels.min(axis=2)).max() <= 2
    assert np.allclose(Scene(imbalance=4).shares(3), [4 / 7, 2 / 7, 1 / 7])
    plain, crowded = (
        draw_image(np.random.default_rng(1), (96, 96), ["star"], False, Scene(clutter=n)) for n in (0, 40)
    )
    assert np.abs(np.asarray(plain[0], int) - np.asarray(crowded[0], int)).mean() > 3
