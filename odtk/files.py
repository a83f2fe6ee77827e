"""Writing files whole or not at all.

What this file promises: a regular file that odtk writes is complete or absent, and one that was there before stays as
it was until the new one is complete. A full disk, a killed process or a power cut cannot leave half a file under its
name. A process that is killed while it writes leaves a temporary file, which the next run removes. A pipe or a device
is written to directly; a symbolic link is followed and stays a link. Every failure is an OdtkError that names the path
and the reason.

A file that a long run writes again and again has a lock beside it, so that two runs cannot overwrite each other.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import io
import json
import os
import re
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from .config import OdtkError
from .text import first_line, printable

MAX_LOCK = 10_000  # bytes that are read of a lock


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], *, one_of_many: bool = False) -> Iterator[IO[bytes]]:
    """Opens a temporary file that becomes ``path`` when the block ends; until then ``path`` is as it was.

    The temporary file is beside ``path``. It is flushed to the disk and then renamed; if anything fails, it is removed.
    Its name says which process wrote it; those that killed processes left for ``path`` are removed first.

    Args:
        one_of_many: of a folder that has had its abandoned files removed: listing it for every file would take longer
            and longer.

    Raises:
        OdtkError: the disk is full, the folder does not exist, or there is no permission to write in it.
    """
    target = os.path.realpath(path)  # write where a symbolic link leads, and keep the link
    if not one_of_many:
        remove_abandoned(target)
    folder, name = os.path.split(target)
    temporary = os.path.join(folder, f".{name}.{process_space()}-{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:  # x: never through a file or a link that someone put there
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


def remove_abandoned(path: str | os.PathLike[str], *, exclusive: bool = False) -> None:
    """Removes the temporary files of ``path`` that processes left when they were killed.

    Args:
        exclusive: this process holds the lock of ``path``, so no other writes it: all of them are removed. Otherwise
            those of processes that run stay, and those of other machines, about which nothing is known.
    """
    folder, name = os.path.split(os.path.realpath(path))
    remove_all_abandoned(folder, re.escape(name), exclusive=exclusive)


def remove_all_abandoned(folder: str | os.PathLike[str], names: str, *, exclusive: bool = False) -> None:
    """As remove_abandoned, for all files in a folder whose names match a pattern."""
    # Until 0.3 the name held the number of the process only.
    pattern = re.compile(rf"\.{names}\.(?:([0-9a-f]{{8}})-(\d+)-[0-9a-f]{{8}}|\d+)\.tmp")
    with contextlib.suppress(OSError):
        for entry in os.listdir(folder):
            found = pattern.fullmatch(entry)
            if found and (exclusive or (found[1] == process_space() and not is_running(int(found[2])))):
                with contextlib.suppress(OSError):
                    os.unlink(os.path.join(folder, entry))


def append(file: io.FileIO, data: bytes) -> None:
    """Appends data to a file that is open without a buffer: whole or not at all, unless it is a pipe or a device.

    Raises:
        OSError: the disk is full, for instance; the file is as it was.
    """
    end = file.seek(0, os.SEEK_END) if file.seekable() else None
    left = memoryview(data)
    try:
        while left:
            left = left[file.write(left) or 0 :]
    except OSError:
        if end is not None:
            with contextlib.suppress(OSError):
                file.truncate(end)
        raise


def os_error_reason(error: BaseException) -> str:
    """The operating system's reason behind an error ("No space left on device"), or the error's own first line."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return first_line(error)


def fsync_folder(folder: str) -> None:
    """Makes a rename in a folder survive a power cut, where the file system can do that."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def need_file(path: str | os.PathLike[str], what: str) -> None:
    """Refuses the path of a model to read where no file is.

    Raises:
        OdtkError: it is a folder, or does not exist; ``what`` says what the file should be.
    """
    if os.path.isdir(path):
        raise OdtkError(f"{path} is a folder, not a {what}: of a bundle, pass the .pth that it was exported from.")
    if not os.path.isfile(path):
        raise OdtkError(f"There is no {what} {path}.")


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
        raise OdtkError(f"Cannot write {path}: the folder {folder} does not exist; make it, or give another path.")
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


@contextlib.contextmanager
def open_output(path: str) -> Iterator[IO[bytes]]:
    """Opens a file to write in parts: it becomes ``path`` when the block ends; a pipe or a device is written directly.

    Raises:
        OdtkError: the disk is full, the folder does not exist, or there is no permission to write.
    """
    if not os.path.exists(path) or os.path.isfile(path):
        with atomic_write(path) as file:
            yield file
        return
    try:
        with open(path, "wb") as file:
            yield file
    except OSError as error:
        raise OdtkError(f"Cannot write {path}: {os_error_reason(error)}.") from error


def has_module(name: str) -> bool:
    """Whether a module is installed; it is not imported."""
    try:
        found = importlib.util.find_spec(name)
        return found is not None and found.origin is not None  # without an origin it is a mere folder of this name
    except ModuleNotFoundError:  # the package that contains it is missing
        return False


def cache_folder(name: str) -> Path:
    """A folder of odtk's in the user's cache folder (XDG Base Directory Specification); it may not exist yet.

    Raises:
        OdtkError: the user has no home.
    """
    given = os.environ.get("XDG_CACHE_HOME", "")
    try:
        return Path(given if os.path.isabs(given) else Path.home() / ".cache") / "odtk" / name
    except RuntimeError:
        raise OdtkError("There is no cache folder: set HOME or XDG_CACHE_HOME.") from None


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


# ---------------------------------------------------------------------------------------------------------------------
# Locks


@dataclass(frozen=True)
class Owner:
    """The process that holds a lock.

    Attributes:
        host: the name of its machine.
        machine: machine_token() of its machine.
        boot: of which start of the machine it is a process; empty where the system does not say.
        namespace: in which its number counts (containers have their own); empty where the system does not say.
        process: its number.
        started: when it started, in the system's own ticks, as numbers are given again; None where it does not say.
        since: when it took the lock, in UTC.
        run: the --rdzv-id of torchrun that it belongs to; empty outside torchrun, and where none was given.
    """

    host: str
    machine: str
    boot: str
    namespace: str
    process: int
    started: int | None
    since: str
    run: str = ""

    @classmethod
    def here(cls) -> Owner:
        """This process, now."""
        pid = os.getpid()
        state = process_state(pid)
        return cls(
            host=socket.gethostname(),
            machine=machine_token(),
            boot=boot_id(),
            namespace=pid_namespace(),
            process=pid,
            started=None if state is None else state[0],
            since=time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
            run=torchrun_id(),
        )

    @classmethod
    def parse(cls, text: bytes) -> Owner | None:
        """The owner that a lock file names, None if it is damaged."""
        try:
            owner = cls(**json.loads(text))
        except (ValueError, TypeError, RecursionError):
            return None
        texts = (owner.host, owner.machine, owner.boot, owner.namespace, owner.since, owner.run)
        if not all(isinstance(value, str) for value in texts) or type(owner.process) is not int:
            return None
        return owner

    def __str__(self) -> str:
        return f"process {self.process} on {printable(self.host)} since {printable(self.since)}"

    @property
    def is_visible(self) -> bool:
        """Whether this process can tell if the owner still runs."""
        if (self.host, self.machine) != (socket.gethostname(), machine_token()):
            return False
        return self.boot != boot_id() or self.namespace == pid_namespace()

    @property
    def is_running(self) -> bool:
        """Whether it still runs, if it is_visible."""
        return self.boot == boot_id() and is_running(self.process, self.started)


@contextlib.contextmanager
def locked(path: str | os.PathLike[str], log: Callable[[str], None] = print) -> Iterator[None]:
    """Holds the lock ``path``.lock while the block runs, so that no other run writes ``path``, on any machine.

    The lock of a process of this machine that has died is taken over, which is logged. So is one that an earlier start
    of the same torchrun run left on another machine: torchrun starts the processes of a run anew only where it has
    ended those before, or cannot reach their machine.

    Raises:
        OdtkError: another process holds the lock, or it cannot be written.
    """
    lock = f"{os.path.realpath(path)}.lock"
    here = Owner.here()
    content = json.dumps(asdict(here)).encode()
    try:
        while not (create_lock(lock, content) or take_over(lock, here, path, log)):
            pass  # its owner removed it in between
    except OSError as error:
        release(lock, b"")  # what is left of it if the disk was full
        raise OdtkError(f"The lock {lock} could not be written: {os_error_reason(error)}.") from error
    try:
        yield
    finally:
        release(lock, content)


def create_lock(lock: str, content: bytes) -> bool:
    """Makes a lock; False if there is one. O_EXCL: exactly one of several processes succeeds, on shared storage too."""
    try:
        with open(lock, "xb", buffering=0) as file:
            append(file, content)
    except FileExistsError:
        return False
    return True


def take_over(lock: str, here: Owner, path: str | os.PathLike[str], log: Callable[[str], None]) -> bool:
    """Writes this process into the lock of one that has died, or of its own run; False if there is no lock any more.

    Raises:
        OdtkError: its owner runs, or that cannot be known.
    """
    try:
        file = open(lock, "r+b", buffering=0)  # noqa: SIM115
    except FileNotFoundError:
        return False
    with file:
        with contextlib.suppress(OSError):  # on storage that has no such locks, O_EXCL alone must do
            fcntl.flock(file, fcntl.LOCK_EX)  # of two processes that come here, the second reads what the first wrote
        owner = Owner.parse(read_content(file))
        if owner is None:
            raise OdtkError(
                f"{path} may be in use: its lock {lock} is damaged. If no run writes that file, remove the lock and "
                "start again."
            )
        of_this_run = here.run != "" and here.run == owner.run
        if not owner.is_visible and not of_this_run:
            raise OdtkError(
                f"{path} is in use by {owner}, which cannot be seen from here. If it has ended, remove {lock} and "
                "start again."
            )
        if owner.is_visible and owner.is_running:
            raise OdtkError(f"{path} is in use by {owner}: wait until it ends, or pass another file name.")
        if not is_same_file(file, lock):  # it ended well, and removed its lock
            return False
        file.truncate(0)
        append(file, json.dumps(asdict(here)).encode())
    why = "which has died" if owner.is_visible else f"of the same run ({printable(here.run)})"
    log(f"Took over the lock {printable(lock)} of {owner}, {why}.")
    return True


def read_content(file: io.FileIO) -> bytes:
    """The content of a lock. Its owner writes it right after making it, so an empty one is given a second."""
    for _ in range(20):
        file.seek(0)
        if content := file.read(MAX_LOCK):
            return content
        time.sleep(0.05)
    return b""


def is_same_file(file: io.FileIO, path: str) -> bool:
    """Whether an open file is the one that has this name now."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def release(lock: str, content: bytes) -> None:
    """Removes a lock if it still has this content."""
    with contextlib.suppress(OSError):
        if Path(lock).read_bytes() == content:
            os.unlink(lock)


@functools.cache
def machine_token() -> str:
    """Eight hexadecimal digits that differ between machines; so do containers', unless they share their host's name."""
    machine = read_text("/etc/machine-id") or ""
    return hashlib.sha256(f"odtk {socket.gethostname()} {machine}".encode()).hexdigest()[:8]


@functools.cache
def process_space() -> str:
    """Eight hexadecimal digits that are the same where the same number means the same process."""
    return hashlib.sha256(f"{machine_token()} {pid_namespace()}".encode()).hexdigest()[:8]


def torchrun_id() -> str:
    """The --rdzv-id of the run that torchrun started this process for; empty outside one, and where none was given."""
    given = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return "" if given == "none" else given  # torchrun's default, which many runs share


def boot_id() -> str:
    return read_text("/proc/sys/kernel/random/boot_id") or ""


def pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def file_hash(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file's content, in hexadecimal digits; it is read in parts, however large it is."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def read_text(path: str) -> str | None:
    try:
        return Path(path).read_text(errors="replace").strip()
    except OSError:
        return None


def process_state(pid: int) -> tuple[int, str] | None:
    """When a process started, in ticks since its machine did, and its state (R, S, T …, see proc(5)); None: unknown."""
    text = read_text(f"/proc/{pid}/stat")
    if text is None:
        return None
    fields = text.rpartition(")")[2].split()  # what is before is its number and its name, which may hold anything
    return (int(fields[19]), fields[0]) if len(fields) > 19 else None


def is_running(pid: int, started: int | None = None) -> bool:
    """Whether a process of this machine runs; with ``started``, whether it is still the one that started then."""
    state = process_state(pid)
    if state is not None:
        return state[1] not in "ZX" and started in (None, state[0])  # Z: dead, and its parent has not noticed
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return True


def parse_json(text: str, path: str | os.PathLike[str]) -> Any:
    """The value of a JSON text.

    Raises:
        OdtkError: it is not JSON (with line and column), or nothing that Python can read: brackets nested thousands
            deep, a number of thousands of digits.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise OdtkError(
            f"{path} is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}."
        ) from None
    except RecursionError:
        raise OdtkError(f"{path} is not usable JSON: its brackets are nested too deeply.") from None
    except ValueError:  # Python's limit of the digits of an int
        raise OdtkError(f"{path} is not usable JSON: it has a number of thousands of digits.") from None
