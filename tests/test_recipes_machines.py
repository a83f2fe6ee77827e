"""Recipes for several machines: their commands are odtk's and torchrun's, and Slurm's script does what it says."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.launcher.api import LaunchConfig
from torch.distributed.run import get_args_parser

from odtk.cli import build_parser, settings_of
from odtk.settings import TrainSettings

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
TRAIN = ["train", "m.pth", "--annotations", "a b.json", "--images", "train", "--batch", "8"]
STANDINS = {  # of Slurm's commands, which note how they were called
    "scontrol": 'if [ "$1" = show ]; then printf "n1\\nn2\\n"; else echo "scontrol $*" >> calls; fi',
    "scancel": 'echo "scancel $*" >> calls; kill -TERM "$(cat pid)"',
    "srun": 'echo $$ > pid; exec "$@"',
    "torchrun": "trap 'echo saved >> calls; exit 143' TERM; echo \"$TORCH_ELASTIC_SHUTDOWN_TIMEOUT\" > timeout; "
    'printf "%s\\n" "$@" > line; sleep $SECONDS_OF_RUN & wait',
}


def torchrun_and_odtk(line: list[str]) -> tuple[Any, TrainSettings]:
    """What a line of torchrun says to it and to odtk."""
    run = get_args_parser().parse_args(line)
    assert run.module and run.training_script == "odtk"
    settings = settings_of(build_parser().parse_args(run.training_script_args))
    assert isinstance(settings, TrainSettings)
    return run, settings


def start_slurm(folder: Path, seconds: float) -> subprocess.Popen:
    for name, body in STANDINS.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (folder / name).chmod(0o755)
    known = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "SECONDS_OF_RUN": str(seconds)}
    known |= {"SLURM_JOB_ID": "41", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "4"}
    return subprocess.Popen([RECIPES / "slurm.sh", *TRAIN], cwd=folder, env=known)


def test_slurm_starts_torchrun_on_each_node(tmp_path: Path) -> None:
    assert start_slurm(tmp_path, 0).wait(30) == 0
    run, settings = torchrun_and_odtk((tmp_path / "line").read_text().splitlines())
    assert (run.nnodes, run.nproc_per_node, run.rdzv_id, run.max_restarts) == ("2", "4", "41", 3)
    assert run.rdzv_endpoint == "n1:20041" and settings.annotations == "a b.json" and settings.batch == 8
    assert not (tmp_path / "calls").exists(), "what has ended is not queued again"
    signaled = re.search(r"#SBATCH --signal=B:USR1@(\d+)", (RECIPES / "slurm.sh").read_text())
    assert signaled and 100 <= int((tmp_path / "timeout").read_text()) < int(signaled[1]), "torchrun's own is 30"


def test_slurm_saves_and_queues_again_before_the_time_is_over(tmp_path: Path) -> None:
    process = start_slurm(tmp_path, 60)
    end = time.monotonic() + 30
    while not (tmp_path / "line").exists() and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    process.wait(30)
    assert (tmp_path / "calls").read_text().splitlines() == ["scancel --signal=TERM 41", "saved", "scontrol requeue 41"]


def test_slurm_fails_as_the_run_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STANDINS, "torchrun", "exit 3")
    assert start_slurm(tmp_path, 0).wait(30) == 3
    assert not (tmp_path / "calls").exists(), "what fails at once would fail again"
    monkeypatch.setenv("RETRY_AFTER", "-1")
    assert start_slurm(tmp_path, 0).wait(30) == 3
    assert (tmp_path / "calls").read_text() == "scontrol requeue 41\n"
    (tmp_path / "calls").unlink()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "5")
    assert start_slurm(tmp_path, 0).wait(30) == 3 and not (tmp_path / "calls").exists()


def test_kubernetes() -> None:
    service, job = yaml.safe_load_all((RECIPES / "kubernetes.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    line = [*container["command"][1:], *container["args"]]
    run, settings = torchrun_and_odtk(line)
    count = job["spec"]["completions"]
    assert container["command"][0] == "torchrun" and run.nnodes == str(count) and job["spec"]["parallelism"] == count
    assert run.nproc_per_node == str(container["resources"]["limits"]["nvidia.com/gpu"])
    assert settings.batch and settings.batch % (count * int(run.nproc_per_node)) == 0
    name, subdomain = job["metadata"]["name"], pod["subdomain"]
    assert run.rdzv_endpoint == f"{name}-0.{subdomain}:29400" and service["metadata"]["name"] == subdomain
    assert service["spec"]["selector"] == {"job-name": name} and service["spec"]["publishNotReadyAddresses"]
    given = {one["name"]: one.get("value") for one in container["env"]}
    assert 100 <= int(given["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < pod["terminationGracePeriodSeconds"]
    assert set(re.findall(r"\$\((\w+)\)", " ".join(line))) <= set(given)
    volumes = {volume["name"] for volume in pod["volumes"]}
    places = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert set(places.values()) <= volumes and "/dev/shm" in places
    assert all(value.startswith("/data/") for value in (settings.model, settings.annotations, settings.images or ""))


def test_torchrun_knows_the_time_to_save(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "110")
    assert LaunchConfig(1, 1, 1).shutdown_timeout == 110
    assert "export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=110\n" in (RECIPES.parent / "docs" / "machines.md").read_text()
