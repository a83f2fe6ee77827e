"""The processes of a run: they meet, they end together, and the first error is the one that is reported."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from odtk import launch
from odtk.config import LoaderConfig, OdtkError


@dataclass(frozen=True)
class Config:
    """The part of a config that launch needs, and the folder into which a job writes."""

    data: LoaderConfig
    folder: str = ""


def config(folder: Path | str = "") -> Config:
    return Config(LoaderConfig(images="."), str(folder))


def note(config: Config, rank: int, world: int) -> str:
    """A job: writes its rank, its device and a sum over all ranks into a file."""
    total = torch.tensor(rank + 1)
    if world > 1:
        dist.all_reduce(total)
    data = config.data
    line = f"{rank} {world} {data.rank} {data.world} {data.device} {total.item()}"
    Path(config.folder, str(rank)).write_text(line)
    return line


def refuse(config: Config, rank: int, world: int) -> None:
    """A job: rank 1 raises an error of the user's while rank 0 waits for it."""
    if rank == 1:
        raise OdtkError("The file x.json is broken: mend it.")
    dist.barrier()


def crash(config: Config, rank: int, world: int) -> None:
    """A job: rank 1 raises an error of ours."""
    if rank == 1:
        raise ZeroDivisionError("by nothing")
    dist.barrier()


def be_killed(config: Config, rank: int, world: int) -> None:
    """A job: rank 1 is killed, as by the kernel when memory is short."""
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def hang(config: Config, rank: int, world: int) -> None:
    """A job: rank 1 fails while rank 0 waits and ignores SIGTERM."""
    if rank == 1:
        raise OdtkError("Rank 1 has a reason.")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)


def raise_long_error(config: Config, rank: int, world: int) -> None:
    """A job: its error is longer than what a pipe holds."""
    raise ValueError("x" * 1_000_000)


def wait_for_signal(config: Config, rank: int, world: int) -> None:
    """A job that ends as training does: on SIGTERM, with an exit code of its own."""
    received: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    Path(config.folder, f"ready{rank}").touch()
    while not received:
        time.sleep(0.05)
    Path(config.folder, f"saved{rank}").touch()
    raise SystemExit(128 + received[0])


def test_a_single_device_needs_no_other_process(tmp_path: Path) -> None:
    assert launch.launch(note, config(tmp_path), devices="cpu") == "0 1 0 1 cpu 1"


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert [launch.parse_devices(d) for d in (None, "cpu", "cpu:3", "2", 4)] == [
        ("cuda", 4),
        ("cpu", 1),
        ("cpu", 3),
        ("cuda", 2),
        ("cuda", 4),
    ]
    with pytest.raises(OdtkError, match="--devices 5: only 4 GPUs are visible"):
        launch.world_size(5)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert launch.parse_devices(None) == ("cpu", 1)
    with pytest.raises(OdtkError, match="--devices 1: no GPU is visible"):
        launch.world_size("1")
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "16")
    assert launch.world_size("cpu") == 16


def test_the_store_opens_on_the_given_port_or_a_free_one() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = server.getsockname()[1]
        store = launch.open_store(f"127.0.0.1:{taken}")
        assert (store.host, store.port != taken) == ("127.0.0.1", True)
    store = launch.open_store(f"127.0.0.1:{taken}")
    assert store.port == taken
    assert launch.open_store(f"127.0.0.1:{taken}").port != taken  # a second run at the same time gets its own
    for wrong in ("127.0.0.1", "host:name", ":29500"):
        with pytest.raises(OdtkError, match="pass an address and a port"):
            launch.open_store(wrong)
    with pytest.raises(OdtkError, match="not an address of this machine"):
        launch.open_store("192.0.2.1:29500")


def test_the_first_error_is_raised() -> None:
    """Exit codes and failures of the ranks → the exception."""
    late, early = (2.0, launch.Failure(0, "Connection closed.")), (1.0, launch.Failure(1, "The disk is full."))
    with pytest.raises(OdtkError, match=r"^The disk is full\.$"):
        launch.raise_first_error([1, 1], [late, early], [])
    with pytest.raises(OdtkError, match=r"^Rank 1 of 2 was killed by SIGKILL \(out of memory\?\)"):
        launch.raise_first_error([1, -9], [late], [])  # rank 1 sent nothing; rank 0 failed because of it
    ends: list[list[int | None]] = [[143, 143], [143, -15], [None, 143]]
    for codes in ends:
        with pytest.raises(SystemExit) as stop:
            launch.raise_first_error(codes, [], [signal.SIGTERM])
        assert stop.value.code == 143
    launch.raise_first_error([0, 0], [], [])


@pytest.mark.slow
def test_spawned_processes_form_a_group(tmp_path: Path) -> None:
    assert launch.launch(note, config(tmp_path), devices="cpu:2", master=f"127.0.0.1:{free_port()}") is None
    assert (tmp_path / "0").read_text() == "0 2 0 2 cpu 3"
    assert (tmp_path / "1").read_text() == "1 2 1 2 cpu 3"


@pytest.mark.slow
@pytest.mark.parametrize(
    "job, message",
    [
        (refuse, r"^The file x\.json is broken: mend it\.$"),
        (crash, r"^Rank 1 of 2 failed, which ended the run: ZeroDivisionError: by nothing$"),
        (be_killed, r"^Rank 1 of 2 was killed by SIGKILL"),
        (hang, r"^Rank 1 has a reason\.$"),
        (raise_long_error, r"^Rank \d of 2 failed, which ended the run: ValueError: x{1000}"),
    ],
    ids=["refuse", "crash", "killed", "hang", "long"],
)
def test_a_rank_that_dies_ends_the_run(job, message: str, capfd: pytest.CaptureFixture) -> None:
    start = time.monotonic()
    with pytest.raises(OdtkError, match=message):
        launch.launch(job, config(), devices="cpu:2")
    assert time.monotonic() - start < 60
    said = capfd.readouterr().err
    assert ("ZeroDivisionError: by nothing" in said) == (job is crash)  # a traceback only where the fault is ours


class Child:
    """A process as wait_for_ranks sees it: a sentinel, and an exit code that may be known only later."""

    def __init__(self, *codes: int | None) -> None:
        self.codes = list(codes)
        self.sentinel, self.end = os.pipe()

    @property
    def exitcode(self) -> int | None:
        return self.codes.pop(0) if len(self.codes) > 1 else self.codes[0]

    def is_alive(self) -> bool:
        return self.exitcode is None


def test_an_exit_code_that_comes_after_the_sentinel_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """If it were missed, the run would wait for the other ranks for as long as they hang."""
    monkeypatch.setattr(launch, "EXIT_SECONDS", 0.1)
    hanging = Child(None)
    for late in range(4):  # how often the exit code is asked for before it is known
        failed = Child(*[None] * late, 1)
        os.close(failed.end)
        watcher = threading.Thread(
            target=launch.wait_for_ranks, args=([hanging, failed], launch.StopSignals()), daemon=True
        )
        watcher.start()
        watcher.join(30)
        assert not watcher.is_alive(), f"wait_for_ranks hangs if the exit code is unknown {late} times"


PARENT = """
import sys
sys.path.insert(0, {tests!r})
from odtk import launch
from test_launch import config, {job}
if __name__ == "__main__":
    print(launch.launch({job}, config({folder!r}), devices="cpu{number}"), flush=True)
"""


def script(tmp_path: Path, job: str, number: str = "") -> str:
    path = tmp_path / "parent.py"
    path.write_text(PARENT.format(tests=str(Path(__file__).parent), job=job, folder=str(tmp_path), number=number))
    return str(path)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_signals_reach_the_ranks(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, script(tmp_path, "wait_for_signal", ":2")], env=environment())
    try:
        wait_until(lambda: all((tmp_path / f"ready{rank}").exists() for rank in (0, 1)))
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
    finally:
        process.kill()
    assert all((tmp_path / f"saved{rank}").exists() for rank in (0, 1))


def stop_rank_1(config: Config, rank: int, world: int) -> None:
    """A job: rank 1 stops, as by SIGSTOP or a machine that hangs, and rank 0 waits for it where no handler runs."""
    Path(config.folder, f"pid{rank}").write_text(str(os.getpid()))
    with launch.catch_stop_signals():
        Path(config.folder, f"ready{rank}").touch()
        if rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        dist.barrier()


QUICK = "from odtk import launch\nlaunch.BEAT_SECONDS, launch.SILENT_SECONDS, launch.REPEAT_SECONDS = 0.2, 2.0, 0.5\n"


@pytest.mark.slow
def test_a_stopped_rank_is_named_and_a_second_signal_ends_the_run(tmp_path: Path) -> None:
    path = Path(script(tmp_path, "stop_rank_1", ":2"))
    path.write_text(QUICK + path.read_text())
    command = [sys.executable, str(path)]
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)
    said = ""
    try:
        assert process.stderr is not None
        while "no sign of life" not in said:
            assert (line := process.stderr.readline())
            said += line
        pid = int((tmp_path / "pid1").read_text())
        assert f"rank 1 of 2 (process {pid} on {socket.gethostname()}) has given no sign of life for 2 s" in said
        process.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):  # neither rank can act on it
            process.wait(1)
        process.send_signal(signal.SIGTERM)
        _, rest = process.communicate(timeout=30)
        assert process.returncode == 143 and "Did not stop, and was killed: rank 0, 1 of 2." in rest
        assert not Path(f"/proc/{pid}").exists()
    finally:
        process.kill()
        for file in tmp_path.glob("pid*"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(file.read_text()), signal.SIGKILL)


class Store:
    """What a heartbeat needs of torch's store, and the signs of life that another rank gives in it."""

    def __init__(self, *signs: str) -> None:
        self.signs = list(signs)
        self.own: list[tuple[str, str]] = []

    def set(self, key: str, value: str) -> None:
        self.own.append((key, value))

    def check(self, keys: list[str]) -> bool:
        return keys == ["heartbeat/2"] and bool(self.signs[0])

    def get(self, key: str) -> bytes:
        return (self.signs.pop(0) if len(self.signs) > 1 else self.signs[0]).encode()


@pytest.mark.parametrize(
    "signs, warnings",
    [
        ([""], ["rank 2 of 3 has given no sign of life for 0.2 s"]),
        (["0 7 a"], ["rank 2 of 3 (process 7 on a) has given no sign of life for 0.2 s"]),
        (["0 7 a"] * 20 + ["1 7 a", "ended"], ["no sign of life", "Rank 2 of 3 answers again."]),
        ([f"{i} 7 a" for i in range(1000)], []),
        (["0 7 a", "ended"], []),
    ],
    ids=["never", "silent", "silent for a while", "alive", "ended"],
)
def test_signs_of_life(signs: list[str], warnings: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(launch, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(launch, "SILENT_SECONDS", 0.2)
    store: Any = Store(*signs)
    with launch.heartbeat(store, 1, 3):
        time.sleep(1.0)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == len(warnings) and all(text in line for text, line in zip(warnings, said, strict=True))
    values = [value for key, value in store.own if key == "heartbeat/1"]
    assert values[0] == f"0 {os.getpid()} {socket.gethostname()}" and values[-1] == "ended"
    assert len(values) == len(set(values)) > 3


HANGS = """
import os, signal, threading, time
from odtk import launch
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup around the tests has it ignored
launch.REPEAT_SECONDS, launch.EXIT_SECONDS, launch.STOP_SECONDS = 0.5, 0.5, {deadline}
try:
    with launch.catch_stop_signals() as signals:
        print("ready", flush=True)
        {body}
finally:
    print("cleaned", flush=True)
"""
WAITS = "while True: time.sleep(0.01)"
# A lock that its owner takes again: no handler of Python ever runs.
STUCK = (
    "import ctypes; lock, m = ctypes.CDLL(None).pthread_mutex_lock, ctypes.create_string_buffer(64); lock(m); lock(m)"
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "body, deadline, number, signals, cleaned",
    [
        (WAITS, 100, signal.SIGTERM, 2, True),
        (WAITS, 100, signal.SIGHUP, 2, True),
        (WAITS, 1, signal.SIGTERM, 1, False),
        (STUCK, 100, signal.SIGTERM, 2, False),
    ],
    ids=["second signal", "second SIGHUP", "deadline", "second signal, main thread stuck"],
)
def test_a_process_that_hangs_can_be_ended(
    body: str, deadline: float, number: int, signals: int, cleaned: bool
) -> None:
    code = HANGS.format(body=body, deadline=deadline)
    process = subprocess.Popen([sys.executable, "-c", code], env=environment(), stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.send_signal(number)
        if signals == 2:
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.8)
            process.send_signal(number)
        said, _ = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 128 + number and ("cleaned" in said) == cleaned


GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Connection closed by peer [10.77.0.2]:1. Look there."


@pytest.mark.parametrize("error", [RuntimeError(GLOO), dist.DistNetworkError(GLOO)])
@pytest.mark.parametrize(
    ("restart", "next_"),
    [("0", r"starts all processes again \(restart 1 of 2\)"), ("2", "start it again with the same")],
)
def test_a_lost_rank_is_one_sentence(
    error: RuntimeError, restart: str, next_: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restart)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "2")
    message = rf"^Rank 0 of 2 lost its connection to another process \(Connection closed by peer \[10\S+\):.* {next_}"
    with pytest.raises(OdtkError, match=message), launch.explaining_lost_ranks(0, 2):
        raise error


def test_an_error_of_ours_is_not_taken_for_a_lost_rank() -> None:
    with pytest.raises(RuntimeError, match="^sizes differ$"), launch.explaining_lost_ranks(0, 2):
        raise RuntimeError("sizes differ")


@pytest.mark.slow
def test_joins_torchrun(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port()]
    result = subprocess.run([*command, script(tmp_path, "note")], env=environment(), capture_output=True, timeout=170)
    assert result.returncode == 0, result.stderr.decode()
    assert {(tmp_path / rank).read_text() for rank in "01"} == {"0 2 0 2 cpu 3", "1 2 1 2 cpu 3"}


@pytest.mark.slow
def test_ranks_end_after_a_parent_that_was_killed(tmp_path: Path) -> None:
    """Killed as by the kernel when memory is short. The ranks get SIGTERM, on which training saves."""
    process = subprocess.Popen([sys.executable, script(tmp_path, "wait_for_signal", ":2")], env=environment())
    try:
        wait_until(lambda: all((tmp_path / f"ready{rank}").exists() for rank in (0, 1)))
    finally:
        process.kill()
    wait_until(lambda: all((tmp_path / f"saved{rank}").exists() for rank in (0, 1)))


@pytest.mark.slow
def test_joins_a_launcher_that_sets_no_local_rank(tmp_path: Path) -> None:
    given = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    command = [sys.executable, script(tmp_path, "note")]
    result = subprocess.run(command, env=environment() | given, capture_output=True, timeout=170)
    assert result.returncode == 0, result.stderr.decode()
    assert (tmp_path / "0").read_text() == "0 1 0 1 cpu 1"


def test_an_ignored_hangup_stays_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """As nohup asks for; otherwise it stops a run as SIGTERM does."""
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with launch.catch_stop_signals() as received:
            os.kill(os.getpid(), signal.SIGHUP)
            assert received == []
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with launch.catch_stop_signals() as received:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGHUP)  # a terminal that closes and a shell send it both
            assert received == [signal.SIGHUP] * 2 and not received.end_now()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, former)


def test_signals_before_there_is_anything_to_save_let_it_clean_up() -> None:
    before = signal.getsignal(signal.SIGTERM)
    cleaned = False
    with pytest.raises(SystemExit) as stop:
        try:
            with launch.exit_on_stop_signals():
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(10)
        finally:
            cleaned = True
    assert stop.value.code == 143 and cleaned and signal.getsignal(signal.SIGTERM) == before


def test_signals_elsewhere_than_in_the_main_thread() -> None:
    """Python cannot catch them there: a run in another thread, by the API, does without."""
    found: list[Any] = []

    def run() -> None:
        with launch.exit_on_stop_signals(), launch.catch_stop_signals() as received:
            found.append(list(received))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [[]]
