"""Inference on real images: an exported file in ONNX Runtime beside the same model in eager PyTorch.

    python benchmarks/inference.py MODEL.pth MODEL.onnx [OTHER.onnx …] --images DIR

The images are loaded once, at the size of the first .onnx; a step is one batch, from pixels to detections.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from harness import again, arguments, compare, serve


def variant(args: argparse.Namespace) -> None:
    import dataclasses

    import torch

    from odtk.config import LoaderConfig
    from odtk.data.dataset import Dataset
    from odtk.data.loader import create_loader
    from odtk.inference.backends import OnnxBackend, open_backend
    from odtk.inference.infer import loader_config

    torch.set_num_threads(2)
    size = OnnxBackend(args.models[1], device="cpu").size
    backend = open_backend(args.variant, device="cpu", precision="fp32", thresholds=None)
    data = LoaderConfig(images=args.images, size=size, batch=args.batch, loader="torch")
    pixels = dataclasses.replace(loader_config(data, backend), input_type="uint8")
    loader = create_loader(Dataset.load(None, args.images), pixels)
    batches = [batch.images for batch, _ in zip(loader, range(4), strict=False)]
    number = 0

    def step() -> int:
        nonlocal number
        number += 1
        images = batches[number % len(batches)]
        backend(images)
        return len(images)

    serve(step)


def main() -> None:
    parser = arguments(__doc__, rounds=20, batch=1)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="the checkpoint, then the files exported from it")
    args = parser.parse_args()
    if args.variant:
        return variant(args)
    if len(args.models) < 2:
        parser.error("name a checkpoint and at least one file exported from it")
    compare(
        f"inference, batch {args.batch}",
        {Path(model).name: again(model) for model in args.models},
        rounds=args.rounds,
        report=args.report,
    )


if __name__ == "__main__":
    main()
