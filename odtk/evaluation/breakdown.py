"""AP with its bootstrap interval: of the whole set, of each class, and by the size of objects and of images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pycocotools.cocoeval import COCOeval

from .bootstrap import RESAMPLES, Interval, Matches, interval, matches_of, mean_of_known, precisions, resamples

AREAS = ("all", "small", "medium", "large")  # pycocotools' order
SEPARATE_SIZES = 6  # up to so many sizes of images are shown each; more are put into GROUPS groups
GROUPS = 4


@dataclass(frozen=True)
class Breakdown:
    """AP 0…1 by what it is of; NaN where there are no objects.

    Attributes:
        figures: by name: AP, AP50, AP75, AP small, AP medium, AP large.
        classes: AP of each class by AREAS' name, in the order of params.catIds.
        classes50: AP50 of each class.
        objects: number of objects of each of AREAS.
        image_sizes: (what, number of images, AP), the smallest images first; empty where sizes are not known.
    """

    figures: dict[str, Interval]
    classes: dict[str, list[Interval]]
    classes50: list[Interval]
    objects: dict[str, int]
    image_sizes: list[tuple[str, int, Interval]]


def breakdown(coco_eval: COCOeval, sizes: Sequence[tuple[int, int] | None], number: int = RESAMPLES) -> Breakdown:
    """The figures of an evaluation (evaluate.run_cocoeval).

    Args:
        sizes: (width, height) of each image in pixels, or None, in the order of params.imgIds.
        number: of resamples.
    """
    counts = resamples(len(sizes), number)
    figures: dict[str, Interval] = {}
    classes: dict[str, list[Interval]] = {}
    objects: dict[str, int] = {}
    whole = matches_of(coco_eval)
    classes50: list[Interval] = []
    for area, name in enumerate(AREAS):
        matches = matches_of(coco_eval, area)
        found = precisions(matches, counts)  # [categories, B, T]
        objects[name] = int(sum(category.objects.sum() for category in matches.categories))
        classes[name] = [interval(of_class.mean(axis=1)) for of_class in found]
        figures["AP" if name == "all" else f"AP {name}"] = interval(mean_of_known(found.mean(axis=2)))
        if name == "all":
            classes50 = [interval(of_class[:, 0]) for of_class in found]
            for text, threshold in (("AP50", 0.5), ("AP75", 0.75)):
                (place,) = np.flatnonzero(np.isclose(coco_eval.params.iouThrs, threshold))
                figures[text] = interval(mean_of_known(found[:, :, place]))
    return Breakdown(figures, classes, classes50, objects, by_image_size(whole, sizes, number))


def by_image_size(
    matches: Matches, sizes: Sequence[tuple[int, int] | None], number: int
) -> list[tuple[str, int, Interval]]:
    """AP of the images of each size, or of each of GROUPS groups of as many images; unknown sizes are left out."""
    found = []
    for name, members in size_groups(sizes):
        own = resamples(len(members), number)
        counts = np.zeros((len(own), len(sizes)), int)
        counts[:, members] = own
        found.append((name, len(members), interval(mean_of_known(precisions(matches, counts).mean(axis=2)))))
    return found


def size_groups(sizes: Sequence[tuple[int, int] | None]) -> list[tuple[str, list[int]]]:
    """The images of each size, or groups of similar numbers of pixels, the smallest first: name, and their indices."""
    known = sorted({size for size in sizes if size}, key=lambda size: (size[0] * size[1], size))
    if len(known) <= SEPARATE_SIZES:
        return [(f"{w} × {h}", [i for i, size in enumerate(sizes) if size == (w, h)]) for w, h in known]
    pixels = np.array([size[0] * size[1] if size else -1 for size in sizes])
    edges = np.quantile(pixels[pixels >= 0], np.linspace(0, 1, GROUPS + 1)[1:-1])
    place = np.where(pixels >= 0, np.searchsorted(edges, pixels, side="left"), -1)
    groups = [np.flatnonzero(place == group).tolist() for group in range(GROUPS)]
    return [
        (f"{pixels[group].min() / 1e6:.2f} to {pixels[group].max() / 1e6:.2f} megapixels", group)
        for group in groups
        if group
    ]
