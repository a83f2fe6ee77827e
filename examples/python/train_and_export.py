"""From nothing to an ONNX file, in Python: draws a dataset of shapes, trains on it, exports the best, measures it.

    python examples/python/train_and_export.py FOLDER [--iters 280]

With images of your own, replace `synthesize` by the paths of your annotations and image folders.
"""

import argparse
from pathlib import Path

import odtk
from odtk.data.synthetic import synthesize


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains and exports a detector of shapes.")
    parser.add_argument("folder", type=Path, help="a new folder for the dataset and the models")
    parser.add_argument("--iters", type=int, default=280, help="training iterations (%(default)s: about 5 minutes)")
    parser.add_argument("--images", type=int, default=240, help="images to draw (%(default)s)")
    args = parser.parse_args()

    data, model = args.folder / "data", args.folder / "model.pth"
    synthesize(str(data), images=args.images, size=(240, 320), classes=4)
    odtk.train(
        model,
        annotations=data / "train.json",
        images=data / "train",
        val_annotations=data / "val.json",
        val_images=data / "val",
        backbone="ResNet18FPN",
        backbone_weights="none",
        resize=192,
        max_size=256,
        jitter=(192, 192),
        augment_crop=0,
        batch=8,
        iters=args.iters,
        milestones=[args.iters * 4 // 5],
        warmup=args.iters // 6,
        lr=0.02,
    )
    best = model.with_name("model.best.pth")
    exported = model.with_suffix(".onnx")
    odtk.export(best, exported)
    detections = args.folder / "detections.json"
    odtk.infer(exported, annotations=data / "val.json", images=data / "val", output=detections)
    metrics = odtk.evaluate(detections, annotations=data / "val.json")
    print(f"{exported}: AP {metrics.ap:.3f}, AP50 {metrics.ap50:.3f}")


if __name__ == "__main__":
    main()
