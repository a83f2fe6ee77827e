"""Images in tar files (WebDataset's layout): an index of their members, which then are read by ranges.

A source is the path or address of a .tar, a pattern (shards/*.tar, train-{000000..000146}.tar), or several of them;
local, http(s):// or s3:// (storage.py). Members that are no images are passed over: boxes are in annotations, as with a
folder. The headers of the images are read with the index, which is kept in the user's cache folder, one file for each
tar, as long as the tar's size and version stay the same; where a storage tells no version, it is read each time.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import tarfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import astuple, dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

import msgspec
import PIL

from ..config import OdtkError
from ..files import atomic_write, cache_folder
from ..text import plural
from .headers import is_text, remove_unused
from .images import EXTENSIONS, Header, ImageError, MissingImage, is_image, read_header
from .storage import RangedFile, Seekable, find_files, read_ranges

VERSION = f"2, Pillow {PIL.__version__}"  # the number rises with the rules of images.py and of scan()
SCAN_THREADS = 16  # tar files that are looked through at once
SAID_AFTER = 10.0  # seconds of reading
SHOWN = 3  # names in a message

Row = tuple[str, int, int, str, int, int, int, bool, str]  # name, offset, size, fault, fields of Header


class _Index(msgspec.Struct, array_like=True):
    version: str
    url: str
    size: int
    file_version: str
    rows: list[Row]


@dataclass(frozen=True)
class Member:
    """An image in a tar file: ``size`` bytes from ``offset`` on."""

    file: RangedFile
    name: str
    offset: int
    size: int

    @property
    def path(self) -> Path:
        """A name for messages and pictures; there is no such file."""
        return Path(self.file.name) / self.name

    @property
    def range(self) -> tuple[RangedFile, int, int]:
        return self.file, self.offset, self.offset + self.size


class Found(NamedTuple):
    """An image of a tar file, and what its header says."""

    member: Member
    header: Header | ImageError


class TarSet:
    """The images in some tar files.

    Args:
        sources: as --images takes them.

    Attributes:
        images: by name, sorted as the files of a folder would be.

    Nothing is read before ``images`` or ``find`` is used, which raise OdtkError where a tar cannot be read, or is none,
    or holds no image, or where two images have one name.
    """

    def __init__(self, sources: Iterable[str]) -> None:
        self.sources = tuple(sources)

    @cached_property
    def images(self) -> dict[str, Found]:
        files = list(dict.fromkeys(file for source in self.sources for file in find_files(source)))
        found: dict[str, Found] = {}
        for rows, file in zip(indices(files), files, strict=True):
            for name, offset, size, fault, width, height, orientation, plain, rule in rows:
                if name in found:
                    earlier = found[name].member.file
                    raise OdtkError(f"{name} is in {earlier.url} and again in {file.url}: keep one of them.")
                header = ImageError(fault) if fault else Header(width, height, orientation, plain, rule)
                found[name] = Found(Member(file, name, offset, size), header)
        if not found:
            raise OdtkError(f"There are no images ({', '.join(sorted(EXTENSIONS))}) in {self}.")
        return {name: found[name] for name in sorted(found, key=lambda name: PurePosixPath(name).parts)}

    @cached_property
    def by_base(self) -> dict[str, str | None]:
        """Names by what follows their last slash; None where several end alike."""
        bases: dict[str, str | None] = {}
        for name in self.images:
            base = name.rpartition("/")[2]
            bases[base] = None if base in bases else name
        return bases

    def __str__(self) -> str:
        return " ".join(self.sources)

    def find(self, file_name: str) -> Found:
        """The image that annotations call ``file_name``: the member of this name, or the only one whose name, without
        folders, is the same. One with a MissingImage where there is none."""
        name = file_name if file_name in self.images else file_name.removeprefix("./")
        if name not in self.images:
            name = self.by_base.get(PurePosixPath(file_name.replace("\\", "/")).name) or ""
        if name in self.images:
            return self.images[name]
        nowhere = RangedFile(self.sources[0], 0, "")
        return Found(Member(nowhere, file_name, 0, 0), MissingImage(f"there is no such image in {self}"))


def is_tar(source: object) -> bool:
    """Whether a source of images is a tar file, or something that is not on this machine."""
    text = os.fspath(source) if isinstance(source, (str, os.PathLike)) else ""
    return "://" in text or (text.partition("?")[0].lower().endswith(".tar") and not os.path.isdir(text))


def tar_sources(images: object) -> tuple[str, ...]:
    """The sources, if they are tar files; empty if none is one.

    Raises:
        OdtkError: only some are, or an address is not that of a tar file.
    """
    given: Sequence[Any] = [images] if isinstance(images, (str, os.PathLike)) else list(images)  # type: ignore[call-overload]
    tars = tuple(os.fspath(one) for one in given if is_tar(one))
    if tars and len(tars) < len(given):
        raise OdtkError("Either tar files are given, or folders and image files, but not both at once.")
    for url in tars:
        if not url.partition("?")[0].lower().endswith(".tar"):
            raise OdtkError(f"{url} is not the address of a .tar: images on other machines are read from tar files.")
    return tars


def read_members(members: Sequence[Member]) -> list[bytes]:
    """The content of each image file.

    Raises:
        OdtkError: as storage.read_ranges.
    """
    return read_ranges([member.range for member in members])


# ---------------------------------------------------------------------------------------------------------------------
# The index


def indices(files: Sequence[RangedFile]) -> list[list[Row]]:
    """The images of each tar; several are looked through at once.

    Raises:
        OdtkError: one cannot be read, or is not a whole tar.
    """
    started, said = time.monotonic(), False
    with ThreadPoolExecutor(min(SCAN_THREADS, max(1, len(files)))) as pool:
        reading = [pool.submit(index_of, file) for file in files]
        try:
            for done, future in enumerate(as_completed(reading), start=1):
                future.result()
                passed = time.monotonic() - started
                if not said and passed > SAID_AFTER and done < len(files):
                    said = True
                    left = passed * (len(files) / done - 1)
                    print(
                        f"Reading the index of {plural(len(files), 'tar file')}, which takes about {left:.0f} s more; "
                        "it is kept for the next start.",
                        file=sys.stderr,
                    )
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [future.result() for future in reading]


def index_of(file: RangedFile) -> list[Row]:
    """The images of a tar, from the cache if it is there."""
    path: Path | None = None
    if file.version:
        with contextlib.suppress(OdtkError):
            where = os.path.realpath(file.url) if file.is_local else file.url
            path = cache_folder("tars") / hashlib.sha256(os.fsencode(where)).hexdigest()[:32]
    rows = None if path is None else cached(path, file)
    if rows is None:
        rows = scan(file)
        if path is not None and all(is_text(row[0]) for row in rows):
            keep(path, file, rows)
    return rows


def cached(path: Path, file: RangedFile) -> list[Row] | None:
    with contextlib.suppress(OSError, ValueError, msgspec.MsgspecError):
        content = path.read_bytes()
        index = msgspec.msgpack.decode(content[32:], type=_Index)
        whole = content[:32] == hashlib.sha256(content[32:]).digest()
        same = (index.version, index.size, index.file_version) == (VERSION, file.size, file.version)
        if whole and same:
            os.utime(path)  # it is in use
            return index.rows
    return None


def keep(path: Path, file: RangedFile, rows: list[Row]) -> None:
    """Writes an index to the cache; does nothing where that is not possible."""
    with contextlib.suppress(OSError, OdtkError):
        content = msgspec.msgpack.encode(_Index(VERSION, file.url, file.size, file.version, rows))
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as out:
            out.write(hashlib.sha256(content).digest() + content)
        remove_unused(path.parent)


def scan(file: RangedFile) -> list[Row]:
    """Looks through a tar: the members that are images, with their headers.

    Raises:
        OdtkError: it cannot be read, or is not a whole, uncompressed tar.
    """
    rows: list[Row] = []
    places: dict[str, Row] = {}  # by name, for hard links
    with file.open() as opened:
        try:
            with tarfile.open(fileobj=opened, mode="r:") as tar:
                while (info := tar.next()) is not None:
                    tar.members.clear()  # type: ignore[attr-defined]  # it would keep them all
                    if info.issym() and is_image(info.name):
                        raise OdtkError(
                            f"{file.url} holds {info.name} as a symbolic link to {info.linkname}: write the image "
                            "itself (tar --dereference)."
                        )
                    if (info.isreg() or info.islnk()) and is_image(info.name):
                        if info.issparse():
                            raise OdtkError(f"{file.url} holds {info.name} as a sparse file: write it as a plain one.")
                        rows.append(link_of(file, info, places) if info.islnk() else row_of(opened, info))
                        places[rows[-1][0]] = rows[-1]
                end = tar.offset  # after the last member; tarfile stops at a damaged one without a word
        except tarfile.TarError as error:
            raise OdtkError(f"{file.url} is not a whole, uncompressed tar file ({error}).") from None
        opened.seek(end)
        if opened.read(512) != bytes(512):
            last = f"after {rows[-1][0]}" if rows else "at its start"
            raise OdtkError(f"{file.url} is damaged or not whole: {last} it does not go on, and has no end mark.")
    return rows


def plain_name(name: str) -> str:
    return name.removeprefix("./")


def link_of(file: RangedFile, info: tarfile.TarInfo, places: dict[str, Row]) -> Row:
    """A hard link to an earlier image of the same tar."""
    row = places.get(plain_name(info.linkname))
    if row is None:
        raise OdtkError(
            f"{file.url} holds {info.name} as a hard link to {info.linkname}, which is no image before it: "
            "write it as a plain file (tar --hard-dereference)."
        )
    return (plain_name(info.name), *row[1:])


def row_of(opened: BinaryIO, info: tarfile.TarInfo) -> Row:
    """A member of a tar that is an image."""
    name, offset, size = plain_name(info.name), info.offset_data, info.size
    try:
        header = read_header(Slice(opened, offset, size))  # type: ignore[arg-type]
    except ImageError as error:
        return (name, offset, size, str(error), 0, 0, 1, False, "")
    width, height, orientation, plain, rule = astuple(header)
    return (name, offset, size, "", width, height, orientation, plain, rule)


class Slice(Seekable):
    """A part of an open file as a file."""

    def __init__(self, file: BinaryIO, offset: int, size: int) -> None:
        super().__init__(size)
        self.file, self.offset = file, offset

    def read(self, size: int | None = -1) -> bytes:  # type: ignore[override]
        left = max(0, self.size - self.at)
        self.file.seek(self.offset + self.at)
        content = self.file.read(left if size is None or size < 0 else min(size, left))
        self.at += len(content)
        return content
