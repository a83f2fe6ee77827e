"""AP of a model as a deployment feeds it, beside the AP as odtk feeds it, and why the inputs differ.

``triton``: the bundle's client.py prepares the images. ``deepstream``: what nvinfer does to a frame by the bundle's
configuration, restated from the sources of NVIDIA/DeepStream 9.1 (commit 581889d): size and padding from
src/gst-plugins/gst-nvinfer/gstnvinfer.cpp, lines 1371 to 1515; color, scale and offsets from
src/utils/nvdsinfer/nvdsinfer_conversion.cu. Its resize itself is in a closed library: bilinear without a filter against
aliasing is assumed.
"""

from __future__ import annotations

import configparser
import dataclasses
import functools
import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image as PILImage

from ..config import ExportConfig, OdtkError
from ..data.batch import Batch
from ..data.images import ImageError
from ..data.loader import create_loader
from ..evaluation.bootstrap import Comparison, compare, matches_of
from ..evaluation.evaluate import filter_categories, metrics_of, run_cocoeval
from ..evaluation.report import Run, interval_of, signed
from ..evaluation.verify import Evaluator
from ..exporting.metadata import ENGINES, Metadata
from ..files import atomic_write
from ..inference.backends import Backend, open_backend
from ..inference.detect import Rows, detection_rows, gather_results
from ..postprocess import BatchDetections
from ..ranks import silent
from ..text import say

NAMES = {"triton": "Triton's client", "deepstream": "DeepStream"}
WHERE = {"triton": "triton/client.py", "deepstream": "deepstream/config_infer.txt"}
REPORT = "as_fed.json"  # in the folder of the deployment
FEW = 8  # images from which the cause is found: those whose inputs differ most
CLEAR = 0.5  # a cause explains a difference that is less than this share of what it was without it
NORMALIZED = 10.0  # pixels from 0 to 255 reach beyond it; those that a mean and a standard deviation normalized do not

# Pixels uint8 [h, w, 3] of an image → what is fed, [3, H, W]; (sx, sy), input pixels per pixel of the image; (x, y) of
# the image in the input.
Fed = tuple[np.ndarray, tuple[float, float], tuple[int, int]]
Feeder = Callable[[np.ndarray], Fed]


@dataclass(frozen=True)
class Feeding:
    """What nvinfer's configuration says of its input.

    Attributes:
        bgr: the color format is BGR, not RGB.
        scale, offsets: a value is scale · (pixel − offset of its channel).
        keep_aspect: frames are scaled by one factor and padded; else stretched.
        symmetric: padded at all sides, not at the right and the bottom.
        nearest: the nearest pixel is taken, not bilinearly.
    """

    bgr: bool = False
    scale: float = 1.0
    offsets: tuple[float, ...] = (0.0, 0.0, 0.0)
    keep_aspect: bool = False
    symmetric: bool = False
    nearest: bool = False

    @classmethod
    def read(cls, path: str) -> Feeding:
        """Those of a configuration file.

        Raises:
            OdtkError: it cannot be read.
        """
        parser = configparser.ConfigParser()
        try:
            if not parser.read(path, encoding="utf-8"):
                raise OdtkError(f"There is no configuration {path}.")
            group = parser["property"]
            offsets = tuple(float(value) for value in group.get("offsets", "0;0;0").strip("; ").split(";"))
            return cls(
                bgr=group.getint("model-color-format", 0) == 1,
                scale=group.getfloat("net-scale-factor", 1.0),
                offsets=offsets,
                keep_aspect=group.getboolean("maintain-aspect-ratio", False),
                symmetric=group.getboolean("symmetric-padding", False),
                nearest=group.getint("scaling-filter", 1) == 0,
            )
        except (configparser.Error, KeyError, ValueError) as error:
            raise OdtkError(f"{path} is not a configuration of nvinfer ({type(error).__name__}).") from error


def feed(pixels: np.ndarray, size: tuple[int, int], how: Feeding) -> Fed:
    """What nvinfer makes of a frame. Of a thin one at least a pixel is kept, where nvinfer may refuse it.

    Args:
        pixels: uint8 [h, w, 3], RGB.
        size: (H, W) of the input.

    Returns:
        float32 [3, H, W]; (sx, sy), input pixels per pixel of the frame; (x, y) of the frame in the input.
    """
    height, width = size
    even = [max(1, side // 2 * 2) for side in pixels.shape[:2]]  # whole pairs of pixels
    source = pixels[: even[0], : even[1]]
    rows, columns = source.shape[:2]
    inner = (height, width)
    if how.keep_aspect and width * rows / columns <= height:
        inner = (max(1, int(width * rows / columns)), width)
    elif how.keep_aspect:
        inner = (height, max(1, int(height * columns / rows)))
    planes = torch.from_numpy(np.ascontiguousarray(source.transpose(2, 0, 1)))[None].float()
    mode = {"mode": "nearest"} if how.nearest else {"mode": "bilinear", "align_corners": False}
    scaled = F.interpolate(planes, inner, **mode)[0].round().numpy()  # type: ignore[arg-type]
    x, y = ((width - inner[1]) // 2, (height - inner[0]) // 2) if how.symmetric and how.keep_aspect else (0, 0)
    canvas = np.zeros((3, height, width), np.float32)
    canvas[:, y : y + inner[0], x : x + inner[1]] = scaled
    if how.bgr:
        canvas = canvas[::-1]
    values = how.scale * (canvas - np.array(how.offsets, np.float32)[:, None, None])
    return np.ascontiguousarray(values, np.float32), (inner[1] / columns, inner[0] / rows), (x, y)


def deepstream_feeder(path: str, size: tuple[int, int]) -> Feeder:
    """What nvinfer does by the configuration ``path``.

    Raises:
        OdtkError: it cannot be read.
    """
    return functools.partial(feed, size=size, how=Feeding.read(path))


def triton_feeder(path: str, metadata: Metadata) -> Feeder:
    """What the client at ``path`` does, which is run for it.

    Raises:
        OdtkError: it cannot be run, or has no function ``prepare``.
    """
    spec = importlib.util.spec_from_file_location("odtk_triton_client", path)
    assert spec is not None and spec.loader is not None  # it ends in .py
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        prepare = module.prepare
    except (Exception, SystemExit) as error:
        raise OdtkError(f"{path} cannot be run: {type(error).__name__}: {error}.") from error
    facts = json.loads(metadata.to_json())

    def fed(pixels: np.ndarray) -> Fed:
        values, scale = prepare(PILImage.fromarray(pixels), facts)
        return values, scale, (0, 0)

    return fed


# ---------------------------------------------------------------------------------------------------------------------
# Causes

MISTAKES: dict[str, dict[str, Any]] = {
    "color order": {"bgr": True},
    "normalization twice": {"scale": 1 / 255},
    "symmetric padding": {"symmetric": True},
    "stretched": {"keep_aspect": False},
}


def differences(pixels: np.ndarray, fed: np.ndarray, ours: np.ndarray, how: Feeding, size: tuple[int, int]) -> float:
    """The mean difference of what was fed from what ``how`` makes of a frame, by nvinfer's resize or by odtk's."""
    made = [feed(pixels, size, how)[0]]
    if how.keep_aspect and not how.symmetric:
        made.append(how.scale * (ours[::-1] if how.bgr else ours))
    return min(float(np.abs(one - fed).mean()) for one in made)


# Of a frame: its pixels uint8 [h, w, 3], what was fed, and what odtk feeds, float32 [3, H, W].
Pair = tuple[np.ndarray, np.ndarray, np.ndarray]


def cause_of(pairs: list[Pair], size: tuple[int, int]) -> str:
    """Why inputs are not what the model was trained on.

    Each mistake is planted into a right feeding: the one that comes much nearer to what was fed than the right one, on
    the frames on which it makes a difference, is the cause. What is in no mistake lies inside the images (``resize
    filter``) or beyond them (``padding``).

    Args:
        pairs: of some frames.
        size: (H, W) of the input.
    """
    right = Feeding(keep_aspect=True)

    def distance(how: Feeding, some: list[Pair]) -> float:
        return float(np.mean([differences(pixels, fed, ours, how, size) for pixels, fed, ours in some]))

    if all(np.array_equal(fed, ours) for _, fed, ours in pairs):
        return "nothing"
    unlike = {}  # what a mistake leaves of the difference
    for name, change in MISTAKES.items():
        how = dataclasses.replace(right, **change)
        told = [one for one in pairs if not np.array_equal(feed(one[0], size, right)[0], feed(one[0], size, how)[0])]
        if told and (base := distance(right, told)):
            unlike[name] = distance(how, told) / base
    nearest = min(unlike, key=lambda name: unlike[name], default="")
    if nearest and unlike[nearest] < CLEAR:
        return nearest
    largest = max(float(np.abs(fed).max()) for _, fed, _ in pairs)
    if largest < NORMALIZED < max(float(pixels.max()) for pixels, _, _ in pairs):
        return "normalization twice"  # by a mean and a standard deviation
    inside, beyond = [], []
    for pixels, fed, ours in pairs:
        _, (sx, sy), _ = feed(pixels, size, right)
        bottom, edge = int(sy * pixels.shape[0]), int(sx * pixels.shape[1])
        difference = np.abs(fed - ours).mean(0)
        inside.append(difference[: max(0, bottom - 1), : max(0, edge - 1)].sum())
        # nvinfer cuts the size that odtk rounds, so the last row and column may differ
        beyond.append(difference[bottom + 1 :].sum() + difference[: bottom + 1, edge + 1 :].sum())
    return "padding" if sum(beyond) > sum(inside) else "resize filter"


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


@dataclass(frozen=True)
class FedVerdict:
    """What was found of a model as a server feeds it.

    Attributes:
        target: ``triton`` or ``deepstream``.
        ap, ap_fed: COCO AP as odtk feeds it, and as the deployment does.
        comparison: of the two, in points.
        cause: why the inputs differ, see cause_of.
    """

    target: str
    ap: float
    ap_fed: float
    comparison: Comparison
    cause: str

    @property
    def passed(self) -> bool:
        """Whether the loss is within, and its cause no mistake. With the same inputs it must not be beyond: AP can then
        still differ by the resize of another loader."""
        if self.cause == "nothing":
            return self.comparison.verdict != "beyond"
        return self.comparison.passed and self.cause not in MISTAKES

    @property
    def exit_code(self) -> int:
        """As of report.Verdict: 0; 2 for a loss beyond the limit or a mistake; 3 where the images cannot tell."""
        if self.passed:
            return 0
        return 2 if self.cause in MISTAKES or self.comparison.verdict == "beyond" else 3

    def lines(self) -> list[str]:
        """What was found, in one or two sentences."""
        change = f"{signed(-self.comparison.drop)} points ({interval_of(self.comparison)})"
        reason = "the inputs are the same" if self.cause == "nothing" else f"the inputs differ by: {self.cause}"
        figures = f"AP {self.ap_fed:.4f}, as odtk does {self.ap:.4f}; {change}"
        said = [f"As {NAMES[self.target]} feeds it: {figures}; {reason}."]
        if not self.passed:
            said.append(
                f"That is not how the model was trained: mend the {self.cause} in {WHERE[self.target]}."
                if self.cause in MISTAKES
                else f"That does not keep within the {self.comparison.allowed:g} points that it may lose."
            )
        return said

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**dataclasses.asdict(self), "verdict": self.comparison.verdict, "passed": self.passed}


def verify_as_fed(
    config: ExportConfig, target: str, ours: Run, *, annotations: str, images: str, max_ap_drop: float
) -> FedVerdict:
    """Measures the file ``config.output`` as the deployment feeds it; writes as_fed.json into the deployment's folder.

    Args:
        config: whose output is a model of a bundle, in its folder for ``deepstream``, and in the bundle itself for
            ``triton``.
        target: ``triton`` or ``deepstream``.
        ours: the same model on the same images, as odtk feeds it.
        annotations, images, max_ap_drop: as verify.verify's.

    Raises:
        OdtkError: what feeds the model cannot be read.
    """
    folder = os.path.dirname(config.output)
    device = "cuda:0" if config.output.endswith(ENGINES) else "cpu"
    evaluator = Evaluator(config, annotations, images, device)
    backend = open_backend(config.output, device=device, precision="fp32", thresholds=evaluator.thresholds, log=silent)
    if target == "deepstream":
        feeder = deepstream_feeder(os.path.join(folder, "config_infer.txt"), evaluator.size)
    else:
        folder = os.path.join(folder, target)
        assert backend.metadata is not None  # an exported file has some
        feeder = triton_feeder(os.path.join(folder, "client.py"), backend.metadata)
    pairs: list[tuple[float, Pair]] = []
    say(f"Running the model as {NAMES[target]} feeds it")
    rows = fed_rows(backend, evaluator, feeder, pairs, in_padding=target == "deepstream")
    results = gather_results(rows, evaluator.categories)
    scored = filter_categories(results, evaluator.ground_truth)
    evaluation = run_cocoeval(scored, evaluator.ground_truth, rotated=backend.rotated)
    found = compare(ours.matches, matches_of(evaluation), max_ap_drop)
    cause = cause_of([pair for _, pair in pairs], evaluator.size)
    verdict = FedVerdict(target, ours.metrics.ap, metrics_of(evaluation).ap, found, cause)
    for line in verdict.lines():
        say(line)
    with atomic_write(os.path.join(folder, REPORT)) as file:
        file.write(json.dumps(verdict.to_dict(), indent=1).encode())
    return verdict


def fed_rows(
    backend: Backend, evaluator: Evaluator, feeder: Feeder, pairs: list[tuple[float, Pair]], *, in_padding: bool
) -> Iterator[tuple[list[int], Rows]]:
    """The detections of each image, fed by ``feeder``; the FEW inputs that differ most from odtk's stay in ``pairs``.

    Args:
        in_padding: keep those that lie in the padding alone, as nvinfer does.
    """
    data = dataclasses.replace(evaluator.data, loader="torch")  # Pillow's resize; DALI's differs in the last bit
    for image, batch in zip(evaluator.dataset.images, create_loader(evaluator.dataset, data), strict=True):
        try:
            pixels = np.asarray(image.decode())
        except ImageError:
            continue  # the loader has named it
        values, scale, (x, y) = feeder(pixels)
        found = backend(torch.from_numpy(values)[None])
        pair = (pixels, values.astype(np.float32), batch.images[0].float().cpu().numpy())
        pairs.append((float(np.abs(pair[1] - pair[2]).mean()), pair))
        pairs.sort(key=lambda one: one[0], reverse=True)  # of equals the first stay
        del pairs[FEW:]
        shift = torch.zeros(found.boxes.shape[-1])
        shift[:4] = torch.tensor([x, y, x, y])
        moved = BatchDetections(found.scores, found.boxes - shift.to(found.boxes), found.classes)
        scales = torch.tensor([scale])
        sizes = None if in_padding else scales * torch.tensor([pixels.shape[1::-1]])
        fed = Batch(batch.images, batch.boxes, batch.labels, torch.tensor([image.id]), scales, sizes=sizes)
        yield [image.id], detection_rows(moved, fed)
