"""The judge of the attack sees each kind of fault, and a case is the same each time it runs."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.attack import judge
from tests.attack.judge import Run, changes, faults_of, leftovers, snapshot
from tests.attack.kinds import KINDS, Case, change_json, small_disk
from tests.attack.materials import draw
from tests.attack.mutations import mutate_bytes, mutate_text


def say(text: str, code: int) -> int:
    print(text, file=sys.stderr)
    return code


def bad_thread(argv: list[str]) -> int:
    thread = threading.Thread(target=lambda: 1 / 0)
    thread.start()
    thread.join()
    return 0


def crash(argv: list[str]) -> int:
    os.kill(os.getpid(), signal.SIGSEGV)
    return 0


def hang(argv: list[str]) -> int:
    time.sleep(60)
    return 0


def hanging_thread(argv: list[str]) -> int:
    threading.Thread(target=time.sleep, args=(60,)).start()
    return 0


def hungry(argv: list[str]) -> int:
    return len(bytearray(64 << 30))


COMMANDS: dict[str, tuple[Callable[[list[str]], int], str]] = {
    "fine": (lambda argv: 0, ""),
    "a sentence": (lambda argv: say("odtk: The file x is damaged: export it again.", 1), ""),
    "traceback": (lambda argv: 1 // 0, "Traceback"),
    "no sentence": (lambda argv: say("no", 1), "without one sentence"),
    "two sentences": (lambda argv: say("odtk: One.\nodtk: Two.", 1), "without one sentence"),
    "half a sentence": (lambda argv: say("odtk: KeyError", 1), "without one sentence"),
    "crash": (crash, "signal 11"),
    "hang": (hang, "hang"),
    "hanging thread": (hanging_thread, "hang"),
    "failed thread": (bad_thread, "Exception in thread"),
    "memory": (hungry, "MemoryError"),
    "warning": (lambda argv: say("/x/odtk/data/voc.py:3: RuntimeWarning: overflow", 0), "RuntimeWarning"),
}


@pytest.mark.parametrize("name", list(COMMANDS))
def test_the_judge_sees(name, tmp_path: Path, monkeypatch) -> None:
    command, fault = COMMANDS[name]
    monkeypatch.setattr(judge, "main", command)
    outcome = Run(["check"], tmp_path).wait(seconds=2 if name.startswith("hang") else 60)
    found = faults_of(outcome)
    assert (fault in "; ".join(found)) if fault else found == [], (found, outcome)


def test_the_judge_kills_and_does_not_blame_what_was_killed(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(judge, "main", COMMANDS["hang"][0])
    run = Run(["check"], tmp_path)
    run.kill()
    outcome = run.wait(30)
    assert outcome.killed and outcome.seconds < 20 and faults_of(outcome) == []


def test_files_of_the_user_that_change_are_seen(tmp_path: Path) -> None:
    for name in ("kept", "changed", "removed"):
        (tmp_path / name).write_text(name)
    before = snapshot(tmp_path)
    assert changes(before, snapshot(tmp_path)) == []
    (tmp_path / "changed").write_text("other")
    (tmp_path / "removed").unlink()
    (tmp_path / ".x.json.12.tmp").write_text("")
    (tmp_path / "x.lock").write_text("")
    found = changes(before, snapshot(tmp_path))
    assert len(found) == 4 and "it changed the user's changed" in found and "it removed the user's removed" in found
    assert leftovers(tmp_path) == ["it left .x.json.12.tmp", "it left x.lock"]


def test_a_case_is_the_same_each_time(tmp_path: Path) -> None:
    def damaged(name: str, folder: str) -> list[bytes]:
        rng = Case(name, tmp_path / folder, tmp_path).rng
        content = b'{"images": [{"id": 1, "file_name": "1.jpg"}]}'
        return [mutate(rng, content) for mutate in (change_json, mutate_text, mutate_bytes) for _ in range(20)]

    first = damaged("coco:0:1", "a")
    assert first == damaged("coco:0:1", "b") and first != damaged("coco:0:2", "c")
    assert len(set(first)) > 40


@pytest.mark.parametrize("number", range(3))
def test_cases_of_detections_run_and_find_no_fault(number, tmp_path: Path) -> None:
    draw(tmp_path / "made")
    case = Case(f"detections:0:{number}", tmp_path / "case", tmp_path / "made")
    KINDS["detections"](case)
    assert case.codes and case.faults == []


def test_a_command_that_writes_where_it_must_not_is_blamed(tmp_path: Path, monkeypatch) -> None:
    def vandal(argv: list[str]) -> int:
        Path("user/train.json").write_text("{}")
        Path("out/m.pth").write_text("half")
        return say("odtk: The disk is full.", 1)

    monkeypatch.setattr(judge, "main", vandal)
    draw(tmp_path / "made")
    case = Case("coco:0:0", tmp_path / "case", tmp_path / "made")
    case.give("train.json")
    (case.out / "m.pth").write_text("whole")
    case.odtk("train", keeps=case.out / "m.pth")
    assert case.faults == ["it changed the user's train.json", "it failed and changed m.pth"]


def test_a_small_disk_is_full_soon(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 8192) as mounted:
        if not mounted:
            pytest.skip("only root can mount a disk here")
        with pytest.raises(OSError, match="No space left"):
            (tmp_path / "disk" / "x").write_bytes(bytes(100_000))
    assert not (tmp_path / "disk" / "x").exists()
