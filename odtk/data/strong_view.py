"""The strong view of a batch: other colors, blur and erased patches, over pixels that a loader has made.

The geometry stays, so that what is found in one view holds in the other. The kinds and their strengths are those of
Unbiased Teacher (https://arxiv.org/abs/2102.09480, table of its appendix), which Dense Teacher takes over. As in the
sampler, what is drawn depends on the seed and the image's position in training alone: it is the same for any number of
processes, for both pixel engines, and in a resumed run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import AugmentConfig, LoaderConfig, scale_and_shift
from .batch import is_padding, to_device
from .sampler import STRONG, color_matrix

COLOR = AugmentConfig(  # standard deviations of uniform changes by up to 0.4, and of the hue by up to 0.1
    brightness=0.23, contrast=0.23, saturation=0.23, hue=0.058
)
COLOR_SHARE, GRAY_SHARE, BLUR_SHARE = 0.8, 0.2, 0.5  # of the images
BLUR = (0.1, 2.0)  # standard deviation in pixels
PATCHES = (  # share of the images, area relative to the image's, width over height
    (0.7, (0.05, 0.2), (0.3, 3.3)),
    (0.5, (0.02, 0.2), (0.1, 6.0)),
    (0.3, (0.02, 0.2), (0.05, 8.0)),
)


@dataclass(frozen=True)
class Change:
    """What is done to one image.

    Attributes:
        color: [3, 4], see sampler.color_matrix.
        blur: standard deviation in pixels; 0: none.
        patches: (left, top, right, bottom) relative to the sides, and the RGB in 0…255 that replaces what is there.
    """

    color: np.ndarray
    blur: float
    patches: list[tuple[tuple[float, float, float, float], np.ndarray]]


def draw_change(seed: int, position: int) -> Change:
    """The change of the image at a position in training, counted from 0 over all processes."""
    generator = np.random.default_rng([seed, STRONG, position])
    color = color_matrix(generator, COLOR)
    if generator.random() >= COLOR_SHARE:
        color = np.eye(3, 4)
    if generator.random() < GRAY_SHARE:
        luma = np.array([0.299, 0.587, 0.114]) @ color  # [4]
        color = np.stack([luma, luma, luma])
    sigma = float(generator.uniform(*BLUR))
    blur = sigma if generator.random() < BLUR_SHARE else 0.0
    patches = []
    for share, areas, aspects in PATCHES:
        area, aspect = generator.uniform(*areas), math.exp(generator.uniform(*np.log(aspects)))
        width, height = min(1.0, math.sqrt(area * aspect)), min(1.0, math.sqrt(area / aspect))
        left, top = generator.random() * (1 - width), generator.random() * (1 - height)
        fill = generator.uniform(0, 255, 3)
        if generator.random() < share:
            patches.append(((left, top, left + width, top + height), fill))
    return Change(color, blur, patches)


def strong_view(images: Tensor, config: LoaderConfig, first: int) -> Tensor:
    """A batch with its colors changed, partly blurred, and with patches erased; what is padding stays so.

    Args:
        images: [N, 3, H, W] normalized, as a loader with this config gives them.
        first: position of the first image in training, over all processes; the others follow it.

    Returns:
        [N, 3, H, W], a new tensor on the same device.
    """
    changes = [draw_change(config.seed, first + i) for i in range(len(images))]
    scale, shift = (np.array(values)[:, None] for values in scale_and_shift(config.mean, config.std))  # [3, 1]
    # Normalized values become pixels, are changed, and are normalized again.
    matrices = [scale * change.color[:, :3] / scale.T for change in changes]
    offsets = [
        scale * change.color[:, 3:] + shift - matrix @ shift for change, matrix in zip(changes, matrices, strict=True)
    ]
    matrix, offset = (to_device(np.stack(v), images) for v in (matrices, offsets))  # [N, 3, 3], [N, 3, 1]
    changed = torch.baddbmm(offset, matrix, images.flatten(2)).view(images.shape)  # [N, 3, H·W] → [N, 3, H, W]
    height, width = images.shape[2:]
    for image, change in zip(changed, changes, strict=True):
        if change.blur:
            image.copy_(blurred(image, change.blur))
        for (left, top, right, bottom), fill in change.patches:
            color = to_device(fill[:, None] * scale + shift, images)  # [3, 1]
            rows, columns = (
                slice(round(a * n), round(b * n)) for a, b, n in ((top, bottom, height), (left, right, width))
            )
            image[:, rows, columns] = color[..., None]
    return torch.where(is_padding(images, config), images, changed)


def blurred(image: Tensor, sigma: float) -> Tensor:
    """An image [3, H, W] after a Gaussian blur of this standard deviation in pixels; its border is continued."""
    radius = max(1, min(math.ceil(2.5 * sigma), *(side - 1 for side in image.shape[1:])))
    steps = torch.arange(-radius, radius + 1, dtype=image.dtype, device=image.device)
    kernel = torch.exp(-0.5 * (steps / sigma).square())
    kernel = kernel / kernel.sum()
    planes = F.pad(image[:, None], (radius,) * 4, mode="replicate")  # [3, 1, H + 2r, W + 2r]
    return F.conv2d(F.conv2d(planes, kernel[None, None, None]), kernel[None, None, :, None])[:, 0]
