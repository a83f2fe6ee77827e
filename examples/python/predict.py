"""Finds objects in images, prints them and draws them.

python examples/python/predict.py model.onnx photos/ --threshold 0.4 --draw pictures/
"""

import argparse
from pathlib import Path

import odtk


def main() -> None:
    parser = argparse.ArgumentParser(description="Prints and draws the objects in images.")
    parser.add_argument("model", help=".pth, .onnx or .plan")
    parser.add_argument("images", help="a folder, or a pattern such as 'photos/*.jpg'")
    parser.add_argument("--threshold", type=float, help="objects score above this")
    parser.add_argument("--draw", type=Path, help="folder for pictures")
    args = parser.parse_args()

    model = odtk.load(args.model, threshold=args.threshold)
    print(model)
    if args.draw:
        args.draw.mkdir(parents=True, exist_ok=True)
    # stream=True gives each image's detections as soon as they are there, and keeps none of them in memory.
    for found in model.predict(args.images, stream=True, skip_damaged=True):
        print(found)
        if found.error:
            continue
        for name, score, (x1, y1, x2, y2) in zip(found.names, found.scores, found.boxes, strict=True):
            print(f"  {name:12} {score:.2f}  {x2 - x1:.0f}×{y2 - y1:.0f} pixels at ({x1:.0f}, {y1:.0f})")
        if args.draw:
            found.draw().save(args.draw / f"{found.image_id}.png")


if __name__ == "__main__":
    main()
