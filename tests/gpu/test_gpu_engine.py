"""A whole engine on a GPU: odtk export model.plan, loaded and run, against PyTorch in fp32 on the same images."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from odtk.config import ROTATED_ANGLES, ExportConfig, ModelConfig, OdtkError
from odtk.exporting import export
from odtk.exporting.engine import require_tensorrt
from odtk.inference import backends
from odtk.postprocess import Detections
from tests.random_models import detector_of, save

SIZE = (192, 256)
BATCH = (1, 2, 4)
MODELS = {
    "retinanet": ModelConfig(backbones=("ResNet18FPN",), classes=3),
    "rotated": ModelConfig(backbones=("ResNet18FPN",), classes=3, angles=ROTATED_ANGLES),
    "fcos": ModelConfig(backbones=("ResNet18FPN",), classes=3, head="fcos"),
}


def images_of(batch: int) -> Tensor:
    return torch.randn(batch, 3, *SIZE, generator=torch.Generator().manual_seed(1)).cuda()


def unmatched(found: Detections, expected: Detections, *, score: float, pixels: float) -> float:
    """Share of the better half of `expected` that `found` lacks: same class, score and every corner within the bounds.

    Near-equal scores may change places or survive the NMS in each other's stead, so rows are matched, not compared.
    """
    missing = total = 0
    for n in range(len(expected.scores)):
        rows = int((expected.scores[n] > 0).sum()) // 2
        near = (expected.scores[n, :rows, None] - found.scores[n]).abs() <= score  # [rows, D]
        near &= expected.classes[n, :rows, None] == found.classes[n]
        near &= ((expected.boxes[n, :rows, None, :4] - found.boxes[n, None, :, :4]).abs() <= pixels).all(-1)
        missing += int((~near.any(1)).sum())
        total += rows
    assert total > 20
    return missing / total


Open = Callable[[str, str], tuple[backends.Backend, backends.Backend]]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Open:
    """(model, precision) -> the engine and PyTorch in fp32; each engine is built once."""
    try:
        require_tensorrt()
    except OdtkError as error:
        pytest.skip(str(error))
    made: dict[tuple[str, str], tuple[backends.Backend, backends.Backend]] = {}

    def open_both(model: str, precision: str) -> tuple[backends.Backend, backends.Backend]:
        if (model, precision) not in made:
            folder = tmp_path_factory.mktemp(f"{model}_{precision}")
            source, plan = save(detector_of(MODELS[model]), folder), str(folder / "model.plan")
            export.export(
                ExportConfig(
                    path=source,
                    output=plan,
                    size=SIZE,
                    batch=BATCH,
                    precision=precision,
                    workspace=1 << 30,
                    timing_cache=str(folder / "timing.cache"),
                )
            )
            made[model, precision] = (
                backends.open_backend(plan, device="cuda", precision="mixed", thresholds=None),
                backends.open_backend(source, device="cuda", precision="fp32", thresholds=None),
            )
        return made[model, precision]

    return open_both


@pytest.mark.parametrize("batch", [1, 3, 4])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("model", MODELS)
def test_the_engine_gives_the_detections_of_pytorch(opened: Open, model: str, precision: str, batch: int) -> None:
    engine, reference = opened(model, precision)
    images = images_of(batch)
    assert unmatched(engine(images), reference(images), score=1e-2, pixels=1.0) <= 0.05


def test_the_engine_says_what_it_is(opened: Open) -> None:
    engine, reference = opened("retinanet", "fp16")
    assert (engine.size, engine.stride, engine.classes, engine.max_batch) == (SIZE, reference.stride, 3, BATCH[2])
    assert engine.categories == reference.categories
    assert engine.precision == "fp16"


def test_the_same_bits_at_every_run_and_in_a_graph(opened: Open) -> None:
    engine, _ = opened("retinanet", "fp16")
    assert isinstance(engine, backends.EngineBackend)
    images = images_of(2)
    expected = engine(images)
    tensors = {"images": images}
    for tensor in engine.engine.tensors:
        if not tensor["input"]:
            kind = {"float32": torch.float32, "int32": torch.int32}[tensor["dtype"]]
            tensors[tensor["name"]] = torch.empty(2, *tensor["shape"][1:], dtype=kind, device="cuda")
    addresses = {name: (tensor.data_ptr(), tuple(tensor.shape)) for name, tensor in tensors.items()}
    for _ in range(3):  # plain and captured, then replayed
        for name in ("scores", "boxes", "classes"):
            tensors[name].fill_(-1)
        engine.engine.infer(addresses, torch.cuda.current_stream().cuda_stream, graph=True)
        assert torch.equal(tensors["scores"], expected.scores)
        assert torch.equal(tensors["boxes"], expected.boxes)
        assert torch.equal(tensors["classes"].long(), expected.classes)


def test_what_does_not_fit_is_refused(opened: Open) -> None:
    engine, _ = opened("retinanet", "fp16")
    assert isinstance(engine, backends.EngineBackend)
    with pytest.raises(OdtkError, match="at most 4 images at a time, not 5"):
        engine(images_of(5))
    images = images_of(1)
    with pytest.raises(ValueError, match="was not given"):
        engine.engine.infer({"images": (images.data_ptr(), tuple(images.shape))}, 0)
    with pytest.raises(ValueError, match=r"has the shape \[1, 3, 192, 255\]"):
        names = [tensor["name"] for tensor in engine.engine.tensors]
        engine.engine.infer({name: (images.data_ptr(), (1, 3, 192, 255)) for name in names}, 0)
