"""Colors that one picture lends to another: what they become, padding, and what lends none."""

import dataclasses

import numpy as np
import pytest
import torch

from odtk.config import LoaderConfig
from odtk.data.batch import padding_value
from odtk.data.color_transfer import transfer_colors
from odtk.model.detector import normalize

CONFIG = LoaderConfig(images="", training=True, padding="black", mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), seed=5)


def picture(seed: int, height: int = 24, width: int = 40) -> torch.Tensor:
    """Normalized [1, 3, height, width] whose channels depend on each other; no pixel is black."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(3) + 0.5 * torch.rand(3, 3, generator=generator)
    noise = torch.randn(1, 3, height, width, generator=generator)
    pixels = 110 + 15 * (seed % 3) + 20 * torch.einsum("ij,njhw->nihw", mix, noise)
    return normalize(pixels.clamp(1, 255), CONFIG.mean, CONFIG.std)


def colors(image: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel of an image [3, …] in 0…255."""
    std, mean = (torch.tensor(values)[:, None] for values in (CONFIG.std, CONFIG.mean))
    pixels = (255 * (image.flatten(1) * std + mean)).numpy()
    return pixels.mean(1), pixels.std(1)


def test_the_colors_are_those_of_the_other() -> None:
    image, other = picture(0), picture(1, 16, 16)
    changed = transfer_colors(image, other, CONFIG, 1.0, 0)
    for found, expected, before in zip(*map(colors, (changed[0], other[0], image[0])), strict=True):
        assert found == pytest.approx(expected, abs=0.2) and np.abs(before - expected).max() > 3
    torch.testing.assert_close(transfer_colors(image, image, CONFIG, 1.0, 0), image, rtol=1e-4, atol=1e-4)


def test_another_light_is_found() -> None:
    image = picture(0)
    light = torch.tensor([0.7, 1.2, 0.9])[:, None, None]
    other = image * light + 0.1
    assert (transfer_colors(image, other, CONFIG, 1.0, 0) - other).abs().max() < 0.02


@pytest.mark.parametrize("padding", ["black", "mean"])
def test_padding_neither_counts_nor_changes(padding: str) -> None:
    config = dataclasses.replace(CONFIG, padding=padding)
    image, other = picture(0), picture(1)
    rows = torch.from_numpy(padding_value(config))[None, :, None, None].expand(1, 3, 8, 40)
    padded = [torch.cat([part, rows], 2) for part in (image, other)]
    changed = transfer_colors(padded[0], padded[1], config, 1.0, 0)
    torch.testing.assert_close(changed[:, :, :24], transfer_colors(image, other, config, 1.0, 0), rtol=1e-4, atol=1e-4)
    assert torch.equal(changed[:, :, 24:], rows)


@pytest.mark.parametrize("level", [0, 90])
def test_a_picture_of_one_color_lends_none(level: int) -> None:
    """0 is black: that of a damaged image, all of which is padding."""
    image = picture(0)
    flat = normalize(torch.full((1, 3, 24, 40), float(level)), CONFIG.mean, CONFIG.std)
    assert torch.equal(transfer_colors(image, flat, CONFIG, 1.0, 0), image)
    gray = torch.full((1, 3, 24, 40), 90.0) + 2 * torch.randn(1, 3, 24, 40)
    changed = transfer_colors(normalize(gray, CONFIG.mean, CONFIG.std), image, CONFIG, 1.0, 0)
    assert colors(changed[0])[1].max() < 10 < 2 * colors(image[0])[1].min(), "noise remains noise"


def test_which_images_change_depends_on_their_position_alone() -> None:
    images, others = torch.cat([picture(i) for i in range(8)]), torch.cat([picture(i) for i in range(8, 16)])

    def changed(first: int, config: LoaderConfig = CONFIG) -> list[bool]:
        found = transfer_colors(images, others, config, 0.5, first)
        return [not torch.equal(a, b) for a, b in zip(found, images, strict=True)]

    assert changed(0)[4:] == changed(4)[:4] and any(changed(0)) and not all(changed(0))
    assert changed(0) != changed(0, dataclasses.replace(CONFIG, seed=6))
    share = np.mean([changed(first) for first in range(0, 400, 8)])
    assert 0.4 < share < 0.6
    assert transfer_colors(images, others, CONFIG, 0.0, 0) is images
    few = transfer_colors(images, others[:2], CONFIG, 1.0, 0)
    torch.testing.assert_close(few[5], transfer_colors(images[5:6], others[1:2], CONFIG, 1.0, 0)[0])


@pytest.mark.parametrize("count, lenders", [(8, 8), (4, 8), (8, 2), (6, 4)])
@pytest.mark.parametrize("first", [0, 8, 24])
def test_two_processes_change_what_one_does(count: int, lenders: int, first: int) -> None:
    images = torch.cat([picture(i) for i in range(count)])
    others = torch.cat([picture(i) for i in range(8, 8 + lenders)])
    whole = transfer_colors(images, others, CONFIG, 0.5, first)
    parts = [
        transfer_colors(part, lent, CONFIG, 0.5, first + rank * lenders // 2)
        for rank, (part, lent) in enumerate(zip(images.chunk(2), others.chunk(2), strict=True))
    ]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=0)
