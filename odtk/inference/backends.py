"""Images → BatchDetections, through PyTorch (.pth), ONNX Runtime (.onnx), TensorRT (.plan, .engine) or a Triton server.

Importable without onnx: only export needs it.
"""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from .. import ops
from ..categories import Category
from ..config import IMAGENET_MEAN, IMAGENET_STD, OdtkError, PostprocessConfig
from ..exporting.engine import require_tensorrt
from ..exporting.metadata import ENGINES, Metadata, unpack
from ..exporting.session import open_session
from ..model import checkpoint
from ..model.detector import normalize
from ..model.padding import padding_warning
from ..postprocess import BatchDetections, postprocess
from ..ranks import silent
from ..text import first_line, plural, say
from .served import Served, is_address


class Backend:
    """A detector that is ready to run.

    Attributes:
        name: the file and what runs it, for messages.
        size: (H, W) in pixels that images must have; None if any multiples of ``stride`` will do.
        classes: number of classes.
        categories: in the order of the class indices; None if the file has none.
        rotated: boxes have 6 values instead of 4.
        mean, std, padding: how images are prepared, as in config.ModelConfig.
        input_type: what loaders are to give it: pixels from 0 to 255 as ``uint8`` or ``float32``, or ``normalized``.
        max_batch: the most images in one call; None if there is no limit.
        resize, max_size: shorter side and cap of the longer one, in pixels, that a .pth was trained with, if it says.
        input_size: (H, W) that holds nearly all images at that size, see model.checkpoint.Checkpoint.
        precision: what it computes in: fp32, fp16, bf16 or int8.
        thresholds: of its detections. Those of an exported file may be narrower than what the file computes.
        metadata: what an exported file says of itself; None for a .pth.
    """

    name: str
    size: tuple[int, int] | None
    stride: int
    classes: int
    categories: tuple[Category, ...] | None
    rotated: bool
    resize: int | None = None
    max_size: int | None = None
    input_size: tuple[int, int] | None = None
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    padding: str = "mean"
    input_type: str = "normalized"
    max_batch: int | None = None
    precision: str
    thresholds: PostprocessConfig
    metadata: Metadata | None = None

    def padding_warning(self, share: float) -> str | None:
        """A sentence where detections depend on padding, and images have another share of it than in training.

        Args:
            share: of the pixels of the batches to come, 0 to 1.
        """
        return None  # an exported file does not say; `odtk export` warns for its size

    def __call__(self, images: Tensor) -> BatchDetections:
        """RGB images [N, 3, H, W] → BatchDetections with boxes in pixels of these images.

        Args:
            images: uint8 pixels, which every backend takes, or floats: pixels from 0 to 255 if ``input_type`` is
                float32, normalized otherwise.

        Raises:
            OdtkError: floats for a file that takes uint8.
        """
        found = self.compute(images)
        computed = self.thresholds if self.metadata is None else self.metadata.thresholds
        return found if computed == self.thresholds else narrow(found, self.thresholds)

    def compute(self, images: Tensor) -> BatchDetections:
        """As __call__, with the thresholds that are fixed in the file."""
        raise NotImplementedError

    def place(self, images: Tensor) -> Tensor:
        """Images, as __call__ has them, where the backend reads them without copying them once more."""
        return images

    def as_input(self, images: Tensor) -> Tensor:
        """Images, as __call__ has them, in the form that an exported file takes, on the same device."""
        if images.dtype != torch.uint8:
            if self.input_type == "uint8":
                raise OdtkError(f"{self.name} takes pixels as uint8, not {images.dtype}.")
            return images.float()
        if self.input_type == "normalized":
            return normalize(images, self.mean, self.std)
        return images if self.input_type == "uint8" else images.float()

    def finished(self, outputs: Sequence[np.ndarray]) -> BatchDetections:
        """The outputs of an exported file, scores, boxes and classes, after the NMS that a graph may lack."""
        scores, boxes, classes = (torch.from_numpy(values) for values in outputs)
        assert self.metadata is not None
        if self.metadata.postprocessing == "candidates":  # rotated boxes: ONNX has no NMS for them
            threshold, detections = self.metadata.thresholds.nms_threshold, self.metadata.thresholds.detections
            scores, boxes, classes = ops.nms(scores, boxes, classes, threshold=threshold, detections=detections)
        return BatchDetections(scores, boxes, classes)

    def apply_metadata(self, metadata: Metadata) -> None:
        """Sets the attributes to what an exported file says about itself."""
        self.metadata = metadata
        self.size, self.stride = metadata.size, metadata.stride
        self.classes, self.rotated = metadata.classes, metadata.rotated
        self.categories = metadata.categories
        self.mean, self.std, self.padding = metadata.mean, metadata.std, metadata.padding
        self.input_type = metadata.input_type
        self.precision, self.thresholds = metadata.precision, metadata.thresholds


class TorchBackend(Backend):
    """A checkpoint through PyTorch, with norms folded and tensors channels-last.

    The precision ``mixed`` is fp16 on a GPU, and fp32 on a CPU, where fp16 costs accuracy and is rarely faster.
    """

    def __init__(self, path: str, *, device: str, precision: str, thresholds: PostprocessConfig) -> None:
        loaded = checkpoint.load(path)
        self.device = torch.device(device)
        if precision == "mixed":
            precision = "fp16" if self.device.type == "cuda" else "fp32"
        self.dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
        detector = checkpoint.build_detector(loaded).fold().requires_grad_(False)
        self.detector = detector.to(self.device, self.dtype).to(memory_format=torch.channels_last)  # type: ignore
        self.anchors = [level.to(self.device) for level in detector.anchors()]
        self.name = f"{os.path.basename(path)} (PyTorch)"
        self.size, self.stride = None, detector.stride
        self.classes, self.categories = loaded.model.classes, loaded.categories
        self.rotated = loaded.model.rotated
        self.mean, self.std, self.padding = loaded.model.mean, loaded.model.std, loaded.model.padding
        self.input_type = "uint8" if self.padding == "black" else "normalized"  # no pixel is 0 once normalized
        self.resize, self.max_size = loaded.setting("resize"), loaded.setting("max_size")
        self.input_size = checkpoint.trained_size(loaded)
        self.padding_share = loaded.setting("padding_share")
        self.precision, self.thresholds = precision, thresholds

    def padding_warning(self, share: float) -> str | None:
        return padding_warning(self.detector, self.padding_share, share, "in these batches")

    @torch.inference_mode()
    def compute(self, images: Tensor) -> BatchDetections:
        images = images.to(self.device)  # before normalization: uint8 are fewer bytes
        if images.dtype == torch.uint8:
            images = normalize(images, self.mean, self.std)
        images = images.to(self.dtype, memory_format=torch.channels_last)
        with TF32.off():
            logits, boxes = self.detector(images)
        return postprocess(
            logits,
            boxes,
            anchors=self.anchors,
            strides=self.detector.strides,
            model=self.detector.config,
            config=self.thresholds,
        )


class OnnxBackend(Backend):
    """An .onnx file through ONNX Runtime, on the CPU or with CUDA; images and results go through the CPU's memory."""

    def __init__(self, path: str, *, device: str, log: Callable[[str], None] = say) -> None:
        import onnxruntime

        providers: list[Any] = ["CPUExecutionProvider"]
        if device.startswith("cuda"):
            if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
                log("This onnxruntime has no CUDA and runs on the CPU: install onnxruntime-gpu instead to use the GPU.")
            else:
                providers.insert(0, ("CUDAExecutionProvider", {"device_id": torch.device(device).index or 0}))
        try:
            self.session = open_session(path, providers)
        except Exception as error:  # onnxruntime's own exceptions have no other common base
            raise OdtkError(f"{path} is not a model that ONNX Runtime can run ({first_line(error)[:200]}).") from error
        text = self.session.get_modelmeta().custom_metadata_map.get("odtk")
        if text is None:
            raise OdtkError(
                f"{path} was not exported by odtk: it has no metadata about its classes, size and normalization."
            )
        metadata = Metadata.from_json(text, path)
        self.apply_metadata(metadata)
        if metadata.postprocessing not in ("detections", "candidates"):
            raise OdtkError(f"The outputs of {path} are {metadata.postprocessing}, not detections: export it again.")
        self.name = f"{os.path.basename(path)} (ONNX Runtime, {self.session.get_providers()[0][:-17]})"

    def compute(self, images: Tensor) -> BatchDetections:
        feed = {"images": self.as_input(images).contiguous().cpu().numpy()}
        return self.finished(self.session.run(None, feed))


class ServedBackend(Backend):
    """A model on a Triton server; images and results go through the CPU's memory."""

    def __init__(self, address: str, *, log: Callable[[str], None] = say) -> None:
        self.served = Served(address, log)
        self.apply_metadata(self.served.metadata)
        self.name = f"{address} (Triton)"

    def compute(self, images: Tensor) -> BatchDetections:
        return self.finished(self.served.infer(self.as_input(images).contiguous().cpu().numpy()))


class EngineBackend(Backend):
    """An engine through TensorRT; images and results stay on the GPU.

    It runs on a CUDA stream of its own, because on the default stream, which torch uses, TensorRT synchronizes with the
    CPU at every call. Torch's stream and this one wait for each other.

    Each batch size is a CUDA graph from its second call on, which needs addresses that stay: images are copied into
    buffers that are kept, on the GPU, and the detections out of them.
    """

    def __init__(self, path: str, *, device: str) -> None:
        extension = require_tensorrt()
        self.device = torch.device("cuda" if device == "cpu" else device)
        with open(path, "rb") as file, torch.cuda.device(self.device):
            try:
                self.engine = extension.Engine(file.read())
            except RuntimeError as error:
                raise OdtkError(f"{path} is not an engine for this GPU and TensorRT: {error}") from error
        if not self.engine.metadata:
            raise OdtkError(
                f"{path} was not exported by odtk: it has no metadata about its classes, size and normalization."
            )
        metadata = Metadata.from_json(unpack(self.engine.metadata, path), path)
        self.apply_metadata(metadata)
        self.min_batch, self.max_batch = self.engine.batch
        self.stream = torch.cuda.Stream(self.device)
        self.lock = threading.Lock()  # the buffers and the engine's execution context take one call at a time
        self.buffers: dict[str, Tensor] = {}
        self.graphs = True  # until the engine proves to be one that cannot be captured
        self.name = f"{os.path.basename(path)} (TensorRT {extension.tensorrt_version()})"

    @torch.inference_mode()
    def compute(self, images: Tensor) -> BatchDetections:
        given = len(images)
        if self.max_batch and given > self.max_batch:
            raise OdtkError(f"{self.name} takes at most {plural(self.max_batch, 'image')} at a time, not {given}.")
        images = self.as_input(images.to(self.device, non_blocking=True))
        batch = max(given, self.min_batch)  # what lies in the buffers behind fewer images is of no account
        with self.own_stream() as current:
            buffers = self.buffers_for(batch)
            if images.data_ptr() != buffers["images"].data_ptr():
                buffers["images"][:given].copy_(images)
            self.run({name: buffer[:batch] for name, buffer in buffers.items()})
            # Copies, because the next call, perhaps of another thread, writes into the buffers.
            scores, boxes = (buffers[name][:given].clone() for name in ("scores", "boxes"))
            classes = buffers["classes"][:given].long()
            for values in (scores, boxes, classes):
                values.record_stream(current)  # the memory belongs to the engine's stream
        return BatchDetections(scores, boxes, classes)

    @torch.inference_mode()
    def place(self, images: Tensor) -> Tensor:
        images = self.as_input(images.to(self.device))
        with self.own_stream():
            return self.buffers_for(max(len(images), self.min_batch))["images"][: len(images)].copy_(images)

    @contextmanager
    def own_stream(self) -> Iterator[torch.cuda.Stream]:
        """Within it torch works on the engine's stream, one thread at a time, behind what the current stream had to do.

        Gives the current stream, which then waits for what was enqueued.
        """
        current = torch.cuda.current_stream(self.device)
        with self.lock:
            self.stream.wait_stream(current)
            with torch.cuda.stream(self.stream):
                yield current
            current.wait_stream(self.stream)

    def buffers_for(self, batch: int) -> dict[str, Tensor]:
        """The engine's tensors by name, for that many images or more; the same ones until a batch is larger."""
        if not self.buffers or len(self.buffers["images"]) < batch:
            assert self.metadata is not None
            rows, values = self.metadata.thresholds.detections, self.metadata.box_values
            pixels = torch.uint8 if self.input_type == "uint8" else torch.float32
            shapes = {
                "images": ((3, *self.metadata.size), pixels),
                "scores": ((rows,), torch.float32),
                "boxes": ((rows, values), torch.float32),
                "classes": ((rows,), torch.int32),
            }
            self.buffers = {
                name: torch.zeros(batch, *shape, dtype=kind, device=self.device)
                for name, (shape, kind) in shapes.items()
            }
        return self.buffers

    def run(self, tensors: dict[str, Tensor]) -> None:
        """Enqueues one inference on the engine's stream, as a CUDA graph unless the engine cannot be captured."""
        addresses = {name: (tensor.data_ptr(), tuple(tensor.shape)) for name, tensor in tensors.items()}
        if self.graphs:
            try:
                return self.engine.infer(addresses, self.stream.cuda_stream, graph=True)
            except RuntimeError as error:
                if "cannot be captured" not in str(error):
                    raise
                self.graphs = False
        self.engine.infer(addresses, self.stream.cuda_stream)


class Tf32:
    """Switches TF32 off while some thread wants it off; the last one restores what the process had."""

    def __init__(self) -> None:
        self.lock, self.threads, self.before = threading.Lock(), 0, (True, True)

    @contextmanager
    def off(self) -> Iterator[None]:
        """Within it, float32 on a GPU is float32: by default, cuDNN's convolutions round their factors to 10 bits."""
        cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
        with self.lock:
            if not self.threads:
                self.before = cudnn.allow_tf32, matmul.allow_tf32
            self.threads += 1
            cudnn.allow_tf32 = matmul.allow_tf32 = False
        try:
            yield
        finally:
            with self.lock:
                self.threads -= 1
                if not self.threads:
                    cudnn.allow_tf32, matmul.allow_tf32 = self.before


TF32 = Tf32()


def open_backend(
    path: str,
    *,
    device: str,
    precision: str,
    thresholds: PostprocessConfig | None,
    explicit: Sequence[str] = (),
    log: Callable[[str], None] = say,
) -> Backend:
    """The backend for a file, chosen by its suffix, or for a model on a server.

    Args:
        path: a .pth, .onnx, .plan or .engine, or an address (served.py).
        device: cpu, cuda:0 …
        precision: of a .pth: mixed, fp16, bf16 or fp32; other files have their own.
        thresholds, explicit: those of a .pth (None: the defaults); for other files see narrowed_thresholds.
        log: takes messages; only rank 0 has any.

    Raises:
        OdtkError: the file does not exist or is not one of odtk's, it cannot give the thresholds asked for, or an
            engine lacks its GPU. A server: as Served.
    """
    suffix = os.path.splitext(path)[1]
    if dist.is_initialized() and dist.get_rank():
        log = silent
    served = is_address(path)
    if not served and not os.path.isfile(path):
        raise OdtkError(f"There is no model {path}.")
    if suffix == ".pth" and not served:
        return TorchBackend(path, device=device, precision=precision, thresholds=thresholds or PostprocessConfig())
    if served:
        backend: Backend = ServedBackend(path, log=log)
    elif suffix == ".onnx":
        backend = OnnxBackend(path, device=device, log=log)
    elif suffix in ENGINES:
        backend = EngineBackend(path, device=device)
    else:
        raise OdtkError(f"{path} must end in .pth, .onnx, .plan or .engine.")
    own = backend.thresholds
    backend.thresholds = narrowed_thresholds(path, own, thresholds, explicit)
    log(
        f"Thresholds in {path}: score above {own.score_threshold:g}, NMS at IoU {own.nms_threshold:g}, "
        f"at most {plural(own.detections, 'detection')}."
    )
    if backend.thresholds != own:
        log(
            f"Of these, kept are scores above {backend.thresholds.score_threshold:g}, "
            f"at most {plural(backend.thresholds.detections, 'detection')} per image."
        )
    return backend


def narrowed_thresholds(
    path: str, own: PostprocessConfig, asked: PostprocessConfig | None, explicit: Sequence[str] = ()
) -> PostprocessConfig:
    """The thresholds of an exported file, where asked for with a higher score threshold or fewer detections.

    Both can be applied to what the file computes: NMS is greedy, so that a box never depends on one of a lower score.

    Args:
        own: the file's thresholds, which are fixed in it.
        asked: the thresholds asked for; None means no preference, and so does a value that is the default.
        explicit: names of thresholds that were asked for expressly, so that even a default is a wish.

    Raises:
        OdtkError: the file cannot give what is asked for; names the flag and both values.
    """
    changes = {}
    for field in dataclasses.fields(PostprocessConfig) if asked else ():
        wanted, fixed = getattr(asked, field.name), getattr(own, field.name)
        if wanted == fixed or (wanted == field.default and field.name not in explicit):
            continue
        if (field.name == "score_threshold" and wanted > fixed) or (field.name == "detections" and wanted < fixed):
            changes[field.name] = wanted
            continue
        flag = "--" + field.name.replace("_", "-")
        reason = {"score_threshold": "is below", "detections": "is above"}.get(field.name, "contradicts")
        raise OdtkError(f"{flag} {wanted:g} {reason} the {fixed:g} in {path}: omit it, or export the model again.")
    return dataclasses.replace(own, **changes)


def narrow(found: BatchDetections, thresholds: PostprocessConfig) -> BatchDetections:
    """The detections above a score, at most so many per image; the other rows are zero or cut off."""
    rows = slice(thresholds.detections)
    scores, boxes, classes = found.scores[:, rows], found.boxes[:, rows], found.classes[:, rows]
    kept = scores > thresholds.score_threshold  # [N, D]
    return BatchDetections(scores * kept, boxes * kept[..., None], classes * kept)
