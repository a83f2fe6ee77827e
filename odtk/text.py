"""Words for people: what several messages phrase alike."""


def plural(count: int, noun: str, nouns: str = "") -> str:
    """A count with its noun: ``1 image``, ``2 images``; ``nouns`` is the plural where an s does not make it."""
    return f"{count} {noun if count == 1 else nouns or noun + 's'}"
