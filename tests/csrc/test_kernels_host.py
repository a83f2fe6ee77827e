"""csrc/cuda without a GPU: the kernels under emulation (tests/emulation), and the geometry against torch."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from odtk import boxes as geometry
from odtk import ops
from odtk.box_coder import BOX_CODERS, BoxCoder
from odtk.kernels import can_run_on_cuda, decode_kernel, nms_kernel
from tests import emulation
from tests import kernel_cases as cases
from tests.kernel_cases import CANDIDATES, HEADS, Candidates, Head


@pytest.fixture(scope="module")
def compiled() -> ModuleType:
    return emulation.build()


@pytest.fixture
def kernels(compiled: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The emulated odtk._C, which takes the place of the real one."""
    monkeypatch.setattr("odtk.kernels.extension", compiled)
    return compiled


# The functions behind the CUDA operators: on CPU tensors they hand the emulation pointers that it can read.
decode: Callable[..., cases.Triple] = decode_kernel._init_fn
nms: Callable[..., cases.Triple] = nms_kernel._init_fn


@pytest.mark.parametrize("head", HEADS, ids=str)
def test_decode_is_the_reference(kernels: ModuleType, head: Head) -> None:
    cases.assert_same(cases.decoded(head, decode), cases.reference(head))


@pytest.mark.parametrize("case", CANDIDATES, ids=str)
def test_nms_is_the_reference(kernels: ModuleType, case: Candidates) -> None:
    cases.assert_same(cases.suppressed(case, nms), cases.suppressed_by_score(case))


@pytest.mark.parametrize(
    "name",
    ["plain", "all_above_the_threshold", "all_tie", "fcos_ties_half", "distances_ties_half", "turned_ties_half"],
)
def test_decode_does_not_depend_on_the_order_of_threads(kernels: ModuleType, name: str) -> None:
    head = next(head for head in HEADS if head.name == name)
    first = cases.decoded(head, decode)
    for seed in (1, 2):
        with emulation.seed(seed):
            again = cases.decoded(head, decode)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("name", ["plain", "all_tie", "rotated_ties"])
def test_nms_does_not_depend_on_the_order_of_threads(kernels: ModuleType, name: str) -> None:
    case = next(case for case in CANDIDATES if case.name == name)
    first = cases.suppressed(case, nms)
    for seed in (1, 2):
        with emulation.seed(seed):
            again = cases.suppressed(case, nms)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_workspace_is_enough_and_nothing_is_kept_in_it(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("odtk.kernels.extension", cases.Guarded(kernels, "cpu"))
    for head in HEADS[:8]:
        cases.assert_same(cases.decoded(head, decode), cases.reference(head))
    for case in [c for c in CANDIDATES if c.name in ("plain", "sorted_in_global_memory", "rotated")]:
        cases.assert_same(cases.suppressed(case, nms), cases.suppressed_by_score(case))


def test_workspace_grows_with_batch_and_size(kernels: ModuleType) -> None:
    """TensorRT asks only for the largest shapes of a profile, so smaller ones must not need more."""

    def needed(batch: int, height: int, top_n: int) -> int:
        level = kernels.DecodeLevel(logits=0, boxes=0, anchors=0, height=height, width=160, stride=8)
        return kernels.decode_workspace(
            kernels.DecodeParams(
                levels=[level],
                batch=batch,
                anchors=9,
                classes=80,
                top_n=top_n,
                anchor_values=4,
                score_threshold=0.05,
                coder=kernels.BoxCoder.ANCHOR_DELTAS,
                logits_half=True,
                boxes_half=True,
            )
        )

    sizes = [needed(1, 50, 500), needed(1, 100, 500), needed(1, 100, 1000), needed(8, 100, 1000), needed(16, 100, 1000)]
    assert sizes == sorted(sizes) and len(set(sizes)) == len(sizes)
    assert sizes[-1] < 100 << 20


@pytest.mark.parametrize(
    "change, field",
    [
        ({"batch": 0}, "batch"),
        ({"batch": 70000}, "batch"),
        ({"top_n": 0}, "top_n"),
        ({"top_n": 5000}, "top_n"),
        ({"anchor_values": 3}, "anchor_values"),
        ({"classes": 0}, "classes"),
        ({"levels": []}, "levels"),
    ],
)
def test_bad_parameters_are_named(kernels: ModuleType, change: dict[str, int], field: str) -> None:
    level = kernels.DecodeLevel(logits=0, boxes=0, anchors=0, height=1, width=1, stride=8)
    good = {
        "levels": [level],
        "batch": 1,
        "anchors": 1,
        "classes": 1,
        "top_n": 1,
        "anchor_values": 4,
        "score_threshold": 0.05,
        "coder": kernels.BoxCoder.ANCHOR_DELTAS,
        "logits_half": False,
        "boxes_half": False,
    }
    kernels.decode_workspace(kernels.DecodeParams(**good))
    with pytest.raises(ValueError, match=field):
        kernels.decode_workspace(kernels.DecodeParams(**good | change))


def test_padding_of_channels_last_is_not_read_as_classes(kernels: ModuleType) -> None:
    """As in TensorRT's kHWC8: 3 classes in 8 channels, whose padding must not be read."""
    head = Head("padded", batch=2, classes=3, anchors=1, sizes=((4, 5),), channels_last=True, half=True)
    (logits,), (boxes,), (anchors,), (stride,) = cases.make(head)

    def pad(t: torch.Tensor) -> torch.Tensor:
        wide = torch.full((2, 4, 5, 8), 9.0, dtype=torch.float16)
        wide[..., : t.shape[1]] = t.permute(0, 2, 3, 1)  # NCHW → NHWC
        return wide

    wide_logits, wide_boxes = pad(logits), pad(boxes)
    level = kernels.DecodeLevel(
        logits=wide_logits.data_ptr(),
        boxes=wide_boxes.data_ptr(),
        anchors=anchors.data_ptr(),
        height=4,
        width=5,
        stride=stride,
        logits_pitch=8,
        boxes_pitch=8,
    )
    params = kernels.DecodeParams(
        levels=[level],
        batch=2,
        anchors=1,
        classes=3,
        top_n=20,
        anchor_values=4,
        score_threshold=0.05,
        coder=kernels.BoxCoder.ANCHOR_DELTAS,
        logits_half=True,
        boxes_half=True,
    )
    out = torch.empty(2, 20), torch.empty(2, 20, 4), torch.empty(2, 20, dtype=torch.int32)
    size = kernels.decode_workspace(params)
    workspace = torch.empty(size, dtype=torch.uint8)
    kernels.decode(params, *(t.data_ptr() for t in out), workspace.data_ptr(), size, 0)
    cases.assert_same((out[0], out[1], out[2].long()), cases.reference(head))


def test_fake_operators_have_the_shapes_of_the_real_ones(kernels: ModuleType) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    head = next(head for head in HEADS if head.name == "rotated")
    with FakeTensorMode() as mode:
        logits, boxes, anchors, strides = cases.make(head)
        fake = torch.ops.odtk.decode(logits, boxes, anchors, strides, head.threshold, head.top_n, head.coder)
        kept = torch.ops.odtk.nms(*fake, 0.5, 100)
        iou = torch.ops.odtk.rotated_iou(torch.empty(1, 7, 5), torch.empty(3, 4, 5), 0.0)
    assert mode is not None
    real = cases.decoded(head, decode)
    assert [(t.shape, t.dtype) for t in fake] == [(t.shape, t.dtype) for t in real]
    assert [(t.shape, t.dtype) for t in kept] == [(t.shape, t.dtype) for t in nms(*real, 0.5, 100)]
    assert iou.shape == (3, 7, 4)


# ---- geometry ----


def test_box_coders_are_the_same_in_python_and_cpp(kernels: ModuleType) -> None:
    assert {coder.name.upper(): coder.number for coder in BOX_CODERS.values()} == dict(kernels.BoxCoder.__members__)
    for coder in BOX_CODERS.values():
        values, anchors = np.zeros((1, coder.head_values), np.float32), np.zeros((1, 4), np.float32)
        boxes = kernels.decode_boxes(kernels.BoxCoder(coder.number), values, anchors, 8, (64, 64))
        assert boxes.shape == (1, coder.box_values)
        with pytest.raises(ValueError, match="values must have the shape"):
            kernels.decode_boxes(kernels.BoxCoder(coder.number), values[:, 1:], anchors, 8, (64, 64))


@pytest.mark.parametrize("coder", BOX_CODERS.values(), ids=lambda coder: coder.name)
def test_decoded_boxes_are_torchs(kernels: ModuleType, coder: BoxCoder) -> None:
    numbers = torch.randn(2000, coder.head_values) * 2
    numbers[::50, coder.head_values % 3] = torch.nan
    numbers[1::50, 2] = torch.inf
    numbers[2::50, 0] = -torch.inf
    anchors = geometry.circumscribe(cases.random_rotated_boxes(2000))
    found = kernels.decode_boxes(kernels.BoxCoder(coder.number), numbers.numpy(), anchors.numpy(), 16, (512, 384))
    expected = coder.decode(numbers, anchors, 16, (512, 384))
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-3)


def test_iou_is_torchs_to_the_bit(kernels: ModuleType) -> None:
    boxes = torch.cat([cases.random_rotated_boxes(200)[:, :4], cases.degenerate_rotated_boxes()[:, :4]])
    assert np.array_equal(kernels.iou(boxes.numpy(), boxes.numpy()), geometry.iou(boxes, boxes).numpy())


def test_rotated_iou_is_torchs_and_shapelys(kernels: ModuleType) -> None:
    """100 × 100 random pairs and all pairs of degenerate boxes: error below 1e-4."""
    pytest.importorskip("shapely")
    for a, b in [
        (cases.random_rotated_boxes(100), cases.random_rotated_boxes(100)),
        (cases.degenerate_rotated_boxes(), cases.degenerate_rotated_boxes()),
    ]:
        found = ops.rotated_iou(a, b)
        torch.testing.assert_close(found, ops.rotated_iou_reference(a, b), rtol=0, atol=1e-5)
        shapes = torch.tensor([[cases.polygon_iou(x, y) for y in b] for x in a])
        torch.testing.assert_close(found, shapes, rtol=0, atol=1e-4)
        assert ((found > 0) & (found < 0.999)).float().mean() > 0.1


def test_rotated_iou_kernel_is_the_hosts(kernels: ModuleType) -> None:
    a, b = cases.random_rotated_boxes(60).reshape(3, 20, 5), cases.random_rotated_boxes(31)[None]
    params = kernels.RotatedIouParams(
        batch=3, a_count=20, b_count=31, a_values=5, b_values=5, b_shared=True, minimum=0.1
    )
    found = torch.full((3, 20, 31), torch.nan)
    kernels.rotated_iou(params, a.data_ptr(), b.data_ptr(), found.data_ptr(), 0)
    assert torch.equal(found, ops.rotated_iou(a, b, minimum=0.1))
    torch.testing.assert_close(found, ops.rotated_iou_reference(a, b, minimum=0.1), rtol=0, atol=1e-5)


def test_rotated_iou_takes_any_leading_dimensions(kernels: ModuleType) -> None:
    boxes = cases.random_rotated_boxes(24)
    for a, b in [
        (boxes[:4], boxes),
        (boxes.reshape(2, 3, 4, 5), boxes[:7]),
        (boxes[:5], boxes.reshape(2, 12, 5)),
        (boxes.reshape(2, 1, 12, 5), boxes.reshape(1, 3, 8, 5)),
        (boxes[:0], boxes),
    ]:
        found, expected = ops.rotated_iou(a, b), ops.rotated_iou_reference(a, b)
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_the_nms_rule_is_exact_near_the_threshold(kernels: ModuleType) -> None:
    """Only far from the threshold fp32 decides: the result is that of the exact IoU, up to its rounding."""
    boxes = torch.cat([cases.random_rotated_boxes(120), cases.degenerate_rotated_boxes()])
    six = torch.cat([boxes[:, :4], boxes[:, 4:].sin(), boxes[:, 4:].cos()], -1)
    exact = geometry.rotated_iou(boxes.double(), boxes.double()).numpy()
    for threshold in (0.0, 0.1, 0.5, 0.9):
        found = kernels.overlaps(six.numpy(), six.numpy(), threshold)
        clear = np.abs(exact - threshold) > 1e-6
        assert np.array_equal(found[clear], (exact > threshold)[clear])


def test_whether_the_kernels_run_is_a_constant_of_compiled_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """device_error is C++, which torch.compile cannot follow: a function of C that returns 1 stands in for it."""
    monkeypatch.setattr("odtk.kernels.extension", SimpleNamespace(device_error=ctypes.pythonapi.Py_IsInitialized))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def added(x: torch.Tensor) -> torch.Tensor:
        return x + (10 if can_run_on_cuda() else 1)

    assert added(torch.zeros(1)).item() == 1


def test_rotated_iou_passes_torchs_own_checks_and_compiles(kernels: ModuleType) -> None:
    a, b = cases.random_rotated_boxes(9), cases.random_rotated_boxes(8)
    torch.library.opcheck(torch.ops.odtk.rotated_iou, (a[None], b[None], 0.0))
    compiled = torch.compile(ops.rotated_iou, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(a, b), ops.rotated_iou(a, b))
