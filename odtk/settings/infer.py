"""`odtk infer`, and `odtk benchmark`, which times it: what runs a model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..config import BenchmarkConfig, OdtkError, TilesConfig, VideoConfig
from .fields import COUNT, FRACTION, POSITIVE_INT, TEXT, flag, option, switch
from .shared import (
    ANY_MODEL,
    FORMATS,
    WithDevices,
    WithLoader,
    WithPrecision,
    WithResize,
    WithSize,
    WithThresholds,
    model_field,
)


@dataclass(frozen=True, kw_only=True)
class InferSettings(WithDevices, WithLoader, WithSize, WithResize, WithThresholds, WithPrecision):
    """`odtk infer`."""

    model: str = model_field("{pth,onnx,plan,engine}", ANY_MODEL)
    images: tuple[str, ...] | None = option(
        None,
        "folder of the images, or tar files; without --annotations also files and patterns such as 'scans/*.jpg', "
        "several of them",
        TEXT,
        "PATH",
        count=(1, None),
        shown="beside the annotations, else this folder",
    )
    annotations: str | None = option(
        None,
        f"take the images of these annotations and print COCO figures: {FORMATS}",
        TEXT,
        "PATH",
        shown="every image",
    )
    tiles: tuple[int, ...] | None = option(
        None,
        "cut each image into tiles of H×W pixels that overlap, for tiny objects in large images; one number for "
        "squares; --detections then limits those of a tile",
        POSITIVE_INT,
        ("H", "W"),
        count=(1, 2),
        shown="whole images",
    )
    overlap: float = option(
        TilesConfig.overlap,
        "part of a tile that two neighbors share at least; as large as the objects",
        FRACTION,
        "FRACTION",
    )
    video: str | None = option(
        None,
        "take a video in place of images: a file, an address such as rtsp://HOST/PATH, or a camera such as /dev/video0",
        TEXT,
        "FILE|URL|DEVICE",
        shown="none",
        section="video",
    )
    every: int = option(VideoConfig.every, "detect in each N-th frame only", POSITIVE_INT, "N", section="video")
    realtime: bool = switch(
        "read a file as fast as it plays, and drop frames that wait too long, as of a camera",
        shown="off: a file drops none",
        section="video",
    )
    track: bool = switch("give the same object the same number in every frame (ByteTrack)", section="video")
    track_threshold: float = option(
        VideoConfig.track_threshold,
        "a detection that scores so much starts a track",
        FRACTION,
        "SCORE",
        section="video",
    )
    rtsp_transport: str = option(VideoConfig.transport, "what carries rtsp://", choices=("tcp", "udp"), section="video")
    output: tuple[str, ...] | None = option(
        None,
        "files to write the detections to, in COCO result form or, where they end in .parquet, as Parquet; of a video "
        ".jsonl or - (a line per frame as it comes) and .mp4 (boxes drawn, no sound)",
        TEXT,
        "PATH",
        count=(1, None),
        shown="detections.json; of a video detections.jsonl",
    )
    strict: bool = switch(
        "fail on a damaged image, or at the end of a damaged video", shown="off: they are named, and the rest is used"
    )
    override: bool = switch("begin anew where OUTPUT.parts holds detections of a run that did not end")
    batch: int | None = option(None, "images at a time over all devices", POSITIVE_INT, "N", shown="2 × devices")
    draw: str | None = option(
        None, "write the images, or the frames of a video, with their detections there", TEXT, "DIR", shown="none"
    )
    draw_threshold: float | None = option(
        None,
        "draw detections that score above this",
        FRACTION,
        "SCORE",
        shown="with annotations the one of the best F1, of a video 0.3, else the best 20 of each image",
    )

    @property
    def outputs(self) -> tuple[str, ...]:
        """The files to write."""
        return self.output or (("detections.jsonl",) if self.video else ("detections.json",))

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> InferSettings:
        """As Settings.of; a model that was named after several images, as in `--images DIR MODEL`, is the model."""
        images = values.get("images")
        if values.get("model") is None and isinstance(images, (list, tuple)) and len(images) > 1:
            last = str(images[-1])
            if os.path.splitext(last)[1] in (".pth", ".onnx", ".plan", ".engine"):
                values = {**values, "model": last, "images": images[:-1]}
        return super().of(values)

    def check(self) -> None:
        tars = all(path.endswith(".tar") for path in self.images or ())  # a shell may have written out {00..99}.tar
        if self.annotations and self.images and len(self.images) > 1 and not tars:
            raise OdtkError("--images takes one folder where --annotations says which images to use.")
        if self.overlap == 1:
            raise OdtkError("--overlap 1: tiles must share less than all of themselves, at most 0.9 or so.")
        if "overlap" in self.given() and not self.tiles:
            raise OdtkError("--overlap needs --tiles H W.")
        drawn = self.draw or (self.video and any(path.endswith(".mp4") for path in self.outputs))
        if self.draw_threshold is not None and not drawn:
            raise OdtkError("--draw-threshold needs --draw DIR, or an .mp4 of a video.")
        if "track_threshold" in self.given() and not self.track:
            raise OdtkError("--track-threshold needs --track.")
        if self.video:
            self.check_video(self.video)
        elif names := [name for name in ("every", "realtime", "track", "rtsp_transport") if name in self.given()]:
            raise OdtkError(f"{flag(names[0])} needs --video.")
        elif "-" in self.outputs:
            raise OdtkError("--output - is for --video: name a file for the detections of images.")

    def check_video(self, source: str) -> None:
        """What the other settings may be where there is a video."""
        for name in ("images", "annotations"):
            if getattr(self, name):
                raise OdtkError(f"--video takes the place of {flag(name)}: omit one of them.")
        seen: set[str] = set()
        for path in self.outputs:
            if path != "-" and os.path.splitext(path)[1] not in (".jsonl", ".mp4"):
                raise OdtkError(f"--output {path}: of a video it must end in .jsonl or .mp4, or be - (lines of JSON).")
            if path != "-" and os.path.realpath(path) == os.path.realpath(source):
                raise OdtkError(f"--output {path} is the video itself: name another file.")
            place = path if path == "-" else os.path.realpath(path)
            if place in seen:
                raise OdtkError(f"--output {path} is there twice, perhaps under another name: name each file once.")
            seen.add(place)


@dataclass(frozen=True, kw_only=True)
class BenchmarkSettings(WithDevices, WithLoader, WithSize, WithPrecision):
    """`odtk benchmark`."""

    model: str = model_field("{pth,onnx,plan,engine}", ANY_MODEL)
    batch: int | None = option(None, "images at a time over all devices", POSITIVE_INT, "N", shown="1 × devices")
    iters: int = option(BenchmarkConfig.iters, "timed batches", POSITIVE_INT, "N")
    warmup: int = option(BenchmarkConfig.warmup, "batches before those", COUNT, "N")
    images: str | None = option(
        None,
        "time it from these files to their detections too",
        TEXT,
        "DIR",
        shown="the model alone, on random images",
    )
    output: str | None = option(None, "write the figures there too", TEXT, "JSON", shown="none")
