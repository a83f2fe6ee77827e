"""Writing files whole or not at all.

What this file promises: a regular file that odtk writes is complete or absent, and one that was there before stays as
it was until the new one is complete. A full disk, a killed process or a power cut cannot leave half a file under its
name. A pipe or a device is written to directly; a symbolic link is followed and stays a link. Every failure is an
OdtkError that names the path and the reason.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from .config import OdtkError


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Opens a temporary file that becomes ``path`` when the block ends; until then ``path`` is as it was.

    The temporary file is beside ``path``. It is flushed to the disk and then renamed; if anything fails, it is removed.

    Raises:
        OdtkError: the disk is full, the folder does not exist, or there is no permission to write in it.
    """
    target = os.path.realpath(path)  # write where a symbolic link leads, and keep the link
    temporary = os.path.join(os.path.dirname(target), f".{os.path.basename(target)}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
        message = f"{path} could not be written ({os_error_reason(error)}); an earlier file is untouched."
        raise OdtkError(message) from error
    finally:  # reached on a KeyboardInterrupt too
        with contextlib.suppress(OSError):
            os.unlink(temporary)
    fsync_folder(os.path.dirname(target))


def os_error_reason(error: BaseException) -> str:
    """The operating system's reason behind an error ("No space left on device"), or the error's own first line."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return str(error).splitlines()[0]


def fsync_folder(folder: str) -> None:
    """Makes a rename in a folder survive a power cut, where the file system can do that."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def check_writable(path: str) -> None:
    """Checks before long work that write_json and atomic_write will be able to write ``path``.

    Raises:
        OdtkError: ``path`` is a folder, its folder does not exist, or there is no permission to write.
    """
    if os.path.isdir(path):
        raise OdtkError(f"Cannot write {path}: it is a folder.")
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe or a device: written to, not replaced
        if not os.access(path, os.W_OK):
            raise OdtkError(f"Cannot write {path}: no permission.")
        return
    folder = os.path.dirname(os.path.realpath(path))
    if not os.path.isdir(folder):
        raise OdtkError(f"Cannot write {path}: the folder {folder} does not exist.")
    if not os.access(folder, os.W_OK):
        raise OdtkError(f"Cannot write {path}: no permission to write in {folder}.")


def write_json(value: Any, path: str) -> None:
    """Writes JSON, whole or not at all; to a pipe or a device (such as /dev/stdout) directly.

    Raises:
        OdtkError: the disk is full, the folder does not exist, or there is no permission to write.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        return stream_json(value, path)
    with atomic_write(path) as file:
        file.write(json.dumps(value).encode())


def stream_json(value: Any, path: str) -> None:
    """Writes JSON to a pipe or a device, which cannot be replaced by a rename."""
    try:
        with open(path, "w", encoding="utf-8") as file:
            json.dump(value, file)
    except OSError as error:
        raise OdtkError(f"Cannot write {path}: {os_error_reason(error)}.") from error


def make_folder(folder: str) -> Path:
    """Makes a folder and those above it where they are missing, and returns its path.

    Raises:
        OdtkError: there is a file of that name, or no permission.
    """
    target = Path(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OdtkError(f"Cannot make the folder {folder}: {error.strerror}.") from error
    return target
