"""The pixel engine of Pillow and torch."""

from __future__ import annotations

from torch import Tensor

from ..config import LoaderConfig
from .batch import Loader
from .dataset import Dataset
from .sampler import BatchPlan


class TorchLoader(Loader):
    """Pillow and PyTorch on ``config.workers`` threads: decoding and scaling release Python's lock."""

    def __init__(self, dataset: Dataset, config: LoaderConfig) -> None:
        super().__init__(dataset, config, threads=max(1, config.workers))

    def _render(self, plan: BatchPlan) -> Tensor:
        return self._render_with_torch(plan)
