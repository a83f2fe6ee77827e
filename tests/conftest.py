"""Shared fixtures: one seed for every test, the tiny COCO dataset, and the real BCCD images where they are found."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

torch.set_num_threads(1)  # two threads that wait for each other made tiny tensors 50 times slower on a busy machine
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for processes that tests start
BCCD = Path(__file__).resolve().parents[2] / "shared" / "data" / "bccd"


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fingerprints and headers are cached in a folder of the tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """A folder with two noisy images of 64×48 pixels, 1.jpg and 2.jpg, and their annotations, truth.json.

    Image 1 holds a box of category 3, "cell", and image 2 one of category 8, "plate". A test may change any of it.
    """
    folder = tmp_path / "images"
    folder.mkdir()
    ids = (1, 2)
    for i in ids:
        Image.effect_noise((64, 48), 60).convert("RGB").save(folder / f"{i}.jpg")
    content = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": 64, "height": 48} for i in ids],
        "categories": [{"id": 3, "name": "cell"}, {"id": 8, "name": "plate"}],
        "annotations": [
            {"id": i, "image_id": i, "category_id": category, "bbox": [4, 4, 40, 40]}
            for i, category in zip(ids, (3, 8), strict=True)
        ],
    }
    (folder / "truth.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def bccd() -> Path:
    """Folder of train/, val/, train.json and val.json (blood cells, MIT license)."""
    if not BCCD.is_dir():
        pytest.skip("the BCCD images are not in ../shared/data/bccd")
    return BCCD
