"""What is told of models and detections: `odtk evaluate`, `odtk visualize` and `odtk info`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from ..config import LossConfig, OdtkError
from .base import Settings
from .fields import FRACTION, POSITIVE_INT, TEXT, option, switch
from .shared import FORMATS, WithResize, WithSize, rising


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings(Settings):
    """`odtk evaluate`."""

    detections: str = option(
        dataclasses.MISSING, "COCO results, such as `odtk infer` writes", TEXT, "DETECTIONS.json", positional=True
    )
    annotations: str = option(dataclasses.MISSING, f"annotations of the same images: {FORMATS}", TEXT, "PATH")
    images: str | None = option(
        None, "folder of the images, which give YOLO's boxes their size", TEXT, "DIR", shown="beside the annotations"
    )
    segmentation: bool = switch(
        "overlap of masks; rotated boxes count as polygons", shown="off: of boxes, rotated if they are"
    )
    evaluator: str = option(
        "pycocotools",
        "what computes the figures; faster-coco-eval (an extra package) is quicker on large sets",
        choices=("pycocotools", "faster-coco-eval"),
    )
    output: str | None = option(None, "write the figures there too", TEXT, "JSON", shown="none")
    report: str | None = option(
        None,
        "write a page for the browser: intervals, thresholds, confusion, sizes, errors with pictures",
        TEXT,
        "HTML",
        shown="none",
    )

    def check(self) -> None:
        super().check()
        if self.report and not self.report.lower().endswith((".html", ".htm")):
            raise OdtkError(f"--report {self.report}: the name of the page must end in .html.")
        if self.report and self.evaluator != "pycocotools":
            raise OdtkError(
                f"--report needs --evaluator pycocotools, as {self.evaluator} does not say what it matched."
            )


@dataclass(frozen=True, kw_only=True)
class VisualizeSettings(WithSize, WithResize):
    """`odtk visualize`."""

    model: str | None = option(
        None, "checkpoint, for --features and --anchors", TEXT, "MODEL.pth", positional=True, shown="none"
    )
    images: str | None = option(None, "folder of the images", TEXT, "DIR", shown="beside the annotations")
    annotations: str | None = option(
        None, f"draws the ground truth of annotations: {FORMATS}", TEXT, "PATH", shown="none"
    )
    detections: str | None = option(
        None, "COCO results: draws the detections, beside the ground truth", TEXT, "JSON", shown="none"
    )
    score_threshold: float = option(0.3, "draw detections above this score", FRACTION, "SCORE")
    features: str | None = option(
        None, "draw the feature maps of this layer of MODEL.pth, for example layer4", TEXT, "LAYER", shown="none"
    )
    anchors: bool = switch("draw which anchors match which boxes")
    anchor_ious: tuple[float, ...] = option(
        (LossConfig.background_iou, LossConfig.foreground_iou),
        "bounds of the match, as in training",
        FRACTION,
        ("BG", "FG"),
        count=2,
    )
    curves: str | None = option(None, "draw the training curves of LOGDIR/metrics.jsonl", TEXT, "LOGDIR", shown="none")
    count: int = option(16, "images to draw", POSITIVE_INT, "N")
    output: str = option("pictures", "folder for the pictures", TEXT, "DIR")

    def check(self) -> None:
        rising("--anchor-ious", self.anchor_ious)
        if (self.features or self.anchors) and not self.model:
            raise OdtkError("--features and --anchors need MODEL.pth.")
        if self.anchors and not self.annotations:
            raise OdtkError("--anchors needs --annotations PATH.")


@dataclass(frozen=True, kw_only=True)
class InfoSettings(Settings):
    """`odtk info`."""

    model: str | None = option(
        None, "file or bundle to tell about", TEXT, "MODEL", positional=True, shown="this machine"
    )
    json: bool = switch("as JSON", shown="a table")
