"""Loses machines of a run by torchrun, and compares what it ends with to an undisturbed run. Needs root and `ip netns`.

    python -m tests.machines [process machine first rendezvous infer]

Two network namespaces, joined by a veth pair, stand for two machines: each has a host name, process numbers and an
address of its own (10.77.0.1, 10.77.0.2), and both see the same files. SIGKILL of all of a namespace's processes is the
loss of that machine: torchrun goes with its process, and nobody tidies up.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from odtk.data.synthetic import synthesize
from odtk.model.checkpoint import load

ROOT = Path(__file__).resolve().parents[2]
ITERS, KILL_AT = 40, 12  # iterations; of those that are validated, every 5th, a checkpoint is left
TRAIN = (
    "--backbone ResNet18C4 --backbone-weights none --head fcos --resize 64 --max-size 96 --batch 4 --lr 0.01 "
    f"--val-iters 5 --iters {ITERS} --devices cpu --loader torch"
).split()
# A shard is otherwise written after half a minute.
INFER = (
    "from odtk.inference import shards; shards.SHARD_SECONDS = 0.2; from odtk.cli import main; raise SystemExit(main())"
)


class Machine:
    """A network namespace that stands for a machine; start() turns it on, kill() off."""

    def __init__(self, number: int, folder: Path) -> None:
        self.name, self.address, self.folder = f"odtk-{number}", f"10.77.0.{number}", folder
        self.log = folder / f"{self.name}.log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, store: Machine, run: str, command: list[str]) -> None:
        """Starts torchrun with a command of odtk as its only process, which meets the other's at ``store``."""
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": f"v{self.name}",
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        }
        inside = f'hostname {self.name} && mount --bind {self.folder}/hosts /etc/hosts && exec "$@"'
        torchrun = f"--nnodes 2 --nproc-per-node 1 --max-restarts 3 --local-addr {self.address} --rdzv-backend c10d "
        torchrun += f"--rdzv-endpoint {store.address}:29400 --rdzv-id {run} --rdzv-conf join_timeout=120"
        self.process = subprocess.Popen(
            [
                *("ip", "netns", "exec", self.name),
                *("unshare", "--uts", "--pid", "--fork", "--kill-child=KILL", "--mount-proc"),
                *("sh", "-c", inside, "sh", sys.executable, "-m", "torch.distributed.run", *torchrun.split()),
                *command,
            ],
            cwd=self.folder,
            env=environment,
            stdout=self.log.open("ab"),
            stderr=subprocess.STDOUT,
        )

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()  # unshare; --kill-child has the kernel kill all others with it
            self.process.wait()

    def kill_worker(self) -> None:
        """SIGKILL to the process that torchrun has started."""
        assert self.process is not None
        parents = {int(path.parent.name): path.read_text().rpartition(")")[2].split() for path in stats()}
        found = [self.process.pid]
        for pid in found:
            found += [child for child, fields in parents.items() if int(fields[1]) == pid]
        ranks = [pid for pid in found if b"\0RANK=" in Path(f"/proc/{pid}/environ").read_bytes()]
        os.kill(ranks[0], signal.SIGKILL)

    def ends_well(self) -> bool:
        assert self.process is not None
        return self.process.wait(timeout=300) == 0


def stats() -> Iterator[Path]:
    return (path for path in Path("/proc").glob("[0-9]*/stat") if path.exists())


@contextlib.contextmanager
def two_machines(folder: Path) -> Iterator[tuple[Machine, Machine]]:
    first, second = (Machine(number, folder) for number in (1, 2))
    both = (first, second)
    (folder / "hosts").write_text("".join(f"{m.address} {m.name}\n" for m in both) + "127.0.0.1 localhost\n")
    remove_namespaces()
    for machine in both:
        ip(f"netns add {machine.name}")
    ip(f"link add v{first.name} type veth peer name v{second.name}")
    for machine in both:
        ip(f"link set v{machine.name} netns {machine.name}")
        ip(f"-n {machine.name} addr add {machine.address}/24 dev v{machine.name}")
        ip(f"-n {machine.name} link set v{machine.name} up")
        ip(f"-n {machine.name} link set lo up")
    try:
        yield both
    finally:
        for machine in both:
            machine.kill()
        remove_namespaces()


def ip(arguments: str) -> None:
    subprocess.run(["ip", *arguments.split()], check=True)


def remove_namespaces() -> None:
    for name in ("odtk-1", "odtk-2"):
        subprocess.run(["ip", "netns", "del", name], stderr=subprocess.DEVNULL)


def wait_until(done: Callable[[], bool], what: str) -> None:
    until = time.monotonic() + 180
    while not done():
        if time.monotonic() > until:
            raise TimeoutError(f"three minutes without {what}")
        time.sleep(0.05)


def iteration_of(folder: Path) -> int:
    """The newest iteration that the run's log tells of."""
    path = folder / "log" / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return json.loads(lines[-1])["iteration"] if lines else 0


def disturb(kind: str, first: Machine, second: Machine, start: Callable[[Machine], None]) -> None:
    """What happens to a run that has come some way. Rank 0 is on the first machine, whose address is the lower."""
    if kind == "process":
        second.kill_worker()
    elif kind == "machine":
        second.kill()
        time.sleep(3)
        start(second)
    elif kind in ("first", "infer"):
        first.kill()
        time.sleep(3)
        start(first)
    elif kind == "rendezvous":
        first.kill()
        second.ends_well()  # whatever its code
        for machine in (first, second):
            start(machine)


def trial(kind: str, folder: Path, data: Path, model: Path | None) -> tuple[Path, str]:
    """One run over both machines, of ``kind`` or undisturbed; returns what it wrote and all that was printed."""
    folder.mkdir()
    if model is None:
        result = folder / "model.pth"
        command = ["-m", "odtk", "train", str(result), "--annotations", str(data / "train.json"), *TRAIN]
        command += ["--val-annotations", str(data / "val.json"), "--logdir", str(folder / "log")]
    else:
        result = folder / "found.json"
        (folder / "infer.py").write_text(INFER)
        command = [str(folder / "infer.py"), "infer", str(model), "--images", str(data / "train")]
        command += ["--output", str(result), "--devices", "cpu", "--loader", "torch", "--resize", "256"]
    with two_machines(folder) as (first, second):
        store = second if kind in ("first", "infer") else first

        def start(machine: Machine) -> None:
            machine.start(store, folder.name, command)

        start(first)
        start(second)
        if kind != "undisturbed":
            if model is None:
                wait_until(lambda: iteration_of(folder) >= KILL_AT, "training")
            else:
                parts = Path(f"{result}.parts")
                wait_until(lambda: len(list(parts.glob("*.parquet"))) >= 4, "shards")
            disturb(kind, first, second, start)
        codes = [machine.ends_well() for machine in (first, second)]
        said = first.log.read_text(errors="replace") + second.log.read_text(errors="replace")
        if not all(codes):
            raise AssertionError(f"{kind}: a machine ended with an error\n{said[-6000:]}")
    left = [path.name for path in folder.iterdir() if path.name.endswith((".lock", ".parts", ".tmp"))]
    assert not left, left
    return result, said


def main() -> None:
    kinds = ("process", "machine", "first", "rendezvous", "infer")
    parser = argparse.ArgumentParser(description="Loses machines of a run by torchrun.")
    parser.add_argument("kinds", nargs="*", default=kinds, help=f"of {', '.join(kinds)} (all)")
    parser.add_argument("--keep", type=Path, help="an empty folder for the files (a temporary one)")
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = args.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        data = folder / "data"
        synthesize(str(data), images=400 if "infer" in args.kinds else 60, size=(64, 96), classes=2)
        model, _ = trial("undisturbed", folder / "undisturbed", data, None)
        expected = load(str(model))
        found = None
        if "infer" in args.kinds:
            found, _ = trial("undisturbed", folder / "undisturbed-infer", data, model)
        for kind in args.kinds:
            began = time.monotonic()
            result, said = trial(kind, folder / kind, data, model if kind == "infer" else None)
            if kind == "infer":
                assert found is not None and result.read_bytes() == found.read_bytes(), "other detections"
                equal = f"the same {len(json.loads(result.read_text()))} detections"
            else:
                now = load(str(result))
                assert now.training and expected.training
                assert now.training["iteration"] == expected.training["iteration"] == ITERS
                different = [k for k, v in expected.state_dict.items() if not torch.equal(v, now.state_dict[k])]
                assert not different, different
                equal = f"{ITERS} iterations, the same weights"
            sentences = re.findall(r"(?:Resuming|Going on|Took over|odtk: Rank).*", said)
            assert any(line.startswith(("Resuming", "Going on")) for line in sentences), said
            print(f"{kind}: {equal}, {time.monotonic() - began:.0f} s", *sentences, sep="\n  ", flush=True)


if __name__ == "__main__":
    main()
