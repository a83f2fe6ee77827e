"""The whole training loop on real images: odtk beside plain PyTorch, and beside torchvision if its Python is given.

    python benchmarks/training.py --annotations JSON --images DIR [--peer-python /path/to/venv/bin/python]

Every step reads and decodes images, makes tensors of them, runs forward and backward, clips gradients and updates the
weights. The model is ResNet18FPN from scratch at --resize × --max-size. "plain PyTorch" is the same detector in fp32
and NCHW, fed by the torch loader.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from harness import again, arguments, compare, serve


def variant(args: argparse.Namespace) -> None:
    import torch

    from odtk.config import AugmentConfig, LoaderConfig, LossConfig, ModelConfig
    from odtk.data.dataset import Dataset
    from odtk.data.loader import create_loader
    from odtk.model.detector import Detector
    from odtk.training.loss import detection_loss, normalize
    from odtk.training.optimizer import autocast_type

    torch.set_num_threads(2)
    torch.manual_seed(0)
    plain = args.variant == "plain"
    dataset = Dataset.load(args.annotations, args.images, training=True)
    config = ModelConfig(backbones=("ResNet18FPN",), classes=len(dataset.categories))
    memory_format = torch.contiguous_format if plain else torch.channels_last
    detector = Detector(config).to(memory_format=memory_format).train()  # type: ignore[call-overload]
    detector.initialize()
    loader = create_loader(
        dataset,
        LoaderConfig(
            images=args.images,
            annotations=args.annotations,
            batch=args.batch,
            training=True,
            stride=detector.stride,
            jitter=(args.resize, args.resize),
            max_size=args.max_size,
            augment=AugmentConfig(crop=0),
            loader="torch" if plain else "dali",
        ),
    )
    batches, anchors = iter(loader), detector.anchors()
    optimizer = torch.optim.SGD(detector.parameters(), lr=0.001, momentum=0.9, weight_decay=1e-4, fused=not plain)
    dtype = autocast_type("fp32" if args.variant in ("plain", "fp32") else "mixed", torch.device("cpu"))

    def step() -> int:
        batch = next(batches)
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            logits, boxes = detector(batch.images.contiguous(memory_format=memory_format))
        terms = detection_loss(
            logits,
            boxes,
            batch.boxes,
            batch.labels,
            anchors=anchors,
            strides=detector.strides,
            model=config,
            loss=LossConfig(),
        )
        loss, _ = normalize(terms, world=1)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(detector.parameters(), 10.0)
        optimizer.step()
        return len(batch.images)

    serve(step)


def main() -> None:
    parser = arguments(__doc__, rounds=10, batch=8)
    parser.add_argument("--peer-python", help="Python interpreter of an environment with torchvision")
    args = parser.parse_args()
    if args.variant:
        return variant(args)
    commands = {}
    if args.peer_python:
        peer = Path(__file__).with_name("peer_torchvision.py")
        commands["torchvision R18-FPN, bf16, channels-last"] = [args.peer_python, str(peer), *sys.argv[1:]]
        commands["torchvision R18-FPN, fp32"] = [args.peer_python, str(peer), "--plain", *sys.argv[1:]]
    commands |= {"plain PyTorch, fp32": again("plain"), "odtk, fp32": again("fp32"), "odtk, mixed": again("mixed")}
    compare(
        f"training, {args.resize}×{args.max_size}, batch {args.batch}", commands, rounds=args.rounds, report=args.report
    )


if __name__ == "__main__":
    main()
