"""csrc/engine without a GPU: plan files, and the messages if TensorRT or a GPU is missing."""

from __future__ import annotations

import json
from types import ModuleType

import pytest

from odtk import kernels

TRAILER = b"ODTKMETA"


@pytest.fixture
def module() -> ModuleType:
    """odtk._C, built with the engine."""
    if kernels.extension is None or not kernels.extension.WITH_TENSORRT:
        pytest.skip("odtk._C was built without the engine: `odtk info` says how to get it")
    return kernels.extension


def with_trailer(plan: bytes, metadata: str) -> bytes:
    return plan + metadata.encode() + len(metadata).to_bytes(8, "little") + TRAILER


def test_a_plain_plan_has_no_trailer(module: ModuleType) -> None:
    assert module.split_plan(b"a plan of TensorRT") == (18, "")
    assert module.split_plan(b"") == (0, "")


def test_the_trailer_holds_the_metadata(module: ModuleType) -> None:
    metadata = json.dumps({"classes": ["Erythrozyt"] * 1000})
    assert module.split_plan(with_trailer(b"plan", metadata)) == (4, metadata)


def test_a_damaged_trailer_is_refused(module: ModuleType) -> None:
    with pytest.raises(RuntimeError, match="damaged"):
        module.split_plan(b"plan" + (1000).to_bytes(8, "little") + TRAILER)


def test_missing_tensorrt_or_gpu_is_named(module: ModuleType) -> None:
    if module.device_error() is None:
        pytest.skip("this machine has a GPU")
    expected = r"TensorRT \d+ was not found on this machine .*: install it, or set TENSORRT_ROOT|needs a GPU"
    with pytest.raises(RuntimeError, match=expected):
        module.Engine(b"plan")
    with pytest.raises(RuntimeError, match=expected):
        module.engine_build(b"onnx", batch=(1, 1, 1), workspace=1 << 20)


def test_the_module_says_what_it_can_do(module: ModuleType) -> None:
    assert isinstance(module.CAN_BUILD, bool) and len("odtk:") + module.LONGEST_METADATA == 4095
