"""A whole engine on a GPU: odtk export model.plan, loaded and run, against PyTorch in fp32 on the same images."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from odtk import kernels
from odtk.categories import Category
from odtk.config import ROTATED_ANGLES, ExportConfig, LoaderConfig, ModelConfig, OdtkError
from odtk.data.dataset import Dataset
from odtk.data.loader import create_loader
from odtk.exporting import export
from odtk.exporting.engine import require_tensorrt
from odtk.inference import backends
from odtk.inference.detect import detect_batches
from odtk.inference.infer import loader_config
from odtk.postprocess import BatchDetections
from tests.random_models import detector_of, pixels_of, save

SIZE = (192, 256)
BATCH = (1, 2, 4)
MODELS = {
    "retinanet": ModelConfig(backbones=("ResNet18FPN",), classes=3),
    "rotated": ModelConfig(backbones=("ResNet18FPN",), classes=3, angles=ROTATED_ANGLES),
    "fcos": ModelConfig(backbones=("ResNet18FPN",), classes=3, head="fcos"),
}


def images_of(batch: int) -> Tensor:
    return pixels_of(batch, SIZE).cuda()


def unmatched(found: BatchDetections, expected: BatchDetections, *, score: float, pixels: float) -> float:
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
        require_tensorrt(build=True)
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


def test_the_backend_replays_graphs_from_buffers_that_it_keeps(opened: Open) -> None:
    """The bits of plain calls, for batch sizes in turns, from pinned images, and kept over later calls."""
    engine, _ = opened("retinanet", "fp16")
    assert isinstance(engine, backends.EngineBackend)
    given = [pixels_of(size, SIZE, seed).pin_memory() for seed, size in enumerate((2, 1, 4, 2, 3))]
    engine.graphs = False
    expected = [engine(images) for images in given]
    engine.graphs = True
    addresses = [tensor.data_ptr() for tensor in engine.buffers.values()]
    found = [engine(images) for _ in range(3) for images in given]
    assert engine.graphs, "this engine could not be captured"
    assert [tensor.data_ptr() for tensor in engine.buffers.values()] == addresses
    for i, actual in enumerate(found):
        wanted = expected[i % len(given)]
        assert torch.equal(actual.scores, wanted.scores) and torch.equal(actual.boxes, wanted.boxes)
        assert torch.equal(actual.classes, wanted.classes)
    placed = engine.place(given[2])
    assert placed.data_ptr() == addresses[0] and torch.equal(engine(placed).scores, expected[2].scores)


def test_infer_finds_in_files_what_single_calls_find(opened: Open, tmp_path: Path) -> None:
    """Copies run ahead of the engine, on a stream of their own; the last batch is smaller."""
    engine, _ = opened("retinanet", "fp16")
    images = pixels_of(11, SIZE)
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{i:02}.png")
    data = loader_config(LoaderConfig(str(tmp_path), batch=4, loader="torch", device="cuda:0"), engine)
    dataset = Dataset.load(None, tmp_path)
    for _ in range(3):
        rows = [rows for _, rows in detect_batches(engine, create_loader(dataset, data))]
        scores = np.concatenate([values[:, 1] for _, values in rows])
        expected = torch.cat([engine(part.cuda()).scores.flatten() for part in images.split(4)]).cpu()
        np.testing.assert_array_equal(scores, expected[expected > 0].numpy())


def bound(engine: backends.EngineBackend, images: Tensor) -> tuple[dict[str, Tensor], dict[str, tuple]]:
    """The tensors of one call, outputs included, and what Engine.infer takes for them."""
    tensors = {"images": images}
    for tensor in engine.engine.tensors:
        if not tensor["input"]:
            kind = {"float32": torch.float32, "int32": torch.int32}[tensor["dtype"]]
            tensors[tensor["name"]] = torch.empty(len(images), *tensor["shape"][1:], dtype=kind, device="cuda")
    return tensors, {name: (tensor.data_ptr(), tuple(tensor.shape)) for name, tensor in tensors.items()}


def test_batch_sizes_take_turns_in_graphs(opened: Open) -> None:
    """A graph of one batch size stays right after others were captured and run; batch 1 has a profile of its own."""
    engine, _ = opened("retinanet", "fp16")
    assert isinstance(engine, backends.EngineBackend)
    calls = {}
    for batch in (1, 2, 4):
        images = images_of(batch)
        calls[batch] = (engine(images), *bound(engine, images))
    for _ in range(3):
        for batch in (2, 4, 1, 2, 1, 4):
            expected, tensors, addresses = calls[batch]
            tensors["scores"].fill_(-1)
            engine.engine.infer(addresses, torch.cuda.current_stream().cuda_stream, graph=True)
            assert torch.equal(tensors["scores"], expected.scores) and torch.equal(tensors["boxes"], expected.boxes)


def test_threads_with_streams_of_their_own_do_not_mix(opened: Open) -> None:
    engine, _ = opened("retinanet", "fp16")
    assert isinstance(engine, backends.EngineBackend)
    given = [pixels_of(2, SIZE, seed).cuda() for seed in (1, 2)]
    expected = [engine(images) for images in given]
    assert not torch.equal(expected[0].scores, expected[1].scores)
    torch.cuda.synchronize()
    wrong: list[int] = []

    def work(i: int) -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            tensors, addresses = bound(engine, given[i])
            for _ in range(50):
                engine.engine.infer(addresses, stream.cuda_stream)
                stream.synchronize()
                wrong.extend([i] if not torch.equal(tensors["scores"], expected[i].scores) else [])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_part_of_a_batch_and_an_address_that_is_not_aligned(opened: Open) -> None:
    engine, _ = opened("retinanet", "fp16")
    assert isinstance(engine, backends.EngineBackend)
    memory = torch.zeros(3 * SIZE[0] * SIZE[1] + 1, dtype=torch.uint8, device="cuda")
    memory[1:] = images_of(1).flatten()
    images = memory[1:].view(1, 3, *SIZE)
    assert torch.equal(engine(images).scores, engine(images.clone()).scores)
    _, addresses = bound(engine, images)
    with pytest.raises(ValueError, match="aligned to 256 bytes"):
        engine.engine.infer(addresses, 0)


def test_a_plan_of_1203_classes_is_a_plain_plan_and_knows_their_names(opened: Open, tmp_path: Path) -> None:
    opened("retinanet", "fp16")  # skips without TensorRT
    model = ModelConfig(backbones=("ResNet18FPN",), classes=1203, ratios=(1.0,), scales=(4.0,))
    names = tuple(Category(i + 1, f"object_{i * 7919 % 99991}") for i in range(1203))
    source, plan = save(detector_of(model), tmp_path, names), tmp_path / "model.plan"
    export.export(ExportConfig(path=source, output=str(plan), size=SIZE, batch=(1, 1, 1), workspace=1 << 30))
    content = plan.read_bytes()
    assert kernels.extension is not None and kernels.extension.split_plan(content) == (len(content), "")
    engine = backends.open_backend(str(plan), device="cuda", precision="mixed", thresholds=None)
    assert engine.categories == names
    assert (engine(images_of(1)).scores > 0).any()


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
