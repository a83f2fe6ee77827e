"""The Batches of ``loader.py`` with pixels from NVIDIA DALI: one pipeline definition for CPU and GPU.

DALI gets each image as encoded bytes together with the sampler's decisions, and does what costs time: it decodes the
crop only (on a GPU: decoder and scaling there), scales, mirrors, turns, colors, normalizes and pads. Its own COCO
reader is not used: it remaps category ids, and its random crop could be neither resumed nor repeated by torch.

Orientation by EXIF and the kinds of image that decoders read differently (``Image.plain`` is false) are few; Pillow
decodes them, and DALI gets the pixels in a PPM envelope.
"""

from __future__ import annotations

import sys
from threading import Lock
from typing import Any

import numpy as np
import nvidia.dali as dali
import torch
from nvidia.dali.plugin.pytorch.torch_utils import to_torch_tensor
from torch import Tensor

from ..config import LoaderConfig
from .batch import PREFETCH, Loader
from .dataset import Dataset
from .images import ImageError, decode
from .sampler import BatchPlan, Sample

fn: Any = dali.fn  # DALI makes operators and types while it is imported, unseen by type checkers
types: Any = dali.types

UNTURNED = np.eye(2, 3, dtype=np.float32)


class DaliLoader(Loader):
    """DALI on ``config.workers`` threads of its own; on a GPU when ``config.device`` is one."""

    def __init__(self, dataset: Dataset, config: LoaderConfig) -> None:
        super().__init__(dataset, config, threads=1 + PREFETCH)  # they read files; one at a time runs the pipeline
        augment = config.augment
        self._turns = config.training and (augment.rotate or augment.free_rotate != (0.0, 0.0))
        self._pipeline: Any = None
        self._lock = Lock()
        self._stream = None if config.device == "cpu" else torch.cuda.Stream(config.device)

    def _render(self, plan: BatchPlan) -> Tensor:
        try:
            encoded = [_encoded(sample) for sample in plan.samples]
            with self._lock:
                return self._run(plan, encoded)
        except (ImageError, RuntimeError) as error:
            # A damaged image spoils DALI's whole batch: torch renders the batch and names the image.
            images = self._render_with_torch(plan)
            if not any(sample.image.path in self._damaged for sample in plan.samples):
                reason = str(error).strip().splitlines()[0]
                print(f"Warning: DALI failed on a batch, which the torch loader took over: {reason}", file=sys.stderr)
            return images

    def _run(self, plan: BatchPlan, encoded: list[np.ndarray]) -> Tensor:
        samples = plan.samples
        # Taken under the caller's lock, and put back when it has run: a damaged image spoils a pipeline.
        pipeline, self._pipeline = self._pipeline, None
        if pipeline is None:
            pipeline = self._build()
        inputs = {
            "encoded": encoded,
            "start": _rows([sample.crop[:2] for sample in samples], np.int32),
            "end": _rows([sample.crop[2:] for sample in samples], np.int32),
            "size": _rows([sample.size[::-1] for sample in samples], np.float32),
            "flip": _rows([sample.flip for sample in samples], np.int32),
            "color": np.stack([sample.color for sample in samples]),
            "height": np.full(len(samples), plan.height, dtype=np.float32),
            "width": np.full(len(samples), plan.width, dtype=np.float32),
        }
        if self._turns:
            inputs["turn"] = np.stack([UNTURNED if sample.turn is None else sample.turn for sample in samples])
            inputs["canvas"] = _rows([sample.canvas[::-1] for sample in samples], np.float32)
        with torch.cuda.stream(self._stream):  # no effect without a stream
            (output,) = pipeline.run(**inputs)
            images = to_torch_tensor(output.as_tensor(), copy=True)
            if self._stream is not None:
                self._stream.synchronize()
        self._pipeline = pipeline
        return images

    def _to_device(self, tensor: Tensor) -> Tensor:
        if self._stream is not None and tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream(tensor.device))  # made on another stream
        return super()._to_device(tensor)

    def _build(self) -> Any:
        pipeline = _pipeline(
            self._turns,
            gpu=self._stream is not None,
            batch_size=self.config.batch,
            num_threads=max(1, self.config.workers),
            device_id=None if self._stream is None else self._stream.device_index,
            prefetch_queue_depth=1,  # the loader's own thread works ahead
        )
        pipeline.build()
        return pipeline


@dali.pipeline_def
def _pipeline(turns: bool, gpu: bool) -> Any:
    """Encoded images and decisions → float32 [3, height, width], zero-padded. The inputs are named in ``_run``."""
    encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
    start = fn.external_source(name="start", dtype=types.INT32, ndim=1)
    end = fn.external_source(name="end", dtype=types.INT32, ndim=1)
    size = fn.external_source(name="size", dtype=types.FLOAT, ndim=1)
    flip = fn.external_source(name="flip", dtype=types.INT32, ndim=0)
    color = fn.external_source(name="color", dtype=types.FLOAT, ndim=2)
    height = fn.external_source(name="height", dtype=types.FLOAT, ndim=0)
    width = fn.external_source(name="width", dtype=types.FLOAT, ndim=0)
    images = fn.decoders.image_slice(
        encoded,
        device="mixed" if gpu else "cpu",
        start=start,
        end=end,
        axis_names="WH",
        output_type=types.RGB,
        adjust_orientation=False,
        **({"jpeg_fancy_upsampling": True} if gpu else {}),  # as the CPU decoder and Pillow do
    )
    images = fn.resize(images, size=size, dtype=types.FLOAT)  # bilinear, antialiased, like Pillow
    images = fn.flip(images, horizontal=flip)
    images = fn.coord_transform(images, MT=color)
    if turns:
        turn = fn.external_source(name="turn", dtype=types.FLOAT, ndim=2)
        canvas = fn.external_source(name="canvas", dtype=types.FLOAT, ndim=1)
        images = fn.warp_affine(images, matrix=turn, size=canvas, fill_value=0)
    return fn.crop_mirror_normalize(
        images,
        crop_h=height,
        crop_w=width,
        crop_pos_x=0.0,
        crop_pos_y=0.0,
        out_of_bounds_policy="pad",
        fill_values=0,
        mean=[0.0],
        std=[1.0],
        dtype=types.FLOAT,
        output_layout="CHW",
    )


def _rows(values: list[Any], kind: Any) -> np.ndarray:
    return np.array(values, dtype=kind)


def _encoded(sample: Sample) -> np.ndarray:
    """The bytes of an image file, or of a PPM of its pixels where Pillow has to decode it; uint8 [bytes]."""
    image = sample.image
    if image.plain:
        try:
            return np.fromfile(image.path, dtype=np.uint8)
        except OSError as error:
            raise ImageError(str(error)) from error
    pixels = decode(image.path, image.orientation)
    header = f"P6 {pixels.shape[1]} {pixels.shape[0]} 255\n".encode()
    return np.concatenate([np.frombuffer(header, dtype=np.uint8), pixels.reshape(-1)])  # [H, W, 3] → [H·W·3]
