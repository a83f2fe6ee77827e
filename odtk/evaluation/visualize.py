"""Pictures: detections and ground truth on images, feature maps, anchors and the boxes they match, training curves."""

from __future__ import annotations

import difflib
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont
from torch import Tensor

from ..boxes import iou
from ..config import LoaderConfig, OdtkError
from ..data.batch import Batch
from ..data.coco import is_degenerate, is_id, load_json
from ..data.dataset import Dataset
from ..data.images import ImageError, decode
from ..data.loader import create_loader
from ..data.records import Image
from ..data.sampler import round_up
from ..files import make_folder
from ..model import checkpoint
from ..model.anchors import place_anchors
from ..model.detector import Detector
from ..ops import rotated_iou
from .drawing import Shape, annotate, beside, color, points, shapes
from .evaluate import STATS, check_detections, read_detections

MAX_MAPS = 64  # channels shown of a feature map
MAX_ANCHORS = 20  # drawn per box
# Anchors [P, 4|5], boxes [1, M, 4|5], labels [1, M] → the label and the box of each anchor: training.assign.assign.
Assign = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
SHOWN_SCORE = 0.3  # of detections that infer draws: those kept for the COCO figures begin at 0.05 and cover the image
RAMP = np.array([[13, 8, 135], [126, 3, 168], [204, 71, 120], [248, 149, 64], [240, 249, 33]])  # dark to bright


# ---------------------------------------------------------------------------------------------------------------------
# Detections and ground truth


def draw_detections(detections: Iterable[dict[str, Any]], writer: PictureWriter) -> list[str]:
    """One JPEG per image, with its detections (COCO results) above SHOWN_SCORE. Returns the paths."""
    by_image = grouped(d for d in detections if d["score"] > SHOWN_SCORE)
    return [writer.save(annotate(pixels, shapes(by_image[image.id])), image) for image, pixels in writer.pictures()]


def draw_results(
    path: str, data: LoaderConfig, folder: str, *, score_threshold: float, count: int | None = None
) -> list[str]:
    """Detections of a file above a score; with annotations the ground truth stands on the left of each picture."""
    writer = open_pictures(data, folder)
    by_image = grouped(d for d in drawable(path, writer.dataset) if d["score"] > score_threshold)
    truth, names = read_truth(data.annotations) if data.annotations else (grouped(()), {})
    written = []
    for image, pixels in writer.pictures(count):
        found = annotate(pixels, shapes(by_image[image.id], names))
        if data.annotations:
            found = beside(annotate(pixels, shapes(truth[image.id], names)), found)
        written.append(writer.save(found, image))
    return written


def draw_truth(data: LoaderConfig, folder: str, *, count: int | None = None) -> list[str]:
    """The annotations on their images, as they are written in the file."""
    assert data.annotations
    writer = open_pictures(data, folder)
    truth, names = read_truth(data.annotations)
    return [
        writer.save(annotate(pixels, shapes(truth[image.id], names)), image) for image, pixels in writer.pictures(count)
    ]


def drawable(path: str, dataset: Dataset) -> list[dict[str, Any]]:
    """The detections of a file, of images of a dataset and of any category.

    Raises:
        OdtkError: as of `odtk evaluate`, for the first that is malformed or of another image.
    """
    found = read_detections(path)
    entries = [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []
    categories = {id for entry in entries if is_id(id := entry.get("category_id"))}
    ids = {"images": [image.id for image in dataset.images], "categories": categories}
    check_detections(found, {what: [{"id": id} for id in known] for what, known in ids.items()}, path)
    return found


def read_truth(path: str) -> tuple[dict[int, list[dict[str, Any]]], dict[int, str]]:
    """Annotations by image, without degenerate boxes, and category names by id; of a file that Dataset accepts."""
    content = load_json(Path(path))
    names = {c["id"]: str(c.get("name", c["id"])) for c in content.get("categories", [])}
    return grouped(entry for entry in content.get("annotations", []) if not is_degenerate(entry["bbox"])), names


def has_angles(annotations: str) -> bool:
    """Whether a box of a COCO file has five numbers."""
    return any(len(entry.get("bbox") or ()) == 5 for entry in load_json(Path(annotations)).get("annotations", []))


def grouped(entries: Iterable[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    by_image: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for entry in entries:
        by_image[entry["image_id"]].append(entry)
    return by_image


@dataclass(frozen=True)
class PictureWriter:
    """A dataset, read once, and the folder for the pictures that are drawn of its images."""

    dataset: Dataset
    folder: Path
    originals: frozenset[Path]  # the images' own files, which no picture may replace

    def pictures(self, count: int | None = None) -> Iterator[tuple[Image, PILImage.Image]]:
        """The first `count` images."""
        for image in self.dataset.images[:count]:
            try:
                yield image, PILImage.fromarray(decode(image.path, image.orientation))
            except ImageError as error:
                raise OdtkError(f"Cannot draw on {image.path}: {error}.") from error

    def save(self, picture: PILImage.Image, image: Image, ending: str = ".jpg") -> str:
        """Writes the picture of an image, and returns its path."""
        path = self.folder / f"{image.path.stem}_{image.id}{ending}"
        if path.resolve() in self.originals:
            raise OdtkError(f"{path} is an image of the dataset: draw into another folder.")
        try:
            picture.save(path, quality=92)  # of a JPEG; PNG has none
        except OSError as error:
            raise OdtkError(f"Cannot write {path}: {error.strerror or error}.") from error
        return str(path)


def open_pictures(data: LoaderConfig, folder: str, *, rotated: bool | None = None) -> PictureWriter:
    """Reads a dataset (rotated: None, as its annotations are) and creates the folder for its pictures.

    Raises:
        OdtkError: a folder whose pictures would lie among the images, where the next run would take them for images.
    """
    images, target = Path(data.images).expanduser().resolve(), Path(folder).resolve()
    listed = data.annotations is None  # with its subfolders
    if target == images or listed and images in target.parents:
        raise OdtkError(f"Pictures in {folder} would lie among the images of {data.images}: draw into another folder.")
    if rotated is None:
        rotated = data.annotations is not None and has_angles(data.annotations)
    dataset = Dataset.load(data.annotations, data.images, rotated=rotated)
    return PictureWriter(dataset, make_folder(folder), frozenset(image.path.resolve() for image in dataset.images))


# ---------------------------------------------------------------------------------------------------------------------
# Inside a model


def draw_features(path: str, layer: str, data: LoaderConfig, folder: str, *, count: int) -> list[str]:
    """Grids of what a layer gives for the first images: a PNG per image and level, each map over its own range.

    Args:
        path: checkpoint.
        layer: a module's name (``backbones.ResNet50FPN.features.layer4``), or its end (``layer4``).

    Raises:
        OdtkError: there is no such layer, or it gives no feature maps [N, C, h, w].
    """
    detector = checkpoint.build(checkpoint.load(path)).eval()
    writer = open_pictures(data, folder, rotated=detector.config.rotated)
    name, module = find_layer(detector, layer)
    while isinstance(module, torch.nn.Sequential):  # whose parts may be called one by one; the last gives its output
        module = module[-1]
    outputs: list[Tensor] = []
    handle = module.register_forward_hook(lambda _module, _inputs, output: outputs.extend(feature_maps(output)))
    written = []
    for image, batch in inputs(detector, writer.dataset, data, count):
        outputs.clear()
        with torch.inference_mode():
            detector(batch.images)
        if not outputs:
            raise OdtkError(f"The layer {name} gives no feature maps: choose one inside a backbone.")
        for level, maps in enumerate(outputs):
            title = f"{name}  {tuple(maps.shape[1:])}  {min(MAX_MAPS, maps.shape[1])} of {maps.shape[1]} channels"
            grid = feature_grid(maps[0], title, picture_of(batch, data))
            written.append(writer.save(grid, image, f"_{name}_{level}.png"))
    handle.remove()
    return written


def find_layer(detector: Detector, layer: str) -> tuple[str, torch.nn.Module]:
    """A module by its whole name, or by the end of its name where only one has it."""
    modules = {name: module for name, module in detector.named_modules() if name}
    if layer in modules:
        return layer, modules[layer]
    ends = [name for name in modules if name.endswith(f".{layer}")]
    if len(ends) == 1:
        return ends[0], modules[ends[0]]
    holding = sorted((name for name in modules if layer.lower() in name.lower()), key=len)
    near = ends or holding or difflib.get_close_matches(layer, modules, cutoff=0.3) or list(modules)
    raise OdtkError(f"There is no single layer {layer}: try {', '.join(near[:6])}.")


def feature_maps(output: Any) -> list[Tensor]:
    """The tensors [N, C, h, w] in what a module returned."""
    if isinstance(output, Tensor):
        return [output.float()] if output.dim() == 4 else []
    if isinstance(output, (list, tuple)):
        return [maps for part in output for maps in feature_maps(part)]
    return []


def feature_grid(maps: Tensor, title: str, image: PILImage.Image) -> PILImage.Image:
    """The first channels of maps [C, h, w] as colored tiles, the input on the left."""
    maps = maps[:MAX_MAPS]
    columns = math.ceil(math.sqrt(len(maps)))
    rows = math.ceil(len(maps) / columns)
    height, width = maps.shape[1:]
    factor = max(1, round(96 / max(height, width)))
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    scaled = ((maps - low) / (high - low).clamp(min=1e-12)).cpu().numpy()  # [C, h, w] in [0, 1]
    position = scaled * (len(RAMP) - 1)
    colored = np.stack([np.interp(position, range(len(RAMP)), RAMP[:, c]) for c in range(3)], axis=-1)
    tile_w, tile_h = width * factor + 2, height * factor + 2
    font = ImageFont.load_default(16)
    header = 28
    side = image.resize((max(1, round(image.width * rows * tile_h / image.height)), rows * tile_h))
    canvas = PILImage.new("RGB", (side.width + 8 + columns * tile_w, header + rows * tile_h), "white")
    ImageDraw.Draw(canvas).text((4, 4), title, fill="black", font=font)
    canvas.paste(side, (0, header))
    for i, tile in enumerate(colored.astype(np.uint8)):
        picture = PILImage.fromarray(tile).resize((width * factor, height * factor), PILImage.Resampling.NEAREST)
        canvas.paste(picture, (side.width + 8 + i % columns * tile_w, header + i // columns * tile_h))
    return canvas


def draw_anchors(path: str, data: LoaderConfig, assign: Assign, folder: str, *, count: int) -> list[str]:
    """Which anchors match which boxes: each box with the anchors that training would give it, a PNG per image.

    Boxes that no anchor reaches are red, with their best anchor. The label says how many anchors match (the best
    MAX_ANCHORS are drawn), on which stride the best one stands, and its IoU.
    """
    detector = checkpoint.build(checkpoint.load(path))
    if detector.config.head == "fcos":
        raise OdtkError("--anchors is of the retinanet head: the fcos head has points, not anchors.")
    writer = open_pictures(data, folder, rotated=detector.config.rotated)
    written = []
    for image, batch in inputs(detector, writer.dataset, data, count):
        picture = annotate(picture_of(batch, data), anchor_shapes(detector, batch, assign))
        written.append(writer.save(picture, image, "_anchors.png"))
    return written


def anchor_shapes(detector: Detector, batch: Batch, assign: Assign) -> list[Shape]:
    """Boxes of a batch of one image and their anchors, in pixels of the network's input."""
    height, width = batch.images.shape[2:]
    cells = [(math.ceil(height / stride), math.ceil(width / stride)) for stride in detector.strides]
    anchors = place_anchors(detector.anchors(), detector.strides, cells, torch.device("cpu"))  # [P, 4|5]
    per_cell = detector.config.num_anchors
    stride_of = torch.cat(
        [torch.full((h * w * per_cell,), s) for (h, w), s in zip(cells, detector.strides, strict=True)]
    )
    labels, index = assign(anchors, batch.boxes, batch.labels)
    found = []
    for i in (batch.labels[0] >= 0).nonzero()[:, 0].tolist():
        box = batch.boxes[0, i]
        overlaps = (rotated_iou if detector.config.rotated else iou)(box[None], anchors)[0]  # [P]
        best = int(overlaps.argmax())
        matched = ((labels[0] >= 0) & (index[0] == i)).nonzero()[:, 0]
        tint = color(i + 1) if len(matched) else (255, 0, 0)
        shown = matched[overlaps[matched].argsort(descending=True)][:MAX_ANCHORS]
        found += [Shape(points(anchors[a]), tint, weight=0) for a in (shown.tolist() or [best])]
        label = f"{len(matched)} anchors, stride {int(stride_of[best])}, IoU {overlaps[best]:.2f}"
        found.append(Shape(points(box), tint, label, weight=2))
    return found


def inputs(detector: Detector, dataset: Dataset, data: LoaderConfig, count: int) -> Iterator[tuple[Image, Batch]]:
    """The first images as the detector gets them, one per batch."""
    size = round_up(data.size, detector.stride) if data.size else None
    data = replace(data, batch=1, training=False, size=size, stride=detector.stride, rotated=detector.config.rotated)
    dataset = replace(dataset, images=dataset.images[:count])
    by_id = {image.id: image for image in dataset.images}
    for batch in create_loader(dataset, data):
        yield by_id[int(batch.ids[0])], batch


def picture_of(batch: Batch, data: LoaderConfig) -> PILImage.Image:
    """The first image of a batch, its normalization undone."""
    mean, std = torch.tensor(data.mean)[:, None, None], torch.tensor(data.std)[:, None, None]
    pixels = ((batch.images[0].cpu() * std + mean) * 255).round().clamp(0, 255).byte()
    return PILImage.fromarray(pixels.permute(1, 2, 0).numpy())  # [3, H, W] -> [H, W, 3]


# ---------------------------------------------------------------------------------------------------------------------
# Training curves


def draw_curves(logdir: str, folder: str) -> list[str]:
    """Losses, learning rate, speed and validation figures of LOGDIR/metrics.jsonl (train.Report) in one PNG.

    Raises:
        OdtkError: no such file, nothing in it, or matplotlib is not installed.
    """
    try:
        import matplotlib

        matplotlib.use("agg")  # draws without a display
        from matplotlib import pyplot
    except ImportError as error:
        raise OdtkError("Training curves need matplotlib: pip install 'odtk[plot]'.") from error
    curves = read_curves(Path(logdir) / "metrics.jsonl")
    panels: dict[str, list[str]] = defaultdict(list)
    for name in curves:
        panels[panel_of(name)].append(name)
    figure, axes = pyplot.subplots(len(panels), 1, sharex=True, squeeze=False, figsize=(9, 2.6 * len(panels)))
    for axis, (title, names) in zip(axes[:, 0], panels.items(), strict=True):
        for name in names:
            x, y = zip(*curves[name], strict=True)
            axis.plot(x, y, label=name, linewidth=1.2, marker="o" if len(x) < 30 else None, markersize=3)
        axis.set_ylabel(title)
        axis.grid(alpha=0.3)
        if len(names) > 1:
            axis.legend(fontsize=8, ncols=3, framealpha=0.6)
    axes[-1, 0].set_xlabel("iteration")
    figure.tight_layout()
    path = make_folder(folder) / "curves.png"
    try:
        figure.savefig(path, dpi=110)
    except OSError as error:
        raise OdtkError(f"Cannot write {path}: {error.strerror or error}.") from error
    finally:
        pyplot.close(figure)
    return [str(path)]


def panel_of(name: str) -> str:
    """Which plot a recorded value stands in."""
    if name in STATS:
        return f"validation {name[:2]}"
    return {"lr": "learning rate", "images_per_second": "images per second"}.get(name, "loss")


def read_curves(path: Path) -> dict[str, list[tuple[int, float]]]:
    """(iteration, value) by name. Where a resumed run went back, the second pass counts; a torn last line does not."""
    if not path.is_file():
        raise OdtkError(f"There is no {path}: train with --logdir {path.parent} to have it written.")
    records: list[dict[str, Any]] = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        while records and records[-1]["iteration"] > record["iteration"]:
            records.pop()
        records.append(record)
    curves: dict[str, dict[int, float]] = defaultdict(dict)
    for record in records:
        for name, value in record.items():
            empty = name in STATS and value < 0  # nothing of that size was to be found
            if name not in ("iteration", "time") and isinstance(value, (int, float)) and not empty:
                curves[name][record["iteration"]] = value
    if not curves:
        raise OdtkError(f"{path} has no figures yet.")
    return {name: list(values.items()) for name, values in curves.items()}
