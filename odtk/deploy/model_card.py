"""The model card of a bundle: what the model is, what it was trained on, and only figures that were measured."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import numpy as np

from .. import __version__
from ..data.batch import nearest_pixels
from ..evaluation.report import Verdict, interval_of, signed
from ..exporting.metadata import Metadata
from ..model.checkpoint import Checkpoint
from ..text import plural, printable
from .as_fed import FedVerdict

TRAINED_ON = ("annotations", "images", "val_annotations", "val_images")
TRAINED_HOW = ("iters", "epochs", "batch", "lr", "optimizer", "backbone", "head", "backbone_weights", "seed")


def now() -> str:
    """Date and time in UTC."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())


def model_card(
    checkpoint: Checkpoint,
    metadata: Metadata,
    verdicts: Mapping[str, Verdict],
    fed: Sequence[FedVerdict] = (),
    *,
    command: str,
    created: str,
    images: str | None,
) -> str:
    """The text of the card, Markdown.

    Args:
        verdicts: what was measured, by file.
        fed: what was measured of models as they are fed.
        command: the export's.
        created: date and time of the export.
        images: folder of the images on which was measured; None if nothing was.
    """
    model = checkpoint.model
    height, width = metadata.size
    padding = ", ".join(f"{value:g}" for value in padding_pixel(metadata))
    boxes = "x1, y1, x2, y2" + (", sine and cosine of the angle" if metadata.rotated else "")
    lines = [
        f"# Detector of {plural(metadata.classes, 'class', 'classes')}",
        f"{' + '.join(model.backbones)}, head {model.head}; weights {metadata.model}. Exported {created} by odtk "
        f"{__version__}:",
        "",
        f"    {printable(command)}",
        "",
        "## Input and output",
        f"- `images`: {metadata.input_type} [N, 3, {height}, {width}], RGB pixels from 0 to 255. An image is scaled to "
        f"fit, its aspect kept, and padded with the pixel ({padding}) at the right and the bottom. The normalization "
        "is in the file.",
        f"- `scores` [N, D], `boxes` [N, D, {metadata.box_values}] ({boxes} in pixels of the input, inclusive "
        f"corners), `classes` [N, D]{outputs_of(metadata)}",
        f"- precision {metadata.precision}; scores above {metadata.score_threshold:g}, NMS at "
        f"{metadata.nms_threshold:g}.",
        "- classes: labels.txt, in the order of the class indices.",
        "",
        "## Training",
        *training_lines(checkpoint),
        "",
        "## Measured",
        *measured_lines(metadata, verdicts, created, images),
        *(f"- {line}" for one in fed for line in one.lines()),
        "",
    ]
    return "\n".join(lines)


def padding_pixel(metadata: Metadata) -> list[float]:
    """The RGB, from 0 to 255, of the pixels beyond an image, as an exported file takes them."""
    if metadata.padding == "black":
        return [0.0, 0.0, 0.0]
    exact = 255 * np.array(metadata.mean)
    return (nearest_pixels(exact) if metadata.input_type == "uint8" else exact).tolist()


def outputs_of(metadata: Metadata) -> str:
    """What the rows of the outputs are."""
    if metadata.postprocessing == "candidates":
        return ": candidates before NMS, as ONNX has none for rotated boxes; `odtk infer` applies it."
    return f", D = {metadata.detections}; rows of score 0 are unused."


def training_lines(checkpoint: Checkpoint) -> list[str]:
    """What a checkpoint says of its training."""
    if checkpoint.settings is None:
        return ["The checkpoint does not say how it was trained."]
    lines = [
        f"- {name}: {printable(checkpoint.settings[name])}"
        for name in (*TRAINED_ON, *TRAINED_HOW)
        if checkpoint.settings.get(name) is not None
    ]
    return [*lines, "- every setting: train.yaml"]


def measured_lines(metadata: Metadata, verdicts: Mapping[str, Verdict], created: str, images: str | None) -> list[str]:
    """A table of what was measured, or that nothing was."""
    if not verdicts:
        return ["Nothing was measured with this export: `odtk export … --bundle --verify --annotations JSON` does."]
    lines = [
        f"On the images of {printable(images)}, {created}, by the command above:",
        "",
        "| file | run as | AP | AP50 | change in points (95% interval) | ms per image |",
        "|---|---|---|---|---|---|",
    ]
    for name, verdict in verdicts.items():
        for run, found in zip(verdict.runs, verdict.comparisons, strict=True):
            change = f"{signed(-found.drop)} ({interval_of(found)})"
            figures = f"{run.metrics.ap:.4f} | {run.metrics.ap50:.4f} | {change} | {run.latency:.1f}"
            lines.append(f"| {name} | {run.name} | {figures} |")
        passed = "passed" if verdict.passed else "did not pass"
        allowed = verdict.comparison.allowed
        if metadata.precision == "int8":
            lines.append(f"\nKept in FP16: {', '.join(verdict.fp16_layers) or 'no convolution'}.")
        lines.append(f"\n{name} {passed}: it may lose {allowed:g} points; {name}.verify.html has the details.\n")
    return lines
