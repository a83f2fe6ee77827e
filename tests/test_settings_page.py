"""The example of docs/settings.md trains as it stands."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch

import odtk
from odtk.cli import main

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "settings.md").read_text()


def test_the_example_file_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    (example,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    Path("train.yaml").write_text(example)
    odtk.synth("data", images=10, size=64, classes=2)  # as the page says
    assert main(["train", "--settings", "train.yaml", "--devices", "cpu"]) == 0
    kept = torch.load("model.pth", weights_only=True)["settings"]
    assert kept["epochs"] is None and kept["iters"] == math.ceil(2 * 8 / 2) and kept["lr"] == 0.001 * math.sqrt(2 / 8)
    assert (
        kept["jitter"] == [64, 64]
        and kept["planned"]["head"]
        and kept["val_iters"] == 8  # one evaluation, at the end
        and Path("model.best.pth").is_file()
    )
