"""Finds objects in the frames of an animation, one by one, and writes the frames with their boxes.

    python examples/python/frames.py model.onnx clip.gif marked.gif

A camera is the same: a generator that yields frames as RGB arrays. OpenCV gives BGR: `frame[:, :, ::-1]` is RGB.
"""

import argparse
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageSequence

import odtk


def frames(path: str) -> Iterator[np.ndarray]:
    """RGB frames, uint8 [H, W, 3]."""
    with Image.open(path) as clip:
        for frame in ImageSequence.Iterator(clip):
            yield np.array(frame.convert("RGB"))


def main() -> None:
    parser = argparse.ArgumentParser(description="Marks the objects in an animation.")
    parser.add_argument("model", help=".pth, .onnx or .plan")
    parser.add_argument("clip", help="an animated GIF, WebP or PNG")
    parser.add_argument("output", help="the marked animation")
    parser.add_argument("--threshold", type=float, help="objects score above this")
    args = parser.parse_args()

    model = odtk.load(args.model, threshold=args.threshold)
    marked = []
    # batch=1: each frame's detections are there before the next frame is taken.
    for frame, found in zip(frames(args.clip), model.predict(frames(args.clip), stream=True, batch=1), strict=True):
        print(found)
        marked.append(found.draw(frame))
    marked[0].save(args.output, save_all=True, append_images=marked[1:], duration=100, loop=0)


if __name__ == "__main__":
    main()
