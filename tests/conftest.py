"""Shared fixtures: one seed for every test, few threads, the real BCCD images where the workplace has them."""

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # two threads that wait for each other made tiny tensors 50 times slower on a busy machine
BCCD = Path(__file__).resolve().parents[2] / "shared" / "data" / "bccd"


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def bccd() -> Path:
    """Folder of train/, val/, train.json and val.json (blood cells, MIT license)."""
    if not BCCD.is_dir():
        pytest.skip("the BCCD images are not in ../shared/data/bccd")
    return BCCD
