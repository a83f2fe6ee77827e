"""The best checkpoint: of equal APs the later one, and what the last line says where nothing was found."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from odtk.training import train
from odtk.training.log import closing_line


def test_the_later_of_equal_aps_is_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[tuple[str, int]] = []
    monkeypatch.setattr(train, "save", lambda path, checkpoint: saved.append((path, checkpoint)))
    run: Any = SimpleNamespace(
        detector=None,
        ema=None,
        autocast=None,
        best_ap=-1.0,
        iteration=0,
        config=SimpleNamespace(path="m.pth"),
        ranks=SimpleNamespace(broadcast_buffers=lambda detector: None),
    )
    run.checkpoint = lambda: run.iteration
    log: Any = SimpleNamespace(validation=lambda *seen: None)
    kept = []
    for run.iteration, ap in enumerate((-1.0, 0.0, 0.0, 0.3, 0.2, 0.3, float("nan")), start=1):  # −1: no ground truth
        measured: Any = SimpleNamespace(run=lambda *_, ap=ap: (SimpleNamespace(ap=ap), []))
        train.validate(run, measured, log)
        kept.append([iteration for path, iteration in saved if path == "m.best.pth"][-1:])
    assert kept == [[], [2], [3], [4], [4], [6], [6]] and run.best_ap == 0.3


def test_the_last_line_says_that_nothing_was_found() -> None:
    assert "no object of the validation set was found yet" in closing_line("m.pth", "m.best.pth", 0.0)
    assert "found" not in closing_line("m.pth", "m.best.pth", 0.001)
