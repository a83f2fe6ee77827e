"""The optimizer, its learning rate and precision, and the average of the weights."""

from __future__ import annotations

import copy

import torch

from ..config import TrainConfig
from ..model.detector import Detector


def learning_rate(iteration: int, config: TrainConfig) -> float:
    """Rate of a step, counted from 0: linear warm-up from a tenth, then by gamma at each milestone."""
    rate = config.lr
    if iteration < config.warmup:
        rate *= 0.1 + 0.9 * iteration / config.warmup
    return rate * config.gamma ** sum(iteration >= round(m * config.schedule) for m in config.milestones)


def autocast_type(precision: str, device: torch.device) -> torch.dtype:
    """mixed is fp16 on GPUs and bf16 on CPUs."""
    if precision == "mixed":
        precision = "fp16" if device.type == "cuda" else "bf16"
    return {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[precision]


class EMA:
    """Exponential moving average of weights and statistics: a ← a + (1 − d)·(w − a) after every step.

    The decay d rises to the given one as min(decay, (1 + n) / (10 + n)) at step n, so that the start is soon forgotten
    (TensorFlow's ExponentialMovingAverage with num_updates).
    """

    def __init__(self, detector: Detector, decay: float) -> None:
        self.detector, self.decay = copy.deepcopy(detector).requires_grad_(False).eval(), decay
        pairs = zip(self.detector.state_dict().values(), detector.state_dict().values(), strict=True)
        self.averages, self.values = zip(*((a, w) for a, w in pairs if a.is_floating_point()), strict=True)

    @torch.no_grad()
    def update(self, iteration: int) -> None:
        decay = min(self.decay, (1 + iteration) / (10 + iteration))
        torch._foreach_lerp_(self.averages, self.values, 1 - decay)
