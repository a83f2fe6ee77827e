"""What the gradients of depthwise convolutions and kept memory save of a training step in bfloat16 on a CPU.

    PYTHONPATH=. python benchmarks/training_cpu.py [--rounds 8] [--backbone EfficientNetLite0FPN] [--size 384 512]

A step is forward, loss, backward and update of the dense detector on random images with fifteen boxes each. "torch's
own" has torch's gradients and glibc's usual memory, as odtk before 2026-11-24.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from typing import Any

from harness import again, arguments, compare, serve


def variant(args: argparse.Namespace) -> None:
    import torch
    from random_batch import CLASSES, random_batch, use_torch_gradients

    from odtk.config import LossConfig, ModelConfig
    from odtk.model.detector import Detector
    from odtk.settings import DENSE
    from odtk.training.loss import detection_loss, normalize
    from odtk.training.memory import freed_memory_kept

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.variant == "torch":
        use_torch_gradients()
    shape: dict[str, Any] = DENSE
    config = ModelConfig(backbones=(args.backbone,), head="dense", classes=CLASSES, **shape)
    detector = Detector(config).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    detector.initialize()
    optimizer = torch.optim.SGD(detector.parameters(), lr=1e-3, momentum=0.9, fused=True)
    images, boxes, labels = random_batch(args.batch, args.size, boxes=15)
    anchors = detector.anchors()

    def step() -> int:
        with torch.autocast("cpu", torch.bfloat16):
            logits, distances = detector(images)
        terms = detection_loss(
            logits, distances, boxes, labels, anchors=anchors, strides=detector.strides, model=config, loss=LossConfig()
        )
        optimizer.zero_grad()
        normalize(terms, world=1)[0].backward()
        torch.nn.utils.clip_grad_norm_(detector.parameters(), 5.0)
        optimizer.step()
        return len(images)

    with freed_memory_kept() if args.variant == "memory" else nullcontext():
        serve(step)


def main() -> None:
    parser = arguments(__doc__, rounds=8)
    parser.add_argument("--backbone", default="EfficientNetLite0FPN")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, nargs=2, default=(384, 512), metavar=("H", "W"))
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if args.variant:
        return variant(args)
    commands = {
        "torch's own": again("torch"),
        "fast depthwise gradients": again("depthwise"),
        "and kept memory (odtk)": again("memory"),
    }
    title = f"training {args.backbone}, {args.size[0]}×{args.size[1]}, batch {args.batch}, bf16"
    compare(title, commands, rounds=args.rounds, report=args.report)


if __name__ == "__main__":
    main()
