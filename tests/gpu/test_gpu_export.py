"""Engines against PyTorch on a GPU with TensorRT: fp32, FP16 and INT8, batches up to the profile's, metadata."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from odtk.categories import Category
from odtk.config import ROTATED_ANGLES, ExportConfig, ModelConfig, OdtkError, PostprocessConfig
from odtk.exporting import export
from odtk.exporting.engine import require_tensorrt
from odtk.inference.backends import open_backend
from tests.random_models import detector_of, pixels_of, save

MODEL = ModelConfig(backbones=("ResNet18FPN",), classes=2)
LIMITS = PostprocessConfig(score_threshold=0.3)
SIZE = (128, 160)


@pytest.fixture(autouse=True)
def tensorrt(kernels) -> None:
    try:
        require_tensorrt(build=True)
    except OdtkError as error:
        pytest.skip(str(error))


def config_of(folder: Path, model: ModelConfig, precision: str) -> ExportConfig:
    """An export of random weights with many detections, and images to calibrate on."""
    path = save(detector_of(model, bias=-0.5), folder, (Category(3, "cat"), Category(7, "dog")))
    images = folder / "images"
    images.mkdir()
    for i in range(8):
        pixels = np.random.default_rng(i).integers(0, 255, (*SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{i}.png")
    return ExportConfig(
        path=path,
        output=str(folder / "engine.plan"),
        size=SIZE,
        batch=(1, 2, 4),
        precision=precision,
        postprocess=LIMITS,
        calibration_images=str(images),
    )


@pytest.mark.parametrize("rotated", [False, True], ids=["", "rotated"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_an_engine_finds_what_pytorch_finds(tmp_path: Path, precision: str, rotated: bool) -> None:
    model = dataclasses.replace(MODEL, angles=ROTATED_ANGLES if rotated else ())
    config = config_of(tmp_path, model, precision)
    export.export(config)
    engine = open_backend(config.output, device="cuda:0", precision="mixed", thresholds=None)
    reference = open_backend(config.path, device="cuda:0", precision="fp32", thresholds=LIMITS)
    assert (engine.size, engine.max_batch, engine.precision, engine.rotated) == (SIZE, 4, precision, rotated)
    assert engine.categories == reference.categories and engine.thresholds == LIMITS
    images = pixels_of(4, SIZE).cuda()
    tolerance = {"fp32": 2e-3, "fp16": 1e-2, "int8": 0.1}[precision]
    for batch in (1, 3, 4):
        found, expected = engine(images[:batch]), reference(images[:batch])
        assert (expected.scores > 0).sum() > 10 * batch and found.classes.dtype == torch.int64
        torch.testing.assert_close(found.scores, expected.scores, atol=tolerance, rtol=0)
        best = (found.boxes[:, 0, :4] - expected.boxes[:, 0, :4]).abs().amax(1)  # later rows change places
        assert precision == "int8" or (best.median() < 1)
    with pytest.raises(OdtkError, match="at most"):
        engine(pixels_of(5, SIZE))


def test_a_file_that_is_no_engine_is_refused(tmp_path: Path) -> None:
    (tmp_path / "engine.plan").write_bytes(b"not a plan")
    with pytest.raises(OdtkError, match="is not an engine for this GPU"):
        open_backend(str(tmp_path / "engine.plan"), device="cuda:0", precision="mixed", thresholds=None)
