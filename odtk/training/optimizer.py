"""The optimizer, its learning rate and precision, and the moving average of the weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..config import RunConfig

LAST_RATE = 0.05  # of a flat-cosine schedule, relative to the first


def create_optimizer(
    network: nn.Module, config: RunConfig, adapters: Iterable[nn.Parameter] = ()
) -> torch.optim.Optimizer:
    """The optimizer that config.optimizer names, over all parameters (see parameter_groups).

    Frozen parameters have no gradient and are skipped; a resumed run may unfreeze them.

    Args:
        adapters: parameters that are trained beside the network's (distill.Student).
    """
    groups = parameter_groups(network, config)
    if beside := list(adapters):
        groups.append({"params": beside, "weight_decay": config.weight_decay})
    parameters = [*network.parameters(), *beside]
    optimizer: torch.optim.Optimizer
    # All states are made here: if fp16's scaler skips the first step, SGD's fused update would leave a buffer of its
    # own uninitialized; and a resumed run can tell which states belong in its file.
    if config.optimizer == "adamw":  # https://arxiv.org/abs/1711.05101
        optimizer = torch.optim.AdamW(groups, lr=config.lr, fused=True)
        for parameter in parameters:
            moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device), **moments}
    else:
        optimizer = torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=True)
        for parameter in parameters:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def parameter_groups(network: nn.Module, config: RunConfig) -> list[dict[str, Any]]:
    """The groups of an optimizer: all parameters in one, or those without weight decay in a second one.

    Norms and biases, which are the parameters of at most one dimension, do not decay under AdamW and in the dense head.
    Under SGD the parameters of the other heads all decay, as in ODTK 0.2.
    """
    parameters = list(network.parameters())
    if config.optimizer == "sgd" and config.model.head != "dense":
        return [{"params": parameters, "weight_decay": config.weight_decay}]
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]


def create_scaler(dtype: torch.dtype, device: torch.device) -> torch.amp.GradScaler:
    """The loss scaler of float16; for other types its scale stays 1, and it only skips steps that are not finite."""
    if dtype == torch.float16:
        return torch.amp.GradScaler(device.type)
    return torch.amp.GradScaler(device.type, init_scale=1.0, growth_interval=2**31 - 1)


def learning_rate(iteration: int, config: RunConfig) -> float:
    """Learning rate of an iteration, counted from 0.

    It rises linearly from a tenth of config.lr during warm-up. With the schedule ``milestones`` it is multiplied by
    config.gamma at each of them. With ``flat-cosine`` it stays until half of the run is done, and then falls along half
    a cosine to LAST_RATE of config.lr (RTMDet, https://arxiv.org/abs/2212.07784 §3.4). With ``cosine`` it falls so from
    the end of the warm-up on (https://arxiv.org/abs/1812.01187 §5.1).
    """
    rate = config.lr
    if iteration < config.warmup:
        rate *= 0.1 + 0.9 * iteration / config.warmup
    if config.lr_schedule != "milestones":
        iters = round(config.iters * config.schedule)
        begin = min(config.warmup, iters - 1) if config.lr_schedule == "cosine" else 0.5 * iters
        done = max(0.0, (iteration - begin) / (iters - begin))
        return rate * (LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * done)))
    return rate * config.gamma ** sum(iteration >= round(m * config.schedule) for m in config.milestones)


def autocast_type(precision: str, device: torch.device) -> torch.dtype:
    """The type of a precision: fp16, bf16, fp32, or mixed, which is fp16 on GPUs and bf16 on CPUs."""
    if precision == "mixed":
        precision = "fp16" if device.type == "cuda" else "bf16"
    return {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[precision]


class EMA:
    """Exponential moving average of weights and normalization statistics: a ← a + (1 − d)·(w − a) after every step.

    At step n, counted from 1, d = min(decay, (1 + n) / (10 + n)), so that the initial weights are soon forgotten
    (TensorFlow's ExponentialMovingAverage with num_updates).

    Attributes:
        network: holds the averages; it is in evaluation mode and has no gradients.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.network, self.decay = copy.deepcopy(network).requires_grad_(False).eval(), decay
        pairs = zip(self.network.state_dict().values(), network.state_dict().values(), strict=True)
        self.averages, self.values = zip(*((a, w) for a, w in pairs if a.is_floating_point()), strict=True)

    @torch.no_grad()
    def update(self, iteration: int) -> None:
        """Averages the weights after an optimizer step; ``iteration``: steps done."""
        decay = min(self.decay, (1 + iteration) / (10 + iteration))
        torch._foreach_lerp_(self.averages, self.values, 1 - decay)
