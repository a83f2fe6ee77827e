"""The peer of benchmarks/training.py: torchvision's RetinaNet R18-FPN, trained as its reference scripts do.

Runs in an environment of its own (torch 2.12.1 and torchvision 0.27.1), never in odtk's. One step: read and decode
a batch of real images, flip, forward, backward, SGD: the whole loop, as odtk's variant does it.
"""

from __future__ import annotations

import json
import random
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
args = parser.parse_args()

torch.manual_seed(0)
random.seed(0)
torch.set_num_threads(2)
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
optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9, weight_decay=1e-4)


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
    losses = model([pixels for pixels, _ in samples], [target for _, target in samples])
    sum(losses.values()).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
    optimizer.step()
    return args.batch


serve(step)
