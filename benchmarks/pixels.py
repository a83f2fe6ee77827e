"""`odtk infer` with pixels as input beside the same model with normalized floats, as files of format 3 take them.

    python benchmarks/pixels.py MODEL.pth --images DIR [--size H W] [--batch N] [--rounds N] [--loader torch|dali]

Both files are written to a temporary folder in fp32 and run on the CPU in turns. Printed are medians of the CPU seconds
of the whole process for all images, which other work on the machine changes less than seconds of the clock, and the
bytes of a batch on their way from the loader to the session.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable

from odtk.config import ExportConfig, InferConfig, LoaderConfig
from odtk.data.dataset import Dataset
from odtk.data.loader import create_loader
from odtk.exporting import export
from odtk.exporting.graph import serialize, trace
from odtk.inference.backends import Backend, open_backend
from odtk.inference.detect import detect_batches
from odtk.inference.infer import infer, loader_config
from odtk.model import checkpoint


def write_normalized(config: ExportConfig) -> None:
    """An ONNX file of format 3: no normalization in the graph, and none named in the metadata."""
    source = checkpoint.load(config.path)
    detector = checkpoint.build_detector(source).fold()
    metadata = export.metadata_of(detector, source, config, "detections")
    model = export.append_postprocess(trace(detector, config.input_size), detector, metadata)
    values = json.loads(model.metadata_props[0].value) | {"format": 3}
    del values["input_type"]
    model.metadata_props[0].value = json.dumps(values)
    with open(config.output, "wb") as file:
        file.write(serialize(model))


def seconds(work: Callable[[], object]) -> float:
    """CPU seconds of this process, all threads."""
    start = time.process_time()
    work()
    return time.process_time() - start


def steps_of(path: str, base: LoaderConfig, dataset: Dataset) -> tuple[dict[str, Callable[[], object]], int]:
    """What is timed of a file, and the bytes of one of its batches."""
    backend: Backend = open_backend(path, device="cpu", precision="fp32", thresholds=None)
    loader = create_loader(dataset, loader_config(base, backend))
    images = next(iter(loader)).images
    steps: dict[str, Callable[[], object]] = {
        "loader alone": lambda: [None for _ in loader],
        "loader and model": lambda: [None for _ in detect_batches(backend, loader)],
        "odtk infer": lambda: infer(InferConfig(path=path, data=base)),
    }
    return steps, images.numel() * images.element_size()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--images", required=True)
    parser.add_argument("--size", type=int, nargs=2, default=(480, 640))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--loader", default="torch")
    args = parser.parse_args()
    base = LoaderConfig(images=args.images, batch=args.batch, loader=args.loader)
    dataset = Dataset.load(None, args.images)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        files = {kind: f"{folder}/{kind}.onnx" for kind in ("normalized", "uint8")}
        config = ExportConfig(args.model, files["uint8"], size=tuple(args.size), precision="fp32")
        export.export(config)
        write_normalized(ExportConfig(args.model, files["normalized"], size=tuple(args.size), precision="fp32"))
        made = {kind: steps_of(path, base, dataset) for kind, path in files.items()}
        times: dict[str, dict[str, list[float]]] = {kind: {} for kind in files}
        for round in range(args.rounds):
            for kind in sorted(files, reverse=bool(round % 2)):
                for name, step in made[kind][0].items():
                    times[kind].setdefault(name, []).append(seconds(step))
    print(f"{len(dataset.images)} images at {args.size[0]}×{args.size[1]}, batch {args.batch}, {args.loader} loader")
    for kind, of_kind in times.items():
        medians = ", ".join(f"{name} {statistics.median(values):.2f} s" for name, values in of_kind.items())
        print(f"{kind}: {medians}, {made[kind][1] / 2**20:.2f} MiB a batch")


if __name__ == "__main__":
    main()
