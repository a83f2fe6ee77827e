"""The strong view: what is drawn, and what becomes of the pixels."""

import math

import numpy as np
import pytest
import torch

from odtk.config import LoaderConfig
from odtk.data import strong_view as module
from odtk.data.strong_view import BLUR_SHARE, Change, blurred, draw_change, strong_view
from odtk.model.detector import normalize

CONFIG = LoaderConfig(images="", training=True, padding="black", mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), seed=5)
NONE = Change(np.eye(3, 4), 0.0, [])


def change_all(monkeypatch: pytest.MonkeyPatch, change: Change) -> None:
    monkeypatch.setattr(module, "draw_change", lambda seed, position: change)


def pixels(count: int = 2, height: int = 24, width: int = 40) -> torch.Tensor:
    """RGB [count, 3, height, width] from 1 to 255, none of them black."""
    return torch.randint(1, 256, (count, 3, height, width)).float()


def normalized(images: torch.Tensor) -> torch.Tensor:
    return normalize(images, CONFIG.mean, CONFIG.std)


def test_colors_are_changed_as_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    color = np.array([[0.5, 0.2, 0.1, 7.0], [0.0, 1.5, 0.0, -3.0], [0.3, 0.3, 0.3, 0.0]])
    images = pixels()
    change_all(monkeypatch, Change(color, 0.0, []))
    matrix = torch.from_numpy(color).float()
    changed = torch.einsum("ij,njhw->nihw", matrix[:, :3], images) + matrix[:, 3, None, None]
    torch.testing.assert_close(strong_view(normalized(images), CONFIG, 0), normalized(changed), rtol=1e-4, atol=1e-4)
    change_all(monkeypatch, NONE)
    torch.testing.assert_close(strong_view(normalized(images), CONFIG, 0), normalized(images), rtol=1e-5, atol=1e-5)


def test_patches_are_erased_and_padding_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    images = pixels()
    images[:, :, 16:] = 0  # padding
    change_all(monkeypatch, Change(np.eye(3, 4), 0.0, [((0.25, 0.5, 0.5, 1.0), np.array([10.0, 20.0, 30.0]))]))
    given = normalized(images)
    changed = strong_view(given, CONFIG, 0)
    expected = images.clone()
    expected[:, :, 12:16, 10:20] = torch.tensor([10.0, 20.0, 30.0])[:, None, None]
    torch.testing.assert_close(changed, normalized(expected), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(given, normalized(images), rtol=0, atol=0)  # the weak view is not touched


@pytest.mark.parametrize("sigma", [0.7, 2.0])
def test_blur_is_a_gaussian(sigma: float) -> None:
    image = torch.zeros(3, 41, 41)
    image[:, 20, 20] = torch.tensor([1.0, 2.0, 3.0])
    result = blurred(image, sigma)
    assert result.sum((1, 2)).tolist() == pytest.approx([1, 2, 3], rel=1e-5)
    steps = torch.arange(-20, 21).float()
    spread = (result[0].sum(0) * steps.square()).sum().sqrt()
    assert spread.item() == pytest.approx(sigma, rel=0.1)
    torch.testing.assert_close(result, result.flip(1), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(result, result.transpose(1, 2), rtol=1e-4, atol=1e-6)
    flat = torch.full((3, 5, 9), 4.0)
    torch.testing.assert_close(blurred(flat, sigma), flat)


def test_what_is_drawn_depends_on_seed_and_position_alone() -> None:
    images = normalized(pixels(4))
    whole = strong_view(images, CONFIG, 10)
    parts = [strong_view(images[i : i + 2], CONFIG, 10 + i) for i in (0, 2)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-5)
    assert (strong_view(images, CONFIG, 14) - whole).abs().max() > 0.1
    assert str(draw_change(1, 7)) == str(draw_change(1, 7)) != str(draw_change(2, 7))


def test_how_often_each_change_comes() -> None:
    draws = [draw_change(0, i) for i in range(2000)]
    gray = np.mean([np.allclose(d.color[0], d.color[2]) for d in draws])
    same = np.mean([np.allclose(d.color, np.eye(3, 4)) for d in draws])
    blurs = [d.blur for d in draws if d.blur]
    assert gray == pytest.approx(0.2, abs=0.03) and same == pytest.approx(0.2 * 0.8, abs=0.03)
    assert len(blurs) / 2000 == pytest.approx(BLUR_SHARE, abs=0.04) and 0.1 <= min(blurs) < max(blurs) <= 2
    assert np.mean([len(d.patches) for d in draws]) == pytest.approx(0.7 + 0.5 + 0.3, abs=0.06)
    for draw in draws:
        for (left, top, right, bottom), fill in draw.patches:
            assert 0 <= left < right <= 1 + 1e-9 and 0 <= top < bottom <= 1 + 1e-9
            assert (right - left) * (bottom - top) <= 0.2 + 1e-9 and fill.shape == (3,)
    assert not math.isnan(sum(d.color.sum() for d in draws))
