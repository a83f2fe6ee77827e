"""Models whose detections depend on how much padding surrounds an image, and the warning about it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from .backbones.ghost import SqueezeExcite

ALLOWED = 0.05  # difference from the trained share of padding that is not worth a word


def map_statistics(detector: nn.Module) -> str | None:
    """What in a detector takes statistics over the whole map at inference, padding included; None: nothing."""
    if any(isinstance(module, nn.GroupNorm) for module in detector.modules()):
        return "GroupNorm"
    if any(isinstance(module, SqueezeExcite) for module in detector.modules()):
        return "squeeze-and-excitation"
    return None


def share_in_frame(aspects: Sequence[float], size: tuple[int, int]) -> float:
    """The mean share of an H×W frame, 0 to 1, that is padding around images fitted inside.

    Args:
        aspects: width over height of the images.
    """
    frame = size[1] / size[0]
    return sum(1 - min(aspect, frame) / max(aspect, frame) for aspect in aspects) / len(aspects)


def padding_warning(detector: nn.Module, trained: float | None, share: float, where: str) -> str | None:
    """A sentence where a model that depends on its padding meets another share of it than in training.

    Args:
        trained: share of padding in training, 0 to 1; None: not known, as in older files.
        share: the share that it meets.
        where: it meets that: "at 512×512", for example.
    """
    kind = map_statistics(detector)
    if kind is None or trained is None or abs(share - trained) <= ALLOWED:
        return None
    return (
        f"Warning: the model's {kind} takes statistics over the whole image with its padding, whose share was "
        f"{trained:.0%} in training and is {share:.0%} {where}: expect a lower AP, or "
        "choose a size of the images' own shape."
    )
