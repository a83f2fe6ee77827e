"""The figures of a benchmark."""

import json
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from odtk.config import BenchmarkConfig, LoaderConfig, ModelConfig
from odtk.evaluation import benchmark
from odtk.model import checkpoint
from odtk.model.detector import Detector


def test_latency_and_throughput_are_those_of_the_backend() -> None:
    calls = []

    def backend(images: torch.Tensor) -> None:
        calls.append(len(images))
        time.sleep(0.05 if len(calls) == 1 else 0.01)  # the first call is slow: warm-up

    batches = iter([torch.zeros(4, 3, 2, 2)] * 12)
    run = benchmark.measure(backend, batches, 10, 2, torch.device("cpu"))  # type: ignore[arg-type]
    assert len(calls) == 12 and run["batches"] == 10
    assert 10 <= run["latency ms"]["p50"] <= run["latency ms"]["p90"] <= run["latency ms"]["p99"]
    assert run["images per second"] <= 400
    assert run["images per second"] > 4 / (run["latency ms"]["p99"] / 1e3 + 0.01)


@pytest.mark.parametrize("with_images", [False, True])
def test_a_whole_benchmark_and_its_json(tmp_path: Path, capsys, with_images: bool) -> None:
    torch.set_num_threads(1)
    config = ModelConfig(backbones=("ResNet18FPN",), classes=1)
    detector = Detector(config)
    detector.initialize()
    checkpoint.save(tmp_path / "m.pth", checkpoint.Checkpoint(config, None, detector.state_dict()))
    for i in range(2):
        Image.new("RGB", (60, 40)).save(tmp_path / f"{i}.png")
    data = LoaderConfig(str(tmp_path) if with_images else "", size=(60, 96), batch=2, loader="torch")
    path = str(tmp_path / "figures.json")
    figures = benchmark.benchmark(BenchmarkConfig(str(tmp_path / "m.pth"), data, iters=3, warmup=1, output=path))
    assert json.loads(Path(path).read_text()) == figures
    assert figures["input"] == [2, 3, 64, 96] and figures["precision"] == "fp32"
    assert list(figures["runs"]) == ["model", "loader and model"][: 1 + with_images]
    assert figures["memory"]["process peak"] > 50  # MiB: torch alone takes more
    shown = capsys.readouterr().out
    assert "p99" in shown and "process peak" in shown and torch.__version__ in shown
