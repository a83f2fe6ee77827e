"""The figures of a benchmark."""

import itertools
import json
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from PIL import Image

from odtk.config import BenchmarkConfig, LoaderConfig, ModelConfig
from odtk.data.dataset import Dataset
from odtk.data.loader import create_loader
from odtk.evaluation import benchmark
from odtk.model import checkpoint
from odtk.model.detector import Detector
from odtk.postprocess import BatchDetections


def test_latency_and_throughput_are_those_of_the_backend() -> None:
    calls = []

    def step() -> int:
        calls.append(4)
        time.sleep(0.05 if len(calls) == 1 else 0.01)  # the first call is slow: warm-up
        return 4

    run = benchmark.measure(step, 10, 2, torch.device("cpu"))
    assert len(calls) == 12 and run["batches"] == 10
    assert 10 <= run["latency ms"]["p50"] <= run["latency ms"]["p90"] <= run["latency ms"]["p99"]
    assert run["images per second"] <= 400
    assert run["images per second"] > 4 / (run["latency ms"]["p99"] / 1e3 + 0.01)


@pytest.mark.parametrize("with_images", [False, True])
def test_a_whole_benchmark_and_its_json(tmp_path: Path, capsys, with_images: bool) -> None:
    torch.set_num_threads(1)
    config = ModelConfig(backbones=("ResNet18FPN",), classes=1, padding="black")
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
    names = ["model", "with copies", "model, batch 1", "with copies, batch 1"]
    assert list(figures["runs"]) == names + ["from files", "from files, one at a time"] * with_images
    assert figures["input type"] == "uint8" and all(run["batches"] == 3 for run in figures["runs"].values())
    assert figures["memory"]["process peak"] > 50  # MiB: torch alone takes more
    shown = capsys.readouterr().out
    assert "p99" in shown and "process peak" in shown and torch.__version__ in shown


class Slow:
    """A backend that needs 5 ms, and says which images it had."""

    input_type, mean, std = "uint8", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def __call__(self, images: torch.Tensor) -> BatchDetections:
        self.seen.append(images)
        time.sleep(0.005)
        n = len(images)
        return BatchDetections(torch.zeros(n, 1), torch.zeros(n, 1, 4), torch.zeros(n, 1, dtype=torch.int64))


def test_runs_from_files_take_every_image_pass_after_pass(tmp_path: Path) -> None:
    for i in range(3):
        Image.new("RGB", (32, 32), (i, i, i)).save(tmp_path / f"{i}.png")
    data = LoaderConfig(str(tmp_path), size=(32, 32), batch=2, loader="torch", input_type="uint8")
    dataset, backend = Dataset.load(None, tmp_path), Slow()
    counts = list(islice(benchmark.pass_after_pass(backend, create_loader(dataset, data)), 4))  # type: ignore[arg-type]
    assert counts == [2, 1, 2, 1] and [int(images[0, 0, 0, 0]) for images in backend.seen] == [0, 2, 0, 2]
    backend.seen.clear()
    single, numbers = create_loader(dataset, replace(data, batch=1)), itertools.count()
    run = benchmark.measure(
        lambda: benchmark.run_one_file(backend, single, numbers),  # type: ignore[arg-type]
        4,
        0,
        torch.device("cpu"),
    )
    assert [int(images[0, 0, 0, 0]) for images in backend.seen] == [0, 1, 2, 0] and run["latency ms"]["p50"] > 5


@pytest.mark.parametrize("kind", ["uint8", "float32", "normalized"])
def test_random_images_are_what_loaders_give(kind: str) -> None:
    backend = Slow()
    backend.input_type = kind  # type: ignore[misc]
    images = benchmark.random_images(backend, 2, (32, 64), pinned=False)  # type: ignore[arg-type]
    assert images.dtype == (torch.uint8 if kind == "uint8" else torch.float32) and images.shape == (2, 3, 32, 64)
    assert images.max() <= 1 if kind == "normalized" else images.max() > 200
