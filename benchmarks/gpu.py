"""Decoding and NMS on a GPU: the kernels beside a copy of the same bytes and beside torch's own path.

    python benchmarks/gpu.py [--batches 1 8 16] [--size 800 1280] [--classes 80] [--report FILE]

The heads are those of a five-level pyramid with 9 anchors, in fp16. Their logits are drawn so that a few thousand
candidates per image pass the threshold, as with a trained model. "read" is the time to read the bytes of all heads once
at the bandwidth that the copy reaches: a copy reads and writes, so it is half of the copy's time. The goal is decode
≤ 3 × read. Times are medians of 20 CUDA-graph replays, so that they are those of the GPU; the replays take turns on
several sets of heads, together more than twice the L2 cache, as an engine's heads would be if they came from memory.
torch's path synchronizes and is timed as it is called. Its NMS is torchvision's if that is installed, otherwise the
reference in odtk/ops.py. "find", "merge" and "suppress" are our kernels alone, in microseconds, as CUDA's profiler saw
them: no cast that torch adds is among them. Beside them stands what kernel_model.py expects at batch 1.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import kernel_model
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from odtk import ops
from odtk.box_coder import BOX_CODERS
from odtk.kernels import extension

DEVICE = "cuda"
STRIDES = (8, 16, 32, 64, 128)
REPEATS = 20
KERNELS = {"find": "find_candidates", "merge": "merge_candidates", "suppress": "suppress"}
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


def milliseconds(works: Sequence[Callable[[], object]], *, graph: bool, rounds: int = REPEATS) -> float:
    """The median time of one call on the GPU after a warm-up, the works taking turns; replayed from CUDA graphs."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            for work in works:
                work()
    stream.synchronize()
    calls: list[Callable[[], object]] = list(works)
    if graph:
        for i, work in enumerate(works):
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured):
                work()
            calls[i] = captured.replay
    times = []
    for i in range(rounds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        calls[i % len(calls)]()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def kernel_microseconds(works: Sequence[Callable[[], object]]) -> dict[str, float]:
    """The median time of each of our kernels, from a trace of CUDA's profiler."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for i in range(REPEATS):
            works[i % len(works)]()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return kernels_of_trace(events)


def kernels_of_trace(events: Sequence[dict]) -> dict[str, float]:
    """The median duration of our kernels in the events of a trace, in microseconds."""
    times: dict[str, list[float]] = {name: [] for name in KERNELS}
    for event in events:
        for name, function in KERNELS.items():
            if event.get("cat") == "kernel" and re.search(rf"\bodtk::.*\b{function}[<(]", event["name"]):
                times[name].append(event["dur"])
    return {name: statistics.median(found) for name, found in times.items() if found}


def measure(name: str, batch: int, sets: Sequence[Heads], expected: dict[str, float]) -> dict[str, Any]:
    """One row of the table; times in ms, those of single kernels in microseconds."""
    sources = [torch.cat([t.permute(0, 2, 3, 1).flatten() for t in heads[0] + heads[1]]) for heads in sets]
    target = torch.empty_like(sources[0])
    survivors = sum(int((t > ops.to_logit(THRESHOLD)).sum()) for t in sets[0][0]) / batch

    def decode(heads: Heads) -> Triple:
        logits, boxes, anchors = heads
        return ops.decode(logits, boxes, anchors, STRIDES, score_threshold=THRESHOLD, top_n=TOP_N)

    def nms(found: Triple) -> Triple:
        return ops.nms(*found, threshold=IOU, detections=DETECTIONS)

    def both_of(heads: Heads) -> Triple:
        return nms(decode(heads))

    candidates = [decode(heads) for heads in sets]
    copy = milliseconds([partial(target.copy_, source) for source in sources], graph=True)
    decode_time = milliseconds([partial(decode, heads) for heads in sets], graph=True)
    nms_time = milliseconds([partial(nms, found) for found in candidates], graph=True)
    both = [partial(both_of, heads) for heads in sets]
    both_time = milliseconds(both, graph=True)
    torch_time = milliseconds([partial(torch_path, heads) for heads in sets], graph=False, rounds=10)
    return {
        "case": name,
        "batch": batch,
        "sets": len(sets),
        "survivors_per_image": survivors,
        "megabytes": sources[0].nbytes / 1e6,
        "copy": copy,
        "read": copy / 2,
        "decode": decode_time,
        "nms": nms_time,
        "both": both_time,
        "torch": torch_time,
        "decode_to_read": decode_time / (copy / 2),
        "torch_to_both": torch_time / both_time,
        "kernels": kernel_microseconds(both),
        "expected": expected,
    }


def sets_of_heads(batch: int, size: tuple[int, int], classes: int, *, mean: float, channels_last: bool) -> list[Heads]:
    """As many sets as exceed twice the L2 cache together, two at least."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    made = [make_heads(batch, size, classes, mean=mean, channels_last=channels_last)]
    one = sum(tensor.nbytes for tensor in made[0][0] + made[0][1])
    for _ in range(max(1, math.ceil(2 * cache / one))):
        made.append(make_heads(batch, size, classes, mean=mean, channels_last=channels_last))
    return made


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
            size = tuple(options.size)
            sets = sets_of_heads(batch, size, options.classes, mean=mean, channels_last=channels_last)
            survivors = sum(int((t > ops.to_logit(THRESHOLD)).sum()) for t in sets[0][0]) // batch
            terms = kernel_model.model(size, options.classes, batch=batch, survivors=survivors)
            row = measure(name, batch, sets, kernel_model.totals(terms))
            rows.append(row)
            print(f"{name:24} {batch:5} " + " ".join(f"{row[c]:14.3f}" for c in columns))
            for kernel, measured in row["kernels"].items():
                print(f"    {kernel:9} {measured:8.1f} µs, expected {row['expected'][kernel]:8.1f} µs", flush=True)
    result = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "unit": "ms", "rows": rows}
    text = json.dumps(result, indent=1)
    print(text)
    if options.report:
        options.report.write_text(text + "\n")


if __name__ == "__main__":
    main()
