"""What the ranks of a run tell each other: values to compare, results to gather, buffers to copy."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

WAIT_TIMEOUT = timedelta(hours=6)  # how long ranks that are done wait for those that still work


def new_cpu_group(world: int) -> dist.ProcessGroup | None:
    """A group of all ranks for CPU tensors, whose collectives may wait for WAIT_TIMEOUT; None for a single rank.

    Every rank must call this at the same point of the program.
    """
    return dist.new_group(backend="gloo", timeout=WAIT_TIMEOUT) if world > 1 else None


def gather(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Collects one value of every rank on rank 0.

    Args:
        value: anything that can be pickled.
        group: a group of all ranks; None: the default group.

    Returns:
        On rank 0 the values in order of rank, on the others an empty list; [value] without torch.distributed.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, values, dst=0, group=group)
    return values or []


class CpuGroup:
    """All ranks of a run, for decisions that they must take alike. CPU tensors, so that nothing waits for a GPU.

    Attributes:
        group: see new_cpu_group; None for a single rank, for which every method returns at once.
        rank: of this process.
    """

    def __init__(self, world: int) -> None:
        self.group = new_cpu_group(world)
        self.rank = 0 if self.group is None else dist.get_rank()

    def all_max(self, *values: int) -> list[int]:
        """The maximum over all ranks of each value."""
        if self.group is None:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group)
        return tensor.tolist()

    def from_first(self, make: Callable[[], Any]) -> Any:
        """What rank 0 makes, on every rank; anything that can be pickled."""
        values = [make() if self.group is None or dist.get_rank() == 0 else None]
        if self.group is not None:
            dist.broadcast_object_list(values, 0, group=self.group)
        return values[0]

    def barrier(self) -> None:
        """Waits until all ranks have called this."""
        self.all_max(0)

    def broadcast_buffers(self, model: torch.nn.Module) -> None:
        """Copies the model's buffers from rank 0 to all: pretrained statistics, and those that batch norms gathered."""
        if self.group is not None:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)  # by the default group, which serves the model's device


def silent(*_: object) -> None:
    """Stands in for print on every rank but 0."""
