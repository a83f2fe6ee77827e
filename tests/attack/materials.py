"""What the attack damages: a tiny dataset in three formats, a trained checkpoint, and what odtk makes of them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from tests.attack.judge import Run

SIZE = (64, 48)  # width, height
COUNT = 8  # images; as many as calibration needs
MODEL = ["--backbone", "MobileNetV2FPN", "--backbone-weights", "none", "--head", "dense", "--last-level", "5"]
SMALL = ["--resize", "64", "--max-size", "64", "--batch", "2", "--warmup", "1", "--precision", "fp32"]
TRAIN = [*MODEL, *SMALL, "--jitter", "64", "64", "--devices", "cpu", "--loader", "torch"]


def draw(folder: Path) -> None:
    """images/ of noise with a blue and a red rectangle each, train.json, and detections.json as odtk writes it."""
    (folder / "images").mkdir(parents=True)
    generator = random.Random(0)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    detections: list[dict[str, Any]] = []
    for i in range(1, COUNT + 1):
        noise = Image.frombytes("RGB", SIZE, generator.randbytes(SIZE[0] * SIZE[1] * 3))
        pen = ImageDraw.Draw(noise)
        name = f"{i}.{('png', 'jpg')[i % 2]}"
        images.append({"id": i, "file_name": name, "width": SIZE[0], "height": SIZE[1]})
        for category, color in ((2, "blue"), (7, "red")):
            x, y = generator.randint(0, 40), generator.randint(0, 28)
            pen.rectangle((x, y, x + 19, y + 15), fill=color)
            entry = {"image_id": i, "category_id": category, "bbox": [x, y, 20, 16]}
            outline = [[x, y, x + 20, y, x + 20, y + 16, x, y + 16]]
            annotations.append(
                {"id": len(annotations) + 1, **entry, "area": 320, "iscrowd": 0, "segmentation": outline}
            )
            detections.append({**entry, "score": round(generator.random(), 3)})
        noise.save(folder / "images" / name)
    categories = [{"id": 2, "name": "blue"}, {"id": 7, "name": "red"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "train.json").write_text(json.dumps(content))
    (folder / "detections.json").write_text(json.dumps(detections))


def make(folder: Path) -> None:
    """Everything, by odtk's own commands: yolo/ and voc/ with their images, model.pth, model.onnx, and int8.onnx with
    its table."""
    draw(folder)
    own = ["--annotations", folder / "train.json", "--images", folder / "images"]
    boxes = folder / "boxes.json"  # without outlines, which the other formats would take instead
    content = json.loads((folder / "train.json").read_text())
    for entry in content["annotations"]:
        del entry["segmentation"]
    boxes.write_text(json.dumps(content))
    model = folder / "model.pth"
    calibration = ["--int8", "--calibration-images", folder / "images", "--calibration-batches", "1"]
    runs = [
        ["convert", boxes, folder / "yolo", "--to", "yolo", "--images", folder / "images"],
        ["convert", boxes, folder / "voc", "--to", "voc", "--images", folder / "images"],
        ["train", model, *own, *TRAIN, "--iters", "2"],
        ["export", model, folder / "model.onnx", "--size", "64", "--full-precision"],
        ["export", model, folder / "int8.onnx", "--size", "64", *calibration],
    ]
    log = folder.parent / "making"
    log.mkdir()
    for argv in runs:
        outcome = Run(argv, log).wait(1200)
        if not outcome.succeeded:
            raise SystemExit(f"The attack could not make its files: {outcome.argv}: {outcome.stderr}")
