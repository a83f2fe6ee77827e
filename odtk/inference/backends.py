"""Images → Detections, through PyTorch (.pth), ONNX Runtime (.onnx) or TensorRT (.plan, .engine)."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import ops
from ..categories import Category
from ..config import IMAGENET_MEAN, IMAGENET_STD, OdtkError, PostprocessConfig
from ..export.engine import need_engine
from ..export.metadata import ENGINES, Metadata
from ..export.session import open_session
from ..launch import silent
from ..model import checkpoint
from ..postprocess import Detections, postprocess


class Backend:
    """A detector that is ready to run.

    Attributes:
        name: the file and what runs it, for messages.
        size: (H, W) in pixels that images must have, None where any multiple of ``stride`` will do.
        classes, categories: number of classes, and what they stand for where the file says so.
        rotated: boxes have 6 values.
        mean, std: normalization of RGB values in [0, 1]; padding is 0 after it.
        max_batch: the most images in one call, None where there is no limit.
        precision: that it computes in.
        postprocess: the thresholds in force.
    """

    name: str
    size: tuple[int, int] | None
    stride: int
    classes: int
    categories: tuple[Category, ...] | None
    rotated: bool
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    max_batch: int | None = None
    precision: str
    postprocess: PostprocessConfig

    def __call__(self, images: Tensor) -> Detections:
        """images [N, 3, H, W] float32, normalized → Detections of boxes in pixels of those images."""
        raise NotImplementedError

    def describe(self, metadata: Metadata) -> None:
        """Takes what an exported file says of itself."""
        self.size, self.stride = metadata.size, metadata.stride
        self.classes, self.rotated = metadata.classes, metadata.box_values == 6
        self.categories = metadata.categories
        self.mean, self.std = metadata.mean, metadata.std
        self.precision, self.postprocess = metadata.precision, metadata.postprocess


class TorchBackend(Backend):
    """A checkpoint through PyTorch: norms folded, channels-last.

    ``mixed`` is fp16 on a GPU, and fp32 on a CPU, where half precision costs accuracy and seldom gains time.
    """

    def __init__(self, path: str, *, device: str, precision: str, thresholds: PostprocessConfig) -> None:
        loaded = checkpoint.load(path)
        self.device = torch.device(device)
        if precision == "mixed":
            precision = "fp16" if self.device.type == "cuda" else "fp32"
        self.type = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
        detector = checkpoint.build(loaded).fold().requires_grad_(False)
        self.detector = detector.to(self.device, self.type).to(memory_format=torch.channels_last)  # type: ignore
        self.anchors = [level.to(self.device) for level in detector.anchors()]
        self.name = f"{os.path.basename(path)} (PyTorch)"
        self.size, self.stride = None, detector.stride
        self.classes, self.categories = loaded.model.classes, loaded.categories
        self.rotated = loaded.model.rotated
        self.precision, self.postprocess = precision, thresholds

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Detections:
        images = images.to(self.device, self.type, memory_format=torch.channels_last)
        logits, boxes = self.detector(images)
        return postprocess(
            logits,
            boxes,
            anchors=self.anchors,
            strides=self.detector.strides,
            model=self.detector.config,
            config=self.postprocess,
        )


class OnnxBackend(Backend):
    """An exported file through ONNX Runtime, on the CPU or by its CUDA provider; images and results pass the host."""

    def __init__(self, path: str, *, device: str, say: Callable[[str], None] = print) -> None:
        import onnxruntime

        providers: list[Any] = ["CPUExecutionProvider"]
        if device.startswith("cuda"):
            if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
                say("This onnxruntime knows no CUDA and runs on the CPU: onnxruntime-gpu in its place uses the GPU.")
            else:
                providers.insert(0, ("CUDAExecutionProvider", {"device_id": torch.device(device).index or 0}))
        try:
            self.session = open_session(path, providers)
        except Exception as error:  # onnxruntime's own classes share no base but this
            raise OdtkError(f"{path} is not a model that ONNX Runtime can run ({first_line(error)}).") from error
        text = self.session.get_modelmeta().custom_metadata_map.get("odtk")
        if text is None:
            raise OdtkError(f"{path} was not exported by odtk: it does not say its classes, size and normalization.")
        metadata = Metadata.from_json(text, path)
        self.describe(metadata)
        if metadata.postprocessing not in ("detections", "candidates"):
            raise OdtkError(f"{path} ends in {metadata.postprocessing}, not in detections: export it again.")
        self.finished = metadata.postprocessing == "detections"
        self.name = f"{os.path.basename(path)} (ONNX Runtime, {self.session.get_providers()[0][:-17]})"

    def __call__(self, images: Tensor) -> Detections:
        feed = {"images": images.float().contiguous().cpu().numpy()}
        scores, boxes, classes = (torch.from_numpy(value) for value in self.session.run(None, feed))
        if not self.finished:  # rotated: ONNX has no such NMS
            limits = self.postprocess
            scores, boxes, classes = ops.nms(
                scores, boxes, classes, threshold=limits.nms_threshold, detections=limits.detections
            )
        return Detections(scores, boxes, classes)


class EngineBackend(Backend):
    """An engine through TensorRT, on a stream of its own between torch's work; images and results stay on the GPU.

    Not on torch's usual stream, CUDA's default one, for which TensorRT makes the host wait at every call.
    """

    def __init__(self, path: str, *, device: str) -> None:
        extension = need_engine()
        self.device = torch.device("cuda" if device == "cpu" else device)
        with open(path, "rb") as file, torch.cuda.device(self.device):
            try:
                self.engine = extension.Engine(file.read())
            except RuntimeError as error:
                raise OdtkError(f"{path} is not an engine for this GPU and TensorRT: {error}") from error
        if not self.engine.metadata:
            raise OdtkError(f"{path} was not exported by odtk: it does not say its classes, size and normalization.")
        metadata = Metadata.from_json(self.engine.metadata, path)
        self.describe(metadata)
        self.min_batch, self.max_batch = self.engine.batch
        self.stream = torch.cuda.Stream(self.device)
        self.name = f"{os.path.basename(path)} (TensorRT {extension.tensorrt_version()})"

    def __call__(self, images: Tensor) -> Detections:
        given, rows = len(images), self.postprocess.detections
        if self.max_batch and given > self.max_batch:
            raise OdtkError(f"{self.name} takes {self.max_batch} images at a time at most, not {given}.")
        images = images.to(self.device, torch.float32).contiguous()
        if given < self.min_batch:
            images = torch.cat([images, images.new_zeros(self.min_batch - given, *images.shape[1:])])
        batch = len(images)
        found = Detections(
            torch.empty(batch, rows, device=self.device),
            torch.empty(batch, rows, 6 if self.rotated else 4, device=self.device),
            torch.empty(batch, rows, dtype=torch.int32, device=self.device),
        )
        values = {"images": images, "scores": found.scores, "boxes": found.boxes, "classes": found.classes}
        addresses = {name: (value.data_ptr(), tuple(value.shape)) for name, value in values.items()}
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        self.engine.infer(addresses, self.stream.cuda_stream)
        current.wait_stream(self.stream)  # before it frees or reads these tensors, all of them its own
        return Detections(found.scores[:given], found.boxes[:given], found.classes[:given].long())


def open_backend(
    path: str,
    *,
    device: str,
    precision: str,
    postprocess: PostprocessConfig | None,
    say: Callable[[str], None] = print,
) -> Backend:
    """The backend for a file, by its suffix; says (once over all processes) which thresholds it has baked in.

    Args:
        device: cpu, cuda:0 …
        precision: of a .pth: mixed, fp16, bf16 or fp32; other files have their own.
        postprocess: thresholds asked for; None, and each value that is the default, is no wish.

    Raises:
        OdtkError: no such file, not a file of odtk, a wish that contradicts what is baked in, no GPU for an engine.
    """
    suffix = os.path.splitext(path)[1]
    if dist.is_initialized() and dist.get_rank():
        say = silent
    if not os.path.isfile(path):
        raise OdtkError(f"There is no model {path}.")
    if suffix == ".pth":
        thresholds = postprocess or PostprocessConfig()
        return TorchBackend(path, device=device, precision=precision, thresholds=thresholds)
    if suffix == ".onnx":
        backend: Backend = OnnxBackend(path, device=device, say=say)
    elif suffix in ENGINES:
        backend = EngineBackend(path, device=device)
    else:
        raise OdtkError(f"{path} must end in .pth, .onnx, .plan or .engine.")
    check_thresholds(path, baked=backend.postprocess, asked=postprocess)
    own = backend.postprocess
    say(
        f"{path} has baked in: score above {own.score_threshold:g}, NMS at IoU {own.nms_threshold:g}, "
        f"at most {own.detections} detections."
    )
    return backend


def check_thresholds(path: str, *, baked: PostprocessConfig, asked: PostprocessConfig | None) -> None:
    """Refuses a threshold that was asked for (is not the default) and is not the one in the file.

    Raises:
        OdtkError: naming the flag and both values.
    """
    if asked is None:
        return
    for field in dataclasses.fields(PostprocessConfig):
        wish, own = getattr(asked, field.name), getattr(baked, field.name)
        if wish != own and wish != field.default:
            flag = "--" + field.name.replace("_", "-")
            raise OdtkError(f"{flag} {wish:g} contradicts the {own:g} baked into {path}: leave it out.")


def first_line(error: BaseException) -> str:
    """An error in one short line."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]
