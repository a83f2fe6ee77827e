"""Pretrained and partial weights."""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..config import OdtkError, TrainConfig
from .checkpoint import load, read
from .detector import Detector

# ImageNet weights of pytorch/vision (IMAGENET1K_V1), whose names are the trunks' own
TORCHVISION_URLS = {
    "ResNet18": "https://download.pytorch.org/models/resnet18-f37072fd.pth",
    "ResNet34": "https://download.pytorch.org/models/resnet34-b627a593.pth",
    "ResNet50": "https://download.pytorch.org/models/resnet50-0676ba61.pth",
    "ResNet101": "https://download.pytorch.org/models/resnet101-63fe2227.pth",
    "ResNet152": "https://download.pytorch.org/models/resnet152-394f9c45.pth",
    "ResNeXt50_32x4d": "https://download.pytorch.org/models/resnext50_32x4d-7cdf4587.pth",
    "ResNeXt101_32x8d": "https://download.pytorch.org/models/resnext101_32x8d-8ba56ff5.pth",
    "MobileNetV2": "https://download.pytorch.org/models/mobilenet_v2-b0353104.pth",
}


def initialize(detector: Detector, config: TrainConfig) -> None:
    """Random weights, and over them those of --fine-tune, or the pretrained ones of the backbones."""
    detector.initialize()
    if config.fine_tune is not None:
        taken, left = load_matching(detector, load(config.fine_tune).state_dict)
        print_taken(config.fine_tune, taken, left)
    elif config.backbone_weights != "none":
        for name, trunk in detector.trunks().items():
            path = config.backbone_weights
            weights = imagenet_weights(name) if path is None else backbone_weights(path)
            taken, left = load_matching(trunk, weights)
            if not taken:
                source = path or "The file of torchvision"
                raise OdtkError(f"{source} has no tensor of {name}: give its own with --backbone-weights.")
            print_taken(path or f"ImageNet, for {name}", taken, left)


def print_taken(source: str, taken: list[str], left: list[str]) -> None:
    """The two lists, by module."""
    for text, names in ((f"Taken from {source}", taken), ("Initialized", left)):
        modules = sorted({name.rpartition(".")[0] for name in names})
        print(f"{text} ({len(names)} tensors): {', '.join(modules) or 'nothing'}.", flush=True)


def backbone_weights(path: str) -> dict[str, Tensor]:
    """Tensors by name from a file of weights, bare or under "state_dict"."""
    content = read(path)
    content = content.get("state_dict", content)
    return {name.removeprefix("module."): value for name, value in content.items() if isinstance(value, Tensor)}


def imagenet_weights(backbone: str) -> dict[str, Tensor]:
    """torchvision's weights of a trunk, by URL (kept in torch's cache)."""
    trunk = re.sub("(FPN|C4)$", "", backbone)
    ways_out = "pass --backbone-weights PATH (a file of torchvision's), or none to train from scratch"
    if trunk not in TORCHVISION_URLS:
        raise OdtkError(f"No pretrained weights are published for {backbone}: {ways_out}.")
    url = TORCHVISION_URLS[trunk]
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)
    try:
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:  # no network; a download that does not match its hash
        raise OdtkError(f"The weights {url} could not be fetched ({error}): {ways_out}.") from error
    finally:
        socket.setdefaulttimeout(patience)


@torch.no_grad()
def load_matching(module: nn.Module, state_dict: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
    """Copy every tensor of ``state_dict`` whose name and shape the module has too; ignore the rest.

    For --fine-tune (a Detector and a detector's file) and --backbone-weights (one of Detector.trunks() and
    torchvision's file, whose classifier ``fc.*`` matches nothing).

    Returns:
        (taken, left): names of the module's own parameters and buffers that were copied, and that were not
        and so keep their value. BatchNorm's counter of batches, which nothing reads, is in neither list.
    """
    taken: list[str] = []
    left: list[str] = []
    for name, tensor in module.state_dict().items():
        source = state_dict.get(name)
        if source is not None and source.shape == tensor.shape:
            tensor.copy_(source)
            taken.append(name)
        else:
            left.append(name)
    counter = "num_batches_tracked"
    return [n for n in taken if not n.endswith(counter)], [n for n in left if not n.endswith(counter)]
