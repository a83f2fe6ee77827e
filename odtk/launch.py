"""One process per device: spawned here, or started by torchrun.

The processes of a run form a group of torch.distributed, over NCCL on GPUs and gloo on CPUs. The parent of spawned
processes watches them: when one fails, the run ends at once, and its error is the one that is reported. A process that
is stopped, or whose machine is gone, keeps the others waiting: the one before it says so.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from .config import OdtkError
from .text import first_line, plural, printable

Job = Callable[[Any, int, int], Any]  # job(config, rank, world)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # the last when the terminal or its connection closes
REPEAT_SECONDS = 2.0  # signals that come closer are one: a terminal sends them to the parent, which passes them on
STOP_SECONDS = 300.0  # for a run to stop after a signal; then it is ended by force
BEAT_SECONDS = 5.0  # between two signs of life of a rank
SILENT_SECONDS = 60.0  # without a sign of life, until that is said
PAUSE_SECONDS = 15.0  # between two signs of its own: the rank was stopped itself, and cannot judge the other
ENDED = "ended"  # the last sign of life
EXIT_SECONDS = 5.0  # for the other ranks to finish writing and exit after one has failed; then they are killed
ORPHAN_EXIT_SECONDS = 60.0  # for a rank to exit after its parent has died
MAX_ERROR_LENGTH = 7_000  # characters of a message, and of a traceback, sent to the parent: a pipe holds 64 KiB
COLLECTIVE_TIMEOUT = timedelta(minutes=10)  # a collective that takes longer has failed
MULTI_NODE_TIMEOUT = timedelta(seconds=45)  # shorter: no parent notices that a process on another machine died


def world_size(devices: str | int | None = None) -> int:
    """Number of processes of a run, over all machines; under torchrun it is torchrun that says how many.

    Args:
        devices: a number of GPUs; ``cpu`` (one process) or ``cpu:N`` (N processes); None for all visible GPUs, or for
            the CPU if there is none.

    Raises:
        OdtkError: fewer GPUs are visible than ``devices`` asks for.
    """
    return int(os.environ["WORLD_SIZE"]) if under_torchrun() else parse_devices(devices)[1]


def share(batch: int, world: int, name: str = "batch") -> int:
    """The part of a global batch that each of `world` processes gets.

    Args:
        name: the setting that gave it.

    Raises:
        OdtkError: it cannot be shared out equally.
    """
    if batch % world:
        near = batch - batch % world or world
        raise OdtkError(f"--{name.replace('_', '-')} {batch} does not divide by the {world} devices: {near} does.")
    return batch // world


def workers_of(world: int) -> int:
    """Threads or processes that read images, per device."""
    return max(1, min(8, (os.cpu_count() or 1) // world))


def launch(job: Job, config: Any, *, devices: str | int | None = None, master: str | None = None) -> Any:
    """Calls ``job(config, rank, world)`` in every process of a run, with rank, world and device set in ``config.data``.

    Args:
        job: what to run. It is pickled for spawned processes, so it must be a function at the top of a module.
        config: a dataclass with a LoaderConfig ``data``; it is pickled too.
        devices: as in world_size.
        master: ADDR:PORT where spawned processes meet. If None, or if the port is taken, a free port is used.

    Returns:
        What the job returns if it runs in this process (a single device, or torchrun); None after spawned ones.

    Raises:
        OdtkError: the error of the rank that failed first.
        SystemExit: with the ranks' own exit code, after a signal.
    """
    if under_torchrun():
        return join_torchrun(job, config, devices)
    kind, world = parse_devices(devices)
    if world == 1:
        device = "cuda:0" if kind == "cuda" else "cpu"
        return job(config_of_rank(config, 0, 1, device), 0, 1)
    return spawn(job, config, kind, world, open_store(master))


def parse_devices(devices: str | int | None) -> tuple[str, int]:
    """``--devices`` → ("cuda" or "cpu", number of processes on this machine)."""
    visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if devices is None:
        return ("cuda", visible) if visible else ("cpu", 1)
    kind, _, number = str(devices).partition(":")
    if kind == "cpu":
        return "cpu", int(number or 1)
    if int(kind) > visible:
        if not visible:
            raise OdtkError(f"--devices {kind}: no GPU is visible; pass --devices cpu.")
        found = f"{plural(visible, 'GPU')} {'is' if visible == 1 else 'are'}"
        raise OdtkError(f"--devices {kind}: only {found} visible; pass --devices {visible}, or --devices cpu.")
    return "cuda", int(kind)


def under_torchrun() -> bool:
    """Whether torchrun, or another launcher that sets the same variables, started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def config_of_rank(config: Any, rank: int, world: int, device: str) -> Any:
    """The config of one rank, whose loader reads that rank's share of the data onto its device."""
    return dataclasses.replace(config, data=dataclasses.replace(config.data, rank=rank, world=world, device=device))


def open_store(master: str | None) -> dist.TCPStore:
    """Opens the store at which the ranks meet, on the given port, or on a free one if that port is taken.

    This process keeps the store open. If it only looked for a free port, another run could take that port before
    rank 0 opens it.

    Args:
        master: ADDR:PORT, an address of this machine; None: 127.0.0.1 and a free port.
    """
    address, _, port = (master or "127.0.0.1:0").rpartition(":")
    if not address or not port.isdigit():
        raise OdtkError(f"--master {master}: pass an address and a port, such as 127.0.0.1:29500.")
    host = address.strip("[]")
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        try:
            probe.bind((host, 0))
        except OSError:
            raise OdtkError(f"--master {master}: {address} is not an address of this machine.") from None
    try:
        return dist.TCPStore(host, int(port), is_master=True, wait_for_workers=False)
    except RuntimeError:  # the port is taken
        return dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)


@contextmanager
def process_group(device: str, *, timeout: timedelta, store: dist.Store, rank: int, world: int) -> Iterator[None]:
    """Makes this process a member of torch.distributed while the block runs, and lets it give signs of life.

    Args:
        device: ``cpu`` or ``cuda:N``, this rank's.
        timeout: of a collective.
        store: where the ranks meet.
    """
    more: dict[str, Any] = {}
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
        more["device_id"] = torch.device(device)
    backend = "nccl" if device.startswith("cuda") else "gloo"
    dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=world, **more)
    with heartbeat(store, rank, world):
        try:
            yield
        except SystemExit:  # all ranks agreed to stop
            dist.destroy_process_group()
            raise
    dist.destroy_process_group()  # not after an error: the other ranks would fail before it is reported


@contextmanager
def heartbeat(store: dist.Store, rank: int, world: int) -> Iterator[None]:
    """Gives signs of life while the block runs, and says on stderr when those of the next rank stop.

    Each rank watches one other, so that a silent one is reported once, whichever it is. A thread gives the signs: they
    stop with the process (SIGSTOP, a machine that is gone), not when its main thread waits.
    """
    ended = threading.Event()
    thread = threading.Thread(target=watch_next_rank, args=(store, rank, world, ended), daemon=True)
    if world > 1:
        give_sign(store, rank, 0)  # before anything can stop this process
        thread.start()
    try:
        yield
    finally:
        ended.set()
        if world > 1:
            thread.join(1.0)


def give_sign(store: dist.Store, rank: int, beats: int) -> None:
    store.set(f"heartbeat/{rank}", f"{beats} {os.getpid()} {socket.gethostname()}")


def watch_next_rank(store: dist.Store, rank: int, world: int, ended: threading.Event) -> None:
    """The thread of heartbeat. A sign of life is a text in the store: a number, the process, its machine."""
    other, beats = (rank + 1) % world, 1
    sign = ""  # the newest of the other rank
    heard = last = time.monotonic()
    silent = False
    with suppress(RuntimeError):  # the store is gone, and the run with it
        while not ended.is_set():
            give_sign(store, rank, beats)
            ended.wait(BEAT_SECONDS)
            beats += 1
            new = store.get(f"heartbeat/{other}").decode() if store.check([f"heartbeat/{other}"]) else ""
            now = time.monotonic()
            stopped_itself, last = now - last > PAUSE_SECONDS, now
            if new != sign or stopped_itself or new == ENDED:
                if silent:
                    print(f"Rank {other} of {world} answers again.", file=sys.stderr, flush=True)
                sign, heard, silent = new, now, False
            elif not silent and now - heard > SILENT_SECONDS:
                silent = True
                process = f" (process {' on '.join(sign.split()[1:])})" if sign else ""
                print(
                    f"Warning: rank {other} of {world}{process} has given no sign of life for {SILENT_SECONDS:g} s, "
                    "and the run waits for it: it is stopped, or its machine is gone or does not answer.",
                    file=sys.stderr,
                    flush=True,
                )
        store.set(f"heartbeat/{rank}", ENDED)


def join_torchrun(job: Job, config: Any, devices: str | int | None) -> Any:
    """Runs the job in this process, one of those that torchrun started and ends together when one fails."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    # Kubeflow sets only RANK and WORLD_SIZE, and starts one process per machine.
    local = int(os.environ.get("LOCAL_RANK", 0))
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", world if "LOCAL_RANK" in os.environ else 1))
    on_gpus = torch.cuda.is_available() and not str(devices).startswith("cpu")
    if on_gpus and local_world > torch.cuda.device_count():
        visible = torch.cuda.device_count()
        raise OdtkError(
            f"torchrun started {plural(local_world, 'process', 'processes')}, but there "
            f"{'is' if visible == 1 else 'are'} only {plural(visible, 'GPU')}: pass --nproc-per-node {visible} to "
            "torchrun, or --devices cpu."
        )
    device = f"cuda:{local}" if on_gpus else "cpu"
    timeout = COLLECTIVE_TIMEOUT if local_world == world else MULTI_NODE_TIMEOUT
    with explaining_lost_ranks(rank, world):
        store = next(dist.rendezvous("env://", rank, world, timeout=timeout))[0]
        with process_group(device, timeout=timeout, store=store, rank=rank, world=world):
            return job(config_of_rank(config, rank, world, device), rank, world)


@contextmanager
def explaining_lost_ranks(rank: int, world: int) -> Iterator[None]:
    """Raises an OdtkError in place of the error that another process's end, or a lost connection to it, causes here."""
    try:
        yield
    except RuntimeError as error:
        if not is_of_connection(error):
            raise
        # Set by torchrun; another launcher says nothing of what it will do.
        restart, restarts = (
            int(os.environ.get(f"TORCHELASTIC_{name}", 0)) for name in ("RESTART_COUNT", "MAX_RESTARTS")
        )
        if restart < restarts:
            next_ = f"torchrun now starts all processes again (restart {restart + 1} of {restarts})"
        else:
            next_ = "the run ends: start it again with the same line"
        raise OdtkError(
            f"Rank {rank} of {world} lost its connection to another process ({reason_of(error)}): that process, its "
            f"machine or the network failed, and what it printed says why; {next_}, and it goes on from what was saved."
        ) from error


def is_of_connection(error: RuntimeError) -> bool:
    """Whether an error of torch.distributed says that another process does not answer. Gloo has no type of its own."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


def reason_of(error: RuntimeError) -> str:
    """The first sentence of an error of torch.distributed, without the place in its sources."""
    return re.sub(r"^\[\S+:\d+\] ", "", first_line(error)).partition(". ")[0].rstrip(".")


# ---------------------------------------------------------------------------------------------------------------------
# Spawned processes


@dataclass(frozen=True)
class Failure:
    """Why a rank failed: the message for the user, and a traceback if the error is not the user's to mend."""

    rank: int
    message: str
    trace: str = ""


def spawn(job: Job, config: Any, kind: str, world: int, store: dist.TCPStore) -> None:
    """Starts one process per device of this machine, and waits for them; when one fails, all end."""
    context = mp.get_context("spawn")
    readers: list[Any] = []
    children: list[Any] = []
    with catch_stop_signals(children) as signals:
        try:
            for rank in range(world):
                reader, writer = context.Pipe(duplex=False)
                device = f"cuda:{rank}" if kind == "cuda" else "cpu"
                arguments = (job, config, rank, world, device, (store.host, store.port), writer)
                child = context.Process(target=run_rank, args=arguments, daemon=True)
                child.start()
                writer.close()  # only the child can write now: once it is dead, reading cannot block
                readers.append(reader)
                children.append(child)
            for number in signals:  # those that came before the last child was started
                send_signal(children, number)
            wait_for_ranks(children, signals)
        finally:
            killed = kill_running(children)
    if killed and signals:
        names = ", ".join(str(rank) for rank, child in enumerate(children) if child in killed)
        print(f"Did not stop, and was killed: rank {names} of {world}.", file=sys.stderr, flush=True)
    failures = [failure for reader in readers if (failure := read_failure(reader)) is not None]
    raise_first_error([None if child in killed else child.exitcode for child in children], failures, signals)
    if killed and signals:
        raise SystemExit(128 + signals[0])


def run_rank(job: Job, config: Any, rank: int, world: int, device: str, address: tuple[str, int], writer: Any) -> None:
    """The body of a spawned process: runs the job, and sends its error to the parent instead of printing it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the job sets its own handler, Ctrl-C ends it silently
    threading.Thread(target=exit_after_parent, daemon=True).start()
    if device == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // world))
    try:
        store = dist.TCPStore(*address, is_master=False)
        with process_group(device, timeout=COLLECTIVE_TIMEOUT, store=store, rank=rank, world=world):
            job(config_of_rank(config, rank, world, device), rank, world)
    except OdtkError as error:
        send_failure_and_exit(writer, Failure(rank, str(error)))
    except Exception as error:
        send_failure_and_exit(writer, Failure(rank, f"{type(error).__name__}: {error}", traceback.format_exc()))


def exit_after_parent() -> None:
    """Waits for the parent to die, then ends this process: a new run must not meet it still writing.

    The parent of a run that ends normally outlives its children, so this acts only if the parent was killed.
    """
    parent = mp.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)  # a training run saves and exits on it
    time.sleep(ORPHAN_EXIT_SECONDS)
    os._exit(1)


def send_failure_and_exit(writer: Any, failure: Failure) -> None:
    """Sends a failure to the parent and exits, without waiting for ranks that may hang in a collective.

    The parent reads only after this process has exited, so the whole message must fit into the pipe.
    """
    short = Failure(failure.rank, failure.message[:MAX_ERROR_LENGTH], failure.trace[-MAX_ERROR_LENGTH:])
    writer.send((time.monotonic(), short))
    writer.close()
    sys.stdout.flush()
    os._exit(1)


def wait_for_ranks(children: list[Any], signals: StopSignals) -> None:
    """Returns when every child has exited, EXIT_SECONDS after the first one failed, or when signals say so."""
    deadline = math.inf
    while alive := [child for child in children if child.is_alive()]:
        # Checked before every wait, because a child's sentinel may be ready a moment before its exit code is.
        if deadline == math.inf and any(child.exitcode not in (None, 0) for child in children):
            deadline = time.monotonic() + EXIT_SECONDS
        left = deadline - time.monotonic()
        if left <= 0 or signals.end_now():
            return
        connection.wait([child.sentinel for child in alive], timeout=min(left, 0.5))  # a signal does not end the wait


def kill_running(children: list[Any]) -> list[Any]:
    """Kills the children that still run, and returns them.

    After another rank has failed they may hang in a collective, where no other signal reaches them.
    """
    running = [child for child in children if child.is_alive()]
    for child in running:
        child.kill()
        child.join()
    return running


def read_failure(reader: Any) -> tuple[float, Failure] | None:
    """The failure that a child sent before it exited, and when; None if it sent none, or was killed while sending."""
    try:
        return reader.recv()
    except (EOFError, OSError):
        return None


def raise_first_error(codes: list[int | None], failures: list[tuple[float, Failure]], signals: list[int]) -> None:
    """Raises the first error of a run: later ones are only its consequences on the other ranks.

    Args:
        codes: exit code of each rank; negative: the signal that ended it, None: killed by kill_running.
        failures: what the ranks sent, each with the time at which it failed.
        signals: those that this process received and passed on to the ranks.

    Raises:
        OdtkError: a rank was ended by a signal that did not come through this process, or a rank failed.
        SystemExit: the ranks ended by themselves with an exit code other than 0.
    """
    world = len(codes)
    for rank, code in enumerate(codes):
        if code is not None and code < 0 and -code not in signals:
            name = signal.Signals(-code).name
            hint = " (out of memory?)" if name == "SIGKILL" else ""
            raise OdtkError(f"Rank {rank} of {world} was killed by {name}{hint}, which ended the run.")
    if failures:
        _, first = min(failures, key=lambda entry: entry[0])
        if first.trace:
            print("\n".join(map(printable, first.trace.splitlines())), file=sys.stderr, flush=True)
            raise OdtkError(f"Rank {first.rank} of {world} failed, which ended the run: {first.message}")
        raise OdtkError(first.message)
    if any(codes):
        raise SystemExit(max(code if code >= 0 else 128 - code for code in codes if code is not None))


def send_signal(children: Sequence[Any], number: int) -> None:
    for child in children:
        if child.is_alive():
            os.kill(child.pid, number)


class StopSignals(list[int]):
    """The numbers of the signals that asked this process to stop, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.first = math.inf  # when the first one came
        self.repeated = False  # whether another came when it had had time to act on it

    def add(self, number: int) -> None:
        self.repeated |= time.monotonic() - self.first > REPEAT_SECONDS
        self.first = min(self.first, time.monotonic())
        self.append(number)

    def end_now(self) -> bool:
        """Whether to wait no longer: a second signal has come, or STOP_SECONDS have passed since the first."""
        return self.repeated or time.monotonic() - self.first > STOP_SECONDS


@contextmanager
def catch_stop_signals(children: Sequence[Any] | None = None) -> Iterator[StopSignals]:
    """SIGTERM, SIGINT and SIGHUP do not end this process while the block runs: they are added to what is yielded.

    A SIGHUP that is ignored (nohup) stays ignored. Outside the main thread, where Python cannot catch signals, nothing
    changes.

    Args:
        children: processes to which the signals are passed on, and whose end the block waits for; the list may still
            grow. None: this process must stop by itself. Unless it was spawned, so that its parent sees to that, a
            second signal ends it with SystemExit, and if it cannot even do that, or has not stopped after
            STOP_SECONDS, it ends at once.
    """
    received = StopSignals()
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    force = children is None and mp.parent_process() is None

    def handle(number: int, frame: Any) -> None:
        received.add(number)
        send_signal(children or (), number)
        if force and received.repeated:
            raise SystemExit(128 + number)

    caught = [n for n in STOP_SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
    former = {number: signal.signal(number, handle) for number in caught}
    try:
        with end_by_force() if force else nullcontext():
            yield received
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


@contextmanager
def end_by_force() -> Iterator[None]:
    """Ends this process some time after stop signals even if its main thread hangs, so that no handler of Python runs.

    Python's own C handler, which always runs, writes the number of each signal into a pipe, from which a thread reads.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    former = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=exit_after_signals, args=(reader,), daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(former)
        os.close(writer)


def exit_after_signals(reader: int) -> None:
    """The thread of end_by_force: returns when the other end of the pipe is closed, unless a second signal has come."""
    received = StopSignals()
    while not received.end_now():
        left = received.first + STOP_SECONDS - time.monotonic()
        if select.select([reader], [], [], None if left == math.inf else max(0.0, left))[0]:
            numbers = os.read(reader, 100)
            if not numbers:
                return os.close(reader)
            for number in numbers:
                if number in STOP_SIGNALS:
                    received.add(number)
    if received.repeated:
        time.sleep(EXIT_SECONDS)  # for the SystemExit that its handler has raised
    with suppress(OSError, ValueError):
        print("The run did not stop and is ended by force.", file=sys.stderr, flush=True)
    os._exit(128 + received[0])


@contextmanager
def exit_on_stop_signals() -> Iterator[None]:
    """Stop signals that would end this process on the spot raise SystemExit in the block, so that it cleans up."""

    def handle(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    main = threading.current_thread() is threading.main_thread()
    caught = [number for number in STOP_SIGNALS if main and signal.getsignal(number) == signal.SIG_DFL]
    for number in caught:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number in caught:
            signal.signal(number, signal.SIG_DFL)
