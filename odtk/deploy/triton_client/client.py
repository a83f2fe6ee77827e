"""Sends images to a detector of odtk on a Triton server, prints what is found as JSON lines, and draws it.

It needs no odtk: pip install 'tritonclient[http,grpc]' pillow

    python client.py photo.jpg --output pictures/
    python client.py photo.jpg --url server:8001 --grpc

A picture that cannot be read is named and left out; the exit code is then 1.
"""

import argparse
import json
import math
import os
import sys

import numpy as np
from PIL import Image, ImageDraw, ImageOps


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", nargs="+", metavar="IMAGE")
    parser.add_argument("--url", metavar="HOST:PORT", help="of the server (localhost:8000, with --grpc localhost:8001)")
    parser.add_argument("--grpc", action="store_true", help="ask by gRPC, not HTTP")
    parser.add_argument("--model", default="detector", metavar="NAME", help="on the server (%(default)s)")
    parser.add_argument("--threshold", type=float, default=0.3, metavar="SCORE", help="(%(default)s)")
    parser.add_argument("--output", metavar="DIR", help="folder for the pictures with boxes")
    options = parser.parse_args()
    if options.output:
        os.makedirs(options.output, exist_ok=True)
    protocol, url = ("gRPC", "localhost:8001") if options.grpc else ("HTTP", "localhost:8000")
    url = (options.url or url).split("://")[-1].rstrip("/")
    try:
        detector = Detector(url, options.model, options.grpc)
    except Exception as error:
        sys.exit(f"{url} is no Triton server for {protocol}, or has no model {options.model}: {error}")
    exit_code = 0
    for path, picture in zip(options.images, picture_names(options.images), strict=True):
        try:
            image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
        except Exception as error:  # it is missing, damaged or no image
            print(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}", file=sys.stderr)
            exit_code = 1
            continue
        found = [one for one in detector(image) if one["score"] > options.threshold]
        for one in found:
            print(json.dumps({"image": path, **one}))
        if options.output:
            draw(image, found).save(os.path.join(options.output, picture))
    return exit_code


def picture_names(paths):
    """The file name of each image's picture: its own, with a number where an earlier image has that."""
    names = []
    for path in paths:
        stem = os.path.splitext(os.path.basename(path))[0]
        name, number = f"{stem}.png", 1
        while name in names:
            number += 1
            name = f"{stem}-{number}.png"
        names.append(name)
    return names


class Detector:
    """A model on a server; what it takes is read from its configuration."""

    def __init__(self, url, model, grpc=False):
        if grpc:
            import tritonclient.grpc as client
        else:
            import tritonclient.http as client
        self.client, self.model = client, model
        self.server = client.InferenceServerClient(url)
        config = self.server.get_model_config(model, **({"as_json": True} if grpc else {}))
        config = config["config"] if grpc else config
        if "odtk" not in config.get("parameters", {}):
            raise SystemExit(f"{model} is not of a bundle of odtk: its config.pbtxt has no parameter odtk.")
        self.facts = json.loads(config["parameters"]["odtk"]["string_value"])
        if self.facts["postprocessing"] == "candidates":
            raise SystemExit(f"{model} gives rotated boxes before NMS: ask it by `odtk infer`, which applies it.")

    def __call__(self, image):
        """The objects in an image (RGB), by descending score."""
        pixels, scale = prepare(image, self.facts)
        given = self.client.InferInput("images", [1, *pixels.shape], "UINT8" if pixels.dtype == np.uint8 else "FP32")
        given.set_data_from_numpy(pixels[None])
        try:
            answer = self.server.infer(self.model, [given])
        except Exception as error:
            raise SystemExit(f"{self.model} on the server does not answer: {error}") from None
        scores, boxes, classes = (answer.as_numpy(name)[0] for name in ("scores", "boxes", "classes"))
        size = image.width * scale[0], image.height * scale[1]
        return [
            {"name": self.name(int(label)), "score": round(float(score), 4), **place(box, scale)}
            for score, box, label in zip(scores, boxes, classes, strict=True)
            if score > 0 and touches_image(box, size)  # rows of score 0 are unused
        ]

    def name(self, label):
        """The name of a class index."""
        categories = self.facts["categories"]
        return categories[label][1] if categories else f"class {label}"


def prepare(image, facts):
    """The model's input, [3, H, W] of RGB from 0 to 255, and (sx, sy), input pixels per pixel of the image.

    The image is scaled to fit, its aspect kept, and padded at the right and the bottom; the normalization is in the
    model.
    """
    height, width = facts["size"]
    scale = min(height / image.height, width / image.width)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    kind = np.uint8 if facts["input_type"] == "uint8" else np.float32
    beyond = np.zeros(3) if facts["padding"] == "black" else 255 * np.array(facts["mean"])
    beyond = np.rint(beyond) if kind == np.uint8 else beyond
    canvas = np.empty((3, height, width), kind)
    canvas[:] = beyond[:, None, None]
    scaled = image if size == image.size else image.resize(size, Image.Resampling.BILINEAR)
    canvas[:, : size[1], : size[0]] = np.asarray(scaled).transpose(2, 0, 1)
    return canvas, (size[0] / image.width, size[1] / image.height)


def touches_image(box, size):
    """Whether some of a box of the model lies on the image, (width, height) in pixels of the input."""
    x1, y1, x2, y2 = (float(value) for value in box[:4])
    if len(box) == 4:
        return x1 < size[0] and y1 < size[1]
    radians = math.atan2(float(box[4]), float(box[5]))  # of a turned box: from the circumscribed one
    sin, cos = abs(math.sin(radians)), abs(math.cos(radians))
    width, height = x2 - x1 + 1, y2 - y1 + 1
    left = (x1 + x2 + 1 - width * cos - height * sin) / 2
    top = (y1 + y2 + 1 - width * sin - height * cos) / 2
    return left < size[0] and top < size[1]


def place(box, scale):
    """Where a box lies in the image: [x, y, width, height] in pixels, and its angle if it has one.

    The model's boxes are corners whose last pixel is still inside, in pixels of its input.
    """
    x1, y1, x2, y2 = (float(value) for value in box[:4])
    sx, sy = scale
    found = {"box": [round(value, 2) for value in (x1 / sx, y1 / sy, (x2 - x1 + 1) / sx, (y2 - y1 + 1) / sy)]}
    return found if len(box) == 4 else {**found, "radians": round(math.atan2(float(box[4]), float(box[5])), 4)}


def draw(image, found):
    """A copy of the image with boxes, names and scores; a rotated box turns about its center."""
    picture = image.copy()
    pen = ImageDraw.Draw(picture)
    for one in found:
        x, y, width, height = one["box"]
        cos, sin = math.cos(one.get("radians", 0.0)), math.sin(one.get("radians", 0.0))
        halves = [
            (-width / 2, -height / 2),
            (width / 2, -height / 2),
            (width / 2, height / 2),
            (-width / 2, height / 2),
        ]
        middle = x + width / 2, y + height / 2
        pen.polygon([(middle[0] + u * cos + v * sin, middle[1] - u * sin + v * cos) for u, v in halves], outline="red")
        pen.text((x + 2, y + 2), f"{one['name']} {one['score']:.2f}", fill="red")
    return picture


if __name__ == "__main__":
    sys.exit(main())
