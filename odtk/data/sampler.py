"""Decides everything about each image of each batch; the loaders only produce the pixels.

A decision depends on the seed, the epoch, the image and the number of the batch alone, and never on what ran before. So
both loaders give the same boxes, and a resumed run gives the batches that it would have given without the interruption.

Order in training: the epochs' permutations form one endless stream. Global batch k takes the next batch × world images
of it, and rank r takes the r-th part of those. Each image comes once per epoch over all ranks, or more often if it
holds a rare class (repeat_factors); a batch may span two epochs, and every rank has the same number of batches. In
inference rank r takes the images r, r + world, ….

Geometry of an image: crop → scale → flip → place in a frame → rotate → pad at the right and the bottom. All of it but
the padding is one affine map of continuous coordinates (pixel i covers [i, i + 1]) from the image to the network's
input.

Images that are classified (``LoaderConfig.square``) have one box, which is what is seen of the image.

Quarter turns keep the batch in one orientation: all of its images lie or all stand, so that they need no square.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock

import numpy as np
import torch

from ..boxes import coco_to_corners, normalize_angle
from ..config import AugmentConfig, LoaderConfig, OdtkError, scale_and_shift
from .dataset import Dataset
from .records import Image

# The second word of each generator's seed, so that the streams of random numbers are independent.
ORDER, BATCH, IMAGE, REPEATS, STRONG, COLORS = range(6)

CROP_IOUS = (None, 0.0, 0.1, 0.3, 0.5, 0.7, 0.9)  # None keeps the whole image; from section 2.2 of the SSD paper
CROP_SIDES = (0.3, 1.0)  # relative to the image's sides
CROP_ASPECTS = (0.75, 4 / 3)  # relative to the image's; narrower than SSD's 0.5 to 2, for less padding in a batch
CROP_CANDIDATES = 50
CLASSIFIED_ASPECTS = (3 / 4, 4 / 3)  # of a crop to classify, and how often one is tried: as torchvision's
CLASSIFIED_TRIES = 10
MIN_SIDE = 1.0  # in pixels of the network's input; a box with a shorter side is dropped in training

# RGB to YIQ (luma and chroma, NTSC): hue rotates the IQ plane, saturation scales it.
YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]])


@dataclass(frozen=True)
class View:
    """What is seen of an image, and where.

    Attributes:
        crop: (x1, y1, x2, y2) in pixels of the image, x2 and y2 exclusive.
        size: (width, height) in pixels to which the crop is scaled.
        frame: (width, height) in pixels of the padding that the scaled crop is placed on; ``size`` if it fills it.
        place: (x, y) in pixels of the frame, where the upper left corner of the scaled crop lies.
    """

    crop: tuple[int, int, int, int]
    size: tuple[int, int]
    frame: tuple[int, int]
    place: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Sample:
    """What is to be done with one image.

    Attributes:
        image: the image and its boxes in the dataset.
        view: what is seen of it, and where.
        flip: mirror left to right after scaling, before the crop is placed on its frame.
        color: float32 [3, 4]; RGB of the batch = color · (R, G, B, 1) with R, G, B in 0…255.
        rotation: float32 [2, 3], the map from the rotated to the former frame in continuous coordinates, or None.
        quarter_turns: counterclockwise, if the rotation is nothing but these, so that pixels only move; else 0.
        canvas: (width, height) in pixels after the rotation.
        boxes: float32 [n, 4] (x1, y1, x2, y2) or [n, 5] (… theta), pixels of the network's input, inclusive corners.
        labels: int64 [n], index of the category.
        scale: (sx, sy), network pixels per image pixel.
    """

    image: Image
    view: View
    flip: bool
    color: np.ndarray
    rotation: np.ndarray | None
    quarter_turns: int
    canvas: tuple[int, int]
    boxes: np.ndarray
    labels: np.ndarray
    scale: tuple[float, float]


@dataclass(frozen=True)
class BatchPlan:
    """The samples of one batch, and the height and width (pixels, multiples of the stride) that they are padded to."""

    samples: list[Sample]
    height: int
    width: int


class Sampler:
    """Makes the plan of any batch of one rank from its number.

    Attributes:
        factors: how often each image comes in an epoch on average (see repeat_factors); None: once.

    Raises:
        OdtkError: no images, or settings that contradict each other.
    """

    def __init__(self, dataset: Dataset, config: LoaderConfig) -> None:
        _check_settings(dataset, config)
        self.dataset, self.config = dataset, config
        self._permutation = lru_cache(maxsize=2)(self._shuffle)
        self.factors = repeat_factors(dataset, config.repeat_threshold) if config.training else None
        self._ends = [0]  # where epochs end in the stream of training, as far as they are known
        self._lock = Lock()  # of _ends: the loader's threads share the sampler

    def __len__(self) -> int:
        """Number of batches of this rank in one epoch (training, on average, rounded up) or one pass (inference)."""
        config = self.config
        if config.training:
            count = len(self.dataset.images) if self.factors is None else float(self.factors.sum())
            return math.ceil(count / (config.batch * config.world))
        return math.ceil(len(range(config.rank, len(self.dataset.images), config.world)) / config.batch)

    def plan(self, number: int) -> BatchPlan:
        """The plan of batch ``number``, counted from 0: without end in training, below ``len()`` in inference."""
        config = self.config
        if config.training and config.square is not None:
            samples = [self._random_square(*draw) for draw in self._stream(number)]
        elif config.training:
            generator = self._generator(BATCH, number)
            target = int(generator.integers(config.jitter[0], config.jitter[1] + 1))
            stands = bool(generator.integers(2))
            samples = [self._augmented_sample(*draw, target, stands) for draw in self._stream(number)]
        else:
            first = config.rank + number * config.batch * config.world
            indices = range(first, len(self.dataset.images), config.world)[: config.batch]
            make = self._plain_sample if config.square is None else self._center_square
            samples = [make(self.dataset.images[index]) for index in indices]
        if config.square is not None:
            return BatchPlan(samples, config.square, config.square)
        if config.size is not None and not config.training:
            return BatchPlan(samples, *config.size)
        widths, heights = zip(*(sample.canvas for sample in samples), strict=True)
        return BatchPlan(samples, *round_up((max(heights), max(widths)), config.stride))

    def _generator(self, *words: int) -> np.random.Generator:
        return np.random.default_rng([self.config.seed, *words])

    def _repeats(self, epoch: int) -> np.ndarray:
        """How often each image comes in an epoch, int64 [images]: its factor, rounded up or down at random."""
        if self.factors is None:
            return np.ones(len(self.dataset.images), dtype=np.int64)
        whole = np.floor(self.factors)
        more = self._generator(REPEATS, epoch).random(len(whole)) < self.factors - whole
        return whole.astype(np.int64) + more

    def _shuffle(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The order of an epoch: indices into the images, and of each how often it came before, both int64 [draws]."""
        repeats = self._repeats(epoch)
        order = self._generator(ORDER, epoch).permutation(int(repeats.sum()))  # of the images one after the other
        indices = np.repeat(np.arange(len(repeats)), repeats)[order]
        return indices, order - (np.cumsum(repeats) - repeats)[indices]

    def _find(self, position: int) -> tuple[int, int]:
        """(epoch, place in it) of a position in the endless stream."""
        if self.factors is None:
            return divmod(position, len(self.dataset.images))
        with self._lock:
            while self._ends[-1] <= position:
                self._ends.append(self._ends[-1] + int(self._repeats(len(self._ends) - 1).sum()))
            epoch = bisect_right(self._ends, position) - 1
            return epoch, position - self._ends[epoch]

    def _stream(self, number: int) -> Iterator[tuple[int, int, int]]:
        """(epoch, index into the images, repetition) for each place of this rank's part of global batch ``number``."""
        config = self.config
        first = (number * config.world + config.rank) * config.batch
        for position in range(first, first + config.batch):
            epoch, place = self._find(position)
            indices, repetitions = self._permutation(epoch)
            yield epoch, int(indices[place]), int(repetitions[place])

    def _plain_sample(self, image: Image) -> Sample:
        config = self.config
        if config.size is not None:
            scale = min(config.size[0] / image.height, config.size[1] / image.width)
        else:
            scale = _resize_scale(image.width, image.height, config.resize, config.max_size)
        size = _scaled_size(image.width, image.height, scale)
        view = View((0, 0, image.width, image.height), size, size)
        return self._make_sample(image, view, False, 0, 0.0, np.eye(3, 4), image.boxes, image.labels)

    def _augmented_sample(self, epoch: int, index: int, repetition: int, target: int, stands: bool) -> Sample:
        image, augment = self.dataset.images[index], self.config.augment
        words = (epoch, index, repetition) if repetition else (epoch, index)  # the first as without repetitions
        generator = self._generator(IMAGE, *words)
        flip = bool(generator.random() < augment.flip)
        quarter_turns = int(generator.integers(4)) if augment.rotate else 0
        degrees = float(generator.uniform(*augment.free_rotate))
        color = color_matrix(generator, augment)
        crops = generator.random() < augment.crop
        window = random_crop(generator, image) if crops else (0, 0, image.width, image.height)
        width, height = window[2] - window[0], window[3] - window[1]
        if augment.rotate and width != height:  # of the four turns two remain, as likely
            quarter_turns += (quarter_turns % 2 == 1) != (stands != (height > width))
        frame = _scaled_size(width, height, _resize_scale(width, height, target, self.config.max_size))
        view = random_view(generator, window, frame, augment.scale, image.boxes)
        inside = _centers_inside(image.boxes, view.crop)
        boxes, labels = _clip(image.boxes[inside], view.crop), image.labels[inside]
        return self._make_sample(image, view, flip, quarter_turns % 4, math.radians(degrees), color, boxes, labels)

    def _random_square(self, epoch: int, index: int, repetition: int) -> Sample:
        image, augment = self.dataset.images[index], self.config.augment
        generator = self._generator(IMAGE, epoch, index, repetition)
        flip = bool(generator.random() < augment.flip)
        quarter_turns = int(generator.integers(4)) if augment.rotate else 0
        color = color_matrix(generator, augment)
        window = resized_crop(generator, (image.width, image.height), augment.area)
        return self._square(image, window, flip, quarter_turns, color)

    def _center_square(self, image: Image) -> Sample:
        side = max(1, round(self.config.center * min(image.width, image.height)))
        x, y = (image.width - side) // 2, (image.height - side) // 2
        return self._square(image, (x, y, x + side, y + side), False, 0, np.eye(3, 4))

    def _square(
        self, image: Image, window: tuple[int, int, int, int], flip: bool, quarter_turns: int, color: np.ndarray
    ) -> Sample:
        assert self.config.square is not None
        size = (self.config.square, self.config.square)
        box = np.array([[*window[:2], window[2] - window[0], window[3] - window[1]]], dtype=np.float64)
        return self._make_sample(
            image, View(window, size, size), flip, quarter_turns, 0.0, color, box, image.labels[:1]
        )

    def _make_sample(
        self,
        image: Image,
        view: View,
        flip: bool,
        quarter_turns: int,
        angle: float,
        color: np.ndarray,
        boxes: np.ndarray,
        labels: np.ndarray,
    ) -> Sample:
        config, crop = self.config, view.crop
        sx, sy = view.size[0] / (crop[2] - crop[0]), view.size[1] / (crop[3] - crop[1])
        to_network = np.array([[sx, 0, -crop[0] * sx], [0, sy, -crop[1] * sy], [0, 0, 1]])
        if flip:
            to_network = np.array([[-1, 0, view.size[0]], [0, 1, 0], [0, 0, 1]]) @ to_network
        if view.place != (0, 0):
            to_network = np.array([[1, 0, view.place[0]], [0, 1, view.place[1]], [0, 0, 1]]) @ to_network
        to_frame, canvas, exact_turns = None, view.frame, 0 if angle else quarter_turns
        angle += quarter_turns * math.pi / 2
        if angle:
            canvas = view.frame[::-1] if quarter_turns % 2 else view.frame
            rotation = _rotation_matrix(angle, view.frame, canvas)
            to_network = rotation @ to_network
            to_frame = np.linalg.inv(rotation)[:2].astype(np.float32)
        boxes = _transform_boxes(boxes, to_network, (sx, sy), flip, angle)
        if config.training:
            boxes, labels = _keep_visible(boxes, labels, canvas)
        return Sample(
            image,
            view,
            flip,
            _with_normalization(color, config) if config.input_type == "normalized" else color.astype(np.float32),
            to_frame,
            exact_turns,
            canvas,
            _to_inclusive_corners(boxes, config.absolute_angle),
            labels,
            (sx, sy),
        )


def _check_settings(dataset: Dataset, config: LoaderConfig) -> None:
    if not dataset.images:
        raise OdtkError(f"There are no images to load from {config.images}.")
    if config.size is not None and any(side % config.stride for side in config.size):
        height, width = config.size
        raise OdtkError(f"--size {height} {width}: both sides must be multiples of the stride {config.stride}.")
    if config.jitter[0] > config.jitter[1]:
        raise OdtkError(f"--jitter {config.jitter[0]} {config.jitter[1]}: the first number must not exceed the second.")


def repeat_factors(dataset: Dataset, threshold: float) -> np.ndarray | None:
    """How often each image is to come in an epoch on average, float64 [images], at least 1; None: each once.

    A class that is in the fraction f of the images has the factor max(1, √(threshold / f)), and an image the largest
    factor of its classes (LVIS, https://arxiv.org/abs/1908.03195, appendix B.2).
    """
    if not threshold:
        return None
    held = [np.unique(image.labels) for image in dataset.images]
    labels, counts = np.unique(np.concatenate(held), return_counts=True)
    of_class = np.ones(len(dataset.categories))
    of_class[labels] = np.maximum(1, np.sqrt(threshold * len(dataset.images) / counts))
    factors = np.array([of_class[labels].max(initial=1) for labels in held])
    return factors if factors.max() > 1 else None


def round_up(size: tuple[int, int], stride: int) -> tuple[int, int]:
    """A size in pixels with each side rounded up to a multiple of the stride."""
    return -(-size[0] // stride) * stride, -(-size[1] // stride) * stride


def input_size(dataset: Dataset, resize: int, max_size: int, stride: int) -> tuple[int, int]:
    """The (H, W) in pixels that holds nearly all images (19 of 20 in each direction), resized as in inference."""
    sizes = []
    for image in dataset.images:
        scale = _resize_scale(image.width, image.height, resize, max_size)
        sizes.append(_scaled_size(image.width, image.height, scale))
    width, height = np.percentile(sizes, 95, axis=0, method="higher").tolist()
    return round_up((int(height), int(width)), stride)


def _resize_scale(width: int, height: int, target: int, cap: int) -> float:
    """The factor that makes the shorter side ``target``, or the longer side ``cap`` if that is less. Pixels."""
    return min(target / min(width, height), cap / max(width, height))


def _scaled_size(width: int, height: int, scale: float) -> tuple[int, int]:
    """(width, height) after scaling, in whole pixels."""
    return max(1, round(width * scale)), max(1, round(height * scale))


def random_view(
    generator: np.random.Generator,
    window: tuple[int, int, int, int],
    frame: tuple[int, int],
    factors: tuple[float, float],
    boxes: np.ndarray,
) -> View:
    """A window of an image in a frame (width, height) of its aspect, enlarged by a random factor from a range.

    The logarithm of the factor is uniform. From 1 on, a part of the window fills the frame; below 1, the whole window
    is shrunk and padded to it. Part and place are random; a part without the center of any of the boxes
    [n, 4|5] (x, y, w, h, …), if some are in the window, is drawn again around one of those.
    """
    if factors == (1.0, 1.0):
        return View(window, frame, frame)
    factor = math.exp(generator.uniform(math.log(factors[0]), math.log(factors[1])))
    width, height = window[2] - window[0], window[3] - window[1]
    part = _scaled_size(width, height, min(1.0, 1 / factor))
    x = window[0] + int(generator.integers(width - part[0] + 1))
    y = window[1] + int(generator.integers(height - part[1] + 1))
    boxes = boxes[_centers_inside(boxes, window)]
    if factor > 1 and len(boxes) and not _centers_inside(boxes, (x, y, x + part[0], y + part[1])).any():
        box = boxes[generator.integers(len(boxes))]
        least = np.array(window[:2])
        most = np.array(window[2:]) - part
        center = np.floor(box[:2] + box[2:4] / 2)
        first = np.clip(center - part + 1, least, most).astype(int)
        x, y = generator.integers(first, np.clip(center, first, most).astype(int) + 1).tolist()
    size = _scaled_size(*frame, min(1.0, factor))
    place = generator.integers(frame[0] - size[0] + 1), generator.integers(frame[1] - size[1] + 1)
    return View((x, y, x + part[0], y + part[1]), size, frame, (int(place[0]), int(place[1])))


def _enclosing_boxes(boxes: np.ndarray) -> np.ndarray:
    """Smallest axis-aligned boxes [n, 4] (x1, y1, x2, y2), continuous, around boxes [n, 4|5] (x, y, w, h, theta)."""
    center, half = boxes[:, :2] + boxes[:, 2:4] / 2, boxes[:, 2:4] / 2
    if boxes.shape[1] == 5:
        cos, sin = np.abs(np.cos(boxes[:, 4])), np.abs(np.sin(boxes[:, 4]))
        half = np.stack([half[:, 0] * cos + half[:, 1] * sin, half[:, 0] * sin + half[:, 1] * cos], axis=1)
    return np.concatenate([center - half, center + half], axis=1)


def _centers_inside(boxes: np.ndarray, crop: tuple[float, float, float, float]) -> np.ndarray:
    """Mask [n]: whether the center of each box [n, 4|5] (x, y, w, h, …) is inside a crop (x1, y1, x2, y2)."""
    center = boxes[:, :2] + boxes[:, 2:4] / 2
    return np.all((center >= crop[:2]) & (center < crop[2:]), axis=1)


def random_crop(generator: np.random.Generator, image: Image) -> tuple[int, int, int, int]:
    """A window (x1, y1, x2, y2; x2, y2 exclusive) in pixels of the image that keeps the center of at least one box.

    The method is SSD's (https://arxiv.org/abs/1512.02325, section 2.2): a minimum IoU is drawn, and the window must
    overlap some box by it. If none of 50 random windows does, another IoU is drawn. Without boxes, the window is the
    whole image.
    """
    whole = (0, 0, image.width, image.height)
    if not len(image.boxes):
        return whole
    hull = _enclosing_boxes(image.boxes)
    for threshold in generator.permutation(len(CROP_IOUS)):
        least = CROP_IOUS[threshold]
        if least is None:
            return whole
        windows = _candidate_windows(generator, image.width, image.height)
        keeps = (_iou(windows, hull) >= least) & _holds_center(windows, hull)
        good = np.flatnonzero(keeps.any(axis=1))
        if len(good):
            x1, y1, x2, y2 = windows[good[0]].tolist()
            return x1, y1, x2, y2
    return whole


def resized_crop(
    generator: np.random.Generator, size: tuple[int, int], area: tuple[float, float]
) -> tuple[int, int, int, int]:
    """A random window (x1, y1, x2, y2; x2, y2 exclusive) of an image of ``size`` (width, height) in pixels.

    Its area is uniform in a range, relative to the image's, and the logarithm of its aspect in CLASSIFIED_ASPECTS
    (Inception, https://arxiv.org/abs/1409.4842, section 6). Where none of CLASSIFIED_TRIES fits into the image, it is
    the largest of an allowed aspect, in the center.
    """
    width, height = size
    for _ in range(CLASSIFIED_TRIES):
        pixels = generator.uniform(*area) * width * height
        aspect = math.exp(generator.uniform(math.log(CLASSIFIED_ASPECTS[0]), math.log(CLASSIFIED_ASPECTS[1])))
        w, h = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
        if 0 < w <= width and 0 < h <= height:
            x, y = int(generator.integers(width - w + 1)), int(generator.integers(height - h + 1))
            return x, y, x + w, y + h
    w = min(width, max(1, round(height * CLASSIFIED_ASPECTS[1])))
    h = min(height, max(1, round(width / CLASSIFIED_ASPECTS[0])))
    x, y = (width - w) // 2, (height - h) // 2
    return x, y, x + w, y + h


def _candidate_windows(generator: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Random windows int64 [k, 4] (x1, y1, x2, y2) in pixels, only those with an allowed aspect ratio."""
    sides = generator.uniform(*CROP_SIDES, (CROP_CANDIDATES, 2))
    aspect = sides[:, 0] / sides[:, 1]
    sides = sides[(aspect >= CROP_ASPECTS[0]) & (aspect <= CROP_ASPECTS[1])]
    size = np.maximum(np.round(sides * (width, height)), 1).astype(np.int64)
    corner = np.floor(generator.random(size.shape) * ((width, height) - size + 1)).astype(np.int64)
    return np.concatenate([corner, corner + size], axis=1)


def _iou(windows: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """IoU [k, n] of continuous boxes [k, 4] and [n, 4]."""
    low = np.maximum(windows[:, None, :2], boxes[:, :2])  # [k, n, 2]
    high = np.minimum(windows[:, None, 2:], boxes[:, 2:])
    overlap = np.clip(high - low, 0, None).prod(axis=2)
    area = (windows[:, 2:] - windows[:, :2]).prod(axis=1)[:, None] + (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    return overlap / (area - overlap)


def _holds_center(windows: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Mask [k, n]: whether each window [k, 4] contains the center of each box [n, 4], both (x1, y1, x2, y2)."""
    center = (boxes[:, :2] + boxes[:, 2:]) / 2  # [n, 2]
    return np.all((center >= windows[:, None, :2]) & (center < windows[:, None, 2:]), axis=2)  # [k, n]


def color_matrix(generator: np.random.Generator, augment: AugmentConfig) -> np.ndarray:
    """A random change of color as a matrix [3, 4]: changed RGB = matrix · (R, G, B, 1), values in 0…255.

    Saturation scales the chroma (IQ of YIQ) and hue rotates it; contrast scales about 128; brightness scales all.
    These three factors are normally distributed about 1 and clipped at 0. Hue is normally distributed about 0, and 1
    is a full turn of the color circle.
    """
    brightness, contrast, saturation = np.maximum(
        generator.normal(1, (augment.brightness, augment.contrast, augment.saturation)), 0
    )
    hue = 2 * math.pi * generator.normal(0, augment.hue)
    cos, sin = saturation * math.cos(hue), saturation * math.sin(hue)
    chroma = np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]])
    matrix = brightness * contrast * np.linalg.inv(YIQ) @ chroma @ YIQ
    offset = np.full((3, 1), brightness * 128 * (1 - contrast))
    return np.concatenate([matrix, offset], axis=1)


def _with_normalization(color: np.ndarray, config: LoaderConfig) -> np.ndarray:
    """A color matrix [3, 4] with the normalization (value / 255 − mean) / std applied after it, float32."""
    scale, shift = map(np.array, scale_and_shift(config.mean, config.std))
    matrix = color * scale[:, None]
    matrix[:, 3] += shift
    return matrix.astype(np.float32)


def _rotation_matrix(angle: float, size: tuple[int, int], canvas: tuple[int, int]) -> np.ndarray:
    """Affine map [3, 3] that rotates an image of ``size`` counterclockwise (y down) about its center, to ``canvas``."""
    cos, sin = round(math.cos(angle), 12), round(math.sin(angle), 12)  # quarter turns map pixels onto pixels
    matrix = np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])
    matrix[:2, 2] = np.array(canvas) / 2 - matrix[:2, :2] @ (np.array(size) / 2)
    return matrix


def _transform_boxes(
    boxes: np.ndarray, affine: np.ndarray, scale: tuple[float, float], flip: bool, angle: float
) -> np.ndarray:
    """Boxes [n, 4|5] (x, y, w, h, theta) after an affine map [3, 3]; without theta, the box around the mapped one."""
    center = (boxes[:, :2] + boxes[:, 2:4] / 2) @ affine[:2, :2].T + affine[:2, 2]
    if boxes.shape[1] == 4:
        size = boxes[:, 2:] @ np.abs(affine[:2, :2]).T
        return np.concatenate([center - size / 2, size], axis=1)
    size = boxes[:, 2:4] * scale
    theta = (-boxes[:, 4] if flip else boxes[:, 4]) + angle
    return np.concatenate([center - size / 2, size, theta[:, None]], axis=1)


def _keep_visible(boxes: np.ndarray, labels: np.ndarray, canvas: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """The boxes [n, 4|5] (x, y, w, h, …) whose center is on the canvas, clipped to it, without those below MIN_SIDE."""
    inside = _centers_inside(boxes, (0, 0, *canvas))
    boxes, labels = _clip(boxes[inside], (0, 0, *canvas)), labels[inside]
    large = (boxes[:, 2:4] >= MIN_SIDE).all(axis=1)
    return boxes[large], labels[large]


def _clip(boxes: np.ndarray, window: tuple[float, float, float, float]) -> np.ndarray:
    """Boxes [n, 4] (x, y, w, h) clipped to a window (x1, y1, x2, y2); rotated boxes [n, 5] unchanged."""
    if boxes.shape[1] == 5:
        return boxes
    low = np.maximum(boxes[:, :2], window[:2])
    high = np.minimum(boxes[:, :2] + boxes[:, 2:], window[2:])
    return np.concatenate([low, high - low], axis=1)


def _to_inclusive_corners(boxes: np.ndarray, absolute: bool) -> np.ndarray:
    """Boxes [n, 4|5] (x, y, w, h, theta) as (x1, y1, x2, y2, theta) with inclusive corners (see boxes.py), float32."""
    corners = coco_to_corners(torch.from_numpy(boxes))
    if boxes.shape[1] == 5:
        corners = normalize_angle(corners, absolute=absolute)
    return corners.numpy().astype(np.float32)
