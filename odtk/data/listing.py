"""The image files that a user names: folders, files, and patterns such as ``scans/*.jpg``."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from ..config import OdtkError
from .images import EXTENSIONS, images_in, is_image

Source = str | os.PathLike[str]


def list_images(sources: Source | Sequence[Source]) -> list[Path]:
    """The image files of folders (with their subfolders, sorted), files (whatever their suffix) and patterns (sorted).

    In the order in which they are named; a file that is named twice comes once.

    Raises:
        OdtkError: something named does not exist, or holds no images.
    """
    found: dict[Path, None] = {}
    for source in [sources] if isinstance(sources, (str, os.PathLike)) else sources:
        found |= dict.fromkeys(_list_one(os.fspath(source)))
    return list(found)


def _list_one(source: str) -> list[Path]:
    if not source:
        raise OdtkError("The path of the images is empty: give a folder or files with --images.")
    path = Path(os.path.expanduser(source))
    if os.path.isfile(path):  # and not path.is_file(), which raises for a name that is too long
        return [path]
    if os.path.isdir(path):
        paths = images_in(path)
        if not paths:
            tars = f"; of its tar files, pass {path / '*.tar'}" if any(path.glob("*.tar")) else ""
            raise OdtkError(f"The folder {path} has no images ({', '.join(sorted(EXTENSIONS))}){tars}.")
        return paths
    if not glob.has_magic(source):
        raise OdtkError(f"The image or folder {path} does not exist: give the right one.")
    matches = sorted(map(Path, glob.glob(str(path), recursive=True)))
    paths = [match for match in matches if is_image(match.name) and match.is_file()]
    if not paths:
        raise OdtkError(f"No image matches {source}: give a folder, files, or another pattern.")
    return paths
