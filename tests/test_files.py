"""Files are written whole or not at all, and what cannot be written is refused."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from odtk import files
from odtk.config import OdtkError
from odtk.files import parse_json


def test_a_device_needs_no_folder_to_write_in(tmp_path: Path, monkeypatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link.json").symlink_to(tmp_path / "other" / "out.json")
    writable = {str(tmp_path / "pipe"), str(tmp_path / "other")}  # root may write anywhere
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) in writable)
    files.check_writable(str(tmp_path / "pipe"))
    with pytest.raises(OdtkError, match="no permission to write in"):
        files.check_writable(str(tmp_path / "out.json"))
    with pytest.raises(OdtkError, match=r"other does not exist"):
        files.check_writable(str(tmp_path / "link.json"))
    (tmp_path / "other").mkdir()
    files.check_writable(str(tmp_path / "link.json"))  # what is replaced is where the link leads
    writable.clear()
    with pytest.raises(OdtkError, match="pipe: no permission"):
        files.check_writable(str(tmp_path / "pipe"))


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, os.strerror(28))

    path = tmp_path / "out.json"
    path.write_text("[1]")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OdtkError, match="No space left on device"):
        files.write_json([2], str(path))
    assert path.read_text() == "[1]" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
def test_a_device_is_written_to_and_not_replaced() -> None:
    with pytest.raises(OdtkError, match="/dev/full: No space left on device"):
        files.write_json([1], "/dev/full")
    assert not os.path.isfile("/dev/full")


def test_the_file_and_its_folder_reach_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In that order: the content before the name leads to it, and then the name."""
    done: list[str] = []

    def fsync(descriptor: int) -> None:
        synced = os.readlink(f"/proc/self/fd/{descriptor}")
        done.append("folder" if synced == str(tmp_path) else "content" if synced.endswith(".tmp") else synced)

    def replaced(source: str, target: str, rename: Callable[[str, str], None] = os.replace) -> None:
        done.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replaced)
    files.write_json([1], str(tmp_path / "out.json"))
    assert done == ["content", "rename", "folder"]


def test_a_temporary_file_is_nobody_elses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link that waits under the name of the temporary file is not followed."""
    monkeypatch.setattr("secrets.token_hex", lambda count: "0" * 2 * count)
    victim = tmp_path / "victim"
    victim.write_text("mine")
    with files.atomic_write(tmp_path / "out") as file:
        trap = tmp_path / os.path.basename(file.name)
    trap.symlink_to(victim)
    with pytest.raises(OdtkError, match="File exists"):
        files.write_json([1], str(tmp_path / "out"))
    assert victim.read_text() == "mine"


KILLED = """
import os, signal
from odtk import files
with files.atomic_write({path!r}) as file:
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def run_until_killed(code: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == -signal.SIGKILL


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "m.pth"
    path.write_bytes(b"old")
    run_until_killed(KILLED.format(path=str(path)))
    (left,) = set(os.listdir(tmp_path)) - {"m.pth"}
    parts = re.fullmatch(r"\.m\.pth\.([0-9a-f]{8})-(\d+)-[0-9a-f]{8}\.tmp", left)
    assert parts and path.read_bytes() == b"old"
    others = {
        left.replace(f"-{parts[2]}-", f"-{os.getpid()}-"),  # of a process that runs
        left.replace(parts[1], "0" * 8),  # of another machine
        f".m.pth.{parts[2]}.tmp",  # of an older odtk, which did not say of which machine
    }
    own = {".m.pth.notes.tmp", ".m.pth.tmp", "m.pth.1.tmp", ".other.pth.1.tmp"}  # the user's
    for name in others | own:
        (tmp_path / name).touch()
    files.write_json([1], str(path))  # as every writer does
    assert set(os.listdir(tmp_path)) == {"m.pth", *others, *own}
    files.remove_abandoned(path, exclusive=True)
    assert set(os.listdir(tmp_path)) == {"m.pth", *own}


def test_what_killed_processes_left_of_many_files_is_removed_at_once(tmp_path: Path, monkeypatch) -> None:
    for name in ("frame1.jpg", "frame22.jpg", "mine.jpg"):
        run_until_killed(KILLED.format(path=str(tmp_path / name)))
    files.remove_all_abandoned(tmp_path, r"frame\d+\.jpg")
    (left,) = os.listdir(tmp_path)
    assert left.startswith(".mine.jpg.")

    monkeypatch.setattr(os, "listdir", lambda folder: pytest.fail("it grows with every file"))
    with files.atomic_write(tmp_path / "frame1.jpg", one_of_many=True) as file:
        file.write(b"new")
    assert (tmp_path / "frame1.jpg").read_bytes() == b"new"


def test_an_error_without_words_is_named_by_its_type(tmp_path: Path) -> None:
    with (
        pytest.raises(OdtkError, match=r"m\.pth could not be written \(RuntimeError\)"),
        files.atomic_write(tmp_path / "m.pth"),
    ):
        raise RuntimeError


def test_a_line_is_appended_whole_or_not_at_all(tmp_path: Path) -> None:
    class Full(files.io.FileIO):
        """A disk that has room for ten bytes in all."""

        def write(self, data: memoryview) -> int:  # type: ignore[override]
            room = 10 - self.seek(0, os.SEEK_END)
            if room <= 0:
                raise OSError(28, os.strerror(28))
            return super().write(data[:room])

    with Full(tmp_path / "log", "w") as file:
        files.append(file, b"12345\n")
        with pytest.raises(OSError, match="No space left"):
            files.append(file, b"67890\n")
        files.append(file, b"67\n")
    assert (tmp_path / "log").read_bytes() == b"12345\n67\n"


# ---------------------------------------------------------------------------------------------------------------------
# Locks

HOLDER = """
import os, signal, sys
from odtk import files
with files.locked({path!r}):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_lock_keeps_a_second_run_out(tmp_path: Path) -> None:
    path, lock = tmp_path / "m.pth", tmp_path / "m.pth.lock"
    with files.locked(path):
        assert json.loads(lock.read_text())["process"] == os.getpid()
        (tmp_path / "link.pth").symlink_to(path)
        for name in (path, tmp_path / "link.pth"):
            message = (
                rf"is in use by process {os.getpid()} on {socket.gethostname()} since 20.* UTC: wait until it ends"
            )
            with pytest.raises(OdtkError, match=message), files.locked(name):
                pass
        assert lock.exists()  # the refused run did not remove it
    assert not lock.exists()
    with pytest.raises(ZeroDivisionError), files.locked(path):
        raise ZeroDivisionError
    assert not lock.exists()


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "m.pth"
    said: list[str] = []
    run_until_killed(HOLDER.format(path=str(path)))
    left = json.loads((tmp_path / "m.pth.lock").read_text())
    with files.locked(path, said.append):
        assert json.loads((tmp_path / "m.pth.lock").read_text())["process"] == os.getpid()
    assert os.listdir(tmp_path) == []
    assert len(said) == 1 and f"process {left['process']} on {socket.gethostname()}" in said[0] and "died" in said[0]


@pytest.mark.parametrize(
    "change",
    [{"started": 1}, {"boot": "another"}, {"process": 2**40}],
    ids=["the number was given again", "before the machine restarted", "no such number"],
)
def test_who_is_dead(tmp_path: Path, change: dict[str, Any]) -> None:
    """Although a process of that number may run."""
    lock = tmp_path / "m.pth.lock"
    lock.write_text(json.dumps(asdict(replace(files.Owner.here(), **change))))
    with files.locked(tmp_path / "m.pth", lambda _: None):
        pass
    assert not lock.exists()


@pytest.mark.parametrize(
    "change",
    [{"host": "elsewhere"}, {"machine": "0" * 8}, {"namespace": "pid:[1]"}],
    ids=["another host", "another machine of the same name", "another container of the same name"],
)
def test_the_lock_of_another_machine_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    lock = tmp_path / "m.pth.lock"
    content = json.dumps(asdict(replace(files.Owner.here(), process=2**40, **change)))
    lock.write_text(content)
    message = rf"cannot be seen from here\. If it has ended, remove {lock}"
    with pytest.raises(OdtkError, match=message) as error, files.locked(tmp_path / "m.pth"):
        pass
    assert "process 1099511627776 on" in str(error.value) and lock.read_text() == content


@pytest.mark.parametrize(
    ("theirs", "ours", "taken"),
    [("job 7", "job 7", True), ("job 7", "job 8", False), ("none", "none", False), (None, None, False)],
    ids=["the same run of torchrun", "another one", "runs without an id", "no torchrun"],
)
def test_a_run_that_torchrun_starts_anew_takes_its_own_lock(
    tmp_path: Path, theirs: str | None, ours: str | None, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which another machine holds, that is gone."""

    def be_of(run: str | None) -> None:
        monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
        if run is not None:
            monkeypatch.setenv("TORCHELASTIC_RUN_ID", run)

    said: list[str] = []
    be_of(theirs)
    lock = tmp_path / "m.pth.lock"
    lock.write_text(json.dumps(asdict(replace(files.Owner.here(), host="elsewhere"))))
    be_of(ours)
    expected = nullcontext() if taken else pytest.raises(OdtkError, match="cannot be seen from here")
    with expected, files.locked(tmp_path / "m.pth", said.append):
        assert json.loads(lock.read_text())["host"] == socket.gethostname()
    assert lock.exists() != taken
    assert [line.rpartition(" on ")[2].partition(" since")[0] for line in said] == (["elsewhere"] if taken else [])


@pytest.mark.parametrize("content", ["", "{", "[]", '{"host": 1}', "\x00" * 100, "[" * 9000, '{"host": "a"}'])
def test_a_damaged_lock_is_refused(tmp_path: Path, content: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    (tmp_path / "m.pth.lock").write_text(content)
    with pytest.raises(OdtkError, match=r"m\.pth\.lock is damaged"), files.locked(tmp_path / "m.pth"):
        pass
    assert (tmp_path / "m.pth.lock").read_text() == content


RACER = """
import sys, time
from pathlib import Path
from odtk import files
from odtk.config import OdtkError
Path(sys.argv[2]).touch()
while not Path(sys.argv[3]).exists():
    time.sleep(0.001)
try:
    with files.locked(sys.argv[1]):
        time.sleep(2)
except OdtkError:
    sys.exit(3)
"""


def test_of_several_runs_one_takes_over(tmp_path: Path) -> None:
    path = tmp_path / "m.pth"
    run_until_killed(HOLDER.format(path=str(path)))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", RACER, str(path)]
    ready = [tmp_path / f"ready{i}" for i in range(4)]
    processes = [subprocess.Popen([*command, str(r), str(tmp_path / "go")], env=environment) for r in ready]
    deadline = time.monotonic() + 60
    while not all(file.exists() for file in ready) and time.monotonic() < deadline:
        time.sleep(0.01)
    (tmp_path / "go").touch()
    assert sorted(process.wait(60) for process in processes) == [0, 3, 3, 3]
    assert not (tmp_path / "m.pth.lock").exists()


def test_a_lock_on_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: files.io.FileIO, data: bytes) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(files, "append", full)
    with pytest.raises(OdtkError, match="could not be written: No space left"), files.locked(tmp_path / "m.pth"):
        pass
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"a": [1, 2', "is not valid JSON: Expecting ',' delimiter at line 1, column 12"),
        ("[" * 200_000, "its brackets are nested too deeply"),
        ('{"a": ' * 200_000, "its brackets are nested too deeply"),
        ("9" * 5000, "it has a number of thousands of digits"),
    ],
)
def test_texts_that_are_no_usable_json(text: str, sentence: str) -> None:
    with pytest.raises(OdtkError, match="x.json is not") as error:
        parse_json(text, "x.json")
    assert sentence in str(error.value)
    assert parse_json('{"a": [1]}', "x.json") == {"a": [1]}
