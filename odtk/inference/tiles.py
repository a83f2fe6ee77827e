"""Large images in tiles that overlap: each tile goes through the model like an image of its own.

Objects of a few pixels vanish where a large image is scaled down to the network's input. Tiles keep their size. The
tiles of an image go through the same loader and backend in batches, and ops.nms merges what they found.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from .. import ops
from ..boxes import area, circumscribe, coco_to_corners, corners_to_coco, intersection
from ..config import TilesConfig
from ..data.batch import Loader
from ..data.dataset import Dataset
from ..data.images import ImageError
from ..data.records import Image
from .backends import Backend
from .detect import detect_batches

Window = tuple[int, int, int, int]  # x1, y1, x2, y2 in pixels of the image; x2 and y2 are exclusive
EDGE = 0.01  # of a tile's side: a box that ends so near to it may be cut by it
MIN_EDGE = 2.0  # pixels


def windows_of(width: int, height: int, tiles: TilesConfig) -> list[Window]:
    """The tiles of an image, row by row. All have the same size: the last of a row or column is moved inwards.

    An image that is smaller than a tile in a direction is one tile there.
    """
    tile_height, tile_width = tiles.size
    return [
        (x, y, min(x + tile_width, width), min(y + tile_height, height))
        for y in starts(height, tile_height, tiles.overlap)
        for x in starts(width, tile_width, tiles.overlap)
    ]


def starts(side: int, tile: int, overlap: float) -> list[int]:
    """Where tiles begin along a side, in pixels; ``overlap`` is the least part of a tile that two neighbors share."""
    if side <= tile:
        return [0]
    step = max(1, tile - round(tile * overlap))
    return [*range(0, side - tile, step), side - tile]


@torch.inference_mode()
def detect_tiles(
    backend: Backend, loader: Loader, images: Iterable[Image], tiles: TilesConfig
) -> Iterator[tuple[Image, np.ndarray | ImageError]]:
    """The detections of each image, found in its tiles; the next image is decoded while one is computed.

    Args:
        loader: an inference loader; its dataset is replaced.

    Returns:
        Each image with its rows as detect.detection_rows gives them, by descending score, or with the reason why it
        cannot be decoded. The limit of detections holds for each tile.
    """
    for image, pixels in decoded_ahead(images):
        if isinstance(pixels, ImageError):
            yield image, pixels
            continue
        windows = windows_of(image.width, image.height, tiles)
        loader.use(Dataset([part(image, pixels, i, window) for i, window in enumerate(windows)], ()), shared=False)
        found: list[list[np.ndarray]] = [[] for _ in windows]
        for batch, (ids, rows) in detect_batches(backend, loader):
            for i in batch.ids.tolist():
                found[i].append(rows[ids == i])
        yield image, merge([np.concatenate(parts) for parts in found], windows, backend.thresholds.nms_threshold)


def part(image: Image, pixels: np.ndarray, number: int, window: Window) -> Image:
    """A tile as an image without boxes."""
    x1, y1, x2, y2 = window
    boxes = np.zeros((0, image.boxes.shape[1]))
    name, labels = Path(f"{image.path} tile {number}"), np.zeros(0, dtype=np.int64)
    return Image(number, name, x2 - x1, y2 - y1, boxes, labels, plain=False, pixels=pixels[y1:y2, x1:x2])


def decoded_ahead(images: Iterable[Image]) -> Iterator[tuple[Image, np.ndarray | ImageError]]:
    """Images with their pixels, uint8 [H, W, 3], or the reason why there are none; one is decoded ahead."""

    def decode(image: Image) -> np.ndarray | ImageError:
        try:
            return image.decode()
        except ImageError as error:
            return error

    pool = ThreadPoolExecutor(1, thread_name_prefix="odtk-tiles")
    try:
        ahead: tuple[Image, Future[np.ndarray | ImageError]] | None = None
        for image in images:
            following = image, pool.submit(decode, image)
            if ahead is not None:
                yield ahead[0], ahead[1].result()
            ahead = following
        if ahead is not None:
            yield ahead[0], ahead[1].result()
    finally:
        pool.shutdown(cancel_futures=True)


def merge(found: Sequence[np.ndarray], windows: Sequence[Window], threshold: float) -> np.ndarray:
    """The detections of an image from those of its tiles.

    Args:
        found: per tile the rows [n, 2 + 4|5] of its detections in pixels of the tile.
        windows: of the tiles.
        threshold: of the NMS.

    Returns:
        Rows [n, 2 + 4|5] in pixels of the image, by descending score.
    """
    rows = np.concatenate([moved(part, window) for part, window in zip(found, windows, strict=True)])
    cut = np.concatenate([is_cut(part, window, windows) for part, window in zip(found, windows, strict=True)])
    rows = rows[~pieces(rows, cut, threshold)]
    if not len(rows):
        return rows
    boxes = coco_to_corners(torch.from_numpy(rows[:, 2:]))  # [n, 4|5]
    if boxes.shape[1] == 5:
        boxes = torch.cat([boxes[:, :4], boxes[:, 4:].sin(), boxes[:, 4:].cos()], dim=1)
    scores, classes = torch.from_numpy(rows[:, 1]), torch.from_numpy(rows[:, 0])
    kept = ops.nms(scores[None], boxes[None], classes[None], threshold=threshold, detections=len(rows))
    scores, boxes, classes = (value[0][kept[0][0] > 0].double() for value in kept)
    return torch.cat([torch.stack([classes, scores], dim=1), corners_to_coco(boxes)], dim=1).numpy()


def moved(rows: np.ndarray, window: Window) -> np.ndarray:
    """Rows of a tile in pixels of the image."""
    rows = rows.copy()
    rows[:, 2:4] += window[:2]
    return rows


def is_cut(rows: np.ndarray, window: Window, windows: Sequence[Window]) -> np.ndarray:
    """Whether each detection [n] of a tile reaches an edge of it beyond which the image goes on."""
    boxes = upright(rows)  # pixels of the tile, inclusive corners
    width, height = window[2] - window[0], window[3] - window[1]
    near_x, near_y = max(MIN_EDGE, EDGE * width), max(MIN_EDGE, EDGE * height)
    right, bottom = max(w[2] for w in windows), max(w[3] for w in windows)  # of the image
    cut = (boxes[:, 0] <= near_x) & (window[0] > 0)
    cut |= (boxes[:, 1] <= near_y) & (window[1] > 0)
    cut |= (boxes[:, 2] >= width - 1 - near_x) & (window[2] < right)
    cut |= (boxes[:, 3] >= height - 1 - near_y) & (window[3] < bottom)
    return cut.numpy()


def pieces(rows: np.ndarray, cut: np.ndarray, threshold: float) -> np.ndarray:
    """Which detections [n] are a piece of another, which a neighboring tile shows whole.

    A piece is cut, and more than ``threshold`` of its own area lies in an uncut box of its class. NMS keeps a small
    piece, as its IoU with the whole is low, and prefers one that scores higher to the whole.

    Args:
        rows: [n, 2 + 4|5] in pixels of the image.
        cut: [n], see is_cut.
    """
    boxes, classes = upright(rows), rows[:, 0]
    found = np.zeros(len(rows), dtype=bool)
    whole, parts = np.flatnonzero(~cut), np.flatnonzero(cut)
    if len(whole) and len(parts):
        inside = intersection(boxes[parts], boxes[whole]) / area(boxes[parts])[:, None].clamp(min=1e-9)  # [p, w]
        same = classes[parts][:, None] == classes[whole]
        found[parts] = ((inside.numpy() > threshold) & same).any(1)
    return found


def upright(rows: np.ndarray) -> torch.Tensor:
    """The boxes of rows [n, 2 + 4|5] as inclusive corners [n, 4], rotated ones as the upright boxes around them."""
    boxes = coco_to_corners(torch.from_numpy(rows[:, 2:]))
    return circumscribe(boxes) if boxes.shape[1] == 5 else boxes
