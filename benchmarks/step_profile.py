"""Where the time of one training step on the CPU goes: convolutions, norms, the loss, the update and the rest.

    PYTHONPATH=. python benchmarks/step_profile.py [--backbone EfficientNetLite0FPN] [--head dense] [--size 384 512]

The step is that of `odtk train` in mixed precision: forward, loss, backward, clipping, update and moving average, on
random images with fifteen boxes each. With --plain it has torch's own gradients of depthwise convolutions and glibc's
usual memory, as odtk before 2026-11-24. The shares are those of torch's profiler, of the operators' own time; the time
of a step is the median of unprofiled ones.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from random_batch import CLASSES, random_batch, use_torch_gradients
from torch.profiler import ProfilerActivity, profile

from odtk.config import LoaderConfig, LossConfig, ModelConfig, TrainConfig
from odtk.model.detector import Detector
from odtk.settings import DENSE
from odtk.training.loss import detection_loss, normalize
from odtk.training.memory import freed_memory_kept
from odtk.training.optimizer import EMA, autocast_type, create_optimizer

BOXES = 15
GROUPS = {  # beginnings of operators' names; the first group that matches counts, the rest is "other"
    "convolutions": ("mkldnn_convolution", "convolution", "_convolution", "thnn_conv", "slow_conv", "_Depthwise"),
    "norms": ("native_batch_norm", "batch_norm", "native_group_norm"),
    "optimizer and moving average": ("_fused_adamw", "_fused_sgd", "_foreach", "lerp"),
    "activations and additions": ("relu", "clamp", "hardtanh", "threshold", "add", "mul", "sigmoid", "upsample"),
    "copies and conversions": ("copy_", "_to_copy", "fill_", "zero_", "cat", "constant_pad_nd"),
}


def training_step(args: argparse.Namespace) -> Callable[[], object]:
    """A function that trains on one batch."""
    shape: dict[str, Any] = DENSE if args.head == "dense" else {}
    model = ModelConfig(backbones=(args.backbone,), head=args.head, classes=CLASSES, norm=args.norm, **shape)
    config = TrainConfig(path="", model=model, data=LoaderConfig(images=""), optimizer="adamw", lr=1e-3)
    detector = Detector(model)
    detector.initialize()
    detector.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimizer, average, anchors = create_optimizer(detector, config), EMA(detector, 0.99), detector.anchors()
    dtype = autocast_type("fp32" if args.full_precision else "mixed", torch.device("cpu"))
    images, boxes, labels = random_batch(args.batch, args.size, boxes=BOXES)

    def step() -> None:
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            logits, values = detector(images)
        terms = detection_loss(
            logits, values, boxes, labels, anchors=anchors, strides=detector.strides, model=model, loss=LossConfig()
        )
        optimizer.zero_grad()
        normalize(terms, world=1)[0].backward()
        torch.nn.utils.clip_grad_norm_(detector.parameters(), 5.0)
        optimizer.step()
        average.update(1)

    return step


def seconds(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def shares(events: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Operators' names and own times → the share of each group of GROUPS and of the rest, largest first."""
    totals = dict.fromkeys([*GROUPS, "other"], 0.0)
    for name, own in events:
        operator = name.removeprefix("aten::")
        group = next((g for g, starts in GROUPS.items() if operator.startswith(starts)), "other")
        totals[group] += own
    whole = sum(totals.values())
    return {name: total / whole for name, total in sorted(totals.items(), key=lambda item: -item[1])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="EfficientNetLite0FPN")
    parser.add_argument("--head", default="dense")
    parser.add_argument("--norm", default="frozen")
    parser.add_argument("--size", type=int, nargs=2, default=(384, 512), metavar=("H", "W"))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--full-precision", action="store_true")
    parser.add_argument("--plain", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.plain:
        use_torch_gradients()
    with nullcontext() if args.plain else freed_memory_kept():
        step = training_step(args)
        step()
        times = [seconds(step) for _ in range(args.rounds)]
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            step()
    print(f"{args.backbone}, {args.head}, {args.size[0]}×{args.size[1]}, batch {args.batch}, {args.threads} thread(s)")
    print(f"one step: {statistics.median(times):.2f} s ({min(times):.2f} to {max(times):.2f})")
    events = [(event.key, event.self_cpu_time_total) for event in profiler.key_averages()]
    for name, share in shares(events).items():
        print(f"{share:6.1%}  {name}")


if __name__ == "__main__":
    main()
