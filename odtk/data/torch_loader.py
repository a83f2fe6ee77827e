"""The pixel engine made of Pillow and PyTorch."""

from __future__ import annotations

from torch import Tensor

from ..config import LoaderConfig
from .batch import Loader
from .dataset import Dataset
from .sampler import BatchPlan


class TorchLoader(Loader):
    """Makes pixels with Pillow and PyTorch on ``config.workers`` threads; decoding and scaling release the GIL."""

    def __init__(self, dataset: Dataset, config: LoaderConfig) -> None:
        super().__init__(dataset, config, threads=max(1, config.workers))

    def render_batch(self, plan: BatchPlan) -> Tensor:
        return self.render_with_torch(plan)
