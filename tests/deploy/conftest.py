"""One bundle that the tests of this folder share; those that change it copy it."""

from pathlib import Path

import pytest

import odtk
from odtk.categories import Category
from odtk.config import ModelConfig
from tests.random_models import detector_of, save


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of random weights, in fp32, padded with black; model.pth is beside it."""
    folder = tmp_path_factory.mktemp("bundle")
    model = ModelConfig(backbones=("ResNet18C4",), classes=2, padding="black")
    path = save(detector_of(model), folder, [Category(3, "red; round cell"), Category(8, "two\nlines")])
    odtk.export(path, folder / "out", bundle=True, size=(64, 64), full_precision=True, devices="cpu")
    return folder / "out"
