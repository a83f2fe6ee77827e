"""How one field is set: the kinds of values there are, and the option that a field carries. Standard library only."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..config import OdtkError


@dataclass(frozen=True)
class Check:
    """A kind of value: how it is made from text, which values are good, and the words for those that are."""

    kind: Callable[[Any], Any]
    good: Callable[[Any], bool]
    words: str

    def __call__(self, value: Any) -> Any:
        """The value in its own type.

        Raises:
            ValueError: it is not of this kind.
        """
        if isinstance(value, bool):  # an int to Python
            raise ValueError
        made = self.kind(os.fspath(value) if isinstance(value, os.PathLike) else value)
        if (isinstance(value, float) and made != value) or not self.good(made):
            raise ValueError
        return made


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError
    return value


def _devices(value: Any) -> bool:
    kind, _, number = value.partition(":")
    if kind == "cpu":
        return value == "cpu" or (number.isdecimal() and int(number) > 0)
    return value.isdecimal() and int(value) > 0


def seconds_of(time: str) -> float:
    """Seconds of a time such as 8m, 1.5h or 1h30m10s; 0 if it is none."""
    found = re.fullmatch(r"(?:([0-9.]+)h)?(?:([0-9.]+)m)?(?:([0-9.]+)s)?", time)
    if found is None:
        return 0.0
    return sum(float(part or 0) * unit for part, unit in zip(found.groups(), (3600, 60, 1), strict=True))


TEXT = Check(_text, bool, "a text")
POSITIVE_INT = Check(int, lambda v: v > 0, "a positive whole number")
COUNT = Check(int, lambda v: v >= 0, "a whole number, 0 or more")
SEED = Check(int, lambda v: 0 <= v < 2**64, "a whole number from 0 to 2^64 - 1")  # as torch takes them
SQUARE = Check(int, lambda v: v > 0 and v % 32 == 0, "a positive multiple of 32")
POSITIVE = Check(float, lambda v: 0 < v < math.inf, "a positive number")
NUMBER = Check(float, lambda v: 0 <= v < math.inf, "a number, 0 or more")
ANGLE = Check(float, math.isfinite, "a number of degrees")
SIDE = Check(float, lambda v: 0.005 <= v <= 0.6, "a number from 0.005 to 0.6")
RATIO = Check(float, lambda v: 1 <= v < math.inf, "a number, 1 or more")
PART = Check(float, lambda v: 0 < v <= 1, "a number above 0, 1 at most")
SHARE = Check(float, lambda v: 0 <= v < 1, "a number from 0 to below 1")
FRACTION = Check(float, lambda v: 0 <= v <= 1, "a number from 0 to 1")
DURATION = Check(_text, lambda v: seconds_of(v) > 0, "a time such as 8m, 1h30m or 90s")
DEVICES = Check(str, _devices, "a number of GPUs, cpu or cpu:N")
SWITCH = Check(bool, lambda v: True, "true or false")


@dataclass(frozen=True)
class Option:
    """How one field is set.

    Attributes:
        help: one phrase, without the default.
        check: of the value, or of each of several.
        metavar: its placeholder in the help; None for a positional argument's or a switch's own.
        count: how many values: None for one, a number, or the least and the greatest number (None: any).
        choices: the values there are, or None.
        flags: names beside the field's own.
        shown: the default in words, where it is not the field's own.
        section: heading in the help.
        positional: given without a flag.
        changes_result: whether a run refuses to be resumed with another value; of lengths and files it compares other
            facts, or their contents.
    """

    help: str
    check: Check
    metavar: str | tuple[str, ...] | None = None
    count: int | tuple[int, int | None] | None = None
    choices: tuple[Any, ...] | None = None
    flags: tuple[str, ...] = ()
    shown: str | None = None
    section: str = ""
    positional: bool = False
    changes_result: bool = True

    def value(self, name: str, given: Any) -> Any:
        """A given value, checked and in the field's type.

        Raises:
            OdtkError: naming the flag and the values it takes.
        """
        if self.check is SWITCH:
            if not isinstance(given, bool):
                raise OdtkError(f"{flag(name)}: {given!r} is not true or false.")
            return given
        if self.count is None:
            return self.one(name, given)
        if isinstance(given, (str, int, float, os.PathLike)):
            given = [given]
        if not isinstance(given, (list, tuple)):
            raise OdtkError(f"{flag(name)}: {given!r} is not a list.")
        least, most = (self.count, self.count) if isinstance(self.count, int) else self.count
        if len(given) < least or (most is not None and len(given) > most):
            wanted = f"{least} values" if least == most else f"{least} to {most} values" if most else f"{least} or more"
            raise OdtkError(f"{flag(name)} takes {wanted}, not {len(given)}.")
        return tuple(self.one(name, part) for part in given)

    def one(self, name: str, given: Any) -> Any:
        try:
            made = self.check(given)
        except (ValueError, TypeError, OverflowError):
            raise OdtkError(f"{flag(name)}: {given!r} is not {self.check.words}.") from None
        if self.choices is not None and made not in self.choices:
            listed = ", ".join(map(str, self.choices))
            raise OdtkError(f"{flag(name)}: {given!r} is not one of {listed}.")
        return made


def option(
    default: Any, help: str, check: Check = TEXT, metavar: str | tuple[str, ...] | None = None, **more: Any
) -> Any:
    """A dataclass field that is an option; ``default`` may be dataclasses.MISSING for one that must be given."""
    return field(default=default, metadata={"option": Option(help, check, metavar, **more)})


def switch(help: str, **more: Any) -> Any:
    """An option that is off unless it is given."""
    return option(False, help, SWITCH, **more)


def flag(name: str) -> str:
    """A field's name as its flag."""
    return "--" + name.replace("_", "-")


def options(cls: type) -> dict[str, Option]:
    """The options of a settings class by field name, in order."""
    return {f.name: f.metadata["option"] for f in dataclasses.fields(cls)}
