"""Chooses the pixel engine: DALI or torch."""

from __future__ import annotations

import sys

from ..config import LoaderConfig, OdtkError
from ..text import printable
from .batch import Loader
from .dataset import Dataset
from .torch_loader import TorchLoader


def create_loader(dataset: Dataset, config: LoaderConfig) -> Loader:
    """The loader that ``config.loader`` names; if DALI is not installed, the torch loader, with a printed line.

    Rank 0 prints the dataset's counted warnings.

    Raises:
        OdtkError: an unknown loader, no images, or settings that contradict each other.
    """
    if config.rank == 0:
        for warning in dataset.warnings():
            print(f"Warning: {printable(warning)}", file=sys.stderr)
    if config.loader == "torch":
        return TorchLoader(dataset, config)
    if config.loader != "dali":
        raise OdtkError(f"Unknown loader {config.loader!r}: use dali or torch.")
    try:
        from .dali import DaliLoader
    except ImportError as error:
        if config.rank == 0:
            print(
                f"DALI is not available ({error}): using the torch loader; pip install 'odtk[cuda13]' (or cuda12) "
                "brings DALI.",
                file=sys.stderr,
            )
        return TorchLoader(dataset, config)
    return DaliLoader(dataset, config)
