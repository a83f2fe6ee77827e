"""Writing files whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from .config import OdtkError


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A file to write that becomes ``path`` when the block ends: at any moment ``path`` is whole, old or new.

    It is written beside ``path``, flushed to the disk and renamed; if anything fails, it is removed.

    Raises:
        OdtkError: the disk is full, the folder does not exist or may not be written to.
    """
    target = os.path.realpath(path)  # through a symbolic link, not over it
    temporary = os.path.join(os.path.dirname(target), f".{os.path.basename(target)}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
        message = f"{path} could not be written ({first_os_error(error)}); an earlier one is untouched."
        raise OdtkError(message) from error
    finally:  # a KeyboardInterrupt comes by here too
        with contextlib.suppress(OSError):
            os.unlink(temporary)
    sync_folder(os.path.dirname(target))


def first_os_error(error: BaseException) -> str:
    """The operating system's reason behind an error, or the first line of the error itself."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return str(error).splitlines()[0]


def sync_folder(folder: str) -> None:
    """Makes a rename survive a power cut, where the file system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def check_folder(path: str) -> None:
    """Refuses, before the work is done, a path that could not be written: as write_json and replacing would."""
    if os.path.isdir(path):
        raise OdtkError(f"Cannot write {path}: it is a folder.")
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe or a device, which is not replaced
        if not os.access(path, os.W_OK):
            raise OdtkError(f"Cannot write {path}: no permission.")
        return
    folder = os.path.dirname(os.path.realpath(path))
    if not os.path.isdir(folder):
        raise OdtkError(f"Cannot write {path}: the folder {folder} does not exist.")
    if not os.access(folder, os.W_OK):
        raise OdtkError(f"Cannot write {path}: no permission to write in {folder}.")


def write_json(value: Any, path: str) -> None:
    """Writes JSON, whole or not at all; a pipe or a device (/dev/stdout, say) is written to as it is.

    Raises:
        OdtkError: the disk is full, or the folder is missing or may not be written to.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        return write_stream(value, path)
    with replacing(path) as file:
        file.write(json.dumps(value).encode())


def write_stream(value: Any, path: str) -> None:
    try:
        with open(path, "w", encoding="utf-8") as file:
            json.dump(value, file)
    except OSError as error:
        raise OdtkError(f"Cannot write {path}: {first_os_error(error)}.") from error


def make_folder(folder: str) -> Path:
    target = Path(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OdtkError(f"Cannot make the folder {folder}: {error.strerror}.") from error
    return target
