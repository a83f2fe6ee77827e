"""Draws a small dataset of shapes in COCO format, so that everything can be tried without a download.

Shapes of random color, size and angle lie on uneven, noisy backgrounds; their boxes are exact. With ``rotated`` the
shapes are elongated and their boxes are [x, y, w, h, theta], theta counterclockwise in radians.
"""

from __future__ import annotations

import colorsys
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PILImage
from PIL import ImageDraw

from ..config import OdtkError
from ..settings import SynthSettings

ELONGATION = (0.4, 0.65)  # height over width of a rotated shape
OVERLAP = 0.1  # largest part of the smaller of two boxes that the other may cover
SMOOTHING = 3  # shapes are drawn this many times larger and then reduced, for smooth edges
JPEG_QUALITY = 90
CREATOR = "odtk synth"  # in the JSON's "info": marks the files that may be drawn again


@dataclass(frozen=True)
class Scene:
    """What the images are like.

    Attributes:
        sides: range of the shapes' widths, relative to the image's shorter side; log-uniform.
        objects: least and greatest number of attempts to place a shape in an image.
        imbalance: how many times as frequent the first class is as the last; those between fall geometrically.
        gray: the images have no color.
        clutter: pieces of lines and blobs for each image, which are no objects.
    """

    sides: tuple[float, ...] = SynthSettings.object_size
    objects: tuple[int, ...] = SynthSettings.objects
    imbalance: float = SynthSettings.imbalance
    gray: bool = SynthSettings.gray
    clutter: int = SynthSettings.clutter

    def shares(self, classes: int) -> np.ndarray:
        """The probability of each class [classes]."""
        weights = self.imbalance ** -np.linspace(0, 1, classes)
        return weights / weights.sum()


def _regular(corners: int, inner: float = 1.0) -> np.ndarray:
    """Points [corners, 2] on the unit circle, every second at radius ``inner``: regular polygons, circles, stars."""
    angle = 2 * math.pi * np.arange(corners) / corners - math.pi / 2
    radius = np.where(np.arange(corners) % 2 == 0, 1.0, inner)[:, None]
    return radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)


# Outlines [corners, 2] (x, y), y down; _place scales them to a box with sides of 1.
SHAPES = {
    "circle": _regular(48),
    "square": np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]),
    "triangle": np.array([[0, -1], [1, 1], [-1, 1]]),
    "star": _regular(10, inner=0.42),
    "cross": np.array(
        [[-1, 1], [-1, 3], [1, 3], [1, 1], [3, 1], [3, -1], [1, -1], [1, -3], [-1, -3], [-1, -1], [-3, -1], [-3, 1]]
    ),
    "arrow": np.array([[-3, -1], [0, -1], [0, -3], [3, 0], [0, 3], [0, 1], [-3, 1]]),
    "hexagon": _regular(6),
    "moon": np.concatenate([_regular(48)[24:], (_regular(48)[24:] * [0.45, 1])[::-1]]),
}
ROTATED_SHAPES = {"ellipse": "circle", "rectangle": "square"} | {
    name: name for name in ("arrow", "triangle", "star", "cross", "hexagon", "moon")
}  # an elongated circle or square has another name


def synthesize(
    folder: str | Path,
    *,
    images: int = SynthSettings.images,
    size: tuple[int, ...] = SynthSettings.size,
    seed: int = SynthSettings.seed,
    classes: int = SynthSettings.classes,
    rotated: bool = SynthSettings.rotated,
    scene: Scene | None = None,
) -> None:
    """Draws ``folder``/{train,val}/*.jpg and {train,val}.json; a fifth of the images is for validation.

    Args:
        images: number of images in both sets together, at least 2.
        size: height and width in pixels, at least 64.
        seed: the same seed draws the same files.
        classes: number of different shapes, 1…8.
        rotated: elongated shapes with boxes [x, y, w, h, theta].
        scene: what the images are like; None: colorful, with 2 to 7 large shapes of all classes alike.

    Raises:
        OdtkError: a number is out of its range, the folder has files that were not drawn by this function, or it
            cannot be written.
    """
    names = list(ROTATED_SHAPES if rotated else SHAPES)
    if not 1 <= classes <= len(names):
        raise OdtkError(f"There are {len(names)} shapes to draw: --classes must be 1 to {len(names)}, not {classes}.")
    if images < 2 or min(size) < 64:
        raise OdtkError(
            f"A dataset needs at least 2 images of at least 64×64 pixels, not {images} of {size[1]}×{size[0]}."
        )
    folder = Path(folder).expanduser()
    held_out = max(1, images // 5)
    try:
        _check_ours(folder)
        for part, count in (("train", images - held_out), ("val", held_out)):
            generator = np.random.default_rng([seed, part == "val"])
            _draw_part(folder, part, count, (size[0], size[1]), names[:classes], rotated, generator, scene or Scene())
    except OSError as error:
        raise OdtkError(f"The dataset cannot be written to {folder}: {error}.") from None


def _check_ours(folder: Path) -> None:
    """Refuses a folder in which something would be lost: only a set whose JSON is ours is drawn again."""
    for part in ("train", "val"):
        path = folder / f"{part}.json"
        if path.exists():
            try:
                ours = json.loads(path.read_text()).get("info", {}).get("description") == CREATOR
            except (ValueError, AttributeError, OSError):
                ours = False
            if not ours:
                raise OdtkError(f"{path} exists and was not drawn by odtk synth: choose another folder.")
        elif (folder / part).is_dir() and any((folder / part).iterdir()):
            raise OdtkError(f"{folder / part} has files that were not drawn by odtk synth: choose another folder.")


def _draw_part(
    folder: Path,
    part: str,
    count: int,
    size: tuple[int, int],
    names: list[str],
    rotated: bool,
    generator: np.random.Generator,
    scene: Scene,
) -> None:
    """Draws one of the two sets: its images and its JSON."""
    (folder / part).mkdir(parents=True, exist_ok=True)
    path = folder / f"{part}.json"
    # Written first, so that a folder left by an interrupted run counts as ours.
    path.write_text(json.dumps({"info": {"description": CREATOR}, "images": []}))
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for id in range(1, count + 1):
        pixels, objects = draw_image(generator, size, names, rotated, scene)
        name = f"{id:05d}.jpg"
        pixels.save(folder / part / name, quality=JPEG_QUALITY)
        images.append({"id": id, "file_name": name, "width": size[1], "height": size[0]})
        for entry in objects:
            annotations.append({"id": len(annotations) + 1, "image_id": id, "iscrowd": 0, **entry})
    content = {
        "info": {"description": CREATOR},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for i, name in enumerate(names, start=1)],
    }
    path.write_text(json.dumps(content))


def draw_image(
    generator: np.random.Generator, size: tuple[int, int], names: list[str], rotated: bool, scene: Scene | None = None
) -> tuple[PILImage.Image, list[dict[str, Any]]]:
    """One image of ``size`` (height, width) pixels and its COCO annotations (category_id, bbox, area, segmentation)."""
    scene = scene or Scene()
    canvas, base = _background(generator, size)
    painter = ImageDraw.Draw(canvas)
    _scatter(painter, generator, size, base, scene.clutter)
    objects: list[dict[str, Any]] = []
    hulls: list[np.ndarray] = []
    for _ in range(generator.integers(scene.objects[0], scene.objects[1] + 1)):
        if scene.imbalance == 1:
            label = int(generator.integers(len(names)))
        else:
            label = int(generator.choice(len(names), p=scene.shares(len(names))))
        outline, box, theta = _place(generator, size, names[label], rotated, scene.sides)
        hull = np.concatenate([outline.min(axis=0), outline.max(axis=0)])
        if any(_covered(hull, other) > OVERLAP for other in hulls):
            continue  # no room here: one object less
        hulls.append(hull)
        _paint(painter, generator, outline, base)
        corners = _rotate(box[2:] * [[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5]], theta) + box[:2] + box[2:] / 2
        objects.append(
            {
                "category_id": label + 1,
                "bbox": [round(float(value), 2) for value in box] + ([round(theta, 5)] if rotated else []),
                "area": round(float(box[2] * box[3]), 2),
                "segmentation": [np.round(corners if rotated else outline, 2).reshape(-1).tolist()],  # [k, 2] → [2·k]
            }
        )
    picture = np.asarray(canvas.resize(size[::-1], PILImage.Resampling.BOX)).astype(np.float64)
    noise = generator.normal(0, generator.uniform(2, 9), picture.shape)
    drawn = PILImage.fromarray(np.clip(picture + noise, 0, 255).astype(np.uint8))
    return drawn.convert("L").convert("RGB") if scene.gray else drawn, objects


def _scatter(
    painter: ImageDraw.ImageDraw,
    generator: np.random.Generator,
    size: tuple[int, int],
    base: np.ndarray,
    count: int,
) -> None:
    """Draws pieces of lines and blobs that are no objects, in colors near and far from the background's."""
    for _ in range(count):
        center = generator.random(2) * size[::-1] * SMOOTHING
        reach = min(size) * SMOOTHING * generator.uniform(0.01, 0.1, 2)
        color = tuple(np.clip(base + generator.normal(0, 60, 3), 0, 255).astype(int).tolist())
        corners = [*(center - reach).tolist(), *(center + reach).tolist()]
        if generator.random() < 0.5:
            painter.line(corners, fill=color, width=int(generator.integers(SMOOTHING, 3 * SMOOTHING)))
        else:
            start, end = generator.uniform(0, 360, 2).tolist()
            painter.chord(corners, start, end, fill=color)


def _background(generator: np.random.Generator, size: tuple[int, int]) -> tuple[PILImage.Image, np.ndarray]:
    """An enlarged canvas of smooth patches of one hue, crossed by faint lines, and its mean RGB."""
    hue, value = generator.random(), generator.uniform(0.25, 0.85)
    base = np.array(colorsys.hsv_to_rgb(hue, generator.uniform(0.05, 0.35), value)) * 255
    cells = generator.integers(3, 9)
    light, tint = generator.normal(0, 18, (cells, cells, 1)), generator.normal(0, 6, (cells, cells, 3))
    patches = np.clip(base + light + tint, 0, 255)
    large = (size[1] * SMOOTHING, size[0] * SMOOTHING)
    canvas = PILImage.fromarray(patches.astype(np.uint8)).resize(large, PILImage.Resampling.BICUBIC)
    painter = ImageDraw.Draw(canvas)
    for _ in range(generator.integers(0, 5)):
        ends = (generator.random((2, 2)) * large).reshape(-1).tolist()  # [2, 2] → [4]
        color = tuple(np.clip(base + generator.normal(0, 30), 0, 255).astype(int).tolist())
        painter.line(ends, fill=color, width=int(generator.integers(1, 3 * SMOOTHING)))
    return canvas, base


def _place(
    generator: np.random.Generator, size: tuple[int, int], name: str, rotated: bool, sides: tuple[float, ...]
) -> tuple[np.ndarray, np.ndarray, float]:
    """Places a shape inside an image of ``size`` (height, width), in pixels.

    Returns:
        Its outline [k, 2] (x, y), its box (x, y, w, h), which for a rotated shape is that before the rotation, and
        theta in radians (0 unless rotated).
    """
    outline = SHAPES[ROTATED_SHAPES[name] if rotated else name]
    low, high = outline.min(axis=0), outline.max(axis=0)
    outline = (outline - (low + high) / 2) / (high - low)
    width = min(size) * math.exp(generator.uniform(math.log(sides[0]), math.log(sides[1])))
    ratio = generator.uniform(*ELONGATION) if rotated else generator.uniform(0.85, 1.18)
    theta = generator.uniform(-math.pi, math.pi) if rotated else generator.normal(0, 0.25)
    box = np.array([width, width * ratio])
    outline = _rotate(outline * box, theta)
    low, high = outline.min(axis=0), outline.max(axis=0)
    corner = 1 + generator.random(2) * (np.array(size[::-1]) - (high - low) - 2)
    center = corner - low
    if rotated:
        return outline + center, np.concatenate([center - box / 2, box]), theta
    return outline + center, np.concatenate([corner, high - low]), 0.0


def _rotate(points: np.ndarray, theta: float) -> np.ndarray:
    """Points [k, 2] rotated counterclockwise about the origin (y down): (x, y) → (cos·x + sin·y, −sin·x + cos·y)."""
    cos, sin = math.cos(theta), math.sin(theta)
    return points @ np.array([[cos, -sin], [sin, cos]])


def _covered(hull: np.ndarray, other: np.ndarray) -> float:
    """The intersection of two boxes (x1, y1, x2, y2) relative to the area of the smaller."""
    overlap = np.clip(np.minimum(hull[2:], other[2:]) - np.maximum(hull[:2], other[:2]), 0, None).prod()
    return float(overlap / min((hull[2:] - hull[:2]).prod(), (other[2:] - other[:2]).prod()))


def _paint(
    painter: ImageDraw.ImageDraw, generator: np.random.Generator, outline: np.ndarray, background: np.ndarray
) -> None:
    """Draws a filled outline with a darker rim and a shadow, in a color that differs from the background."""
    while True:
        hsv = generator.random(), generator.uniform(0.35, 1), generator.uniform(0.2, 1)
        color = np.array(colorsys.hsv_to_rgb(*hsv)) * 255
        if np.abs(color - background).sum() > 150:
            break
    points = outline * SMOOTHING
    shadow = [tuple(point) for point in (points + 2 * SMOOTHING).tolist()]
    painter.polygon(shadow, fill=tuple((background * 0.75).astype(int).tolist()))
    corners = [tuple(point) for point in points.tolist()]
    painter.polygon(corners, fill=tuple(color.astype(int).tolist()))
    rim = tuple((color * 0.6).astype(int).tolist())
    painter.line([*corners, corners[0]], fill=rim, width=SMOOTHING, joint="curve")
