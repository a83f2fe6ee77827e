"""Wording that several messages share."""

from __future__ import annotations

from typing import Any

JOINERS = "\u200c\u200d"  # invisible, but Persian words and joined emoji need them


def plural(count: int, noun: str, nouns: str = "") -> str:
    """A count with its noun: ``1 image``, ``2 images``; pass ``nouns`` where the plural is not noun + s."""
    return f"{count} {noun if count == 1 else nouns or noun + 's'}"


def in_words(value: Any) -> str:
    """A setting's value, or any plain value: lists without brackets, ``none`` for what is empty or None."""
    if isinstance(value, (list, tuple)):
        return " ".join(map(in_words, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def printable(text: object) -> str:
    """A name from a user's file as a terminal can show it: no control character reaches it, as ``\\x1b`` or a turned
    writing direction could repaint, hide or rename what is on the screen. Those, line ends and lone surrogates are
    shown as Python writes them. A rich Console must be told ``markup=False, emoji=False`` as well.
    """
    return "".join(
        c if c.isprintable() or c in JOINERS else c.encode("unicode_escape").decode("ascii") for c in str(text)
    )


def say(line: str) -> None:
    """Prints a line in which a user's names may stand."""
    print(printable(line), flush=True)
