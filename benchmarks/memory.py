"""Peak memory of training with and without --grad-checkpoint, which recomputes the residual blocks in backward.

    PYTHONPATH=. python benchmarks/memory.py [--rounds 5] [--backbone ResNet50FPN] [--size 256 320] [--batch 4]

A step is forward, loss, backward and update in fp32 on the CPU, on random images with eight boxes each. The peak is
that of the process: torch itself, weights, gradients and momentum, whose sum is printed above the table as "at the
start", and then the activations.
"""

from __future__ import annotations

import argparse
import resource
import sys

from harness import again, arguments, compare, serve


def variant(args: argparse.Namespace) -> None:
    import torch
    from random_batch import CLASSES, random_batch

    from odtk.config import LossConfig, ModelConfig
    from odtk.model.detector import Detector
    from odtk.training.loss import detection_loss, normalize

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config = ModelConfig(backbones=(args.backbone,), classes=CLASSES, grad_checkpoint=args.variant == "checkpoint")
    detector = Detector(config).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    detector.initialize()
    optimizer = torch.optim.SGD(detector.parameters(), lr=1e-4, momentum=0.9, fused=True)
    for parameter in detector.parameters():  # all that is allocated before the first activation
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    print(
        f"{args.variant}: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB at the start",
        file=sys.stderr,
    )
    images, boxes, labels = random_batch(args.batch, args.size, boxes=8)
    anchors = detector.anchors()

    def step() -> int:
        logits, deltas = detector(images)
        terms = detection_loss(
            logits, deltas, boxes, labels, anchors=anchors, strides=detector.strides, model=config, loss=LossConfig()
        )
        optimizer.zero_grad()
        normalize(terms, world=1)[0].backward()
        optimizer.step()
        return args.batch

    serve(step)


def main() -> None:
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("--backbone", default="ResNet50FPN")
    parser.add_argument("--size", type=int, nargs=2, default=[256, 320], metavar=("H", "W"))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if args.variant:
        return variant(args)
    title = f"training {args.backbone}, {args.batch} images of {args.size[0]}×{args.size[1]}, fp32"
    commands = {"plain": again("plain"), "--grad-checkpoint": again("checkpoint")}
    compare(title, commands, rounds=args.rounds, report=args.report)


if __name__ == "__main__":
    main()
