"""What is done with datasets before a model is: `odtk check`, `odtk convert` and `odtk synth`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from ..config import LoaderConfig, ModelConfig, OdtkError
from .base import Settings
from .defaults import HEADS
from .fields import COUNT, POSITIVE_INT, RATIO, SEED, SIDE, TEXT, option, switch
from .shared import FORMATS, WithAnchors, check_rotated, rising


@dataclass(frozen=True, kw_only=True)
class CheckSettings(WithAnchors):
    """`odtk check`."""

    annotations: str | None = option(
        None, f"annotations: {FORMATS}", TEXT, "PATH", shown="none: only looks for damaged images"
    )
    images: str | None = option(None, "folder of the images", TEXT, "DIR", shown="beside the annotations")
    resize: int = option(LoaderConfig.resize, "shorter side of the image", POSITIVE_INT, "PIXELS")
    max_size: int = option(LoaderConfig.max_size, "cap of the longer side", POSITIVE_INT, "PIXELS")
    head: str = option(
        ModelConfig.head, "to be trained; only retinanet has anchors to match", choices=HEADS, section="model"
    )
    backbone: tuple[str, ...] = option(
        ModelConfig.backbones, "whose levels the anchors stand on", TEXT, "NAME", count=(1, None), section="model"
    )
    rotated_bbox: bool = switch("boxes are [x, y, w, h, theta], theta in radians, counterclockwise")
    headers_only: bool = switch("neither decode the images to their end nor compare them with each other")
    verbose: bool = switch("print every finding", shown="off: the first of each kind, and their number")

    def check(self) -> None:
        super().check()
        if not self.annotations and not self.images:
            raise OdtkError("--annotations PATH or --images DIR is required.")
        check_rotated(self.head, self.rotated_bbox)


@dataclass(frozen=True, kw_only=True)
class ConvertSettings(Settings):
    """`odtk convert`."""

    source: str = option(dataclasses.MISSING, f"annotations: {FORMATS}", TEXT, "SOURCE", positional=True)
    target: str = option(
        dataclasses.MISSING,
        "a .json, or a folder to make for yolo and voc; must not exist",
        TEXT,
        "TARGET",
        positional=True,
    )
    to: str = option(dataclasses.MISSING, "format to write", TEXT, "{coco,yolo,voc}", choices=("coco", "yolo", "voc"))
    images: str | None = option(None, "folder of the images", TEXT, "DIR", shown="beside the annotations")
    box_format: str | None = option(
        None,
        "what a COCO file's boxes are instead of x y w h in pixels: x1 y1 x2 y2; x y w h in fractions of the image; "
        "or the center and the size",
        TEXT,
        choices=("xyxy", "normalized", "cxcywh"),
        flags=("--from",),
        shown="x y w h in pixels",
    )
    lossy: bool = switch("go on where TARGET's format cannot hold everything", shown="off: what would be lost is said")


@dataclass(frozen=True, kw_only=True)
class SynthSettings(Settings):
    """`odtk synth`."""

    folder: str = option(
        dataclasses.MISSING, "where to write train/, val/, train.json and val.json", TEXT, "DIR", positional=True
    )
    images: int = option(240, "images of both sets together, every fifth for validation", POSITIVE_INT, "N")
    size: tuple[int, ...] = option(
        (240, 320), "height and width of the images in pixels", POSITIVE_INT, ("H", "W"), count=(1, 2)
    )
    classes: int = option(4, "kinds of shapes", POSITIVE_INT, "N")
    object_size: tuple[float, ...] = option(
        (0.18, 0.45), "range of the shapes' widths, relative to the image's shorter side", SIDE, ("MIN", "MAX"), count=2
    )
    objects: tuple[int, ...] = option(
        (2, 7), "range of the number of shapes that an image is tried to hold", POSITIVE_INT, ("MIN", "MAX"), count=2
    )
    imbalance: float = option(1.0, "how many times as frequent the first class is as the last", RATIO, "FACTOR")
    gray: bool = switch("images without color")
    clutter: int = option(0, "pieces of lines and blobs in an image that are no objects", COUNT, "N")
    rotated: bool = switch("elongated shapes with boxes [x, y, w, h, theta]", flags=("--rotated-bbox",))
    seed: int = option(0, "of everything that is drawn at random", SEED, "N")

    def check(self) -> None:
        rising("--object-size", self.object_size)
        rising("--objects", self.objects)
