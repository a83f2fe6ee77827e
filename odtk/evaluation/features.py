"""Pictures of feature maps: what a layer of a model makes of an image."""

from __future__ import annotations

import difflib
import math
from typing import Any

import numpy as np
import torch
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont
from torch import Tensor

from ..config import LoaderConfig, OdtkError
from ..inference.drawing import PLASMA
from ..model import checkpoint
from ..model.detector import Detector
from .pictures import input_picture, network_inputs, open_pictures

MAX_MAPS = 64  # channels shown of one layer
TILE = 96  # pixels that the longer side of a shown map has, about
GAP = 2  # pixels between the maps
HEADER = 28  # pixels of the title's line


def draw_features(path: str, layer: str, data: LoaderConfig, folder: str, *, count: int) -> list[str]:
    """Grids of the feature maps that a layer returns: one PNG per image and level. Returns the paths.

    Args:
        path: checkpoint.
        layer: the name of a module (``backbones.ResNet50FPN.features.layer4``), or its last part (``layer4``).
        count: images to draw, the first ones.

    Raises:
        OdtkError: there is no such layer, or it returns no feature maps [N, C, h, w].
    """
    detector = checkpoint.build_detector(checkpoint.load(path)).eval()
    writer = open_pictures(data, folder, rotated=detector.config.rotated)
    name, module = find_layer(detector, layer)
    # The detector may call the parts of a Sequential one by one, so a hook on it would not run; its last part does.
    while isinstance(module, torch.nn.Sequential):
        module = module[-1]
    outputs: list[Tensor] = []
    handle = module.register_forward_hook(lambda _module, _inputs, output: outputs.extend(feature_maps(output)))
    written = []
    for image, batch in network_inputs(detector, writer.dataset, data, count):
        outputs.clear()
        with torch.inference_mode():
            detector(batch.images)
        if not outputs:
            raise OdtkError(f"The layer {name} returns no feature maps: choose a layer inside a backbone.")
        for level, maps in enumerate(outputs):
            title = f"{name}  {tuple(maps.shape[1:])}  {min(MAX_MAPS, maps.shape[1])} of {maps.shape[1]} channels"
            grid = feature_grid(maps[0], title, input_picture(batch, detector.config))
            written.append(writer.save(grid, image, f"_{name}_{level}.png"))
    handle.remove()
    return written


def find_layer(detector: Detector, layer: str) -> tuple[str, torch.nn.Module]:
    """A module and its whole name, found by that name or by its last part.

    Raises:
        OdtkError: no module has this name, or several end in it; the sentence names a few that are close.
    """
    modules = {name: module for name, module in detector.named_modules() if name}
    if layer in modules:
        return layer, modules[layer]
    matches = [name for name in modules if name.endswith(f".{layer}")]
    if len(matches) == 1:
        return matches[0], modules[matches[0]]
    if matches:
        raise OdtkError(f"{len(matches)} layers end in .{layer}: choose one of {', '.join(matches[:6])}.")
    containing = sorted((name for name in modules if layer.lower() in name.lower()), key=len)
    close = containing or difflib.get_close_matches(layer, modules, cutoff=0.3) or list(modules)
    raise OdtkError(f"There is no layer {layer}: try {', '.join(close[:6])}.")


def feature_maps(output: Any) -> list[Tensor]:
    """The tensors [N, C, h, w] in what a module returned, as float32."""
    if isinstance(output, Tensor):
        return [output.float()] if output.dim() == 4 else []
    if isinstance(output, (list, tuple)):
        return [maps for part in output for maps in feature_maps(part)]
    return []


def feature_grid(maps: Tensor, title: str, image: PILImage.Image) -> PILImage.Image:
    """The first MAX_MAPS channels of maps [C, h, w] as colored tiles, with the model's input on their left.

    The colors of each tile span its own range, from its smallest to its largest value.
    """
    maps = maps[:MAX_MAPS]
    columns = math.ceil(math.sqrt(len(maps)))
    rows = math.ceil(len(maps) / columns)
    height, width = maps.shape[1:]
    factor = max(1, round(TILE / max(height, width)))
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    scaled = ((maps - low) / (high - low).clamp(min=1e-12)).cpu().numpy()  # [C, h, w] in [0, 1]
    position = scaled * (len(PLASMA) - 1)
    colored = np.stack([np.interp(position, range(len(PLASMA)), PLASMA[:, c]) for c in range(3)], axis=-1)
    tile_width, tile_height = width * factor + GAP, height * factor + GAP
    shown = image.resize((max(1, round(image.width * rows * tile_height / image.height)), rows * tile_height))
    left = shown.width + 8
    grid = PILImage.new("RGB", (left + columns * tile_width, HEADER + rows * tile_height), "white")
    ImageDraw.Draw(grid).text((4, 4), title, fill="black", font=ImageFont.load_default(16))
    grid.paste(shown, (0, HEADER))
    for i, tile in enumerate(colored.astype(np.uint8)):  # [h, w, 3]
        picture = PILImage.fromarray(tile).resize((width * factor, height * factor), PILImage.Resampling.NEAREST)
        grid.paste(picture, (left + i % columns * tile_width, HEADER + i // columns * tile_height))
    return grid
