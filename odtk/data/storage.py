"""Files on a disk, an HTTP server or in S3 (any file system of fsspec) that are read by ranges.

A lost connection is retried with growing pauses, and named when it does not come back. What the server refuses (no such
file, no permission) is refused at once.
"""

from __future__ import annotations

import functools
import inspect
import io
import os
import random
import re
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeVar

from ..config import OdtkError
from ..text import first_line, plural, printable

TRIES = 6
FIRST_PAUSE = 0.5  # seconds before the second try; each further one is twice as long
CONNECT_SECONDS, READ_SECONDS = 10.0, 30.0  # until a server that does not answer, or stops sending, has failed
BLOCK = 1 << 15  # bytes that are read at least of a remote file that is looked through
MAX_BLOCKS = 32  # at once, where one block after the other is read
KEPT_BLOCKS = 64
# What fsspec has beside storages; where an archive is, the address in front of it would have to say (zip://a::https://…).
NO_STORAGE = ("zip", "tar", "libarchive", "dir", "generic", "data")
T = TypeVar("T")


@dataclass(frozen=True)
class RangedFile:
    """A file that can be read by ranges.

    Attributes:
        url: a path, or an address such as s3://BUCKET/KEY.
        size: bytes.
        version: changes with the content, as far as its storage says; empty where it does not.
    """

    url: str
    size: int
    version: str

    @property
    def is_local(self) -> bool:
        return "://" not in self.url

    @property
    def name(self) -> str:
        """For messages and paths: without the scheme and what follows a question mark."""
        return self.url.partition("://")[2].partition("?")[0] if not self.is_local else self.url

    def read(self, start: int, end: int) -> bytes:
        """The bytes from ``start`` on, before ``end``.

        Raises:
            OdtkError: as read_ranges.
        """
        return read_ranges([(self, start, end)])[0]

    def open(self) -> BinaryIO:
        """The file to look through: what is skipped is not read.

        Raises:
            OdtkError: it cannot be opened. Reading it raises as read_ranges.
        """
        if not self.is_local:
            return BlockFile(self)  # type: ignore[return-value]
        try:
            return open(self.url, "rb")
        except OSError as error:
            raise OdtkError(f"Cannot read {self.url}: {error.strerror}.") from error


class Seekable(io.RawIOBase):
    """A file of a known size, read only, that keeps its place; a subclass reads at it.

    Attributes:
        size: bytes.
        at: offset of the next byte.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.size}[whence])
        return self.at


class BlockFile(Seekable):
    """A remote file that is read block by block; where one follows the other, more and more at once."""

    def __init__(self, file: RangedFile) -> None:
        super().__init__(file.size)
        self.file = file
        self.blocks: OrderedDict[int, bytes] = OrderedDict()
        self.last = -1  # block that was read last
        self.ahead = 1

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), self.size - self.at)
        if wanted <= 0:
            return 0
        number, inside = divmod(self.at, BLOCK)
        part = self.block(number)[inside : inside + wanted]
        buffer[: len(part)] = part
        self.at += len(part)
        return len(part)

    def read(self, size: int | None = -1) -> bytes:  # type: ignore[override]
        """All that was asked for, unless the file ends before."""
        left = self.size - self.at if size is None or size < 0 else size
        parts = []
        while left > 0 and (part := super().read(left)):
            parts.append(part)
            left -= len(part)
        return b"".join(parts)

    def block(self, number: int) -> bytes:
        if number not in self.blocks:
            self.ahead = min(2 * self.ahead, MAX_BLOCKS) if number == self.last + 1 else 1
            content = self.file.read(number * BLOCK, min((number + self.ahead) * BLOCK, self.size))
            for i in range(0, len(content), BLOCK):
                self.last = number + i // BLOCK
                self.blocks[self.last] = content[i : i + BLOCK]
            while len(self.blocks) > KEPT_BLOCKS:
                self.blocks.popitem(last=False)
        return self.blocks[number]


@functools.lru_cache(64)
def file_system(protocol: str) -> Any:
    """The file system of fsspec for file, http, https, s3 …

    Raises:
        OdtkError: it is unknown, or its package is not installed.
    """
    import fsspec

    more: dict[str, Any] = {}
    if protocol in ("http", "https"):
        try:
            import aiohttp
        except ImportError as error:
            raise OdtkError(f"{protocol}:// needs the package aiohttp: pip install 'odtk[scale]'.") from error
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=READ_SECONDS)
        more["client_kwargs"] = {"timeout": timeout}
    if protocol in ("s3", "s3a"):  # once, as the tries are counted here
        waits = {"connect_timeout": CONNECT_SECONDS, "read_timeout": READ_SECONDS}
        more["config_kwargs"] = {**waits, "retries": {"max_attempts": 1}}
    try:
        if protocol in NO_STORAGE or "::" in protocol or needs_arguments(fsspec.get_filesystem_class(protocol)):
            raise OdtkError(f"{protocol}:// cannot be read: tar files are read from http, https, s3 and file.")
        system = fsspec.filesystem(protocol, use_listings_cache=False, skip_instance_cache=True, **more)
    except (ImportError, ValueError) as error:
        raise OdtkError(f"{protocol}:// cannot be read: {error}; try pip install 'odtk[scale]'.") from error
    if protocol in ("s3", "s3a"):
        system.retries = 1
    return system


def needs_arguments(system: type) -> bool:
    """Whether a file system must be told more than an address: ftp its host, for one."""
    parameters = list(inspect.signature(system.__init__).parameters.values())[1:]  # type: ignore[misc]
    return any(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)


def system_of(url: str) -> Any:
    return file_system(url.partition("://")[0] if "://" in url else "file")


def read_ranges(ranges: Sequence[tuple[RangedFile, int, int]]) -> list[bytes]:
    """The bytes of each range (file, start, end), remote ones at the same time.

    Raises:
        OdtkError: the connection is lost and does not come back, or the file is not there any more, is shorter than it
            was, or its server does not answer ranges.
    """
    found: list[bytes | None] = [None] * len(ranges)

    def read_missing() -> None:
        left = [i for i, content in enumerate(found) if content is None]
        for url in dict.fromkeys(ranges[i][0].url.partition("://")[0] for i in left):
            own = [i for i in left if ranges[i][0].url.partition("://")[0] == url]
            files, starts, ends = zip(*(ranges[i] for i in own), strict=True)
            contents = system_of(files[0].url).cat_ranges(
                [file.url for file in files], list(starts), list(ends), on_error="return"
            )
            for i, content in zip(own, contents, strict=True):
                if isinstance(content, Exception):
                    raise Failed(ranges[i][0]) from content
                if len(content) > ranges[i][2] - ranges[i][1]:
                    raise OdtkError(f"The server of {ranges[i][0].url} does not answer ranges (HTTP 206).")
                if len(content) < ranges[i][2] - ranges[i][1]:
                    raise Failed(ranges[i][0]) from EOFError("fewer bytes came than were asked for")
                found[i] = content

    patiently(read_missing, ranges[0][0].url if ranges else "")
    return [content for content in found if content is not None]


class Failed(Exception):
    """A file could not be read; the cause says why."""

    def __init__(self, file: RangedFile) -> None:
        super().__init__(file.url)
        self.url = file.url


def patiently(read: Callable[[], T], url: str) -> T:
    """What a reading gives that is tried again when the connection is lost.

    Raises:
        OdtkError: it is refused, or the connection was lost TRIES times.
    """
    started = time.monotonic()
    for attempt in range(TRIES):
        try:
            return read()
        except OdtkError:
            raise
        except Exception as error:  # each storage has its own exceptions
            where = error.url if isinstance(error, Failed) else url
            cause: BaseException = error.__cause__ or error if isinstance(error, Failed) else error
            if "://" not in where or is_final(cause):
                raise OdtkError(f"Cannot read {where}: {reason_of(cause)}.") from error
            if attempt == TRIES - 1:
                raise OdtkError(
                    f"The connection to {where} was lost ({reason_of(cause)}) and did not come back in {TRIES} tries "
                    f"over {time.monotonic() - started:.0f} s: start again when the storage answers."
                ) from error
            pause = FIRST_PAUSE * 2**attempt * random.uniform(0.75, 1.25)  # not all processes at the same moment
            if attempt == 1:  # a single failure is not worth a word
                tries = plural(TRIES - attempt - 1, "more try", "more tries")
                print(f"Warning: cannot read {printable(where)} ({reason_of(cause)}): {tries}.", file=sys.stderr)
            time.sleep(pause)
    raise AssertionError


def is_final(error: BaseException) -> bool:
    """Whether trying again cannot help: there is no such file, or no permission."""
    while isinstance(error, FileNotFoundError) and error.__cause__ is not None:  # fsspec's for whatever HTTP did
        error = error.__cause__
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return 400 <= status < 500 and status not in (408, 429)
    refused = isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError))
    return refused or "Credentials" in type(error).__name__  # botocore's NoCredentialsError


def reason_of(error: BaseException) -> str:
    while isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(status := getattr(error, "status", None), int):
        return f"HTTP {status}"
    return str(getattr(error, "strerror", None) or first_line(error)).rstrip(".")


# ---------------------------------------------------------------------------------------------------------------------
# Names


def find_files(source: str) -> list[RangedFile]:
    """The files that a name means: {000..146} and {a,b} are written out, * and ? are looked up.

    Raises:
        OdtkError: there are none, or one cannot be read.
    """
    if "://" not in source:
        source = os.path.expanduser(source)
    urls: list[str] = []
    for name in written_out(source):
        if "*" not in name and not ("?" in name and "://" not in name):
            urls.append(name)
            continue
        matches = sorted(patiently(functools.partial(system_of(name).glob, name), name))
        if not matches:
            raise OdtkError(f"No tar file matches {name}: give another pattern with --images.")
        scheme, slashes, _ = name.rpartition("://")
        urls += [match if "://" in match else scheme + slashes + match for match in matches]
    return [stat(url) for url in urls]


def written_out(name: str) -> list[str]:
    """The names that a pattern with braces stands for: a{08..10}.tar → a08.tar, a09.tar, a10.tar; {x,y} → x, y."""
    found = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", name)
    if found is None:
        return [name]
    first, last, listed = found.groups()
    if listed is None:
        choices = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    else:
        choices = listed.split(",")
    return [one for choice in choices for one in written_out(name[: found.start()] + choice + name[found.end() :])]


def stat(url: str) -> RangedFile:
    """A file with its size.

    Raises:
        OdtkError: it does not exist, or cannot be read.
    """
    if "://" not in url:
        try:
            status = os.stat(url)
        except OSError as error:
            raise OdtkError(f"Cannot read {url}: {error.strerror}.") from None
        return RangedFile(url, status.st_size, str(status.st_mtime_ns))
    system = system_of(url)
    info = patiently(lambda: system.info(url), url)
    if info.get("size") is None:
        raise OdtkError(f"The server of {url} does not say how large it is, which reading by ranges needs.")
    version = info.get("ETag") or info.get("Last-Modified") or info.get("LastModified") or info.get("mtime") or ""
    return RangedFile(url, int(info["size"]), str(version))
