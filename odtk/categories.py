"""A class of objects: its id and its name."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Category:
    """A class of objects: the id of the annotations and its name."""

    id: int
    name: str
