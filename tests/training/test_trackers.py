"""--log-to: MLflow and Weights & Biases get every value and picture, offline, and neither can stop a run."""

from __future__ import annotations

import importlib.util
import sys
import time
from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy as np
import pytest

from odtk.config import LoaderConfig, ModelConfig, OdtkError, TrainConfig
from odtk.evaluation.evaluate import ClassMetrics, Metrics
from odtk.settings import TrainSettings
from odtk.training.log import TRACKERS, RunLog
from odtk.training.validation import validated

NAME = "round & <b>red</b>"  # of a class; MLflow takes few characters in names


def config(folder: Path, *names: str) -> TrainConfig:
    settings = {"lr": 0.001, "given": ["lr"], "long": "x" * 1000}
    return TrainConfig("m.pth", ModelConfig(), LoaderConfig("."), logdir=str(folder), log_to=names, settings=settings)


def log_run(folder: Path, *names: str) -> None:
    with RunLog(config(folder, *names), 0, 10) as log:
        for i in range(1, 6):
            log.training(i, {"loss": 1 / i, "box": float("nan") if i == 1 else 0.5}, 0.01, 30.0)
        classes = (ClassMetrics(1, NAME, 0.25, 0.5, 3, 3),)
        log.validation(5, validated(Metrics((0.5, *[0.25] * 11), classes), [np.full((40, 60, 3), 99, np.uint8)]))


@pytest.mark.slow
def test_mlflow_has_every_value_and_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    log_run(tmp_path, "mlflow")
    assert capsys.readouterr().err.count("Warning") == 0
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("odtk").experiment_id])
    assert run.info.status == "FINISHED" and run.data.params["lr"] == "0.001" and run.info.run_name == "m.pth"
    points = [(p.step, round(p.value, 6)) for p in client.get_metric_history(run.info.run_id, "loss")]
    assert points == [(i, round(1 / i, 6)) for i in range(1, 6)]
    assert run.data.metrics["AP"] == 0.5 and run.data.metrics["AP/round _ _b_red_/b_"] == 0.25
    assert list(tmp_path.glob("mlflow/*/artifacts/validation/0/00000005.png"))
    assert not Path("mlruns").exists() and not Path("mlflow.db").exists()


@pytest.mark.slow
def test_wandb_is_written_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    log_run(tmp_path, "wandb")
    assert capsys.readouterr().err.count("Warning") == 0
    (written,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    names = (b"images_per_second", b"AP50", NAME.encode())
    deadline = time.monotonic() + 60  # W&B's service writes the file after the run
    while not all(name in written.read_bytes() for name in names):
        assert time.monotonic() < deadline, written.read_bytes()
        time.sleep(0.1)
    assert list(tmp_path.glob("wandb/offline-run-*/files/media/images/validation/*.png"))


@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_that_fails_stops_no_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Whatever its package does; the other writers go on."""
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / f"{name}.py").write_text("raise PermissionError(13, 'not allowed')")
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.delitem(sys.modules, name, raising=False)
    log_run(tmp_path / "log", name)
    said = capsys.readouterr().err.splitlines()
    assert said == [f"Warning: --log-to {name} fails (not allowed); training goes on."]
    assert (tmp_path / "log" / "metrics.jsonl").read_text().count("\n") == 6
    assert "best AP 0.500" in (tmp_path / "log" / "run.html").read_text()


def test_a_package_that_is_missing_is_said_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OdtkError, match=r"--log-to wandb needs its package: pip install 'odtk\[wandb\]'"):
        RunLog(config(tmp_path, "wandb"), 0, 10)
    folder = ModuleSpec("wandb", None, is_package=True)  # what find_spec gives for an empty ./wandb
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: folder)
    with pytest.raises(OdtkError, match="--log-to wandb needs its package"):
        RunLog(config(tmp_path, "wandb"), 0, 10)
    with pytest.raises(OdtkError, match="--log-to mlflow needs --logdir DIR"):
        TrainSettings(model="m.pth", annotations="a.json", log_to=("mlflow",))
