"""Heads with planted difficulties for the kernels, and the comparison with the torch reference.

tests/csrc/test_kernels_host.py runs them on the CPU, through the emulation of csrc/cuda; tests/gpu/test_gpu_kernels.py
runs them on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from odtk import boxes as geometry
from odtk import ops
from odtk.box_coder import BOX_CODERS

GUARD = 4096  # bytes on either side of the workspace
POISON = 0xA5
Triple = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Head:
    """How a random head is drawn and decoded."""

    name: str
    batch: int = 2
    classes: int = 3
    sizes: tuple[tuple[int, int], ...] = ((7, 5), (4, 3))  # cells (h, w) of each level
    anchors: int = 3
    coder: str = "anchor_deltas"
    mean: float = -3.0  # of the logits: the logit of the threshold is −2.94
    step: float = 0.0  # logits are rounded to multiples of it: ties
    plant: str = ""  # see logits_of
    top_n: int = 20
    threshold: float = 0.05
    half: bool = False
    channels_last: bool = False

    def __str__(self) -> str:
        return self.name


HEADS = [
    Head("plain"),
    Head("one_class", classes=1, batch=1),
    Head("ninety_classes", classes=90, anchors=9, sizes=((8, 8), (4, 4)), batch=1, mean=-6.0),
    Head("odd_sizes", classes=7, sizes=((13, 1), (1, 11), (5, 3), (1, 1)), batch=3),
    Head("ties", step=1.0, classes=5, sizes=((9, 11),)),
    Head("all_tie", step=1.0, mean=50.0, classes=5, sizes=((9, 11), (3, 3))),
    Head("all_above_the_threshold", mean=4.0, classes=80, anchors=9, sizes=((8, 9), (2, 2)), batch=1),
    Head("all_tie_in_many_chunks", step=1.0, mean=50.0, classes=80, anchors=9, sizes=((10, 10),), batch=1),
    Head("saturated", mean=20.0, classes=5, sizes=((9, 11),)),
    Head("none_above_the_threshold", mean=-30.0),
    Head("threshold_zero", threshold=0.0, mean=-20.0),
    Head("threshold_one", threshold=1.0, mean=20.0),
    Head("at_the_threshold", plant="threshold"),
    Head("at_the_threshold_half", plant="threshold", half=True, threshold=0.5),
    Head("empty_image", plant="empty", batch=3),
    Head("not_a_number", plant="nan", mean=-1.0),
    Head("infinite", plant="inf", mean=-1.0),
    Head("more_wanted_than_there_are", top_n=1000, mean=0.0),
    Head("top_one", top_n=1, mean=0.0),
    Head("half", half=True),
    Head("channels_last", channels_last=True, classes=5),
    Head("channels_last_half", channels_last=True, half=True, sizes=((6, 5), (3, 2))),
    Head("rotated", coder="rotated_deltas"),
    Head("rotated_channels_last_half", coder="rotated_deltas", half=True, channels_last=True),
    Head("fcos", coder="distances_centerness", anchors=1),
    Head("fcos_ties_half", coder="distances_centerness", anchors=1, step=0.5, half=True, mean=-1.0),
    Head("fcos_not_a_number", coder="distances_centerness", anchors=1, plant="nan", mean=-1.0),
    Head("distances", coder="distances", anchors=1),
    Head("distances_channels_last_half", coder="distances", anchors=1, half=True, channels_last=True),
    Head("distances_ties_half", coder="distances", anchors=1, step=0.5, half=True, mean=-1.0),
    Head("distances_not_a_number", coder="distances", anchors=1, plant="nan", mean=-1.0),
    Head("distances_infinite", coder="distances", anchors=1, plant="inf", mean=-1.0),
    Head("turned", coder="center_size_angle", anchors=1),
    Head("turned_channels_last_half", coder="center_size_angle", anchors=1, half=True, channels_last=True),
    Head("turned_ties_half", coder="center_size_angle", anchors=1, step=0.5, half=True, mean=-1.0),
    Head("turned_not_a_number", coder="center_size_angle", anchors=1, plant="nan", mean=-1.0),
    Head("turned_infinite", coder="center_size_angle", anchors=1, plant="inf", mean=-1.0),
    Head("batch_of_sixteen", batch=16, sizes=((3, 3),)),
    Head("ten_levels", sizes=((3, 3), (2, 2), (1, 1), (1, 1), (1, 1)) * 2, batch=1),
]


def logits_of(head: Head, shape: tuple[int, ...]) -> Tensor:
    """Logits [N, A·C, h, w] with what head.plant names: the threshold and its neighbors, an empty image, NaN, ±inf."""
    logits = torch.randn(shape) + head.mean
    if head.step:
        logits = (logits / head.step).round() * head.step
    flat = logits.flatten()  # a view
    if head.plant == "threshold":
        limit = torch.tensor(ops.to_logit(head.threshold))
        if head.half:
            limit = limit.half().float()
        flat[0::5] = limit
        flat[1::5] = torch.nextafter(limit, torch.tensor(math.inf))
        flat[2::5] = torch.nextafter(limit, torch.tensor(-math.inf))
    elif head.plant == "empty":
        logits[1] = -30
    elif head.plant == "nan":
        flat[0::3] = math.nan
    elif head.plant == "inf":
        flat[0::3], flat[1::3] = math.inf, -math.inf
    return logits


def make(head: Head, device: str = "cpu") -> tuple[list[Tensor], list[Tensor], list[Tensor], list[int]]:
    """Logits, boxes, anchors and strides of all levels; the same at every call."""
    torch.manual_seed(0)
    strides = [2 ** (3 + i % 5) for i in range(len(head.sizes))]
    dtype = torch.float16 if head.half else torch.float32
    memory = torch.channels_last if head.channels_last else torch.contiguous_format

    def place(t: Tensor) -> Tensor:
        return t.to(device=device, dtype=dtype).contiguous(memory_format=memory)

    logits, boxes, anchors = [], [], []
    for (h, w), stride in zip(head.sizes, strides, strict=True):
        logits.append(place(logits_of(head, (head.batch, head.anchors * head.classes, h, w))))
        values = torch.randn(head.batch, head.anchors * BOX_CODERS[head.coder].head_values, h, w)
        if head.plant in ("nan", "inf"):
            values.flatten()[1::4] = math.nan if head.plant == "nan" else math.inf
        boxes.append(place(values))
        half = torch.rand(head.anchors, 2) * 2 * stride + stride / 2
        base = torch.cat([0.5 * stride - half, 0.5 * stride + half - 1], -1)
        if head.coder.startswith(("distances", "center")):
            base = torch.tensor([[0.0, 0.0, stride - 1.0, stride - 1.0]])
        elif head.coder == "rotated_deltas":
            base = torch.cat([base, torch.randn(head.anchors, 1)], -1)
        anchors.append(base.to(device))
    return logits, boxes, anchors, strides


def reference(head: Head, device: str = "cpu") -> Triple:
    """decode in torch."""
    return ops.decode_reference(*make(head, device), score_threshold=head.threshold, top_n=head.top_n, coder=head.coder)


def decoded(head: Head, run: Callable[..., Triple], device: str = "cpu") -> Triple:
    """decode by `run`, the kernel's operator; its outputs hold NaN or the largest integer where nothing was written."""
    torch.use_deterministic_algorithms(True)
    try:
        return run(*make(head, device), head.threshold, head.top_n, head.coder)
    finally:
        torch.use_deterministic_algorithms(False)


def assert_same(found: Triple, expected: Triple, *, pixels: float = 1e-3) -> None:
    """Scores to the bit, hence the order too; classes; boxes to `pixels`, relative to their size when far larger."""
    assert [t.shape for t in found] == [t.shape for t in expected]
    assert [t.dtype for t in found] == [t.dtype for t in expected]
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[2], expected[2])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=pixels)


@dataclass(frozen=True)
class Candidates:
    """Random candidates of a batch for the NMS."""

    name: str
    batch: int = 2
    count: int = 150
    classes: int = 3
    box_values: int = 4
    size: float = 100.0  # px: the smaller, the more boxes overlap
    step: float = 0.0  # scores are rounded to multiples of it
    unused: float = 0.2  # share of rows with score 0
    threshold: float = 0.5
    detections: int = 20

    def __str__(self) -> str:
        return self.name


CANDIDATES = [
    Candidates("plain"),
    Candidates("one_class", classes=1, batch=1),
    Candidates("ninety_classes", classes=90),
    Candidates("ties", step=0.25),
    Candidates("all_tie", step=1.0),
    Candidates("few_detections", detections=1),
    Candidates("more_detections_than_candidates", detections=200),
    Candidates("unused", unused=1.0),
    Candidates("one_candidate", count=1, unused=0.0),
    Candidates("a_tile", count=64, unused=0.0, size=1000.0, detections=64),
    Candidates("a_tile_and_one", count=65, unused=0.0, size=1000.0, detections=65),
    Candidates("threshold_zero", threshold=0.0),
    Candidates("threshold_one", threshold=1.0),
    Candidates("sorted_in_global_memory", count=4200, unused=0.0, batch=1, size=40.0, classes=1, detections=100),
    Candidates("rotated", box_values=6),
    Candidates("rotated_ties", box_values=6, step=0.25, classes=1, size=60.0),
    Candidates("batch_of_sixteen", batch=16, count=40),
]


def candidates(case: Candidates, device: str = "cpu") -> Triple:
    """Scores [N, T], boxes [N, T, box_values], classes [N, T]; half of the boxes on a grid, to get equal IoUs."""
    torch.manual_seed(0)
    shape = (case.batch, case.count)
    scores = torch.rand(shape) * 0.9 + 0.1
    if case.step:
        scores = (scores / case.step).ceil() * case.step
    scores[torch.rand(shape) < case.unused] = 0
    start = torch.rand(*shape, 2) * case.size
    boxes = torch.cat([start, start + torch.rand(*shape, 2) * 30 + 5], -1)
    boxes[:, ::2] = (boxes[:, ::2] / 8).round() * 8
    if case.box_values == 6:
        angle = torch.rand(*shape, 1) * 2 * math.pi
        length = torch.rand(*shape, 1) + 0.5  # sin and cos are as regressed, not of length 1
        boxes = torch.cat([boxes, length * angle.sin(), length * angle.cos()], -1)
    classes = torch.randint(case.classes, shape)
    return scores.to(device), boxes.to(device), classes.to(device)


def degenerate_rotated_boxes() -> Tensor:
    """Rotated boxes [n, 5] that share edges, corners, centers or all, without area, thin, huge, by right angles."""
    quarter = math.pi / 2
    return torch.tensor(
        [
            [10, 10, 29, 19, 0],
            [10, 10, 29, 19, quarter],
            [10, 10, 29, 19, 2 * quarter],
            [10, 10, 29, 19, 0.3],
            [10, 10, 29, 19, 0.3 + 2 * quarter],
            [30, 10, 49, 19, 0],
            [10, 20, 29, 29, 0],
            [30, 20, 49, 29, 0],
            [15, 12, 20, 15, 0],
            [15, 12, 20, 15, 0.7],
            [10, 10, 9, 19, 0],
            [10, 10, 5, 5, 0.4],
            [10, 10, 10, 10, 1],
            [0, 0, 999, 0, 0.01],
            [0, 0, 999, 0, 0],
            [0, 0, 1999, 1999, 0.5],
            [10, 10, 29, 29, quarter / 2],
            [10, 10, 29, 29, 0],
            [10, 10, 29, 29, 3 * quarter / 2],
            [500, 500, 519, 509, 0.1],
        ],
        dtype=torch.float32,
    )


def random_rotated_boxes(count: int) -> Tensor:
    """Rotated boxes [count, 5] in 300×300 px."""
    start = torch.rand(count, 2) * 200
    return torch.cat([start, start + torch.rand(count, 2) * 100, (torch.rand(count, 1) - 0.5) * 8], -1)


def suppressed_by_score(case: Candidates, device: str = "cpu") -> Triple:
    """nms in torch."""
    return ops.nms_reference(*candidates(case, device), threshold=case.threshold, detections=case.detections)


def suppressed(case: Candidates, run: Callable[..., Triple], device: str = "cpu") -> Triple:
    """nms by `run`, the kernel's operator; unwritten output as in decoded."""
    torch.use_deterministic_algorithms(True)
    try:
        return run(*candidates(case, device), case.threshold, case.detections)
    finally:
        torch.use_deterministic_algorithms(False)


class Guarded:
    """odtk._C, with a poisoned workspace between guard bytes in every call; touched guards are an AssertionError."""

    def __init__(self, module: ModuleType, device: str) -> None:
        self.module, self.device = module, device

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    def decode(self, *arguments: Any) -> None:
        self.call(self.module.decode, *arguments)

    def nms(self, *arguments: Any) -> None:
        self.call(self.module.nms, *arguments)

    def call(self, kernel: Callable[..., None], *arguments: Any) -> None:
        *others, _, size, stream = arguments
        memory = torch.full((size + 2 * GUARD,), POISON, dtype=torch.uint8, device=self.device)
        assert (memory.data_ptr() + GUARD) % 64 == 0
        kernel(*others, memory.data_ptr() + GUARD, size, stream)
        assert (memory[:GUARD] == POISON).all() and (memory[-GUARD:] == POISON).all(), "written outside the workspace"


def with_batch(head: Head, batch: int) -> Head:
    return replace(head, name=f"batch_{batch}", batch=batch)


def polygon_iou(a: Tensor, b: Tensor) -> float:
    """IoU of two rotated boxes [5] by shapely, which knows nothing of us; 0 without area."""
    import shapely

    shapes = [shapely.Polygon(geometry.corners(box.double()).tolist()) for box in (a, b)]
    union = shapes[0].area + shapes[1].area
    if min(shape.area for shape in shapes) == 0:
        return 0.0
    both = shapes[0].intersection(shapes[1]).area
    return both / (union - both)
