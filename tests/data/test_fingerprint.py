"""The numbers that describe a dataset: what they say of known data, near-duplicates, and the cache."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PILImage

from odtk.config import OdtkError
from odtk.data import fingerprint as module
from odtk.data.dataset import Dataset
from odtk.data.fingerprint import Fingerprint, difference_hashes, fingerprint, near_duplicates


def photo(seed: int, size: tuple[int, int] = (120, 90)) -> PILImage.Image:
    """Smooth random color, as photos are."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return PILImage.fromarray(small).resize(size, PILImage.Resampling.BICUBIC)


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """Three photos, a noisy JPEG of the first, its mirror image turned by 90 degrees, and a gray one; known boxes."""
    pictures = [photo(0), photo(1), photo(2)]
    noise = np.random.default_rng(9).integers(-6, 7, (90, 120, 3))
    pictures.append(PILImage.fromarray(np.clip(np.asarray(pictures[0]).astype(int) + noise, 0, 255).astype(np.uint8)))
    mirrored = pictures[0].transpose(PILImage.Transpose.FLIP_LEFT_RIGHT)
    pictures.append(mirrored.transpose(PILImage.Transpose.ROTATE_90))
    pictures.append(photo(5).convert("L").convert("RGB"))
    for i, picture in enumerate(pictures, 1):
        picture.save(tmp_path / f"{i}.jpg", quality=85)
    boxes = [(1, 1, [10, 10, 16, 16]), (1, 1, [12, 10, 16, 16]), (1, 2, [60, 40, 40, 10]), (2, 1, [0, 0, 90, 90])]
    content = {
        "images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(1, 7)],
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}, {"id": 3, "name": "never"}],
        "annotations": [{"id": n, "image_id": i, "category_id": c, "bbox": b} for n, (i, c, b) in enumerate(boxes)],
    }
    (tmp_path / "t.json").write_text(json.dumps(content))
    return Dataset.load(tmp_path / "t.json", tmp_path)


def test_known_numbers(dataset: Dataset, tmp_path: Path) -> None:
    found = fingerprint(dataset, cache=tmp_path / "cache")
    assert (found.images, found.empty, found.boxes) == (6, 4, 4)
    assert (found.width[0], found.width[2], found.height[2], found.height[4]) == (90, 120, 90, 120)
    assert found.side == (16, 16, 20, 90, 90) and found.relative_side[4] == 1
    assert found.aspect == (1, 1, 1, 4, 4) and found.per_image == (1, 1, 1, 3, 3)
    assert found.classes == ((1, "a", 3, 2), (2, "b", 1, 1), (3, "never", 0, 0)) and found.imbalance == 3
    assert found.crowded == 0.5  # two of four: their IoU is 14/18
    assert found.gray == round(1 / 6, 4)
    text = "\n".join(found.lines())
    assert "6 images, 4 without boxes" in text and "mixed images" in text and "2 of 6 images" in text


def test_copies_are_found_in_every_orientation(dataset: Dataset, tmp_path: Path) -> None:
    found = fingerprint(dataset, cache=tmp_path / "cache")
    assert dict(found.groups) == {0: 0, 1: 1, 2: 2, 3: 0, 4: 0, 5: 5}
    assert found.copies == 2 and found.distinct_images == 4
    pixels = np.asarray(photo(7))
    every = difference_hashes(pixels)
    for turns in range(4):
        for one in (np.rot90(pixels, turns), np.rot90(pixels[:, ::-1], turns)):
            upright = difference_hashes(np.ascontiguousarray(one))[0]
            assert min((upright ^ other).bit_count() for other in every) <= module.HASH_DISTANCE


def test_chains_are_one_group_and_unreadable_images_are_alone() -> None:
    def hashes(bits: int) -> tuple[int, ...]:
        return (bits, *[(1 << 63) - 1 - 997 * k for k in range(7)])  # its other orientations are far from all

    frames = [hashes(0), hashes(0b111), hashes(0b111111), hashes(0xFFFF0000), (), ()]
    assert near_duplicates(frames) == [0, 0, 0, 3, 4, 5]
    assert near_duplicates([]) == []


def test_different_images_are_not_copies() -> None:
    hashes = [difference_hashes(np.asarray(photo(seed))) for seed in range(60)]
    assert near_duplicates(hashes) == list(range(60))


def test_the_cache_spares_the_decoding_until_something_changes(dataset: Dataset, tmp_path: Path, monkeypatch) -> None:
    cache = tmp_path / "cache"
    first = fingerprint(dataset, cache=cache)

    def refuse(*_: object) -> None:
        raise AssertionError("decoded again")

    with monkeypatch.context() as patch:
        patch.setattr(module.Image, "decode", refuse)
        assert fingerprint(dataset, cache=cache) == first
        os.utime(dataset.images[0].path, ns=(1, 1))
        with pytest.raises(AssertionError):
            fingerprint(dataset, cache=cache)
    dataset.images[1].boxes = dataset.images[1].boxes / 2
    assert fingerprint(dataset, cache=cache).side[4] == 45
    for path in cache.iterdir():
        path.write_text("{")
    assert fingerprint(dataset, cache=cache).side[4] == 45
    (tmp_path / "file").write_text("")
    assert fingerprint(dataset, cache=tmp_path / "file" / "below").side[4] == 45, "no cache, no harm"


def test_another_version_is_made_anew(dataset: Dataset, tmp_path: Path) -> None:
    found = fingerprint(dataset, cache=tmp_path / "cache")
    assert Fingerprint.from_json(found.to_json()) == found
    for text in (
        found.to_json().replace(f'"version": {module.VERSION}', '"version": 0'),
        "[]",
        f'{{"version": {module.VERSION}}}',
    ):
        with pytest.raises(ValueError):
            Fingerprint.from_json(text)


def test_a_set_without_boxes_or_images(dataset: Dataset, tmp_path: Path) -> None:
    for image in dataset.images:
        image.boxes, image.labels = np.zeros((0, 4)), np.zeros(0, dtype=np.int64)
    found = fingerprint(dataset, cache=tmp_path / "cache")
    assert found.boxes == 0 and found.side == () and found.imbalance == 1 and len(found.lines()) == 2
    dataset.images[0].path.write_bytes(b"damaged")
    assert dict(fingerprint(dataset, cache=tmp_path / "cache").groups)[0] == 0
    with pytest.raises(OdtkError, match="no usable image"):
        fingerprint(Dataset([], ()), cache=tmp_path / "cache")


def test_posture_is_seen(tmp_path: Path) -> None:
    """Tall boxes that are larger the lower they are, under a bright sky; and the same turned by quarter turns."""
    generator = np.random.default_rng(3)
    images: list[dict] = []
    annotations: list[dict] = []
    sky = np.repeat(np.linspace(200, 60, 90)[:, None], 120, axis=1).astype(np.uint8)
    for i in range(1, 9):
        PILImage.fromarray(sky).save(tmp_path / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png"})
        for _ in range(4):
            y = float(generator.uniform(10, 60))
            box = [float(generator.uniform(10, 90)), y, 4 + y / 10, 8 + y / 5]
            annotations.append({"id": len(annotations) + 1, "image_id": i, "category_id": 1, "bbox": box})
    content = {"images": images, "categories": [{"id": 1, "name": "a"}], "annotations": annotations}
    (tmp_path / "t.json").write_text(json.dumps(content))
    found = fingerprint(Dataset.load(tmp_path / "t.json", tmp_path), cache=tmp_path / "cache")
    assert found.lean == pytest.approx(np.log(2), abs=1e-3) and found.depth > 0.9 and found.whole == 32
    assert found.light == pytest.approx(70, abs=3) and found.contrast == pytest.approx(140 / 12**0.5, abs=2)
    assert found.is_gray and -0.1 < found.drop < 0.1
    for entry in annotations[::2]:
        entry["bbox"][2:] = entry["bbox"][3:1:-1]
    (tmp_path / "t.json").write_text(json.dumps(content))
    mixed = fingerprint(Dataset.load(tmp_path / "t.json", tmp_path), cache=tmp_path / "cache")
    assert mixed.whole == 32 and mixed.lean < 0.7


def test_the_posture_of_rotated_boxes_is_that_of_the_upright_ones_around_them(tmp_path: Path) -> None:
    """Bars of 40×10 that all lie at 0.1 radians lean; those in every direction do not, whatever their sides say."""
    photo(0).save(tmp_path / "1.png")

    def found(angles: np.ndarray) -> Fingerprint:
        content = {
            "images": [{"id": 1, "file_name": "1.png"}],
            "categories": [{"id": 1, "name": "a"}],
            "annotations": [
                {"id": n, "image_id": 1, "category_id": 1, "bbox": [25, 35, 40, 10, float(angle)]}
                for n, angle in enumerate(angles, 1)
            ],
        }
        (tmp_path / "t.json").write_text(json.dumps(content))
        return fingerprint(Dataset.load(tmp_path / "t.json", tmp_path, rotated=True), cache=tmp_path / "cache")

    lying = found(np.full(40, 0.1))
    width, height = 40 * np.cos(0.1) + 10 * np.sin(0.1), 10 * np.cos(0.1) + 40 * np.sin(0.1)
    assert lying.lean == pytest.approx(np.log(width / height), abs=1e-3) and lying.whole == 40
    assert found(np.linspace(0, np.pi, 40, endpoint=False)).lean < 0.1
