"""The compiled kernels of odtk._C as torch operators: torch.ops.odtk.decode, .nms and .rotated_iou.

torch.compile and torch.export see them as operators. ops.py decides when they run, and has the reference that each of
them is tested against.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from .box_coder import BOX_CODERS


def _load_extension() -> ModuleType | None:
    try:
        return importlib.import_module("odtk._C")
    except ImportError:  # not built, or built for another Python
        return None


extension = _load_extension()  # odtk._C, or None; `odtk info` says which, and how to get it


def can_run_on_cuda() -> bool:
    """Whether the kernels can run on this machine's GPU.

    A driver that is new enough for torch's CUDA may be too old for the one that the kernels were built with.
    """
    return extension is not None and extension.device_error() is None


# As torch.compiler.assume_constant_result does, which imports all of torch's compiler: two seconds of every start.
can_run_on_cuda._dynamo_marked_constant = True  # type: ignore[attr-defined]


@torch.library.custom_op(
    "odtk::decode",
    mutates_args=(),
    device_types="cuda",
    schema="(Tensor[] logits, Tensor[] boxes, Tensor[] anchors, int[] strides, float score_threshold, int top_n, "
    "str coder) -> (Tensor, Tensor, Tensor)",
)
def decode_kernel(
    logits: Sequence[Tensor],
    boxes: Sequence[Tensor],
    anchors: Sequence[Tensor],
    strides: Sequence[int],
    score_threshold: float,
    top_n: int,
    coder: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """ops.decode by csrc/cuda/decode.cu: two launches, no host synchronization if the anchors are on the device."""
    assert extension is not None
    logits, logits_half = _as_kernel_type(logits)
    boxes, boxes_half = _as_kernel_type(boxes)
    device = logits[0].device
    base = [a.to(device=device, dtype=torch.float32).contiguous() for a in anchors]
    levels = [
        extension.DecodeLevel(
            logits=level.data_ptr(),
            boxes=box.data_ptr(),
            anchors=anchor.data_ptr(),
            height=level.shape[2],
            width=level.shape[3],
            stride=stride,
            logits_pitch=_channels_last_pitch(level),
            boxes_pitch=_channels_last_pitch(box),
        )
        for level, box, anchor, stride in zip(logits, boxes, base, strides, strict=True)
    ]
    params = extension.DecodeParams(
        levels=levels,
        batch=logits[0].shape[0],
        anchors=base[0].shape[0],
        classes=logits[0].shape[1] // base[0].shape[0],
        top_n=top_n,
        anchor_values=base[0].shape[1],
        score_threshold=score_threshold,
        coder=extension.BoxCoder[coder.upper()],
        logits_half=logits_half,
        boxes_half=boxes_half,
    )
    scores, decoded, classes = _empty_detections(logits[0], params.columns, BOX_CODERS[coder].box_values)
    with _on_device(device):
        bytes_ = extension.decode_workspace(params)
        workspace = torch.empty(bytes_, dtype=torch.uint8, device=device)
        outputs = (scores.data_ptr(), decoded.data_ptr(), classes.data_ptr())
        extension.decode(params, *outputs, workspace.data_ptr(), bytes_, _stream(device))
    return scores, decoded, classes.long()


@decode_kernel.register_fake
def _(
    logits: Sequence[Tensor],
    boxes: Sequence[Tensor],
    anchors: Sequence[Tensor],
    strides: Sequence[int],
    score_threshold: float,
    top_n: int,
    coder: str,
) -> tuple[Tensor, Tensor, Tensor]:
    columns = sum(min(top_n, level[0].numel()) for level in logits)
    scores, decoded, classes = _empty_detections(logits[0], columns, BOX_CODERS[coder].box_values)
    return scores, decoded, classes.long()


@torch.library.custom_op(
    "odtk::nms",
    mutates_args=(),
    device_types="cuda",
    schema="(Tensor scores, Tensor boxes, Tensor classes, float threshold, int detections) -> (Tensor, Tensor, Tensor)",
)
def nms_kernel(
    scores: Tensor, boxes: Tensor, classes: Tensor, threshold: float, detections: int
) -> tuple[Tensor, Tensor, Tensor]:
    """ops.nms by csrc/cuda/nms.cu: one launch, no host synchronization."""
    assert extension is not None
    scores, boxes, classes = scores.float().contiguous(), boxes.float().contiguous(), classes.int().contiguous()
    batch, count, box_values = boxes.shape
    params = extension.NmsParams(
        batch=batch, count=count, detections=detections, box_values=box_values, threshold=threshold
    )
    out = _empty_detections(scores, detections, box_values)
    with _on_device(scores.device):
        bytes_ = extension.nms_workspace(params)
        workspace = torch.empty(bytes_, dtype=torch.uint8, device=scores.device)
        pointers = [tensor.data_ptr() for tensor in (scores, boxes, classes, *out, workspace)]
        extension.nms(params, *pointers, bytes_, _stream(scores.device))
    return out[0], out[1], out[2].long()


@nms_kernel.register_fake
def _(
    scores: Tensor, boxes: Tensor, classes: Tensor, threshold: float, detections: int
) -> tuple[Tensor, Tensor, Tensor]:
    out = _empty_detections(scores, detections, boxes.shape[-1])
    return out[0], out[1], out[2].long()


@torch.library.custom_op(
    "odtk::rotated_iou",
    mutates_args=(),
    device_types=("cpu", "cuda"),
    schema="(Tensor a, Tensor b, float minimum) -> Tensor",
)
def rotated_iou_kernel(a: Tensor, b: Tensor, minimum: float) -> Tensor:
    """IoU [P, N, M] of a [P or 1, N, 5 or 6] and b [P or 1, M, 5 or 6], float32, by csrc/cuda/rotated_iou.cu."""
    assert extension is not None
    a, b = a.contiguous(), b.contiguous()
    batch = max(len(a), len(b))
    params = extension.RotatedIouParams(
        batch=batch,
        a_count=a.shape[1],
        b_count=b.shape[1],
        a_values=a.shape[2],
        b_values=b.shape[2],
        a_shared=len(a) < batch,
        b_shared=len(b) < batch,
        minimum=minimum,
    )
    iou = a.new_empty(batch, a.shape[1], b.shape[1])
    pointers = (a.data_ptr(), b.data_ptr(), iou.data_ptr())
    if a.is_cuda:
        with _on_device(a.device):
            extension.rotated_iou(params, *pointers, _stream(a.device))
    else:
        extension.rotated_iou_host(params, *pointers)
    return iou


@rotated_iou_kernel.register_fake
def _(a: Tensor, b: Tensor, minimum: float) -> Tensor:
    return a.new_empty(max(a.shape[0], b.shape[0]), a.shape[1], b.shape[1])


def _as_kernel_type(tensors: Sequence[Tensor]) -> tuple[list[Tensor], bool]:
    """The tensors, all in float16 or all in float32, dense in NCHW or channels-last; and whether in float16."""
    half = all(t.dtype == torch.float16 for t in tensors)
    same = [t if half else t.float() for t in tensors]
    return [t if t.is_contiguous(memory_format=torch.channels_last) else t.contiguous() for t in same], half


def _channels_last_pitch(tensor: Tensor) -> int:
    """Elements from one cell to the next if channels-last, 0 if NCHW: csrc/cuda/decode.h tells the formats by it."""
    return 0 if tensor.is_contiguous() else tensor.shape[1]


def _empty_detections(like: Tensor, rows: int, box_values: int) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialized scores [N, rows], boxes [N, rows, box_values] and classes [N, rows] (int32, as the kernels write).

    N and the device are those of ``like``.
    """
    return (
        like.new_empty(len(like), rows, dtype=torch.float32),
        like.new_empty(len(like), rows, box_values, dtype=torch.float32),
        like.new_empty(len(like), rows, dtype=torch.int32),
    )


def _on_device(device: torch.device) -> torch.cuda.device:
    """A context in which ``device`` is current, as the kernels need it. It does nothing for the CPU (emulation)."""
    return torch.cuda.device(device if device.type == "cuda" else -1)


def _stream(device: torch.device) -> int:
    """torch's current stream on the device, as the integer that the kernels take."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
