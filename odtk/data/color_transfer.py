"""Labeled images with the colors of others: those of the place where a detector will run, whose boxes nobody drew.

Each channel gets the mean and the standard deviation that it has in another image (Reinhard, Ashikhmin, Gooch and
Shirley, Color transfer between images, IEEE Computer Graphics and Applications 21 (5), 2001, here in RGB): so light,
white balance, exposure and contrast are those of the other, and the boxes stay true. The covariance of the channels
too, by a matrix, brought nothing more (docs/unlabeled.md).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..config import LoaderConfig, scale_and_shift
from .batch import is_padding, to_device
from .sampler import COLORS

MOST = 4.0  # times as much contrast at the most, so that the noise of a flat image does not become a picture
FAINT = 4.0  # of 255: where no channel deviates more, as in a black frame, objects would become invisible


def transfer_colors(images: Tensor, others: Tensor, config: LoaderConfig, share: float, first: int) -> Tensor:
    """A batch of which a share has the colors of others; what is padding stays so.

    As in the sampler, which images change depends on the seed and their position in training alone, and so does which
    image they take the colors of: both are the same for any number of processes.

    Args:
        images: [N, 3, H, W] normalized, as a loader with this config gives them.
        others: [M, 3, h, w] likewise, M ≥ 1; image i takes on the colors of other i · M // N.
        share: probability of an image to change.
        first: position of the first of the others in training, over all processes.

    Returns:
        [N, 3, H, W], a new tensor if any image changes.
    """
    count = len(images)
    first = first * count // len(others)  # of the images
    draws = np.array([np.random.default_rng([config.seed, COLORS, first + i]).random() for i in range(count)])
    if not (draws < share).any():
        return images
    unit = to_device(np.array(scale_and_shift(config.mean, config.std)[0]), images)[:, None, None]  # 1 of 255
    chosen = to_device(draws < share, images)[:, None, None, None] > 0
    others = others[torch.arange(count, device=images.device) * len(others) // count]  # [N, 3, h, w]
    inside = ~is_padding(images, config)
    mean, variance = moments(images, inside)
    new_mean, new_variance = moments(others, ~is_padding(others, config))
    gain = (new_variance / variance.clamp(min=1e-12)).sqrt().clamp(max=MOST)
    lends = (new_variance > (FAINT * unit).square()).any(1, keepdim=True)  # [N, 1, 1, 1]
    return torch.where(chosen & inside & lends, (images - mean) * gain + new_mean, images)


def moments(images: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance [N, 3, 1, 1] of each channel of images [N, 3, H, W], where inside [N, 1, H, W] is true."""
    count = inside.sum((2, 3), keepdim=True).clamp(min=1)
    mean = (images * inside).sum((2, 3), keepdim=True) / count
    return mean, ((images - mean) * inside).square().sum((2, 3), keepdim=True) / count
