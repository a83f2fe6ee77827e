"""Decoding and NMS on a GPU: the kernels beside a copy of the same bytes and beside torch's own path.

    python benchmarks/gpu.py [--batches 1 8 16] [--size 800 1280] [--classes 80] [--report FILE]

The heads are those of a five-level pyramid with 9 anchors, in fp16. Their logits are drawn so that a few thousand
candidates per image pass the threshold, as with a trained model. "read" is the time to read the bytes of all heads once
at the bandwidth that the copy reaches: a copy reads and writes, so it is half of the copy's time. The goal is decode
≤ 3 × read. Times are medians of CUDA-graph replays, so that they are those of the GPU; torch's path synchronizes and is
timed as it is called. Its NMS is torchvision's if that is installed, otherwise the reference in odtk/ops.py.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from odtk import ops
from odtk.box_coder import BOX_CODERS
from odtk.kernels import extension

DEVICE = "cuda"
STRIDES = (8, 16, 32, 64, 128)
ANCHORS, TOP_N, THRESHOLD, IOU, DETECTIONS = 9, 1000, 0.05, 0.5, 100
Heads = tuple[list[Tensor], list[Tensor], list[Tensor]]
Triple = tuple[Tensor, Tensor, Tensor]


def make_heads(batch: int, size: tuple[int, int], classes: int, *, mean: float, channels_last: bool) -> Heads:
    """Logits, boxes and base anchors of all levels."""
    memory = torch.channels_last if channels_last else torch.contiguous_format
    logits, boxes, anchors = [], [], []
    for stride in STRIDES:
        h, w = (math.ceil(side / stride) for side in size)
        level = torch.randn(batch, ANCHORS * (classes + 4), h, w, device=DEVICE, dtype=torch.float16)
        scores, deltas = level.split([ANCHORS * classes, ANCHORS * 4], 1)
        logits.append((scores * 1.2 + mean).contiguous(memory_format=memory))
        boxes.append((deltas * 0.3).contiguous(memory_format=memory))
        half = torch.linspace(2, 5, ANCHORS, device=DEVICE)[:, None] * stride
        anchors.append(torch.cat([0.5 * stride - half, 0.5 * stride - half, half, half], 1))
    return logits, boxes, anchors


def torch_path(heads: Heads) -> Triple:
    """Sigmoid of all logits, topk per level, decoding, NMS: what one would write without kernels."""
    found: list[list[Tensor]] = [[], [], []]
    for logits, boxes, anchors, stride in zip(*heads, STRIDES, strict=True):
        n, channels, h, w = logits.shape
        classes = channels // ANCHORS
        scores, index = logits.sigmoid().flatten(1).topk(min(TOP_N, channels * h * w))  # [N, A·C·h·w] → [N, K]
        scores = torch.where(scores > THRESHOLD, scores.float(), 0)
        channel, cell = index // (h * w), index % (h * w)
        anchor, y, x = channel // classes, cell // w, cell % w
        image = torch.arange(n, device=index.device)[:, None].expand_as(index)
        numbers = boxes.unflatten(1, (ANCHORS, 4))[image, anchor, :, y, x].float()  # [N, A, 4, h, w] → [N, K, 4]
        placed = anchors[anchor] + torch.stack([x, y, x, y], -1) * stride
        decoded = BOX_CODERS["anchor_deltas"].decode(numbers, placed, stride, (w * stride, h * stride))
        for part, values in zip(found, (scores, decoded, channel % classes), strict=True):
            part.append(values)
    return torch_nms(*(torch.cat(part, 1) for part in found))


def torch_nms(scores: Tensor, boxes: Tensor, classes: Tensor) -> Triple:
    """torchvision's NMS, image by image, or the reference."""
    try:
        from torchvision.ops import batched_nms
    except ImportError:
        return ops.nms_reference(scores, boxes, classes, threshold=IOU, detections=DETECTIONS)
    kept = [batched_nms(b, s, c, IOU)[:DETECTIONS] for b, s, c in zip(boxes, scores, classes, strict=True)]

    def rows(values: Tensor) -> Tensor:
        """[N, T, …] → the kept ones [N, most kept, …], zero-padded."""
        return pad_sequence([v[k] for v, k in zip(values, kept, strict=True)], batch_first=True)

    return rows(scores), rows(boxes), rows(classes)


def milliseconds(work: Callable[[], object], *, graph: bool, rounds: int = 50) -> float:
    """The median time of one call on the GPU after a warm-up; replayed from a CUDA graph if ``graph`` is set."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    stream.synchronize()
    call: Callable[[], object] = work
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            work()
        call = captured.replay
    times = []
    for _ in range(rounds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def measure(name: str, batch: int, heads: Heads) -> dict[str, object]:
    """One row of the table; times in ms."""
    logits, boxes, anchors = heads
    source = torch.cat([t.permute(0, 2, 3, 1).flatten() for t in logits + boxes])  # NCHW → flat: the same bytes
    target = torch.empty_like(source)
    survivors = sum(int((t > ops.to_logit(THRESHOLD)).sum()) for t in logits) / batch

    def decode() -> Triple:
        return ops.decode(logits, boxes, anchors, STRIDES, score_threshold=THRESHOLD, top_n=TOP_N)

    candidates = decode()

    def nms(found: Triple) -> Triple:
        return ops.nms(*found, threshold=IOU, detections=DETECTIONS)

    copy = milliseconds(lambda: target.copy_(source), graph=True)
    decode_time = milliseconds(decode, graph=True)
    nms_time = milliseconds(lambda: nms(candidates), graph=True)
    both = milliseconds(lambda: nms(decode()), graph=True)
    torch_time = milliseconds(lambda: torch_path(heads), graph=False, rounds=10)
    return {
        "case": name,
        "batch": batch,
        "survivors_per_image": survivors,
        "megabytes": source.nbytes / 1e6,
        "copy": copy,
        "read": copy / 2,
        "decode": decode_time,
        "nms": nms_time,
        "both": both,
        "torch": torch_time,
        "decode_to_read": decode_time / (copy / 2),
        "torch_to_both": torch_time / both,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--size", type=int, nargs=2, default=[800, 1280], metavar=("H", "W"))
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--report", type=Path, help="JSON file to write")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/gpu.py needs a CUDA GPU and a torch built with CUDA.")
    if extension is None:
        raise SystemExit("benchmarks/gpu.py needs odtk._C: `pip install .` where nvcc is.")
    torch.manual_seed(0)

    cases = [("trained, channels-last", -7.0, True), ("trained, NCHW", -7.0, False), ("all survive", 5.0, True)]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, kernels for {extension.ARCHITECTURES}")
    columns = [
        "survivors_per_image",
        "megabytes",
        "copy",
        "read",
        "decode",
        "nms",
        "both",
        "torch",
        "decode_to_read",
        "torch_to_both",
    ]
    print(f"{'case':24} {'batch':>5} " + " ".join(f"{c[:14]:>14}" for c in columns))
    rows = []
    for name, mean, channels_last in cases:
        for batch in options.batches:
            heads = make_heads(batch, tuple(options.size), options.classes, mean=mean, channels_last=channels_last)
            rows.append(measure(name, batch, heads))
            print(f"{name:24} {batch:5} " + " ".join(f"{rows[-1][c]:14.3f}" for c in columns), flush=True)
    result = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "unit": "ms", "rows": rows}
    text = json.dumps(result, indent=1)
    print(text)
    if options.report:
        options.report.write_text(text + "\n")


if __name__ == "__main__":
    main()
