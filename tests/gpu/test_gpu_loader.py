"""Batches on their way to a GPU: copies on a stream of their own, from pinned memory, while the GPU works."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from odtk.config import LoaderConfig
from odtk.data.color_transfer import transfer_colors
from odtk.data.dataset import Dataset
from odtk.data.loader import create_loader


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    for i in range(12):
        pixels = np.random.default_rng(i).integers(0, 256, (96, 128, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i:02}.png")
    return Dataset.load(None, tmp_path)


@pytest.mark.parametrize("kind", ["uint8", "normalized"])
def test_a_busy_gpu_reads_whole_batches(dataset: Dataset, kind: str) -> None:
    """The GPU falls behind the loader, so that a copy that did not wait, or memory given away early, would show."""
    config = LoaderConfig("", size=(96, 128), batch=2, loader="torch", input_type=kind)
    expected = [batch.images for batch in create_loader(dataset, config)]
    loader = create_loader(dataset, LoaderConfig(**{**vars(config), "device": "cuda:0"}))
    for _ in range(4):  # pinned memory is given again
        sums, kept = [], []
        for batch in loader:
            assert batch.images.is_cuda
            torch.cuda._sleep(20_000_000)  # about 10 ms
            kept.append(batch.images.clone())
            sums.append(batch.images.double().sum())
        for images, total, wanted in zip(kept, sums, expected, strict=True):
            assert torch.equal(images.cpu(), wanted)
            assert float(total) == pytest.approx(float(wanted.double().sum()))


def test_images_are_rendered_into_pinned_memory(dataset: Dataset) -> None:
    loader = create_loader(dataset, LoaderConfig("", size=(96, 128), batch=2, loader="torch", device="cuda:0"))
    assert loader.render_with_torch(loader.sampler.plan(0)).is_pinned()


def test_colors_are_lent_without_waiting_for_the_gpu() -> None:
    config = LoaderConfig("", training=True)
    images, others = torch.randn(2, 4, 3, 64, 96).unbind()
    expected = transfer_colors(images, others, config, 0.5, 0)
    images, others = images.cuda(), others.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = transfer_colors(images, others, config, 0.5, 0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-4)
