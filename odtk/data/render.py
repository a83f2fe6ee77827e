"""The pixels of one image, made as the sampler decided, by Pillow and torch."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image as PILImage

from .sampler import Sample


def render(sample: Sample, padding: np.ndarray) -> np.ndarray:
    """The pixels of a sample, [3, H, W] with the height and width of its canvas.

    Args:
        padding: [3], the value of what is shown beyond the image. Its type is that of the result: float32 has the
            sample's color and rotation, uint8, which only inference has, is as the file has it.

    Raises:
        ImageError: the file cannot be decoded.
    """
    view = sample.view
    x1, y1, x2, y2 = view.crop
    pixels = sample.image.decode()[y1:y2, x1:x2]
    if view.size != (x2 - x1, y2 - y1):
        pixels = np.asarray(PILImage.fromarray(pixels).resize(view.size, PILImage.Resampling.BILINEAR))
    if sample.flip:
        pixels = pixels[:, ::-1]
    if padding.dtype == np.uint8:
        return pixels.transpose(2, 0, 1)  # [H, W, 3] → [3, H, W]
    planes = np.ascontiguousarray(pixels.transpose(2, 0, 1), dtype=np.float32)  # [H, W, 3] → [3, H, W]
    # einsum and not @, as the threads of BLAS would wait for each other
    image = np.einsum("ij,jhw->ihw", sample.color[:, :3], planes) + sample.color[:, 3:, None]
    if view.frame != view.size:
        scaled = image
        image = np.broadcast_to(padding[:, None, None], (3, view.frame[1], view.frame[0])).copy()
        (x, y), (width, height) = view.place, view.size
        image[:, y : y + height, x : x + width] = scaled
    if sample.quarter_turns:
        return np.rot90(image, sample.quarter_turns, axes=(1, 2))
    return image if sample.rotation is None else _rotate(image, sample.rotation, sample.canvas, padding)


def _rotate(image: np.ndarray, matrix: np.ndarray, canvas: tuple[int, int], padding: np.ndarray) -> np.ndarray:
    """Samples image [3, h, w] bilinearly at matrix [2, 3] · (x, y, 1) for each pixel center of the canvas (w, h)."""
    size = torch.tensor([image.shape[2], image.shape[1]])
    x, y = torch.arange(canvas[0]) + 0.5, torch.arange(canvas[1]) + 0.5
    points = torch.stack([*torch.meshgrid(x, y, indexing="xy"), torch.ones(canvas[1], canvas[0])], dim=-1)
    source = points @ torch.from_numpy(matrix).T  # [H, W, 3] · [3, 2] → [H, W, 2]
    beyond = padding[:, None, None]  # grid_sample has zeros there
    batch = torch.from_numpy(np.ascontiguousarray(image - beyond))[None]
    return F.grid_sample(batch, (2 * source / size - 1)[None], align_corners=False)[0].numpy() + beyond
