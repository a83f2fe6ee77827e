"""The kernels on a GPU against the torch reference: `pytest tests/gpu`."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch

from odtk import ops
from tests import kernel_cases as cases
from tests.kernel_cases import CANDIDATES, HEADS, Candidates, Head

pytestmark = pytest.mark.usefixtures("kernels")
COCO = ((100, 160), (50, 80), (25, 40), (13, 20), (7, 10))  # 800×1280
LARGE = [
    Head("coco_half", classes=80, anchors=9, sizes=COCO, mean=-5.0, top_n=1000, half=True, channels_last=True),
    Head("coco_float", classes=80, anchors=9, sizes=COCO[:2], mean=-5.0, top_n=1000),
    Head("coco_all_above", classes=80, anchors=9, sizes=COCO[:2], mean=5.0, top_n=1000, half=True),
    Head("coco_all_tie", classes=80, anchors=9, sizes=COCO[:1], mean=50.0, step=1.0, top_n=1000),
    Head(
        "rotated_large",
        classes=15,
        anchors=27,
        coder="rotated_deltas",
        sizes=((64, 64), (32, 32)),
        mean=-4.0,
        top_n=1000,
    ),
    Head(
        "fcos_large",
        classes=80,
        anchors=1,
        coder="distances_centerness",
        sizes=COCO[:2],
        mean=-4.0,
        top_n=1000,
        half=True,
    ),
    Head("distances_large", classes=80, anchors=1, coder="distances", sizes=COCO[:3], mean=-4.0, top_n=1000, half=True),
    Head(
        "turned_large",
        classes=15,
        anchors=1,
        coder="center_size_angle",
        sizes=COCO[:3],
        mean=-4.0,
        top_n=1000,
        half=True,
        channels_last=True,
    ),
    Head("odd_large", batch=5, classes=17, sizes=((101, 37), (51, 19)), mean=-4.0, top_n=1000, half=True),
]
MANY = [
    Candidates("five_thousand", batch=4, count=5000, classes=80, size=1000.0, detections=100),
    Candidates("five_thousand_of_one_class", batch=2, count=5000, classes=1, size=2000.0, detections=300),
    Candidates("ten_thousand_rotated", batch=2, count=10000, classes=15, size=1000.0, box_values=6, detections=100),
]


def run(head: Head) -> cases.Triple:
    return cases.decoded(head, torch.ops.odtk.decode, "cuda")


@pytest.mark.parametrize("head", HEADS + LARGE, ids=str)
def test_decode_is_the_reference(head: Head) -> None:
    cases.assert_same(run(head), cases.reference(head, "cuda"))


@pytest.mark.parametrize("batch", range(1, 17))
def test_decode_of_every_batch(batch: int) -> None:
    head = cases.with_batch(LARGE[-1], batch)
    cases.assert_same(run(head), cases.reference(head, "cuda"))


@pytest.mark.parametrize("case", CANDIDATES + MANY, ids=str)
def test_nms_is_the_reference(case: Candidates) -> None:
    found = cases.suppressed(case, torch.ops.odtk.nms, "cuda")
    cases.assert_same(found, cases.suppressed_by_score(case, "cuda"))


@pytest.mark.parametrize("head", [HEADS[4], *LARGE], ids=str)
def test_decode_gives_the_same_bits_at_every_run(head: Head) -> None:
    inputs = (*cases.make(head, "cuda"), head.threshold, head.top_n, head.coder)
    first = torch.ops.odtk.decode(*inputs)
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(first, torch.ops.odtk.decode(*inputs), strict=True))


@pytest.mark.parametrize("case", MANY, ids=str)
def test_nms_gives_the_same_bits_at_every_run(case: Candidates) -> None:
    inputs = (*cases.candidates(case, "cuda"), case.threshold, case.detections)
    first = torch.ops.odtk.nms(*inputs)
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(first, torch.ops.odtk.nms(*inputs), strict=True))


def test_nothing_is_written_outside_the_workspace(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("odtk.kernels.extension", cases.Guarded(kernels, "cuda"))
    for head in HEADS + LARGE:
        cases.assert_same(run(head), cases.reference(head, "cuda"))
    for case in CANDIDATES + MANY:
        found = cases.suppressed(case, torch.ops.odtk.nms, "cuda")
        cases.assert_same(found, cases.suppressed_by_score(case, "cuda"))


def test_decode_and_nms_in_a_cuda_graph() -> None:
    """Captured once, replayed on other data: no synchronization, allocation or copy from the host."""
    head = replace(LARGE[0], batch=4)
    logits, boxes, anchors, strides = cases.make(head, "cuda")

    def detect() -> cases.Triple:
        found = ops.decode(logits, boxes, anchors, strides, score_threshold=0.05, top_n=1000)
        return ops.nms(*found, threshold=0.5, detections=100)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        detect()  # loads the kernels
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = detect()
    for _ in range(3):
        for tensor in logits + boxes:
            tensor.copy_(torch.randn_like(tensor) - (5 if tensor.shape[1] == 720 else 0))
        graph.replay()
        expected = ops.decode_reference(logits, boxes, anchors, strides, score_threshold=0.05, top_n=1000)
        cases.assert_same(captured, ops.nms_reference(*expected, threshold=0.5, detections=100))


def test_kernels_follow_the_callers_stream() -> None:
    """Inputs that another stream is still writing are only read after it."""
    head = LARGE[0]
    logits, boxes, anchors, strides = cases.make(head, "cuda")
    expected = ops.decode(logits, boxes, anchors, strides, score_threshold=0.05, top_n=1000)
    late = [torch.full_like(t, 9.0) for t in logits]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for target, source in zip(late, logits, strict=True):
            target.copy_(source)
        found = ops.decode(late, boxes, anchors, strides, score_threshold=0.05, top_n=1000)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_no_host_synchronization() -> None:
    logits, boxes, anchors, strides = cases.make(LARGE[0], "cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = ops.decode(logits, boxes, anchors, strides, score_threshold=0.05, top_n=1000)
        ops.nms(*found, threshold=0.5, detections=100)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("count", [1, 100, 3000])
def test_rotated_iou_is_the_reference(count: int) -> None:
    a = torch.cat([cases.random_rotated_boxes(count), cases.degenerate_rotated_boxes()])
    b = torch.cat([cases.random_rotated_boxes(64), cases.degenerate_rotated_boxes()])
    for minimum in (0.0, 0.4):
        found = ops.rotated_iou(a.cuda(), b.cuda(), minimum=minimum).cpu()
        expected = ops.rotated_iou_reference(a.double(), b.double()).float()
        wanted = expected > minimum
        torch.testing.assert_close(found[wanted], expected[wanted], rtol=0, atol=1e-4)


def test_operators_pass_torchs_own_checks() -> None:
    logits, boxes, anchors, strides = cases.make(HEADS[0], "cuda")
    torch.library.opcheck(torch.ops.odtk.decode, (logits, boxes, anchors, strides, 0.05, 20, "anchor_deltas"))
    torch.library.opcheck(torch.ops.odtk.nms, (*cases.candidates(CANDIDATES[0], "cuda"), 0.5, 20))
    pair = cases.random_rotated_boxes(9)[None].cuda(), cases.random_rotated_boxes(8)[None].cuda()
    torch.library.opcheck(torch.ops.odtk.rotated_iou, (*pair, 0.0))


def test_torch_compile_sees_the_operators() -> None:
    logits, boxes, anchors, strides = cases.make(HEADS[0], "cuda")

    @torch.compile(fullgraph=True, backend="aot_eager")
    def detect(logits: list[torch.Tensor], boxes: list[torch.Tensor]) -> cases.Triple:
        found = ops.decode(logits, boxes, anchors, strides, score_threshold=0.05, top_n=20)
        return ops.nms(*found, threshold=0.5, detections=10)

    expected = ops.decode_reference(logits, boxes, anchors, strides, score_threshold=0.05, top_n=20)
    cases.assert_same(detect(logits, boxes), ops.nms_reference(*expected, threshold=0.5, detections=10))


def test_kernels_that_cannot_run_leave_the_work_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a driver that is new enough for torch's CUDA and too old for the one they were built with."""
    head = HEADS[0]
    made = cases.make(head, "cuda")
    broken = SimpleNamespace(MAX_LEVELS=16, MAX_TOP_N=4096, device_error=lambda: "the driver is too old")
    monkeypatch.setattr("odtk.kernels.extension", broken)  # a call of anything else would be an AttributeError
    found = ops.decode(*made, score_threshold=head.threshold, top_n=head.top_n, coder=head.coder)
    cases.assert_same(found, cases.reference(head, "cuda"))
    ops.nms(*found, threshold=0.5, detections=10)
