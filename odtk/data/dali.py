"""The pixel engine of NVIDIA DALI: one pipeline definition for CPU and GPU.

DALI gets the encoded bytes of each image and the sampler's decisions, and does what takes time: it decodes only the
crop (partly on the GPU, if there is one), scales, flips, rotates, changes the color, normalizes and pads; in inference
it rounds the scaled pixels as Pillow does, so that a batch of uint8 and a normalized one hold the same. DALI's own
COCO reader is not used: it remaps category ids, and its random crop could not be resumed, nor repeated by the torch
loader.

Images to be turned by EXIF, and kinds that decoders read differently (``Image.plain`` is false), are few. Pillow
decodes them, and DALI gets their pixels as a PPM file.
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
from ..text import first_line
from .batch import PREFETCH, Loader, padding_value
from .dataset import Dataset
from .images import ImageError
from .sampler import BatchPlan, Sample

fn: Any = dali.fn  # DALI makes its operators and types at import, where type checkers do not see them
types: Any = dali.types

NO_ROTATION = np.eye(2, 3, dtype=np.float32)


class DaliLoader(Loader):
    """Makes pixels with DALI on ``config.workers`` threads of its own; on the GPU if ``config.device`` is one."""

    def __init__(self, dataset: Dataset, config: LoaderConfig) -> None:
        super().__init__(dataset, config, threads=1 + PREFETCH)  # these read files, and one at a time runs the pipeline
        augment = config.augment
        self._rotates = config.training and (augment.rotate or augment.free_rotate != (0.0, 0.0))
        self._places = config.training and augment.scale != (1.0, 1.0)
        self._pipeline: Any = None
        self._lock = Lock()
        self._stream = None if config.device == "cpu" else torch.cuda.Stream(config.device)

    def render_batch(self, plan: BatchPlan) -> Tensor:
        try:
            encoded = [_encoded(sample) for sample in plan.samples]
            with self._lock:
                return self._run(plan, encoded)
        except (ImageError, RuntimeError) as error:
            # One damaged image makes DALI fail on the batch: torch then makes the batch and names the image.
            images = self.render_with_torch(plan)
            if not any(sample.image.path in self.damaged for sample in plan.samples):
                reason = first_line(error)
                print(f"Warning: DALI failed on a batch, so the torch loader made it: {reason}", file=sys.stderr)
            return images

    def _run(self, plan: BatchPlan, encoded: list[np.ndarray]) -> Tensor:
        samples = plan.samples
        # The caller holds the lock. The pipeline is put back only after a run without error: a damaged image spoils it.
        pipeline, self._pipeline = self._pipeline, None
        if pipeline is None:
            pipeline = self._build()
        inputs = {
            "encoded": encoded,
            "start": _array([sample.view.crop[:2] for sample in samples], np.int32),
            "end": _array([sample.view.crop[2:] for sample in samples], np.int32),
            "size": _array([sample.view.size[::-1] for sample in samples], np.float32),
            "flip": _array([sample.flip for sample in samples], np.int32),
            "height": np.full(len(samples), plan.height, dtype=np.float32),
            "width": np.full(len(samples), plan.width, dtype=np.float32),
        }
        if self.config.input_type != "uint8":
            inputs["color"] = np.stack([sample.color for sample in samples])
        if self._places:
            inputs["place"] = -_array([sample.view.place for sample in samples], np.int32)
            inputs["frame"] = _array([sample.view.frame for sample in samples], np.int32)
        if self._rotates:
            rotations = [NO_ROTATION if sample.rotation is None else sample.rotation for sample in samples]
            inputs["rotation"] = np.stack(rotations)
            inputs["canvas"] = _array([sample.canvas[::-1] for sample in samples], np.float32)
        with torch.cuda.stream(self._stream):  # no effect without a stream
            (output,) = pipeline.run(**inputs)
            images = to_torch_tensor(output.as_tensor(), copy=True)
            if self._stream is not None:
                self._stream.synchronize()
        self._pipeline = pipeline
        return images

    def to_device(self, tensor: Tensor) -> Tensor:
        if self._stream is not None and tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream(tensor.device))  # made on another stream
        return super().to_device(tensor)

    def _build(self) -> Any:
        pipeline = _pipeline(
            rotates=self._rotates,
            freely=self.config.augment.free_rotate != (0.0, 0.0),
            places=self._places,
            gpu=self._stream is not None,
            padding=padding_value(self.config).tolist(),
            rounds=not self.config.training,
            integers=self.config.input_type == "uint8",
            batch_size=self.config.batch,
            num_threads=max(1, self.config.workers),
            device_id=None if self._stream is None else self._stream.device_index,
            prefetch_queue_depth=1,  # the loader's own threads work ahead
        )
        pipeline.build()
        return pipeline


@dali.pipeline_def
def _pipeline(
    rotates: bool, freely: bool, places: bool, gpu: bool, padding: list[float], rounds: bool, integers: bool
) -> Any:
    """Encoded images and decisions → [3, height, width], padded by [3] values; ``_run`` names the inputs.

    Args:
        rounds: scaled pixels are rounded to integers.
        integers: the result is these, uint8, without the change of color; else it is float32.
    """
    encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
    start = fn.external_source(name="start", dtype=types.INT32, ndim=1)
    end = fn.external_source(name="end", dtype=types.INT32, ndim=1)
    size = fn.external_source(name="size", dtype=types.FLOAT, ndim=1)
    flip = fn.external_source(name="flip", dtype=types.INT32, ndim=0)
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
    scaled = types.UINT8 if rounds else types.FLOAT
    images = fn.resize(images, size=size, dtype=scaled)  # bilinear, antialiased, like Pillow
    images = fn.flip(images, horizontal=flip)
    if not integers:
        color = fn.external_source(name="color", dtype=types.FLOAT, ndim=2)
        images = fn.coord_transform(images, MT=color, dtype=types.FLOAT)
    if places:
        place = fn.external_source(name="place", dtype=types.INT32, ndim=1)
        frame = fn.external_source(name="frame", dtype=types.INT32, ndim=1)
        images = fn.slice(
            images, start=place, shape=frame, axis_names="WH", out_of_bounds_policy="pad", fill_values=padding
        )
    if rotates:
        rotation = fn.external_source(name="rotation", dtype=types.FLOAT, ndim=2)
        canvas = fn.external_source(name="canvas", dtype=types.FLOAT, ndim=1)
        if freely:
            # fill_value is one number for all channels, so that the images are shifted there and back
            images = fn.warp_affine(images - padding, matrix=rotation, size=canvas, fill_value=0) + padding
        else:  # quarter turns, which show nothing beyond the frame
            images = fn.warp_affine(images, matrix=rotation, size=canvas, interp_type=types.INTERP_NN)
    return fn.crop_mirror_normalize(
        images,
        crop_h=height,
        crop_w=width,
        crop_pos_x=0.0,
        crop_pos_y=0.0,
        out_of_bounds_policy="pad",
        fill_values=padding,
        mean=[0.0],
        std=[1.0],
        dtype=types.UINT8 if integers else types.FLOAT,
        output_layout="CHW",
    )


def _array(values: list[Any], dtype: Any) -> np.ndarray:
    """One row per sample, as DALI takes it."""
    return np.array(values, dtype=dtype)


def _encoded(sample: Sample) -> np.ndarray:
    """The bytes of an image file, or of a PPM file of its pixels if Pillow has to decode it; uint8 [bytes].

    Raises:
        ImageError: the file cannot be read or decoded.
    """
    image = sample.image
    if image.plain and (image.content is not None or image.member is not None):
        return np.frombuffer(image.read(), dtype=np.uint8)
    if image.plain:
        try:
            return np.fromfile(image.path, dtype=np.uint8)
        except OSError as error:
            raise ImageError(str(error)) from error
    pixels = image.decode()
    header = f"P6 {pixels.shape[1]} {pixels.shape[0]} 255\n".encode()
    return np.concatenate([np.frombuffer(header, dtype=np.uint8), pixels.reshape(-1)])  # [H, W, 3] → [H·W·3]
