"""What the backends need of a GPU's numbers, addresses and buffers, as far as it shows without one."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import math
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from odtk.config import ModelConfig, OdtkError, PostprocessConfig
from odtk.inference.backends import TF32, EngineBackend, open_backend
from tests.exporting.test_metadata import GOOD
from tests.random_models import detector_of, save

METADATA = dataclasses.replace(GOOD, size=(32, 32), detections=5, input_type="uint8", postprocessing="plugins")


@pytest.fixture
def tf32():
    """TF32 on, as a user may have it."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def test_a_checkpoint_in_fp32_computes_without_tf32(tf32, tmp_path: Path) -> None:
    path = save(detector_of(ModelConfig(backbones=("ResNet18FPN",), classes=2)), tmp_path)
    backend = open_backend(path, device="cpu", precision="fp32", thresholds=PostprocessConfig())
    seen = []
    convolution = next(m for m in backend.detector.modules() if isinstance(m, torch.nn.Conv2d))  # type: ignore[attr-defined]
    convolution.register_forward_pre_hook(
        lambda *_: seen.append((torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32))
    )
    backend(torch.zeros(1, 3, 64, 64))
    assert seen == [(False, False)]
    assert torch.backends.cudnn.allow_tf32 and torch.backends.cuda.matmul.allow_tf32


def test_tf32_stays_off_until_the_last_thread_is_done(tf32) -> None:
    one, other = TF32.off(), TF32.off()
    with one:
        other.__enter__()
    assert not torch.backends.cudnn.allow_tf32
    other.__exit__(None, None, None)
    assert torch.backends.cudnn.allow_tf32 and torch.backends.cuda.matmul.allow_tf32


def test_tf32_is_restored_after_an_error(tf32) -> None:
    with pytest.raises(ValueError, match="no"), TF32.off():
        raise ValueError("no")
    assert torch.backends.cudnn.allow_tf32 and torch.backends.cuda.matmul.allow_tf32


class Memory:
    """An engine on the CPU's memory, which keeps what it was called with: scores of 0.5 for as many rows as the first
    pixel of an image says."""

    batch = (2, 4)

    def __init__(self, capturable: bool) -> None:
        self.capturable = capturable
        self.calls: list[tuple[int, bool, dict[str, int]]] = []

    def infer(self, tensors: dict[str, tuple[int, tuple[int, ...]]], stream: int, graph: bool = False) -> None:
        if graph and not self.capturable:
            raise RuntimeError("this engine cannot be captured in a CUDA graph: a reason")
        values = {}
        for name, (address, shape) in tensors.items():
            kind = {"images": ctypes.c_uint8, "classes": ctypes.c_int32}.get(name, ctypes.c_float)
            count = math.prod(shape)
            values[name] = np.ctypeslib.as_array((kind * count).from_address(address)).reshape(shape)
        self.calls.append((len(values["images"]), graph, {name: address for name, (address, _) in tensors.items()}))
        rows = values["images"][:, 0, 0, 0, None] > np.arange(5)
        values["scores"][:] = 0.5 * rows
        values["boxes"][:] = rows[..., None]
        values["classes"][:] = rows


class Stream:
    """What a CUDA stream is asked for, without one."""

    cuda_stream = 7

    def wait_stream(self, other: Stream) -> None:
        pass


@pytest.fixture
def engine_of(monkeypatch: pytest.MonkeyPatch):
    """An EngineBackend whose engine is in the CPU's memory."""
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None, raising=False)

    def make(engine: Memory) -> EngineBackend:
        made = EngineBackend.__new__(EngineBackend)
        made.apply_metadata(METADATA)
        made.name, made.device, made.engine = "m.plan", torch.device("cpu"), engine
        made.min_batch, made.max_batch = engine.batch
        made.stream, made.lock, made.buffers, made.graphs = Stream(), threading.Lock(), {}, True  # type: ignore[assignment]
        return made

    return make


def rows_of(*counts: int) -> torch.Tensor:
    """Images for Memory that give so many detections each."""
    return torch.tensor(counts, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 32, 32)


def found_in(backend: EngineBackend, *counts: int) -> list[int]:
    return (backend(rows_of(*counts)).scores > 0).sum(1).tolist()


def test_an_engine_keeps_its_addresses_so_that_graphs_can_be_replayed(engine_of) -> None:
    engine = Memory(capturable=True)
    backend = engine_of(engine)
    assert found_in(backend, 1, 2, 3, 4) == [1, 2, 3, 4]
    assert found_in(backend, 3) == [3]  # the least batch is 2
    assert found_in(backend, 5, 0, 2) == [5, 0, 2]
    assert [(size, graph) for size, graph, _ in engine.calls] == [(4, True), (2, True), (3, True)]
    assert all(addresses == engine.calls[0][2] for _, _, addresses in engine.calls)


def test_a_larger_batch_gets_larger_buffers(engine_of) -> None:
    backend = engine_of(Memory(capturable=True))
    assert found_in(backend, 1, 2) == [1, 2] and len(backend.buffers["images"]) == 2
    assert found_in(backend, 1, 2, 3) == [1, 2, 3] and len(backend.buffers["images"]) == 3


def test_detections_are_not_overwritten_by_the_next_call(engine_of) -> None:
    backend = engine_of(Memory(capturable=True))
    first = backend(rows_of(2, 4))
    second = backend(rows_of(5, 1))
    assert (first.scores > 0).sum(1).tolist() == [2, 4] and (second.scores > 0).sum(1).tolist() == [5, 1]
    assert first.classes.dtype == torch.int64 and first.classes.sum(1).tolist() == [2, 4]
    assert first.boxes[:, :, 0].sum(1).tolist() == [2, 4]


def test_an_engine_that_cannot_be_captured_runs_without_graphs(engine_of) -> None:
    engine = Memory(capturable=False)
    backend = engine_of(engine)
    assert found_in(backend, 2, 1) == [2, 1] and found_in(backend, 1, 3) == [1, 3]
    assert [graph for _, graph, _ in engine.calls] == [False, False]

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("TensorRT could not run the engine")

    backend = engine_of(engine)
    engine.infer = broken  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="could not run"):
        backend(rows_of(1, 1))
    assert backend.graphs


def test_placed_images_are_not_copied_again(engine_of, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = engine_of(Memory(capturable=True))
    placed = backend.place(rows_of(3, 1))
    assert placed.data_ptr() == backend.buffers["images"].data_ptr()
    copies: list[int] = []
    monkeypatch.setattr(torch.Tensor, "copy_", lambda *_: copies.append(1))
    assert (backend(placed).scores > 0).sum(1).tolist() == [3, 1] and not copies


def test_more_images_than_the_engine_takes_and_floats_are_refused(engine_of) -> None:
    backend = engine_of(Memory(capturable=True))
    with pytest.raises(OdtkError, match="m.plan takes at most 4 images at a time, not 5"):
        backend(rows_of(1, 1, 1, 1, 1))
    with pytest.raises(OdtkError, match="m.plan takes pixels as uint8, not torch.float32"):
        backend(rows_of(1, 1).float())
