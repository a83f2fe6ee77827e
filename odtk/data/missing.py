"""What may have been meant by the name of an image file that does not exist. Folders are only listed."""

from __future__ import annotations

import os
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from .images import EXTENSIONS

MAX_FILES = 1_000_000  # listed at most
SHOWN = 3  # names in a message


class NearestFiles:
    """The files under a folder, to be found by names that are nearly theirs.

    It finds a file of the same name in another folder (also for ``train\\back.jpg`` and absolute paths), in other
    letters (case, Unicode form), or an image of the same name with another extension.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.by_name: dict[str, list[str]] = defaultdict(list)
        self.by_stem: dict[str, list[str]] = defaultdict(list)
        count = 0
        for root, _, files in os.walk(folder):
            for file in files:
                path = os.path.relpath(os.path.join(root, file), folder)
                stem, extension = os.path.splitext(file)
                self.by_name[_folded(file)].append(path)
                if extension.lower() in EXTENSIONS:
                    self.by_stem[_folded(stem)].append(path)
            count += len(files)
            if count > MAX_FILES:
                break

    def find(self, name: str) -> str:
        """The path, relative to the folder, of the file that is nearest to a name; empty if there is none."""
        parts = _parts(name)
        if not parts:
            return ""
        found = self.by_name.get(_folded(parts[-1])) or self.by_stem.get(_folded(os.path.splitext(parts[-1])[0])) or []
        return min(found, key=lambda path: (-_common_end(_parts(path), parts), len(path), path), default="")


def none_found(folder: Path, names: Sequence[str]) -> str:
    """The sentence for annotations none of whose images, ``names``, are under a folder."""
    looked = ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")
    text = f"none of {len(names)} images found under {folder}: looked for {looked}"
    parts = _parts(names[0])
    parent = folder.resolve().parent
    if parts and os.path.isfile(parent.joinpath(*parts)):
        return f"{text}; {names[0]} is in {parent}: give --images {parent}"
    path = NearestFiles(folder).find(names[0])
    if not path:
        return f"{text}; give the folder that they are in with --images"
    there = _parts(path)
    if there[-len(parts) :] == parts:
        root = folder.joinpath(*there[: -len(parts)])
        return f"{text}; {names[0]} is in {root}: give --images {root}"
    return f"{text}; the nearest is {path}"


def _parts(name: str) -> list[str]:
    return [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _common_end(first: list[str], second: list[str]) -> int:
    """How many of the last parts of two paths are alike."""
    count = 0
    for a, b in zip(reversed(first), reversed(second), strict=False):
        if _folded(a) != _folded(b):
            break
        count += 1
    return count
