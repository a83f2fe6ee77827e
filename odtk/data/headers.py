"""The headers of many image files, read by several threads, and not read again while the files stay as they are.

What was read is kept in the user's cache folder, one file for each image folder, keyed by name, size and time of the
last change; never beside the images. The cache can only save time: without it, or with one that is damaged or of
another version, every header is read. Of two runs that write it at once, one whole file stays. What could not be read
is tried again each time.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from pathlib import Path

import msgspec
import PIL

from ..config import OdtkError
from ..files import atomic_write, cache_folder
from ..text import plural
from .images import Header, ImageError, read_header

VERSION = f"1, Pillow {PIL.__version__}"  # the number rises with the rules of images.py
SCAN_THREADS = 16  # reading headers waits for the disk, not for the processor
MAX_CHUNK = 64  # files that a thread takes at a time
MIN_FILES = 100  # fewer are read in a moment, and need no cache
MAX_FILES = 2_000_000  # of a cache file; it starts anew when there would be more
UNSETTLED_SECONDS = 2  # a file changed this shortly before may change again without a change of its time
UNUSED_DAYS = 90  # after which a cache file is removed
SAID_AFTER = 10.0  # seconds of reading

Entry = tuple[int, int, int, int, int, bool, str]  # size in bytes, time of the last change in ns, fields of Header


class _Cache(msgspec.Struct, array_like=True):
    version: str
    root: str
    files: dict[str, Entry]


class HeaderCache:
    """What is known of the files under one folder.

    Args:
        root: the folder with a slash at its end, or the common beginning of the files' paths.

    Attributes:
        known: by path without the root, as it was read.
        found: what is to be added.
    """

    def __init__(self, root: str) -> None:
        self.root = os.path.realpath(root)
        self.known: dict[str, Entry] = {}
        self.found: dict[str, Entry] = {}
        try:
            name = hashlib.sha256(os.fsencode(self.root)).hexdigest()[:32]
            self.path: Path | None = cache_folder("headers") / name
            content = self.path.read_bytes()
            cache = msgspec.msgpack.decode(content[32:], type=_Cache)
            whole = content[:32] == hashlib.sha256(content[32:]).digest()
            if whole and (cache.version, cache.root) == (VERSION, self.root):
                self.known = cache.files
                os.utime(self.path)  # it is in use
        except OdtkError:
            self.path = None
        except (OSError, ValueError, msgspec.MsgspecError):
            pass

    def read(self, path: Path, name: str) -> Header | ImageError:
        """The header of a file, whose ``name`` is its path without the root."""
        try:
            status = os.stat(path)
        except (OSError, ValueError):  # ValueError: a NUL in its name
            return header_or_error(path)
        entry = self.known.get(name)
        if entry is not None and entry[:2] == (status.st_size, status.st_mtime_ns):
            return Header(*entry[2:])
        header = header_or_error(path)
        settled = status.st_mtime < time.time() - UNSETTLED_SECONDS
        if isinstance(header, Header) and settled and is_text(name):
            self.found[name] = (status.st_size, status.st_mtime_ns, *astuple(header))
        return header

    def save(self) -> None:
        """Writes what was found to the cache; does nothing where that is not possible."""
        if self.path is None or not self.found:
            return
        files = {**self.known, **self.found}
        if len(files) > MAX_FILES:
            files = self.found
        with contextlib.suppress(OSError, OdtkError):
            content = msgspec.msgpack.encode(_Cache(VERSION, self.root, files))
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(self.path) as file:
                file.write(hashlib.sha256(content).digest() + content)
            remove_unused(self.path.parent)


def remove_unused(folder: Path) -> None:
    """Removes cache files that were neither read nor written for UNUSED_DAYS."""
    for path in folder.iterdir():
        if path.stat().st_mtime < time.time() - UNUSED_DAYS * 86_400:
            path.unlink()


def is_text(name: str) -> bool:
    """Whether a file name can be written as UTF-8; on Linux it may be any bytes."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def header_or_error(path: Path) -> Header | ImageError:
    try:
        return read_header(path)
    except ImageError as error:
        return error


def read_headers(paths: Sequence[Path]) -> list[Header | ImageError]:
    """The header of each file, or the reason why it cannot be used."""
    names = [os.fspath(path) for path in paths]
    begin = os.path.commonprefix(names)
    begin = begin[: begin.rfind("/") + 1]
    cache = HeaderCache(begin) if len(paths) >= MIN_FILES else None
    chunk = max(1, min(MAX_CHUNK, len(paths) // (4 * SCAN_THREADS)))
    started = time.monotonic()
    said = False

    def read(first: int) -> list[Header | ImageError]:
        part = paths[first : first + chunk]
        if cache is None:
            return [header_or_error(path) for path in part]
        return [cache.read(path, names[first + i][len(begin) :]) for i, path in enumerate(part)]

    found: list[Header | ImageError] = []
    with ThreadPoolExecutor(SCAN_THREADS) as pool:
        for part in pool.map(read, range(0, len(paths), chunk)):
            found += part
            if not said and time.monotonic() - started > SAID_AFTER and len(found) < len(paths):
                said = True
                left = (time.monotonic() - started) * (len(paths) / len(found) - 1)
                print(
                    f"Reading the headers of {plural(len(paths), 'image')}, which takes about {left:.0f} s more; what "
                    "was read once is kept for the next start.",
                    file=sys.stderr,
                )
    if cache is not None:
        cache.save()
    return found
