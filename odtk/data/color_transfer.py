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
from .batch import padding_value
from .sampler import COLORS

# Standard deviations of a channel, of 255:
LEAST = 2.0  # added to all, as the square, so that the noise of a flat image is hardly amplified
FAINT = 4.0  # an image whose channels all have less, such as a black frame, would make objects invisible


def transfer_colors(images: Tensor, others: Tensor, config: LoaderConfig, share: float, first: int) -> Tensor:
    """A batch of which a share has the colors of others; what is padding stays so.

    As in the sampler, which images change depends on the seed and a position in training alone.

    Args:
        images: [N, 3, H, W] normalized, as a loader with this config gives them.
        others: [M, 3, h, w] likewise, M ≥ 1; image i takes on the colors of i modulo M.
        share: probability of an image to change.
        first: position of the first of the others in training, over all processes.

    Returns:
        [N, 3, H, W], a new tensor if any image changes.
    """
    draws = [np.random.default_rng([config.seed, COLORS, first + i]).random() for i in range(len(images))]
    chosen = [i for i, drawn in enumerate(draws) if drawn < share]
    if not chosen:
        return images
    padding = torch.from_numpy(padding_value(config)).to(images)[:, None, None]  # [3] → [3, 1, 1]
    unit = torch.tensor(scale_and_shift(config.mean, config.std)[0]).to(images)[:, None, None]  # what 1 of 255 became
    own, other = images[chosen], others[[i % len(others) for i in chosen]]  # [n, 3, H, W], [n, 3, h, w]
    inside = (own != padding).any(1, keepdim=True)
    mean, variance = moments(own, inside)
    new_mean, new_variance = moments(other, (other != padding).any(1, keepdim=True))
    least = (LEAST * unit).square()
    changed = (own - mean) * ((new_variance + least) / (variance + least)).sqrt() + new_mean
    lends = (new_variance > (FAINT * unit).square()).any(1, keepdim=True)  # [n, 1, 1, 1]
    result = images.clone()
    result[chosen] = torch.where(inside & lends, changed, own)
    return result


def moments(images: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance [N, 3, 1, 1] of each channel of images [N, 3, H, W], where inside [N, 1, H, W] is true."""
    count = inside.sum((2, 3), keepdim=True).clamp(min=1)
    mean = (images * inside).sum((2, 3), keepdim=True) / count
    return mean, ((images - mean) * inside).square().sum((2, 3), keepdim=True) / count
