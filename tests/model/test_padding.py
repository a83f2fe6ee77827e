"""Which models depend on padding, how much of it there is, and where that is said."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from odtk.categories import Category
from odtk.config import AugmentConfig, ExportConfig, InferConfig, LoaderConfig, ModelConfig
from odtk.data.dataset import Dataset
from odtk.data.padding import padded_share, padding_facts
from odtk.data.sampler import Sampler
from odtk.exporting import export as exporting
from odtk.inference.infer import infer
from odtk.model.checkpoint import Checkpoint, save
from odtk.model.detector import Detector
from odtk.model.padding import map_statistics, padding_warning, share_in_frame

FCOS = ModelConfig(backbones=("ResNet18C4",), head="fcos", classes=1, head_channels=32, head_convs=1)


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"backbones": ("EfficientNetLite0FPN",), "head": "dense"}, None),
        ({"backbones": ("ResNet18FPN",)}, None),
        ({"backbones": ("ResNet18FPN",), "norm": "group", "head": "dense"}, "GroupNorm"),
        ({"backbones": ("EfficientNetLite0FPN",), "head": "fcos"}, "GroupNorm"),
        ({"backbones": ("GhostNetFPN",), "head": "dense"}, "squeeze-and-excitation"),
    ],
)
def test_which_models_take_statistics_over_the_map(changes: dict, kind: str | None) -> None:
    with torch.device("meta"):
        detector = Detector(ModelConfig(**changes)).fold()
    assert map_statistics(detector) == kind


def test_the_share_in_a_frame() -> None:
    assert share_in_frame([4 / 3], (384, 512)) == pytest.approx(0)
    assert share_in_frame([4 / 3], (512, 512)) == pytest.approx(0.25)
    assert share_in_frame([4 / 3, 3 / 4], (384, 512)) == pytest.approx((0 + (1 - 9 / 16)) / 2)


def test_a_warning_only_where_the_share_differs_and_is_known() -> None:
    detector = Detector(FCOS)
    assert "3% in training and is 25% here" in (padding_warning(detector, 0.03, 0.25, "here") or "")
    assert "30% in training and is 0% here" in (padding_warning(detector, 0.3, 0.0, "here") or "")
    assert padding_warning(detector, 0.21, 0.25, "here") is None
    assert padding_warning(detector, None, 0.25, "here") is None
    assert padding_warning(torch.nn.Sequential(torch.nn.BatchNorm2d(3)), 0.03, 0.25, "here") is None


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(4):
        Image.fromarray(np.full((96, 128, 3), 60 * number, dtype=np.uint8)).save(folder / f"{number}.png")
    return folder


def sampler(folder: Path, **changes: object) -> Sampler:
    settings = {"batch": 2, "resize": 96, "max_size": 128, "jitter": (96, 96), **changes}
    return Sampler(Dataset.load(None, str(folder)), LoaderConfig(str(folder), **settings))  # type: ignore[arg-type]


def test_the_share_of_padding_in_batches(images: Path) -> None:
    assert padded_share(sampler(images)) == 0
    assert padded_share(sampler(images, size=(128, 128))) == pytest.approx(0.25)
    assert padded_share(sampler(images, training=True, augment=AugmentConfig(crop=0))) == 0
    half = AugmentConfig(crop=0, scale=(0.5, 0.5))
    assert padded_share(sampler(images, training=True, augment=half)) == pytest.approx(0.75)
    facts = padding_facts(sampler(images))
    assert facts["padding_share"] == 0 and set(facts["aspects"]) == {1.3333}


@pytest.mark.parametrize(("known", "warned"), [(True, True), (False, False)])
def test_export_and_infer_warn(
    known: bool, warned: bool, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch
) -> None:
    torch.manual_seed(0)
    detector = Detector(FCOS)
    detector.initialize()
    facts = {"input_size": [96, 128], **(padding_facts(sampler(images)) if known else {})}
    path = str(tmp_path / "m.pth")
    save(path, Checkpoint(FCOS, (Category(1, "cell"),), detector.state_dict(), settings=facts))

    class Stop(Exception):
        pass

    def stop(*_: object) -> None:
        raise Stop

    monkeypatch.setattr(exporting, "raw_graph", stop)
    said = {}
    for size in ((96, 128), (128, 128)):
        with pytest.raises(Stop):
            exporting.export(ExportConfig(path=path, output=str(tmp_path / "m.onnx"), size=size, precision="fp32"))
        exported = "".join(capsys.readouterr())
        data = LoaderConfig(str(images), size=size, batch=2, loader="torch", workers=1)
        infer(InferConfig(path=path, data=data, output=(str(tmp_path / "d.json"),)))
        said[size] = (exported, "".join(capsys.readouterr()))
    assert not any("statistics" in text for text in said[96, 128])
    sentence = "0% in training and is 25%"
    assert [sentence in text for text in said[128, 128]] == [warned, warned]
