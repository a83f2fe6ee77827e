"""DALI's Batches equal the torch loader's: pixels within 2/255 on average, boxes bit for bit."""

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from PIL import ImageFilter

from odtk.categories import Category
from odtk.config import AugmentConfig, LoaderConfig
from odtk.data.batch import Batch
from odtk.data.check import check
from odtk.data.dataset import Dataset
from odtk.data.loader import create_loader
from odtk.data.records import Image
from odtk.model.detector import normalize

pytest.importorskip("nvidia.dali", reason="DALI is not installed")
dali = pytest.importorskip("odtk.data.dali")

STRONG = AugmentConfig(rotate=True, free_rotate=(-30, 30), brightness=0.2, contrast=0.2, hue=0.1, saturation=0.3)
MODES: dict[str, dict[str, Any]] = {
    "shorter side": {"resize": 96, "max_size": 130},
    "enlarged": {"resize": 200, "max_size": 400},
    "letterbox": {"size": (128, 96)},
    "training": {"training": True, "jitter": (64, 160), "max_size": 200},
    "training, every augmentation": {"training": True, "jitter": (64, 160), "max_size": 200, "augment": STRONG},
    "training, scale": {
        "training": True,
        "jitter": (96, 96),
        "max_size": 200,
        "padding": "black",
        "augment": replace(STRONG, free_rotate=(0.0, 0.0), crop=0.0, scale=(0.5, 2.0)),
    },
    "training, scale and free rotation": {
        "training": True,
        "jitter": (96, 96),
        "max_size": 200,
        "padding": "black",
        "augment": replace(STRONG, scale=(0.5, 2.0)),
    },
    "classified": {"square": 96},
    "classified, training": {"training": True, "square": 96, "augment": replace(STRONG, free_rotate=(0.0, 0.0))},
    "letterbox, black": {"size": (128, 96), "padding": "black", "mean": (0.5, 0.4, 0.3)},
    "training, black": {"training": True, "jitter": (64, 160), "max_size": 200, "augment": STRONG, "padding": "black"},
}


def picture(seed: int, width: int = 160, height: int = 120) -> PILImage.Image:
    """A picture with smooth edges, somewhat like a photograph."""
    generator = np.random.default_rng(seed)
    coarse = PILImage.fromarray(generator.integers(0, 256, (9, 12, 3)).astype(np.uint8))
    image = coarse.resize((width, height), PILImage.Resampling.NEAREST)
    return image.filter(ImageFilter.GaussianBlur(1))


@pytest.fixture
def files(tmp_path: Path) -> Dataset:
    generator = np.random.default_rng(2)
    images = []
    for i in range(5):
        width, height = (160, 120) if i % 2 else (90, 150)
        picture(i, width, height).save(tmp_path / f"{i}.jpg", quality=92)
        size = generator.uniform(20, 60, (3, 2))
        boxes = np.concatenate([generator.random((3, 2)) * ((width, height) - size), size], axis=1)
        images.append(Image(i + 1, tmp_path / f"{i}.jpg", width, height, boxes, np.arange(3) % 2))
    return Dataset(images, (Category(1, "a"), Category(2, "b")))


def batches(dataset: Dataset, loader: str, count: int, **settings) -> list[Batch]:
    config = replace(LoaderConfig("images", batch=2, workers=2, loader=loader), **settings)
    return list(islice(create_loader(dataset, config), count))


def assert_equal(a: Batch, b: Batch, limit: float = 2.0) -> None:
    """Pixels of each image on average within ``limit`` gray values, everything else equal."""
    assert a.images.shape == b.images.shape and a.images.dtype == b.images.dtype
    std = torch.tensor(LoaderConfig("").std)[:, None, None]
    difference = ((a.images - b.images) * std * 255).abs().mean(dim=(1, 2, 3))
    assert difference.max() < limit, difference
    assert torch.equal(a.boxes, b.boxes) and torch.equal(a.labels, b.labels)
    assert torch.equal(a.ids, b.ids) and torch.equal(a.scales, b.scales)


@pytest.mark.parametrize("mode", MODES)
def test_both_loaders_give_the_same_batches(files, mode) -> None:
    pairs = list(zip(batches(files, "torch", 5, **MODES[mode]), batches(files, "dali", 5, **MODES[mode]), strict=True))
    assert len(pairs) == (5 if "training" in mode else 3)
    for a, b in pairs:
        assert_equal(a, b, limit=1.0)
        assert a.images.std() > 0.3  # the images are not empty


@pytest.mark.parametrize("mode", MODES)
def test_both_loaders_agree_on_real_images(bccd, mode) -> None:
    dataset = Dataset.load(bccd / "val.json", bccd / "val")
    settings = {k: v for k, v in MODES[mode].items()} | {"batch": 4}
    for a, b in zip(batches(dataset, "torch", 3, **settings), batches(dataset, "dali", 3, **settings), strict=True):
        assert_equal(a, b, limit=1.0)


@pytest.mark.parametrize("mode", ["shorter side", "enlarged", "letterbox", "letterbox, black"])
def test_pixels_are_those_that_are_normalized(files, mode) -> None:
    """uint8, float32 and normalized batches hold the same pixels, and nearly those of the torch loader."""
    settings = LoaderConfig("", **MODES[mode])
    kinds = ("normalized", "float32", "uint8")
    found = [batches(files, "dali", 3, **MODES[mode], input_type=kind) for kind in kinds]
    by_torch = batches(files, "torch", 3, **MODES[mode], input_type="uint8")
    for whole, floats, integers, other in zip(*found, by_torch, strict=True):
        assert integers.images.dtype == torch.uint8 and floats.images.dtype == torch.float32
        torch.testing.assert_close(
            normalize(floats.images, settings.mean, settings.std), whole.images, atol=1e-5, rtol=0
        )
        assert (integers.images - floats.images).abs().max() <= 0.5  # padding; the rest is equal
        inside = (integers.images == floats.images).float().mean()
        assert inside == 1.0 if settings.padding == "black" else inside > 0.5
        difference = (integers.images.float() - other.images.float()).abs().mean(dim=(1, 2, 3))
        assert difference.max() < 1.0 and integers.images.float().std() > 30


def test_rotated_boxes_are_the_same(files) -> None:
    for i, image in enumerate(files.images):
        image.boxes = np.concatenate([image.boxes, np.full((3, 1), 0.3 * i)], axis=1)
    settings = MODES["training, every augmentation"] | {"rotated": True}
    for a, b in zip(batches(files, "torch", 4, **settings), batches(files, "dali", 4, **settings), strict=True):
        assert a.boxes.shape[2] == 5
        assert_equal(a, b)


def odd_file(kind: str, folder: Path) -> Path:
    image = picture(7)
    exif = PILImage.Exif()
    if kind.startswith("EXIF"):
        exif[0x0112] = int(kind[-1])
        image.save(folder / "odd.jpg", exif=exif, quality=92)
        return folder / "odd.jpg"
    if kind == "alpha":
        image.putalpha(PILImage.linear_gradient("L").resize(image.size))
    converted: dict[str, tuple[PILImage.Image, str]] = {
        "grayscale JPEG": (image.convert("L"), "odd.jpg"),
        "grayscale PNG": (image.convert("L"), "odd.png"),
        "CMYK": (image.convert("CMYK"), "odd.jpg"),
        "palette": (image.quantize(64), "odd.png"),
        "alpha": (image, "odd.png"),
        "16-bit": (PILImage.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257), "odd.png"),
        "GIF": (image.quantize(64), "odd.gif"),
        "BMP": (image, "odd.bmp"),
        "WebP": (image, "odd.webp"),
        "TIFF": (image, "odd.tif"),
        "bilevel": (image.convert("1"), "odd.png"),
        "progressive": (image, "odd.jpg"),
    }
    pixels, name = converted[kind]
    options: dict[str, Any] = {"progressive": True} if kind == "progressive" else {}
    pixels.save(folder / name, **options)
    return folder / name


KINDS = [
    "EXIF 3",
    "EXIF 6",
    "EXIF 8",
    "grayscale JPEG",
    "grayscale PNG",
    "CMYK",
    "palette",
    "alpha",
    "16-bit",
    "GIF",
    "BMP",
    "WebP",
    "TIFF",
    "bilevel",
    "progressive",
]


@pytest.mark.parametrize("kind", KINDS)
def test_odd_images_are_the_same(tmp_path, kind) -> None:
    path = odd_file(kind, tmp_path)
    dataset = Dataset.load(None, tmp_path)  # without annotations EXIF turns the image
    assert dataset.images[0].width == (120 if kind in ("EXIF 6", "EXIF 8") else 160)
    dataset.images[0].boxes, dataset.images[0].labels = np.array([[20.0, 30, 50, 40]]), np.zeros(1, np.int64)
    for settings in (MODES["shorter side"], MODES["training, every augmentation"]):
        for a, b in zip(batches(dataset, "torch", 1, **settings), batches(dataset, "dali", 1, **settings), strict=True):
            assert_equal(a, b)
            assert a.images.std() > 0.3
    assert check(None, path.parent).refused == 0


def test_exif_ignored_where_the_annotated_size_is_the_stored_one(tmp_path) -> None:
    """DALI applies the EXIF orientation unless it is told not to."""
    path = odd_file("EXIF 6", tmp_path)
    image = Image(1, path, 160, 120, np.zeros((0, 4)), np.zeros(0, np.int64))
    (a,), (b,) = (batches(Dataset([image], ()), loader, 1, resize=120, max_size=160) for loader in ("torch", "dali"))
    assert_equal(a, b)


@pytest.mark.parametrize("keep", [0.3, 0.8, 0.99])
def test_a_file_damaged_after_the_scan_stops_nothing(files, capsys, keep) -> None:
    path = files.images[1].path
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    for loader in ("torch", "dali"):
        first, second, third = batches(files, loader, 3, resize=96, max_size=130)
        assert first.images[1].abs().max() == 0 and first.labels[1].max() == -1
        assert first.images[0].std() > 0.3 and first.labels[0].max() >= 0
        assert second.images.std() > 0.3 and third.ids.tolist() == [5]
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and str(path) in error and "image 2" in error


def test_a_file_that_vanishes_stops_nothing(files, capsys) -> None:
    files.images[0].path.unlink()
    first, second, _ = batches(files, "dali", 3, resize=96, max_size=130)
    assert first.images[0].abs().max() == 0 and first.images[1].std() > 0.3 and second.images.std() > 0.3
    assert "0.jpg" in capsys.readouterr().err


def test_a_pipeline_survives_a_file_that_vanishes_while_another_batch_runs_on_it(files, monkeypatch) -> None:
    """A thread that misses a file must not discard the pipeline that another thread is about to run."""
    loader = create_loader(files, LoaderConfig("images", batch=2, loader="dali", resize=96, max_size=130))
    assert isinstance(loader, dali.DaliLoader)
    first, second = loader.sampler.plan(0), loader.sampler.plan(1)
    loader.render_batch(first)
    pipeline = loader._pipeline
    second.samples[0].image.path.unlink()
    array = dali._array

    def interrupted(*args):
        monkeypatch.setattr(dali, "_array", array)
        assert loader.render_batch(second)[0].abs().max() == 0  # what another thread does meanwhile
        return array(*args)

    monkeypatch.setattr(dali, "_array", interrupted)
    assert loader.render_batch(first).std() > 0.3
    assert loader._pipeline is pipeline


def test_resume_and_shards(files) -> None:
    settings: dict[str, Any] = {"training": True, "jitter": (64, 96), "max_size": 130}
    config = replace(LoaderConfig("images", batch=2, loader="dali"), **settings)
    whole = list(islice(create_loader(files, config), 4))
    resumed = create_loader(files, config)
    resumed.restore({"seen": 4})
    for a, b in zip(whole[2:], islice(resumed, 2), strict=True):
        assert torch.equal(a.images, b.images) and torch.equal(a.boxes, b.boxes)  # bit for bit
    ids = [b.ids for rank in (0, 1) for b in batches(files, "dali", 9, rank=rank, world=2, resize=64, max_size=96)]
    assert sorted(torch.cat(ids).tolist()) == [1, 2, 3, 4, 5]


def test_passes_repeat_and_shapes_may_change(files) -> None:
    loader = create_loader(files, LoaderConfig("images", batch=2, loader="dali", resize=64, max_size=96))
    for a, b in zip(loader, loader, strict=True):
        assert torch.equal(a.images, b.images)
    assert type(loader).__name__ == "DaliLoader"
