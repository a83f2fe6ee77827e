"""The base of every command's settings: how the layers of flags, file and preset become one checked whole."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from ..config import OdtkError
from .fields import flag, options

S = TypeVar("S", bound="Settings")


@dataclass(frozen=True)
class Settings:
    """Base of all: checks every value, however it was given.

    Attributes:
        PRESETS: values as a whole, by name.
        REPLACES: setting → those that a lower layer's word on it decided, and that go when it is given anew.
    """

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    REPLACES: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    def __post_init__(self) -> None:
        for name, one in options(type(self)).items():
            given = getattr(self, name)
            if given is not None:
                object.__setattr__(self, name, one.value(name, given))
            elif next(f for f in dataclasses.fields(self) if f.name == name).default is not None:
                raise OdtkError(f"{flag(name)} needs a value.")
        self.check()

    def check(self) -> None:
        """What several settings say together.

        Raises:
            OdtkError: they contradict each other.
        """

    @classmethod
    def checked(cls, values: Mapping[str, Any], source: str = "") -> dict[str, Any]:
        """Values by name, where ``-`` may stand for ``_``, each known and good.

        Args:
            source: of the values, for the sentence of an error.

        Raises:
            OdtkError: an unknown name (the nearest right one is offered), or a wrong value.
        """
        known = options(cls)
        found = {}
        where = f"{source}: " if source else ""
        for key, value in values.items():
            name = str(key).replace("-", "_")
            if name not in known:
                raise OdtkError(where + unknown(str(key), known))
            try:
                found[name] = None if value is None else known[name].value(name, value)
            except OdtkError as error:
                raise OdtkError(f"{where}{error}") from None
        return found

    @classmethod
    def of(cls: type[S], values: Mapping[str, Any]) -> S:
        """The settings of values by name: those of ``settings``, a YAML file, and of a ``preset`` lie below them.

        Raises:
            OdtkError: as checked, or something required is missing, or the values contradict each other.
        """
        own = dict(values)
        path, preset = own.pop("settings", None), own.pop("preset", None)
        file = read_settings(path) if path is not None else {}
        preset = file.pop("preset", None) if preset is None else preset
        return cls.layered(cls.presets(preset), cls.checked(file, str(path)), own)

    @classmethod
    def layered(cls: type[S], *layers: Mapping[str, Any]) -> S:
        """The settings of several layers, of which the later stand over the earlier.

        What an earlier layer says of something that a later one decides otherwise goes with it: milestones with another
        length, jitter with another size (see ``REPLACES``).

        Raises:
            OdtkError: as of.
        """
        given: dict[str, Any] = {}
        for layer in layers:
            new = cls.expanded(cls.checked(layer), given)
            for name in new:
                for other in cls.REPLACES.get(name, ()):
                    given.pop(other, None)
            given.update(new)
        for f in dataclasses.fields(cls):
            if f.default is dataclasses.MISSING and given.get(f.name) is None:
                one = f.metadata["option"]
                raise OdtkError(
                    f"{one.metavar if one.positional else flag(f.name) + ' ' + str(one.metavar)} is required."
                )
        found = cls(**given)
        object.__setattr__(found, "_given", frozenset(given))
        return found

    @classmethod
    def expanded(cls, layer: dict[str, Any], lower: Mapping[str, Any]) -> dict[str, Any]:
        """A layer with the values that a word in it stands for, below its own.

        Args:
            lower: the values of the layers below.
        """
        return layer

    @classmethod
    def presets(cls, name: str | None) -> dict[str, Any]:
        """The values of a preset; none without a name.

        Raises:
            OdtkError: there is no such preset.
        """
        if name is None:
            return {}
        if name not in cls.PRESETS:
            listed = ", ".join(cls.PRESETS) or "none for this command"
            raise OdtkError(f"There is no preset {name!r}: there is {listed}.")
        return dict(cls.PRESETS[name])

    def given(self) -> list[str]:
        """Names of the settings that were given, or, of settings made directly, that differ from their defaults."""
        known: frozenset[str] | None = getattr(self, "_given", None)
        if known is not None:
            return [name for name in options(type(self)) if name in known]
        return [f.name for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]

    def to_dict(self) -> dict[str, Any]:
        """Plain values by name, as a settings file takes them."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(self).items()}


def unknown(name: str, known: Mapping[str, Any]) -> str:
    """The sentence for a setting that does not exist."""
    near = difflib.get_close_matches(name.replace("-", "_"), known, n=1)
    return f"There is no setting {name!r}" + (f": did you mean {near[0]!r}?" if near else ".")


def read_settings(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The values in a YAML file by name, not yet checked.

    Raises:
        OdtkError: it cannot be read, or is no YAML of names and values.
    """
    import yaml

    try:
        with open(path, encoding="utf-8") as file:
            values = yaml.safe_load(file) or {}
    except OSError as error:
        raise OdtkError(f"Cannot read the settings {path}: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise OdtkError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(values, dict):
        raise OdtkError(f"{path} holds no settings: write one `name: value` per line.")
    return values
