"""A category of objects, and the [id, name] pairs in which files hold the categories."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Category:
    """A category of objects: its id in the annotations, and its name."""

    id: int
    name: str


def to_pairs(categories: Sequence[Category] | None) -> list[list[int | str]] | None:
    """Categories as a file holds them: [[id, name], …] in the order of the class indices; None stays None."""
    return None if categories is None else [[category.id, category.name] for category in categories]


def from_pairs(pairs: Iterable[tuple[int, str]] | None) -> tuple[Category, ...] | None:
    """The inverse of to_pairs.

    Raises:
        ValueError, TypeError: an entry is not a pair.
    """
    return None if pairs is None else tuple(Category(id, name) for id, name in pairs)
