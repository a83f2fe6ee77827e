"""How much of what a network sees is padding: facts that a checkpoint keeps of its training."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .dataset import Dataset
from .sampler import Sampler

LOOKED_AT = 256  # images whose padding stands for that of all
ASPECTS = 20  # numbers that stand for the shapes of all images


def padded_share(sampler: Sampler) -> float:
    """The share of the pixels of a rank's first batches, 0 to 1, that is padding. No image is read."""
    batches = math.ceil(LOOKED_AT / sampler.config.batch)
    seen = whole = 0
    for number in range(batches if sampler.config.training else min(batches, len(sampler))):
        plan = sampler.plan(number)
        seen += sum(sample.view.size[0] * sample.view.size[1] for sample in plan.samples)
        whole += len(plan.samples) * plan.height * plan.width
    return 1 - seen / max(1, whole)


def aspects(dataset: Dataset) -> list[float]:
    """Width over height of the images, as quantiles, evenly spaced."""
    middles = (np.arange(ASPECTS) + 0.5) / ASPECTS
    ratios = [image.width / image.height for image in dataset.images]
    return [round(float(ratio), 4) for ratio in np.quantile(ratios, middles, method="nearest")]


def padding_facts(sampler: Sampler) -> dict[str, Any]:
    """What a checkpoint's settings say of the padding in its training: ``padding_share`` and ``aspects``."""
    return {"padding_share": round(padded_share(sampler), 4), "aspects": aspects(sampler.dataset)}
