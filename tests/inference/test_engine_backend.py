"""What the backends need of a GPU's numbers and addresses, as far as it shows without one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from odtk.config import ModelConfig, PostprocessConfig
from odtk.inference.backends import aligned, open_backend, without_tf32
from tests.random_models import detector_of, save


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


def test_tf32_is_restored_after_an_error(tf32) -> None:
    with pytest.raises(ValueError, match="no"), without_tf32():
        raise ValueError("no")
    assert torch.backends.cudnn.allow_tf32 and torch.backends.cuda.matmul.allow_tf32


def test_a_part_of_a_batch_is_copied_to_an_aligned_address() -> None:
    memory = torch.arange(4096.0)
    start = (-memory.data_ptr() % 256) // 4  # floats up to the first aligned address
    whole, part = memory[start : start + 500], memory[start + 1 : start + 500]
    assert aligned(whole) is whole
    assert torch.equal(aligned(part), part)
    assert aligned(part).data_ptr() != part.data_ptr()
