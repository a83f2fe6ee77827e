"""benchmarks/kernel_model.py counts what the kernels do; benchmarks/gpu.py finds them in a trace."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from odtk import kernels

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import gpu as benchmark
import kernel_model as model


@pytest.mark.parametrize(
    ("size", "classes", "batch"), [((800, 1280), 80, 1), ((240, 320), 3, 4), ((512, 512), 1203, 2)]
)
def test_the_workspace_is_that_of_the_kernels(size: tuple[int, int], classes: int, batch: int) -> None:
    """It follows from the number of blocks of find_candidates and of the lists that merge_candidates goes through."""
    if kernels.extension is None:
        pytest.skip("odtk._C is not built")
    sizes = [(-(-size[0] // stride), -(-size[1] // stride)) for stride in model.STRIDES]
    levels = [
        kernels.extension.DecodeLevel(logits=0, boxes=0, anchors=0, height=h, width=w, stride=stride)
        for (h, w), stride in zip(sizes, model.STRIDES, strict=True)
    ]
    coder = kernels.extension.BoxCoder.ANCHOR_DELTAS
    params = kernels.extension.DecodeParams(
        levels=levels, batch=batch, anchors=9, classes=classes, top_n=1000, anchor_values=4, score_threshold=0.05,
        coder=coder, logits_half=True, boxes_half=True,
    )  # fmt: skip
    assert model.decode_workspace(size, 9 * classes, batch, 1000) == kernels.extension.decode_workspace(params)


def test_more_candidates_than_fit_in_shared_memory_cost_a_sort_in_global_memory() -> None:
    few, many = (model.totals(model.model(survivors=survivors))["suppress"] for survivors in (4000, 40000))
    assert many > 3 * few


def test_a_slower_memory_takes_longer_to_read() -> None:
    slow = model.totals(model.model(gpu=model.Gpu(bandwidth=1.5e12)))
    assert slow["find"] == pytest.approx(2 * model.totals(model.model())["find"])


def test_bitonic_stages() -> None:
    assert [model.bitonic_stages(count) for count in (1, 2, 1000, 1024, 1025)] == [0, 1, 55, 55, 66]


def test_our_kernels_are_found_in_a_trace_and_casts_are_not() -> None:
    names = [
        "void odtk::(anonymous namespace)::find_candidates<__half>(odtk::Plan)",
        "odtk::(anonymous namespace)::merge_candidates(odtk::Plan)",
        "void odtk::(anonymous namespace)::suppress<4>(odtk::NmsParams)",
        "void at::native::elementwise_kernel<128>(int)",
    ]
    events = [{"cat": "kernel", "name": name, "dur": 10.0 * (i + 1)} for i, name in enumerate(names)]
    events += [{"cat": "kernel", "name": names[0], "dur": 12.0}, {"cat": "gpu_memcpy", "name": names[0], "dur": 99.0}]
    assert benchmark.kernels_of_trace(events) == {"find": 11.0, "merge": 20.0, "suppress": 30.0}
