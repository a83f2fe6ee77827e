"""The best checkpoint, when a run ends early, and what its last line says."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from odtk.model import checkpoint as files
from odtk.training import train
from odtk.training.log import Validated, closing_line
from odtk.training.validation import Validation
from tests.training.test_train import draw_dataset, settings, with_validation


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    draw_dataset(tmp_path / "shapes", 4)
    return tmp_path / "shapes"


def test_the_later_of_equal_aps_is_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[tuple[str, int]] = []
    monkeypatch.setattr(train, "save", lambda path, checkpoint: saved.append((path, checkpoint)))
    run: Any = SimpleNamespace(
        network=None,
        ema=None,
        autocast=None,
        best_score=-1.0,
        iteration=0,
        config=SimpleNamespace(path="m.pth"),
        ranks=SimpleNamespace(broadcast_buffers=lambda network: None),
    )
    run.checkpoint = lambda raw: run.iteration
    log: Any = SimpleNamespace(validation=lambda *seen, ema: None)
    kept = []
    for run.iteration, ap in enumerate((-1.0, 0.0, 0.0, 0.3, 0.2, 0.3, float("nan")), start=1):  # −1: no ground truth
        measured: Any = SimpleNamespace(run=lambda *_, ap=ap: Validated(ap, "", {}))
        train.validate(run, measured, log)
        kept.append([iteration for path, iteration in saved if path == "m.best.pth"][-1:])
    assert kept == [[], [2], [3], [4], [4], [6], [6]] and run.best_score == 0.3


def test_the_better_of_average_and_trained_weights_is_kept(tmp_path: Path, dataset: Path, monkeypatch) -> None:
    """The best file holds those that scored higher, the newest one the EMA; both resume to the same run."""
    config = with_validation(settings(tmp_path / "m.pth", dataset), iters=3, milestones=(), ema=0.5, val_iters=3)
    scores = {"ema": 0.2, "raw": 0.4}
    real, seen = Validation.run, []

    def scored(self: Validation, detector: Any, autocast: Any) -> Any:
        found = real(self, detector, autocast)
        seen.append("raw" if any(p.requires_grad for p in detector.parameters()) else "ema")
        assert found is not None
        return dataclasses.replace(found, score=scores[seen[-1]])

    monkeypatch.setattr(Validation, "run", scored)
    train.train(config)
    assert seen == ["ema", "raw"]
    best, newest = (files.load(tmp_path / name) for name in ("m.best.pth", "m.pth"))
    assert best.training is not None and newest.training is not None and newest.training["ema"] is None
    assert best.training["best"] == newest.training["best"] == 0.4 and newest.training["best_at"] == 3
    for name, trained in newest.training["average"].items():
        assert torch.equal(best.state_dict[name], trained)
        assert torch.equal(best.training["ema"][name], newest.state_dict[name])
    assert any(not torch.equal(best.state_dict[name], newest.state_dict[name]) for name in best.state_dict)
    (tmp_path / "m.best.pth").rename(tmp_path / "other.pth")
    ends = []
    for name in ("other.pth", "m.pth"):
        train.train(dataclasses.replace(config, path=str(tmp_path / name), iters=4, val_data=None))
        ends.append(files.load(tmp_path / name).state_dict)
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.parametrize(("aps", "last"), [((0.1, 0.3, 0.2, 0.3, 0.1, 0.2, 0.9), 6), ((0.0,) * 7, 7), ((-1.0,) * 7, 7)])
def test_a_run_ends_once_validation_has_stopped_improving(
    aps: tuple[float, ...], last: int, tmp_path: Path, dataset: Path, monkeypatch, capsys
) -> None:
    config = with_validation(
        settings(tmp_path / "m.pth", dataset), iters=7, milestones=(), val_iters=1, patience=2, save_seconds=1e9
    )
    left = list(aps)

    def scored(*_: Any) -> Any:
        return Validated(left.pop(0), "", {})

    monkeypatch.setattr(Validation, "run", scored)
    train.train(config)
    training = files.load(config.path).training
    assert training is not None and training["iteration"] == last
    shown = capsys.readouterr().out
    assert ("Ended at iteration 6: 2 evaluations have brought no better AP" in shown) == (last == 6)
    page = Path(str(config.logdir), "run.html")
    early = "ended early: 2 evaluations have brought no better AP (--patience)</p>"
    assert (early if last == 6 else ", finished</p>") in page.read_text()
    if last == 6:
        train.train(config)
        assert early in page.read_text()
        assert "it ended at iteration 6 of 7" in capsys.readouterr().out and len(left) == 1, "it stays ended"
        train.train(dataclasses.replace(config, patience=5))
        assert files.load(config.path).training["iteration"] == 7  # type: ignore[index]
        assert ", finished</p>" in page.read_text()


def test_the_last_line_says_that_nothing_was_found() -> None:
    assert "no object of the validation set was found yet" in closing_line("m.pth", "m.best.pth", 0.0)
    assert "found" not in closing_line("m.pth", "m.best.pth", 0.001)
