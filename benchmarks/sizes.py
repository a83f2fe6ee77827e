"""The named sizes of --variant and small detectors with other backbones: a table of their size and their time.

    PYTHONPATH=. python benchmarks/sizes.py [--rounds 15] [--peer YOLO.onnx …] [--only nano small]

Each row is exported (fp32, and INT8 with min-max ranges of random images) and run by ONNX Runtime on one thread, from
pixels to detections, all rows in turns; the time is the thread's own (CPU) time, so that other work on the machine
disturbs it less. The weights are random: hardly anything is left to suppress. A peer is an .onnx of any kind, run as it
is on random numbers.

The time of an engine is a MODEL until a GPU measures it: each convolution takes as long as its operations at the GPU's
peak, or its bytes (input, output, weights) at its bandwidth, whichever is longer, and never less than LAUNCH; ReLU and
additions are fused into it, except that a residual is read. Decoding and NMS are left out.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from odtk.categories import Category
from odtk.config import ExportConfig, ModelConfig
from odtk.exporting.export import export
from odtk.exporting.graph import trace
from odtk.exporting.session import open_session
from odtk.model.checkpoint import Checkpoint, save
from odtk.model.detector import Detector
from odtk.model.sizes import count_parameters
from odtk.settings import VARIANTS, TrainSettings
from odtk.training.plan import train_config

ROWS: dict[str, dict[str, Any]] = {
    **{name: {"variant": name} for name in VARIANTS},
    "small, GhostNet": {"variant": "small", "backbone": "GhostNetFPN"},
    "small, MobileNetV2": {"variant": "small", "backbone": "MobileNetV2FPN"},
    "small, RepVGGA0": {"variant": "small", "backbone": "RepVGGA0FPN"},
    "small, ResNet18 × 0.5": {"variant": "small", "backbone": "ResNet18FPN", "resnet_width": 0.5},
    "small, ResNet18 × 0.75": {"variant": "small", "backbone": "ResNet18FPN", "resnet_width": 0.75},
}
LAUNCH = 3e-6  # seconds that the smallest kernel takes
FUSED = {"Relu", "Clip", "LeakyRelu", "Sigmoid", "HardSigmoid"}  # into the convolution before them
CLASSES = 3


@dataclass(frozen=True)
class Gpu:
    """A data sheet: dense operations per second in FP16 and INT8, and bytes per second."""

    name: str
    fp16: float
    int8: float
    bandwidth: float


GPUS = (Gpu("Orin Nano 8GB", 10e12, 20e12, 68e9), Gpu("T4", 65e12, 130e12, 320e9))


def model_of(values: dict[str, Any]) -> tuple[ModelConfig, tuple[int, int]]:
    """The model of a row, and the size of its input for images of 3:4."""
    settings = TrainSettings.of({"model": "m.pth", "annotations": "a.json", "backbone_weights": "none", **values})
    config = train_config(settings.resolved(batch=8, iters=100, classes=CLASSES), 1, "images")
    scale = min(settings.resize / 480, settings.max_size / 640)
    height, width = (math.ceil(round(side * scale) / 32) * 32 for side in (480, 640))
    return config.model, (height, width)


def gflops(detector: Detector, size: tuple[int, int]) -> float:
    """10⁹ operations for one image; a multiply-add counts as two."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        detector(torch.empty(1, 3, *size, device="meta"))
    return counter.get_total_flops() / 1e9


def engine_seconds(model: onnx.ModelProto, gpu: Gpu, value_bytes: int) -> float:
    """The roofline of a raw graph with values of that many bytes: 2 is FP16, 1 INT8."""
    shapes = {t.name: tuple(t.dims) for t in model.graph.initializer}
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output):
        shapes[value.name] = tuple(max(1, d.dim_value) for d in value.type.tensor_type.shape.dim)  # the batch is 1
    peak = gpu.int8 if value_bytes == 1 else gpu.fp16
    seconds, convolved = 0.0, set()
    for node in model.graph.node:
        moved = sum(math.prod(shapes[name]) for name in (*node.input, *node.output) if name in shapes) * value_bytes
        operations = 0.0
        if node.op_type == "Conv":
            kernel, out = shapes[node.input[1]], shapes[node.output[0]]
            operations = 2.0 * math.prod(kernel[1:]) * math.prod(out)
            convolved.update(node.output)
        elif node.op_type in FUSED and node.input[0] in convolved:
            convolved.update(node.output)
            continue
        elif node.op_type == "Add" and convolved.intersection(node.input):
            convolved.update(node.output)
            seconds += math.prod(shapes[node.output[0]]) * value_bytes / gpu.bandwidth
            continue
        seconds += max(LAUNCH, operations / peak, moved / gpu.bandwidth)
    return seconds


def measure(folder: Path, name: str, values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Path]]:
    """A row's figures but its times in ONNX Runtime, and the files that give those."""
    torch.manual_seed(0)
    config, size = model_of(values)
    detector = Detector(config).eval()
    detector.initialize()
    stem = folder / name.replace(" ", "").replace(",", "-")
    categories = tuple(Category(i, str(i)) for i in range(CLASSES))
    save(f"{stem}.pth", Checkpoint(model=config, categories=categories, state_dict=detector.state_dict()))
    files = {}
    for precision in ("fp32", "int8"):
        files[precision] = Path(f"{stem}-{precision}.onnx")
        export(
            ExportConfig(
                path=f"{stem}.pth",
                output=str(files[precision]),
                size=size,
                precision=precision,
                calibration_images=str(folder / "images"),
                calibration_batches=1,
                calibration_method="minmax",
            )
        )
    folded = detector.fold()
    graph = trace(folded, size)
    row = {
        "name": name,
        "size": f"{size[0]}×{size[1]}",
        "parameters": count_parameters(folded) / 1e6,
        "gflops": gflops(Detector(config).to("meta").eval(), (640, 640)),
        "engine": [[engine_seconds(graph, gpu, b) * 1e3 for b in (2, 1)] for gpu in GPUS],
    }
    return row, files


def draw_images(folder: Path) -> None:
    """As many random images as calibration needs."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(8):
        blocks = Image.fromarray(generator.integers(0, 256, (30, 40, 3), dtype=np.uint8))
        blocks.resize((640, 480)).save(folder / f"{number}.png")


def time_in_turns(files: dict[str, Path], rounds: int) -> dict[str, float]:
    """Median of the thread's milliseconds for one image, by name."""
    work = {}
    for name, path in files.items():
        session = open_session(str(path))
        entry = session.get_inputs()[0]
        shape = [d if isinstance(d, int) else 1 for d in entry.shape]
        pixels = np.random.default_rng(0).integers(0, 256, shape)
        work[name] = (session, {entry.name: pixels.astype(np.uint8 if "uint8" in entry.type else np.float32)})
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds + 1):  # the first is to warm up
        for name, (session, feed) in work.items():
            start = time.process_time()
            session.run(None, feed)
            times[name].append((time.process_time() - start) * 1e3)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--peer", nargs="*", type=Path, default=[])
    parser.add_argument("--only", nargs="*", choices=tuple(ROWS), default=tuple(ROWS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        draw_images(folder / "images")
        rows, files = [], {path.stem: path for path in args.peer}
        for row_name in args.only:
            row, own = measure(folder, row_name, ROWS[row_name])
            rows.append(row)
            files |= {f"{row_name} {precision}": path for precision, path in own.items()}
        times = time_in_turns(files, args.rounds)
    columns = [f"{gpu.name}, {p}" for gpu in GPUS for p in ("FP16", "INT8")]
    print(f"\n| | input | parameters (M) | GFLOPs at 640×640 | fp32, ms | INT8, ms | {' | '.join(columns)} |")
    print("|---|---|" + "---:|" * (4 + len(columns)))
    for row in rows:
        measured = [f"{times[row['name'] + ' ' + precision]:.1f}" for precision in ("fp32", "int8")]
        modeled = [f"{ms:.2f}" for pair in row["engine"] for ms in pair]
        figures = [f"{row['parameters']:.2f}", f"{row['gflops']:.1f}", *measured, *modeled]
        print(f"| {row['name']} | {row['size']} | {' | '.join(figures)} |")
    for path in args.peer:
        print(f"| {path.stem} | | | | {times[path.stem]:.1f} |" + " |" * (1 + len(columns)))


if __name__ == "__main__":
    main()
