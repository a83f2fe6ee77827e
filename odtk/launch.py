"""One process per device: spawned here, or joined to those that torchrun started.

The processes of a run meet in torch.distributed: NCCL between GPUs, gloo between CPU processes. The parent of spawned
processes watches them, so that one which dies ends the run at once, with its own error on top.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from .config import OdtkError

Job = Callable[[Any, int, int], Any]  # job(config, rank, world)

GRACE = 5.0  # seconds the other ranks have to end by themselves (and finish writing) after one has failed
ORPHAN = 60.0  # seconds that a rank has to end by itself when its parent is gone
LONGEST = 7_000  # characters of an error's sentence and of its traceback that reach the parent; a pipe holds 64 KiB
HANG = timedelta(minutes=10)  # a collective that takes longer has failed
HANG_OVER_MACHINES = timedelta(seconds=45)  # no parent sees the death of a process on another machine


def world_size(devices: str | int | None = None) -> int:
    """Number of processes of a run, over all machines (as torchrun says, under torchrun).

    Args:
        devices: a number of GPUs; ``cpu`` (one process) or ``cpu:N``; None for every visible GPU, else the CPU.

    Raises:
        OdtkError: there are fewer GPUs than asked for.
    """
    return int(os.environ["WORLD_SIZE"]) if under_torchrun() else resolve(devices)[1]


def launch(job: Job, config: Any, *, devices: str | int | None = None, master: str | None = None) -> Any:
    """Calls ``job(config, rank, world)`` in every process of a run; ``config.data`` has rank, world and device set.

    A single process is this one, and what the job returns is returned; of spawned processes nothing is.

    Args:
        job: a function of a module, so that it can be pickled, as must be the config.
        devices: as in world_size.
        master: ADDR:PORT where spawned processes meet; None or a port that is taken: a free one of this machine.

    Raises:
        OdtkError: the error of the rank that failed first.
        SystemExit: with the ranks' own exit code, after a signal.
    """
    if under_torchrun():
        return join_torchrun(job, config, devices)
    kind, world = resolve(devices)
    if world == 1:
        device = "cuda:0" if kind == "cuda" else "cpu"
        return job(placed(config, 0, 1, device), 0, 1)
    return spawn(job, config, kind, world, meeting_place(master))


def resolve(devices: str | int | None) -> tuple[str, int]:
    """``--devices`` as ("cuda" or "cpu", number of processes on this machine)."""
    visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if devices is None:
        return ("cuda", visible) if visible else ("cpu", 1)
    kind, _, number = str(devices).partition(":")
    if kind == "cpu":
        return "cpu", int(number or 1)
    if int(kind) > visible:
        raise OdtkError(f"--devices {kind}: {visible} GPUs are visible here; pass that many at most, or --devices cpu.")
    return "cuda", int(kind)


def under_torchrun() -> bool:
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def placed(config: Any, rank: int, world: int, device: str) -> Any:
    """The config of one rank: its loader reads this rank's share onto this rank's device."""
    return dataclasses.replace(config, data=dataclasses.replace(config.data, rank=rank, world=world, device=device))


def meeting_place(master: str | None) -> dist.TCPStore:
    """The store at which ranks meet, open on the port given, or on a free one where that is taken.

    This process keeps it: a port that was only found free could be another run's before a rank opens it.
    """
    address, _, port = (master or "127.0.0.1:0").rpartition(":")
    if not address or not port.isdigit():
        raise OdtkError(f"--master {master}: give an address and a port, such as 127.0.0.1:29500.")
    host = address.strip("[]")
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        try:
            probe.bind((host, 0))
        except OSError:
            raise OdtkError(f"--master {master}: {address} is not an address of this machine.") from None
    try:
        return dist.TCPStore(host, int(port), is_master=True, wait_for_workers=False)
    except RuntimeError:  # taken
        return dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)


@contextmanager
def process_group(device: str, *, timeout: timedelta, **where: Any) -> Iterator[None]:
    """This process as a member of torch.distributed, on its device."""
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
        where["device_id"] = torch.device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=timeout, **where)
    try:
        yield
    except SystemExit:  # a stop that the ranks agreed on
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()  # not after an error: that would make the other ranks fail before it is told


def join_torchrun(job: Job, config: Any, devices: str | int | None) -> Any:
    """Runs the job as one of torchrun's processes; torchrun's agent ends them all when one fails."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    # Where only RANK and WORLD_SIZE are set (Kubeflow), there is one process per machine.
    local = int(os.environ.get("LOCAL_RANK", 0))
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", world if "LOCAL_RANK" in os.environ else 1))
    on_gpus = torch.cuda.is_available() and not str(devices).startswith("cpu")
    if on_gpus and local_world > torch.cuda.device_count():
        raise OdtkError(
            f"torchrun started {local_world} processes and {torch.cuda.device_count()} GPUs are visible: "
            "pass --nproc-per-node with that number, or --devices cpu."
        )
    device = f"cuda:{local}" if on_gpus else "cpu"
    timeout = HANG if local_world == world else HANG_OVER_MACHINES
    with process_group(device, timeout=timeout, init_method="env://"):
        return job(placed(config, rank, world, device), rank, world)


# ---------------------------------------------------------------------------------------------------------------------
# Spawned processes


@dataclass(frozen=True)
class Failure:
    """How a rank ended: the sentence for the user, and the traceback where the fault is not the user's."""

    rank: int
    sentence: str
    trace: str = ""


def spawn(job: Job, config: Any, kind: str, world: int, store: dist.TCPStore) -> None:
    """Starts one process per device of this machine, watches them and ends them together."""
    context = mp.get_context("spawn")
    readers: list[Any] = []
    children: list[Any] = []
    with forward_signals(children) as signals:
        try:
            for rank in range(world):
                reader, writer = context.Pipe(duplex=False)
                device = f"cuda:{rank}" if kind == "cuda" else "cpu"
                arguments = (job, config, rank, world, device, (store.host, store.port), writer)
                child = context.Process(target=run_rank, args=arguments, daemon=True)
                child.start()
                writer.close()  # the child holds the only end: reading after its death ends at once
                readers.append(reader)
                children.append(child)
            for number in signals:  # one that came before the last child was there
                send(children, number)
            watch(children)
        finally:
            killed = end(children)
    failures = [failure for reader in readers if (failure := received(reader)) is not None]
    report([None if child in killed else child.exitcode for child in children], failures, signals)


def run_rank(job: Job, config: Any, rank: int, world: int, device: str, place: tuple[str, int], writer: Any) -> None:
    """Body of a spawned process. Its error goes to the parent; nothing is printed here."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the job has its own handlers a Ctrl-C ends it, silently
    threading.Thread(target=follow_parent, daemon=True).start()
    if device == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // world))
    try:
        store = dist.TCPStore(*place, is_master=False)
        with process_group(device, timeout=HANG, store=store, rank=rank, world_size=world):
            job(placed(config, rank, world, device), rank, world)
    except OdtkError as error:
        leave(writer, Failure(rank, str(error)))
    except Exception as error:
        leave(writer, Failure(rank, f"{type(error).__name__}: {error}", traceback.format_exc()))


def follow_parent() -> None:
    """Ends this process after the parent, were it killed: a run that is started anew must not find it at work."""
    parent = mp.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)  # a training saves and ends
    time.sleep(ORPHAN)
    os._exit(1)


def leave(writer: Any, failure: Failure) -> None:
    """Tells the parent and ends this process, without waiting for ranks that may hang in a collective.

    The parent reads when this process has ended, so that all of it must fit into the pipe.
    """
    short = Failure(failure.rank, failure.sentence[:LONGEST], failure.trace[-LONGEST:])
    writer.send((time.monotonic(), short))
    writer.close()
    sys.stdout.flush()
    os._exit(1)


def watch(children: list[Any]) -> None:
    """Returns when every child has ended, or GRACE seconds after the first that failed."""
    deadline: float | None = None
    while alive := [child for child in children if child.is_alive()]:
        # Asked before every wait: a child's sentinel may be ready a moment before its exit code is.
        if deadline is None and any(child.exitcode not in (None, 0) for child in children):
            deadline = time.monotonic() + GRACE
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            return
        connection.wait([child.sentinel for child in alive], timeout=left)


def end(children: list[Any]) -> list[Any]:
    """Kills what still runs, and returns it: a failed rank's ranks may hang in a collective, deaf to other signals."""
    running = [child for child in children if child.is_alive()]
    for child in running:
        child.kill()
        child.join()
    return running


def received(reader: Any) -> tuple[float, Failure] | None:
    """What a child sent before it ended, with the time; None if nothing, or not all of it."""
    try:
        return reader.recv()
    except (EOFError, OSError):
        return None


def report(codes: list[int | None], failures: list[tuple[float, Failure]], signals: list[int]) -> None:
    """Raises the error that began the end of a run; the later ones are only its echo on the other ranks.

    Args:
        codes: exit codes by rank (negative: a signal), None for a rank that had to be killed.
        failures: what ranks said before they ended, with the time.
        signals: those that this process received and passed on.
    """
    world = len(codes)
    for rank, code in enumerate(codes):
        if code is not None and code < 0 and -code not in signals:
            name = signal.Signals(-code).name
            hint = " (out of memory?)" if name == "SIGKILL" else ""
            raise OdtkError(f"Rank {rank} of {world} was ended by {name}{hint}, and the run with it.")
    if failures:
        _, first = min(failures, key=lambda entry: entry[0])
        if first.trace:
            print(first.trace, file=sys.stderr, flush=True)
            raise OdtkError(f"Rank {first.rank} of {world} failed, and the run with it: {first.sentence}")
        raise OdtkError(first.sentence)
    if any(codes):
        raise SystemExit(max(code if code >= 0 else 128 - code for code in codes if code is not None))


def send(children: list[Any], number: int) -> None:
    for child in children:
        if child.is_alive():
            os.kill(child.pid, number)


@contextmanager
def forward_signals(children: list[Any]) -> Iterator[list[int]]:
    """SIGINT and SIGTERM go on to the children, which know what to save; the list yielded holds those that came."""
    signals: list[int] = []

    def forward(number: int, frame: Any) -> None:
        signals.append(number)
        send(children, number)

    former = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


PATIENCE = timedelta(hours=6)  # that ranks which are done wait for the others


def patient_group(world: int) -> dist.ProcessGroup | None:
    """All ranks of several, over CPU tensors, for waits as long as PATIENCE; each rank calls this at the same point."""
    return dist.new_group(backend="gloo", timeout=PATIENCE) if world > 1 else None


def gather(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Every rank's value on rank 0, in order of rank; nothing on the others; [value] outside of torch.distributed.

    Args:
        group: all ranks, to gather over; None: the default group.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, values, dst=0, group=group)
    return values or []


class HostGroup:
    """The ranks of the run, and what all have to decide alike: over CPU tensors, so that no device is waited for."""

    def __init__(self, world: int) -> None:
        self.group = patient_group(world)

    def all_max(self, *wishes: int) -> list[int]:
        """The greatest wish of any rank, for each of the wishes."""
        if self.group is None:
            return list(wishes)
        tensor = torch.tensor(wishes, dtype=torch.int64)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group)
        return tensor.tolist()

    def barrier(self) -> None:
        """Until all ranks are here."""
        self.all_max(0)

    def broadcast_buffers(self, model: torch.nn.Module) -> None:
        """Rank 0's buffers to all: pretrained statistics at the start, and later those that each rank gathered."""
        if self.group is not None:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)


def silent(*_: object) -> None:
    """What ranks other than 0 say."""
