"""BatchNorm whose statistics are those of the whole batch, when several processes share it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def synchronize_batch_norms(module: nn.Module) -> None:
    """Makes every BatchNorm2d inside the module take its statistics over all processes while it trains, in place.

    On GPUs they become torch's SyncBatchNorm, which is for GPUs only; on CPUs the same in plain operators. Names and
    values in the state_dict stay. Every process must run the module equally often.
    """
    for name, child in list(module.named_children()):
        if not isinstance(child, nn.BatchNorm2d):
            synchronize_batch_norms(child)
        elif next(child.buffers()).device.type == "cuda":
            setattr(module, name, nn.SyncBatchNorm.convert_sync_batchnorm(child))
        else:
            child.__class__ = CpuSyncBatchNorm2d


class CpuSyncBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d over all processes of the default group; in eval mode it is BatchNorm2d itself."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        assert self.momentum is not None
        values = x.float()  # [N, C, h, w]
        cells = values.new_full((1,), len(x) * x.shape[2] * x.shape[3])
        total = sum_over_ranks(torch.cat([values.sum((0, 2, 3)), cells]))
        mean, count = total[:-1] / total[-1], float(total[-1].detach())
        centered = values - mean[:, None, None]
        variance = sum_over_ranks(centered.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / max(1.0, count - 1)), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centered * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of the ranks' values. Its gradient is the sum of the gradients that they have for it."""
    return _SumOverRanks.apply(values)


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        values = values.clone()
        dist.all_reduce(values)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad
