"""Runs one command of odtk in a process of its own, with limits, and says what it did that it must not do.

The process is a fork of this one, where torch is imported already: that saves seconds of each case. What it must do:
end within its time and memory, by itself and not by a signal; with 0, or with another code and one sentence; without a
traceback; and leave every file of the user's as it was.
"""

from __future__ import annotations

import atexit
import faulthandler
import hashlib
import os
import re
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from odtk.cli import main

MEMORY = 6 << 30  # bytes of address space beyond that of the parent, as `ulimit -v` limits it
PEAK = 3 << 30  # bytes of resident memory that no case may need
SECONDS = 240.0  # of a command that takes one to ten where it has a processor to itself
SENTENCE = re.compile(r"^odtk: .*[.!?)]$")
FORBIDDEN = (
    "Traceback (most recent call last)",
    "Exception in thread",
    "Exception ignored in",
    "Fatal Python error",
    "Segmentation fault",
    "MemoryError",
    "core dumped",
)
OWN_WARNING = re.compile(r"odtk/[\w/]+\.py:\d+: \w*Warning")  # such as NumPy's overflow, in code of odtk


@dataclass(frozen=True)
class Outcome:
    """How a command ended.

    Attributes:
        argv: without "odtk".
        code: its exit code; None if a signal ended it.
        signal: that ended it, 0 for none.
        killed: the attack sent that signal.
        timed_out: it took longer than its limit.
        peak: bytes of resident memory.
    """

    argv: tuple[str, ...]
    code: int | None
    signal: int
    killed: bool
    timed_out: bool
    seconds: float
    peak: int
    stdout: str
    stderr: str

    @property
    def succeeded(self) -> bool:
        return self.code == 0


class Run:
    """A command that runs.

    Args:
        argv: its arguments, without "odtk".
        folder: where it runs, and where what it prints is kept.
        environment: added to this process's.
        file_bytes: the largest file that it can write (a full disk, where none can be mounted).
    """

    def __init__(
        self,
        argv: Iterable[object],
        folder: Path,
        environment: Mapping[str, str] | None = None,
        file_bytes: int | None = None,
    ) -> None:
        self.argv = tuple(str(part) for part in argv)
        number = len(list(folder.glob("*.stdout")))
        self.printed = (folder / f"{number}.stdout", folder / f"{number}.stderr")
        (folder / f"{number}.argv").write_text(repr(self.argv))
        self.started = time.monotonic()
        self.was_killed = self.has_ended = False
        sys.stdout.flush()
        sys.stderr.flush()
        for file in self.printed:
            file.touch()
        self.pid = os.fork()
        if self.pid == 0:
            _be_odtk(self.argv, folder, self.printed, environment or {}, file_bytes)

    def wait(self, seconds: float = SECONDS) -> Outcome:
        """Waits until it ends; after ``seconds`` it is killed with all that it started."""
        timed_out = False
        while True:
            pid, status, usage = os.wait4(self.pid, os.WNOHANG)
            if pid:
                break
            if not timed_out and time.monotonic() - self.started > seconds:
                timed_out = True
                self.kill()
            time.sleep(0.005)
        self.has_ended = True
        was_killed = self.was_killed
        self.kill()  # processes that it left
        ended_by = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        killed = was_killed and not timed_out and ended_by != 0
        stdout, stderr = (file.read_text(errors="replace") for file in self.printed)
        return Outcome(
            self.argv,
            os.WEXITSTATUS(status) if os.WIFEXITED(status) else None,
            ended_by,
            killed,
            timed_out,
            time.monotonic() - self.started,
            usage.ru_maxrss * 1024,
            stdout,
            stderr,
        )

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Sends a signal to the command and to all that it started."""
        self.was_killed = True
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:  # it has no group of its own yet, or nothing of it is left
            if not self.has_ended:
                os.kill(self.pid, number)


def _be_odtk(
    argv: tuple[str, ...],
    folder: Path,
    printed: tuple[Path, Path],
    environment: Mapping[str, str],
    file_bytes: int | None,
) -> None:
    """The child's life after the fork; never returns."""
    code = 70
    try:
        os.setsid()
        for number, path in zip((1, 2), printed, strict=True):
            os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
        threading.excepthook, sys.unraisablehook = threading.__excepthook__, sys.__unraisablehook__  # and not pytest's
        faulthandler.disable()
        os.environ.update(environment)
        os.chdir(folder)
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, mapped + MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if file_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
        sys.argv = ["odtk", *argv]
        code = main(list(argv))
    except SystemExit as error:  # of argparse
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 70
    finally:
        try:  # what the interpreter does at its end, which may hang or fail too
            threading._shutdown()  # type: ignore[attr-defined]
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        except BaseException:
            traceback.print_exc()
        os._exit(code)


def faults_of(outcome: Outcome) -> list[str]:
    """What a command did that it must not do, whatever it was given."""
    found = []
    said = outcome.stdout + outcome.stderr
    if outcome.timed_out:
        found.append(f"hang: it ran for {outcome.seconds:.0f} s")
    elif outcome.signal and not outcome.killed:
        found.append(f"crash: ended by signal {outcome.signal} ({signal.strsignal(outcome.signal)})")
    found += [f"it printed {text!r}" for text in FORBIDDEN if text in said]
    if warning := OWN_WARNING.search(said):
        found.append(f"it printed {warning.group()!r}")
    if outcome.code not in (0, None):
        sentences = [line for line in outcome.stderr.splitlines() if line.startswith("odtk: ")]
        usage = outcome.code == 2 and "usage: odtk" in outcome.stderr  # argparse
        reported = outcome.argv[0] == "check" and outcome.code == 1 and "REFUSED" in outcome.stdout
        if not usage and not reported and (len(sentences) != 1 or not SENTENCE.match(sentences[0])):
            found.append(f"exit code {outcome.code} without one sentence")
    if outcome.peak > PEAK:
        found.append(f"memory: {outcome.peak / 2**30:.1f} GiB")
    return found


def snapshot(folder: Path) -> dict[str, str]:
    """What a folder holds: a hash of each file, the target of each link."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"link to {os.readlink(path)}"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[name] = "folder"
    return found


def changes(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """The faults of files that must not change."""
    found = [f"it removed the user's {name}" for name in before if name not in after]
    found += [f"it wrote {name} beside the user's files" for name in after if name not in before]
    found += [f"it changed the user's {name}" for name in before if name in after and before[name] != after[name]]
    return found


def leftovers(folder: Path) -> list[str]:
    """The faults of temporary files and locks that no run owns any more."""
    names = sorted(path.name for path in folder.rglob("*") if re.search(r"^\..*\.tmp$|\.lock$", path.name))
    return [f"it left {name}" for name in names]
