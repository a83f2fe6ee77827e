"""The feature extractor: what every classification network shares once its classifier is gone."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..layers import DeformConv2d, FrozenBatchNorm2d, run_checkpointed


class FeatureExtractor(nn.Module):
    """A classification network without its classifier: images [N, 3, H, W] → feature maps, finest first.

    Each map is [N, channels[i], H/strides[i], W/strides[i]]. Stages are numbered as in C1…C5: stage 1 is the stem, and
    the last map of stage n has stride 2^n.

    Attributes:
        outputs: numbers of the stages whose last feature map is returned.
        channels, strides: of each returned map.
        stride: the input's height and width must be multiples of it.
        grad_checkpoint: backward recomputes what is inside the blocks, to save memory.
    """

    outputs: tuple[int, ...] = (3, 4, 5)
    channels: tuple[int, ...]
    grad_checkpoint: bool

    @property
    def classifier_parameters(self) -> int:
        """Parameters of the published classifier of 1000 classes: a linear layer after the pooled C5."""
        return linear_parameters(self.channels[-1], 1000)

    @property
    def strides(self) -> tuple[int, ...]:
        return tuple(2**number for number in self.outputs)

    @property
    def stride(self) -> int:
        return max(self.strides)

    def stem(self, images: Tensor) -> Tensor:
        """Stage 1, and the pooling after it where there is one."""
        raise NotImplementedError

    def stages(self) -> list[list[nn.Module]]:
        """The modules of each stage, from stage 1; those of stage 2 and later run one after another."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> list[Tensor]:
        x = self.stem(images)
        features = []
        for number, blocks in enumerate(self.stages()[1:], start=2):
            for block in blocks:
                x = run_checkpointed(block, x) if self.grad_checkpoint and torch.is_grad_enabled() else block(x)
            if number in self.outputs:
                features.append(x)
        return features

    def freeze(self, stages: int) -> None:
        """Stages 1 to ``stages`` get no gradient. Detector.train() keeps their batch norms in eval mode."""
        for stage in self.stages()[:stages]:
            for module in stage:
                module.requires_grad_(False)

    def initialize(self) -> None:
        """Convolutions: Kaiming normal over fan-out (https://arxiv.org/abs/1502.01852). Norms: the identity."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, (_BatchNorm, nn.GroupNorm, FrozenBatchNorm2d)):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, DeformConv2d):
                module.initialize()


def linear_parameters(in_features: int, out_features: int) -> int:
    """Parameters of a linear layer with bias.

    A 1×1 convolution without bias and its batch norm have ``out_features`` more: scale and shift in place of the bias.
    """
    return in_features * out_features + out_features
