"""`odtk export`."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass

from ..config import INPUT_TYPES, ExportConfig, OdtkError
from .defaults import CALIBRATION_METHOD_OF_HEAD, CALIBRATION_METHODS
from .fields import DEVICES, NUMBER, POSITIVE_INT, TEXT, flag, option, switch
from .shared import FORMATS, WithSize, WithThresholds, model_field


@dataclass(frozen=True, kw_only=True)
class ExportSettings(WithSize, WithThresholds):
    """`odtk export`."""

    model: str = model_field("pth", "checkpoint")
    output: str = option(
        dataclasses.MISSING,
        "file to write, or with --bundle a new folder",
        TEXT,
        "OUT.{onnx,plan,engine}",
        positional=True,
    )
    bundle: bool = switch(
        "write a folder that a server can take: the model as ONNX, and as an engine where a GPU is, its labels, "
        "settings, figures and a manifest with the hash of every file"
    )
    batch: tuple[int, ...] = option(
        ExportConfig.batch,
        "batch sizes that the file accepts and is tuned for",
        POSITIVE_INT,
        ("MIN", "OPT", "MAX"),
        count=3,
        flags=("--dynamic-batch-opts",),
    )
    input_type: str = option(
        ExportConfig.input_type,
        "of the RGB pixels, from 0 to 255, that the file takes; DeepStream gives float32",
        choices=INPUT_TYPES,
    )
    full_precision: bool = switch("fp32", shown="fp16")
    int8: bool = switch("int8, with fp16 where it would cost accuracy", shown="fp16")
    calibration_images: str | None = option(None, "images for --int8", TEXT, "DIR", shown="none")
    calibration_batches: int | None = option(
        None, "batches of calibration images to use", POSITIVE_INT, "N", shown="as many as hold 500 images"
    )
    calibration_table: str | None = option(
        None,
        "table of --int8: read instead of images when it exists, else written",
        TEXT,
        "PATH",
        shown="beside OUT",
    )
    calibration_method: str | None = option(
        None,
        "how the range of an activation is chosen",
        choices=CALIBRATION_METHODS,
        shown="; ".join(f"{method} with --head {head}" for head, method in CALIBRATION_METHOD_OF_HEAD.items()),
    )
    opset: int = option(ExportConfig.opset, "ONNX operator set", POSITIVE_INT, "N")
    rotated_bbox: bool = switch(
        "refuse a MODEL.pth without rotated boxes", shown="the checkpoint says which boxes it has"
    )
    timing_cache: str | None = option(None, "TensorRT's timing cache, read and updated", TEXT, "PATH", shown="none")
    hardware_compatible: bool = switch(
        "an engine that every GPU from Ampere on can run, slower than one for this GPU; DLA is not supported"
    )
    version_compatible: bool = switch(
        "an engine that newer TensorRT can run too; it contains code for the CPU, which odtk runs only where the "
        "environment has ODTK_ALLOW_HOST_CODE=1"
    )
    verify: bool = switch("run the written file beside PyTorch in fp32 on --annotations and --images")
    annotations: str | None = option(None, f"annotations for --verify: {FORMATS}", TEXT, "PATH", shown="none")
    images: str | None = option(None, "images for --verify", TEXT, "DIR", shown="beside the annotations")
    max_ap_drop: float = option(
        0.3,
        "points of AP (0 to 100) that --verify allows to be lost, else exit code 2, or 3 where the images cannot tell",
        NUMBER,
        "POINTS",
    )
    fed_as: tuple[str, ...] = option(
        (),
        "--verify measures the model of a bundle as the client for Triton, and as DeepStream feeds it too; exit code 2 "
        "names a mistake in that",
        TEXT,
        "NAME",
        count=(0, None),
        choices=("triton", "deepstream"),
        flags=("--as",),
        shown="as odtk feeds it only",
    )
    verbose: bool = switch("print the log of the conversion")
    devices: str | None = option(
        None,
        "cpu: no GPU is to be used",
        DEVICES,
        "N|cpu",
        shown="an .onnx is written on the CPU, an engine on the first GPU",
    )

    def check(self) -> None:
        suffix = os.path.splitext(self.output)[1]
        if self.bundle and suffix in (".onnx", ".plan", ".engine"):
            raise OdtkError(f"--bundle writes a folder: {self.output} names a file; omit one of them.")
        if not self.bundle and suffix not in (".onnx", ".plan", ".engine"):
            raise OdtkError(f"{self.output} must end in .onnx, .plan or .engine; a folder needs --bundle.")
        if self.devices and self.devices.startswith("cpu") and suffix in (".plan", ".engine"):
            raise OdtkError(f"--devices cpu: {self.output} is built on the GPU that will run it; an .onnx needs none.")
        if self.output.endswith(".onnx"):
            for name in ("hardware_compatible", "version_compatible"):
                if getattr(self, name):
                    raise OdtkError(f"{flag(name)} is for a .plan or .engine: {self.output} runs on any GPU.")
        if self.int8 and self.full_precision:
            raise OdtkError("--int8 contradicts --full-precision.")
        if self.int8 and not self.calibration_images and not self.calibration_table:
            raise OdtkError("--int8 needs --calibration-images DIR, or a --calibration-table PATH written earlier.")
        if self.verify and not self.annotations:
            raise OdtkError("--verify needs --annotations PATH and --images DIR.")
        if self.fed_as and not (self.bundle and self.verify):
            raise OdtkError(f"--as {' '.join(self.fed_as)} needs --bundle and --verify.")
        low, best, high = self.batch
        if not low <= best <= high:
            raise OdtkError(f"--batch {low} {best} {high}: the numbers are MIN, OPT and MAX, in rising order.")
