"""DALI's GPU pipeline gives the Batches of the torch loader, already on the GPU."""

from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from PIL import ImageFilter

from odtk.categories import Category
from odtk.config import AugmentConfig, LoaderConfig
from odtk.data.dataset import Dataset
from odtk.data.loader import create_loader
from odtk.data.records import Image

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
STRONG = AugmentConfig(rotate=True, free_rotate=(-30, 30), brightness=0.2, contrast=0.2, hue=0.1, saturation=0.3)
SCALED = AugmentConfig(rotate=True, scale=(0.5, 2.0))


@pytest.fixture
def files(tmp_path: Path) -> Dataset:
    """A color JPEG, a grayscale JPEG, a color PNG and a CMYK JPEG, each with a box."""
    images = []
    for i, (mode, suffix) in enumerate((("RGB", "jpg"), ("L", "jpg"), ("RGB", "png"), ("CMYK", "jpg"))):
        coarse = np.random.default_rng(i).integers(0, 256, (9, 12, 3)).astype(np.uint8)
        picture = PILImage.fromarray(coarse).resize((320, 240), PILImage.Resampling.NEAREST)
        path = tmp_path / f"{i}.{suffix}"
        picture.filter(ImageFilter.GaussianBlur(2)).convert(mode).save(path)
        plain = mode != "CMYK"
        images.append(Image(i + 1, path, 320, 240, np.array([[40.0, 30, 90, 80]]), np.zeros(1, np.int64), 1, plain))
    return Dataset(images, (Category(1, "a"),))


@pytest.mark.parametrize(
    "settings",
    [
        {"resize": 160, "max_size": 240},
        {"size": (256, 192)},
        {"training": True, "jitter": (128, 256), "max_size": 320},
        {"training": True, "jitter": (128, 256), "max_size": 320, "augment": STRONG},
        {"training": True, "jitter": (200, 200), "max_size": 320, "augment": SCALED, "padding": "black"},
        {"training": True, "jitter": (200, 200), "max_size": 320, "augment": replace(SCALED, free_rotate=(-9, 9))},
    ],
)
def test_the_gpu_pipeline_equals_the_torch_loader(files, settings) -> None:
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    config = replace(LoaderConfig("", batch=3), **settings)
    std = torch.tensor(config.std)[:, None, None]
    on_gpu = islice(create_loader(files, replace(config, loader="dali", device="cuda:0")), 4)
    for a, b in zip(islice(create_loader(files, replace(config, loader="torch")), 4), on_gpu, strict=False):
        assert b.images.is_cuda and b.boxes.is_cuda and b.labels.is_cuda and not b.ids.is_cuda
        difference = ((a.images - b.images.cpu()) * std * 255).abs().mean(dim=(1, 2, 3))
        assert difference.max() < 2, difference
        assert torch.equal(a.boxes, b.boxes.cpu()) and torch.equal(a.labels, b.labels.cpu())
        assert torch.equal(a.ids, b.ids)


def test_the_torch_loader_ends_on_the_gpu(files) -> None:
    batch = next(iter(create_loader(files, LoaderConfig("", batch=2, loader="torch", device="cuda:0", resize=160))))
    assert batch.images.is_cuda and batch.boxes.is_cuda and not batch.scales.is_cuda


def test_a_damaged_file_stops_nothing(files, capsys) -> None:
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    path = files.images[0].path
    path.write_bytes(path.read_bytes()[:900])
    loader = create_loader(files, LoaderConfig("", batch=2, loader="dali", device="cuda:0", resize=160))
    first, second = loader
    assert first.images.is_cuda and first.images[0].abs().max() == 0 and first.images[1].std() > 0.1
    assert second.images.std() > 0.1 and "0.jpg" in capsys.readouterr().err
