"""A validation set out of a training set that has none: seeded, with every class on both sides, copies on one."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

from .dataset import Dataset
from .fingerprint import Fingerprint
from .records import Image


def validation_split(
    dataset: Dataset, fingerprint: Fingerprint, *, share: float = 0.2, seed: int = 0
) -> tuple[Dataset, Dataset]:
    """(training, validation): a share of the images, and about that share of every class, is set aside.

    Near-duplicates stay together, as a copy of a training image tells nothing of new images. A class that only one
    group of images has stays in training. The rarest classes choose first (iterative stratification,
    https://doi.org/10.1007/978-3-642-23808-6_10).

    Args:
        fingerprint: of this dataset; images that it has not looked at are taken for distinct.
        share: of the images, in (0, 1).
    """
    groups = _groups(len(dataset.images), fingerprint)
    boxes = [Counter(label for i in group for label in dataset.images[i].labels.tolist()) for group in groups]
    order = np.random.default_rng(seed).permutation(len(groups)).tolist()
    total = _added(boxes)
    left = _added([Counter(set(own)) for own in boxes])  # groups with a class that stay in training
    held: Counter[int] = Counter()  # boxes set aside, by class
    chosen: set[int] = set()
    images = 0  # set aside

    def set_aside(group: int) -> None:
        """Moves a group to validation, unless it holds the last example of a class in training."""
        nonlocal images
        if group not in chosen and all(left[label] > 1 for label in boxes[group]):
            chosen.add(group)
            held.update(boxes[group])
            left.subtract(set(boxes[group]))
            images += len(groups[group])

    for label in sorted(total, key=lambda one: (total[one], one)):
        for group in (g for g in order if boxes[g][label]):
            if held[label] < share * total[label]:
                set_aside(group)
    for group in order:
        if images < round(share * len(dataset.images)):
            set_aside(group)
    aside = {i for g in chosen for i in groups[g]}
    return _part(dataset, [i for i in range(len(dataset.images)) if i not in aside]), _part(dataset, sorted(aside))


def _groups(count: int, fingerprint: Fingerprint) -> list[list[int]]:
    """Positions of images that belong together."""
    number = {**{i: ("alone", i) for i in range(count)}, **{i: ("group", g) for i, g in fingerprint.groups}}
    found: dict[tuple[str, int], list[int]] = defaultdict(list)
    for i in range(count):
        found[number[i]].append(i)
    return list(found.values())


def _added(counters: Sequence[Counter[int]]) -> Counter[int]:
    found: Counter[int] = Counter()
    for one in counters:
        found.update(one)
    return found


def _part(dataset: Dataset, positions: Sequence[int]) -> Dataset:
    images: list[Image] = [dataset.images[i] for i in positions]
    return dataclasses.replace(dataset, images=images)
