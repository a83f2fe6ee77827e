"""The peer of benchmarks/training.py and accuracy.py: torchvision's RetinaNet R18-FPN, trained as its reference does.

Runs in an environment of its own (torch 2.14.1 and torchvision 0.29.1), never in odtk's. One step: read and decode
a batch of real images, flip, forward, backward, SGD: the whole loop, as odtk's variant does it. Without --minutes it
answers benchmarks/harness.py; with it, it trains from scratch for so long and writes the detections on --val-images.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import time
from collections import defaultdict
from pathlib import Path

import torch
import torchvision.transforms.functional as transforms
from harness import arguments, serve
from PIL import Image
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

parser = arguments(__doc__, rounds=0, batch=8)
parser.add_argument("--peer-python")
parser.add_argument("--plain", action="store_true", help="fp32 and NCHW in place of bf16 autocast and channels-last")
parser.add_argument("--minutes", type=float, help="train for so long, then detect and time")
parser.add_argument("--lr", type=float, default=0.01)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--val-annotations", type=Path)
parser.add_argument("--val-images", type=Path)
parser.add_argument("--output", type=Path, help="COCO results of --val-images")
args = parser.parse_args()

torch.manual_seed(args.seed)
random.seed(args.seed)
torch.set_num_threads(len(os.sched_getaffinity(0)))  # two threads on one core wait for each other
coco = json.loads(Path(args.annotations).read_text())
boxes, labels = defaultdict(list), defaultdict(list)
for annotation in coco["annotations"]:
    x, y, w, h = annotation["bbox"]
    boxes[annotation["image_id"]].append([x, y, x + w, y + h])
    labels[annotation["image_id"]].append(annotation["category_id"])

backbone = resnet_fpn_backbone(
    backbone_name="resnet18",
    weights=None,
    norm_layer=torch.nn.BatchNorm2d,
    trainable_layers=5,
    returned_layers=[2, 3, 4],
    extra_blocks=LastLevelP6P7(256, 256),
)
classes = 1 + max(c["id"] for c in coco["categories"])
model = RetinaNet(backbone, classes, min_size=args.resize, max_size=args.max_size).train()
if not args.plain:
    model = model.to(memory_format=torch.channels_last)
optimizer = torch.optim.SGD(model.parameters(), lr=args.lr if args.minutes else 0.001, momentum=0.9, weight_decay=1e-4)


def computing() -> contextlib.AbstractContextManager:
    return contextlib.nullcontext() if args.plain else torch.autocast("cpu", torch.bfloat16)


def load(image: dict) -> tuple[torch.Tensor, dict]:
    pixels = transforms.to_tensor(Image.open(Path(args.images) / image["file_name"]).convert("RGB"))  # [3, H, W]
    target = torch.tensor(boxes[image["id"]]).reshape(-1, 4)
    if random.random() < 0.5:
        pixels = pixels.flip(2)
        target[:, [0, 2]] = pixels.shape[2] - target[:, [2, 0]]
    return pixels, {"boxes": target, "labels": torch.tensor(labels[image["id"]], dtype=torch.int64)}


def step() -> int:
    samples = [load(image) for image in random.sample(coco["images"], args.batch)]
    optimizer.zero_grad()
    with computing():
        losses = model([pixels for pixels, _ in samples], [target for _, target in samples])
    sum(losses.values()).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
    optimizer.step()
    return args.batch


def train() -> int:
    """Steps for --minutes: 100 of warm-up, and a tenth of the learning rate in the last fifth. Returns the images."""
    start, count = time.perf_counter(), 0
    while (done := (time.perf_counter() - start) / (args.minutes * 60)) < 1:
        scale = min(1.0, 0.1 + 0.9 * count / (100 * args.batch)) * (0.1 if done > 0.8 else 1.0)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * scale
        count += step()
    return count


def detect() -> tuple[list[dict], float]:
    """COCO results of --val-images in fp32, and milliseconds per image from pixels to detections."""
    model.eval()
    results, seconds = [], []
    for image in json.loads(args.val_annotations.read_text())["images"]:
        pixels = transforms.to_tensor(Image.open(args.val_images / image["file_name"]).convert("RGB"))  # [3, H, W]
        start = time.perf_counter()
        with torch.inference_mode():
            (found,) = model([pixels])
        seconds.append(time.perf_counter() - start)
        columns = (found[key].tolist() for key in ("boxes", "scores", "labels"))
        for (x1, y1, x2, y2), score, label in zip(*columns, strict=True):
            bbox = [x1, y1, x2 - x1, y2 - y1]
            results.append({"image_id": image["id"], "category_id": label, "score": score, "bbox": bbox})
    return results, sorted(seconds)[len(seconds) // 2] * 1e3


if args.minutes:
    images = train()
    results, milliseconds = detect()
    args.output.write_text(json.dumps(results))
    print(json.dumps({"images": images, "ms": milliseconds}))
else:
    serve(step)
