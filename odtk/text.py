"""Wording that several messages share."""


def plural(count: int, noun: str, nouns: str = "") -> str:
    """A count with its noun: ``1 image``, ``2 images``; pass ``nouns`` where the plural is not noun + s."""
    return f"{count} {noun if count == 1 else nouns or noun + 's'}"
