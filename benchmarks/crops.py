"""Cuts the objects of a COCO dataset out of its images, one folder per class: images for `odtk pretrain`.

    python benchmarks/crops.py shared/data/bccd/train.json shared/data/bccd/train crops/train

Each crop is a square around its box, whose side is that of the box's longer one and a margin, so that the surroundings
show too and the shape is kept; it ends where the image does. Crops are PNG, so that nothing is lost twice.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

from odtk.data.dataset import Dataset


def cut(annotations: str, images: str, output: str, margin: float = 0.25) -> dict[str, int]:
    """Writes the crops and returns how many each class has.

    Args:
        margin: of the square on every side, relative to the longer side of the box.
    """
    dataset = Dataset.load(annotations, images)
    counts = {category.name: 0 for category in dataset.categories}
    for image in dataset.images:
        pixels = Image.fromarray(image.decode())
        for number, ((x, y, w, h), label) in enumerate(zip(image.boxes, image.labels, strict=True)):
            name = dataset.categories[label].name
            half = (0.5 + margin) * max(w, h)
            center = (x + w / 2, y + h / 2)
            corners = (center[0] - half, center[1] - half, center[0] + half, center[1] + half)
            inside = [min(max(0, round(v)), (image.width, image.height)[i % 2]) for i, v in enumerate(corners)]
            folder = Path(output, name)
            folder.mkdir(parents=True, exist_ok=True)
            pixels.crop(tuple(inside)).save(folder / f"{image.path.stem}_{number}.png")  # type: ignore[arg-type]
            counts[name] += 1
    return counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("annotations")
    parser.add_argument("images")
    parser.add_argument("output")
    parser.add_argument("--margin", type=float, default=0.25)
    args = parser.parse_args()
    print(cut(args.annotations, args.images, args.output, args.margin))
