"""A model that predicts: images as Python has them → Detections, by the same loader and rules as `odtk infer`.

Arrays and tensors are RGB, never BGR: what OpenCV reads needs ``image[:, :, ::-1]`` first.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, overload

import numpy as np
import torch
from PIL import Image as PILImage
from torch import Tensor

from ..boxes import circumscribe, coco_to_corners
from ..categories import Category
from ..config import InferConfig, LoaderConfig, OdtkError, TilesConfig, VideoConfig
from ..data.batch import Loader
from ..data.dataset import Dataset
from ..data.headers import read_headers
from ..data.images import ImageError, decode, decode_content, read_header, to_rgb
from ..data.listing import list_images
from ..data.loader import create_loader
from ..data.records import Image
from ..ranks import silent
from ..text import plural, printable
from .backends import Backend, open_backend
from .detect import box_outlines, coco_results, detect_batches
from .drawing import annotate, coco_to_shapes
from .infer import as_trained, describe_size, loader_config, match_categories
from .tiles import detect_tiles
from .tracking import Tracker
from .video import Frame, Video, is_video, shown_name

FilePath: TypeAlias = str | os.PathLike[str]
InMemory: TypeAlias = bytes | bytearray | PILImage.Image | np.ndarray | Tensor
ImageLike: TypeAlias = FilePath | InMemory
BATCH = 2  # images at a time, as `odtk infer` has it on one device
VIDEO_BATCHES = 4  # batches of a video file that are prepared together, while others are computed


# ---------------------------------------------------------------------------------------------------------------------
# What was found


@dataclass(frozen=True, eq=False)
class Detections:
    """What was found in one image, by descending score. ``len()`` is the number of objects.

    Attributes:
        rows: float64 [n, 2 + 4|5]: class index, score, and COCO box as detect.detection_rows gives it.
        categories: of the model, in the order of the class indices.
        size: (width, height) of the image in pixels; of a file, turned as its EXIF orientation says. (0, 0) if it
            could not be read.
        image_id: position of the image in what was given, from 1; of a video, the frame's index, from 0.
        path: of the image's file; None if it came from memory.
        error: why the image could not be read, where damaged images are skipped; else None.
        frame: of a video: its index, its time and its pixels; else None.
        tracks: of a video that is tracked, int64 [n]: the same number for the same object in every frame, from 1 on; 0
            for none, or not yet. Else None.
    """

    rows: np.ndarray
    categories: tuple[Category, ...]
    size: tuple[int, int]
    image_id: int = 1
    path: Path | None = None
    error: str | None = None
    frame: Frame | None = None
    tracks: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        where = self.path or f"{'frame' if self.frame else 'image'} {self.image_id}"
        return f"<Detections in {where}: {self.error or plural(len(self), 'object')}>"

    @property
    def labels(self) -> np.ndarray:
        """Class indices, int64 [n]: places in ``categories`` and in Model.names, not category ids."""
        return self.rows[:, 0].astype(np.int64)

    @property
    def scores(self) -> np.ndarray:
        """Float64 [n], in (0, 1]."""
        return self.rows[:, 1].copy()

    @property
    def names(self) -> list[str]:
        """The class name of each object."""
        return [self.categories[label].name for label in self.labels]

    @property
    def boxes(self) -> np.ndarray:
        """Float64 [n, 4] (x1, y1, x2, y2) in pixels of the image, continuous: x2 − x1 is the width.

        Of a rotated model, the smallest upright boxes around the rotated ones.
        """
        if self.rotated:
            around = circumscribe(coco_to_corners(torch.from_numpy(self.rows[:, 2:]))).numpy()  # inclusive corners
            return np.concatenate([around[:, :2], around[:, 2:] + 1], axis=1)
        x1y1, size = self.rows[:, 2:4], self.rows[:, 4:6]
        return np.concatenate([x1y1, x1y1 + size], axis=1)

    @property
    def rotated(self) -> bool:
        """Whether the model's boxes have angles."""
        return self.rows.shape[1] == 7

    @property
    def rotated_boxes(self) -> np.ndarray:
        """Float64 [n, 5] (center x, center y, width, height, theta), pixels of the image.

        Theta is in radians, counterclockwise as seen on the screen; 0 throughout if the model is not a rotated one.
        """
        corner, size = self.rows[:, 2:4], self.rows[:, 4:6]
        theta = self.rows[:, 6:] if self.rotated else np.zeros((len(self), 1))
        return np.concatenate([corner + size / 2, size, theta], axis=1)

    @property
    def polygons(self) -> np.ndarray:
        """The four corners (x, y) of each box, rotated or not: float64 [n, 4, 2] in pixels of the image.

        From the upper left corner of the box before its turn, clockwise on the screen.
        """
        boxes = self.rows[:, 2:] if self.rotated else np.pad(self.rows[:, 2:], ((0, 0), (0, 1)))
        return box_outlines(boxes).reshape(-1, 4, 2)  # [n, 8] -> [n, 4, 2]

    def above(self, score: float) -> Detections:
        """Those that score above a number."""
        kept = self.rows[:, 1] > score
        return dataclasses.replace(
            self, rows=self.rows[kept], tracks=None if self.tracks is None else self.tracks[kept]
        )

    def to_coco(self, image_id: int | None = None) -> list[dict[str, Any]]:
        """COCO results, exactly as `odtk infer` writes them (``bbox`` is [x, y, w, h], or [x, y, w, h, theta]).

        What has a track has its number as ``track_id``.

        Args:
            image_id: of the image; None: its position in what was given, as in a folder without annotations.
        """
        ids = np.full(len(self), self.image_id if image_id is None else image_id, dtype=np.int64)
        results = coco_results(ids, self.rows, self.categories)
        if self.tracks is not None:
            for result, track in zip(results, self.tracks.tolist(), strict=True):
                if track:
                    result["track_id"] = track
        return results

    def to_supervision(self) -> Any:
        """As supervision.Detections: ``xyxy``, ``confidence``, ``class_id``, ``data["class_name"]``.

        Rotated boxes add their corners as ``data["xyxyxyxy"]``, as its OrientedBoxAnnotator takes them.

        Raises:
            OdtkError: the package supervision is not installed.
        """
        try:
            import supervision
        except ImportError as error:
            raise OdtkError(
                "to_supervision() needs the package supervision: install it with `pip install supervision`."
            ) from error
        data: dict[str, Any] = {"class_name": np.array(self.names, dtype=str)}
        if self.rotated:
            data["xyxyxyxy"] = self.polygons.astype(np.float32)
        return supervision.Detections(
            xyxy=self.boxes.astype(np.float32),
            confidence=self.scores.astype(np.float32),
            class_id=self.labels,
            data=data,
            tracker_id=self.tracks,
        )

    def draw(self, image: ImageLike | None = None) -> PILImage.Image:
        """A copy of the image with the boxes, names and scores drawn on it, of the same size.

        Args:
            image: the image that was given to predict; None: its file, or its frame of a video.

        Raises:
            OdtkError: there is no file or frame, it cannot be read, or the image has another size.
        """
        if image is None and self.frame is not None:
            image = self.frame.pixels
        if image is None:
            if self.path is None:
                raise OdtkError("draw(image) needs the image: it was not given to predict as a file.")
            image = self.path
        try:
            picture = PILImage.fromarray(pixels_of(image))
        except ImageError as error:
            raise OdtkError(f"Cannot draw on {name_of(image, self.image_id)}: {error}.") from error
        if picture.size != self.size:
            sizes = f"{picture.width}×{picture.height} pixels, not {self.size[0]}×{self.size[1]}"
            raise OdtkError(f"Cannot draw on another image than the one predicted on: this one has {sizes}.")
        return annotate(picture, coco_to_shapes(self.to_coco()))


# ---------------------------------------------------------------------------------------------------------------------
# Images as Python has them


def pixels_of(image: ImageLike) -> np.ndarray:
    """The pixels of an image, uint8 [H, W, 3] RGB; a file, or its bytes, is turned by its EXIF orientation.

    Raises:
        ImageError: a file or its bytes cannot be decoded.
        OdtkError: an array or tensor is not of the form that predict takes, or it is nothing of the kind.
    """
    if isinstance(image, (str, os.PathLike)):
        path = Path(os.path.expanduser(image))
        return decode(path, read_header(path).orientation)
    if isinstance(image, (bytes, bytearray)):
        return decode_content(bytes(image))
    if isinstance(image, PILImage.Image):
        try:
            return np.array(to_rgb(image))
        except ImageError:
            raise
        except Exception as error:  # Pillow decodes late, and its plugins raise almost any exception
            raise ImageError(f"the image cannot be read ({error})") from error
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise OdtkError(f"An array must be RGB, uint8 [H, W, 3], not {image.dtype} {list(image.shape)}.")
        return image
    if isinstance(image, Tensor):
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3 or 0 in image.shape:
            kind = str(image.dtype).removeprefix("torch.")
            raise OdtkError(f"A tensor must be RGB, uint8 [3, H, W], not {kind} {list(image.shape)}.")
        return image.detach().cpu().permute(1, 2, 0).numpy()  # [3, H, W] -> [H, W, 3]
    raise OdtkError(
        f"Not an image, but of type {type(image).__name__}: give a path, the bytes of a file, a PIL image, a NumPy "
        "array uint8 [H, W, 3] or a torch tensor uint8 [3, H, W]."
    )


def listed(images: FilePath) -> list[Path]:
    """As list_images, where no flag is to be named.

    Raises:
        OdtkError: what is named does not exist, or holds no images.
    """
    try:
        return list_images(images)
    except OdtkError as error:
        raise OdtkError(str(error).replace(" with --images", "")) from None


def name_of(image: ImageLike, number: int) -> str:
    """What messages call an image: its path, or its number."""
    return os.fspath(image) if isinstance(image, (str, os.PathLike)) else f"image {number}"


def record(image: ImageLike, number: int, header: Any, rotated: bool) -> Image:
    """An image for the loader.

    Args:
        header: of a file, as read_headers gives it; None for what is in memory.

    Raises:
        ImageError: it cannot be read.
        OdtkError: it is a folder.
    """
    path = Path(os.path.expanduser(name_of(image, number)))
    if isinstance(header, ImageError) and os.path.isdir(path):
        raise OdtkError(f"{path} is a folder: predict takes it alone, a list holds single images.")
    if isinstance(header, ImageError):
        raise header
    if header is not None:
        return Image.from_header(number, path, header, header.orientation, rotated=rotated)
    return in_memory(pixels_of(image), number, path, rotated)


def in_memory(pixels: np.ndarray, number: int, name: FilePath, rotated: bool) -> Image:
    """Pixels, uint8 [H, W, 3] RGB, as an image for the loader; its name is for messages."""
    boxes, labels = np.zeros((0, 5 if rotated else 4)), np.zeros(0, dtype=np.int64)
    height, width = pixels.shape[:2]
    return Image(number, Path(name), width, height, boxes, labels, plain=False, pixels=pixels)


def tracker_of(video: Video) -> Tracker | None:
    """The tracker that a video is to have."""
    if not video.config.track:
        return None
    return Tracker(float(video.rate / video.config.every) if video.rate else None, video.config.track_threshold)


def warn(line: str) -> None:
    """Says on stderr what becomes of a video."""
    print(f"Warning: {printable(line)}", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# The model


class Model:
    """A detector that is ready to run, made by odtk.load.

    Several threads may call predict at the same time; they share the weights, and nothing that one does is seen by
    another. No input is modified.

    Attributes:
        name: the file and what runs it.
        categories: id and name of each class, in the order of the class indices.
        rotated: whether boxes have angles.
        precision: what it computes in: fp32, fp16, bf16 or int8.
        threshold: detections score above this.
    """

    def __init__(
        self,
        backend: Backend,
        data: LoaderConfig,
        categories: tuple[Category, ...],
        tiles: TilesConfig | None = None,
    ) -> None:
        self.backend, self.data, self.categories, self.tiles = backend, data, categories, tiles
        self.name, self.rotated, self.precision = backend.name, backend.rotated, backend.precision
        self.threshold = backend.thresholds.score_threshold
        self._idle: dict[int, list[Loader]] = {}  # by batch: DALI takes 0.1 s to build what a loader needs
        self._lock = threading.Lock()

    @classmethod
    def load(cls, config: InferConfig, log: Callable[[str], None] = silent) -> Model:
        """The model of config.path, on config.data.device, for images of the sizes that `odtk infer` gives it.

        Args:
            log: takes messages about sizes, thresholds and categories.

        Raises:
            OdtkError: as open_backend, or a size is asked for that is not the exported file's.
        """
        backend = open_backend(
            config.path,
            device=config.data.device,
            precision=config.precision,
            thresholds=config.postprocess,
            explicit=config.explicit,
            log=log,
        )
        data = loader_config(as_trained(config, backend, log), backend, log)
        return cls(backend, data, match_categories(backend, (), log), config.tiles)

    @property
    def names(self) -> list[str]:
        """Class names, in the order of the class indices."""
        return [category.name for category in self.categories]

    def __repr__(self) -> str:
        classes = plural(len(self.categories), "class", "classes")
        return f"<Model {self.name}: {classes}, images {describe_size(self.data, self.tiles)}, {self.precision}>"

    @overload
    def predict(  # type: ignore[overload-overlap]  # bytes and arrays are iterables too
        self, images: InMemory, *, batch: int = ..., stream: Literal[False] = ..., skip_damaged: bool = ...
    ) -> Detections: ...
    @overload
    def predict(
        self, images: FilePath, *, batch: int = ..., stream: Literal[False] = ..., skip_damaged: bool = ...
    ) -> Any: ...
    @overload
    def predict(
        self, images: Iterable[ImageLike], *, batch: int = ..., stream: Literal[False] = ..., skip_damaged: bool = ...
    ) -> list[Detections]: ...
    @overload
    def predict(
        self,
        images: ImageLike | Iterable[ImageLike],
        *,
        batch: int = ...,
        stream: Literal[True],
        skip_damaged: bool = ...,
        every: int = ...,
        track: bool = ...,
    ) -> Iterator[Detections]: ...

    def predict(
        self,
        images: ImageLike | Iterable[ImageLike],
        *,
        batch: int = BATCH,
        stream: bool = False,
        skip_damaged: bool = False,
        every: int = 1,
        track: bool = False,
    ) -> Any:
        """Finds the objects in one image, in several, or in a video, in their order.

        The detections are those of `odtk infer` with the same ``batch``. Where images are not fitted into one size
        (``model.data.size`` is None), those of a batch are padded to a common one, and padding changes detections a
        little: an image alone may give other last digits than the same image in a list, and with a head that has
        GroupNorm (FCOS) visibly other scores. ``batch=1`` avoids it.

        Args:
            images: RGB. One image: a path, the bytes of an image file, a PIL image, a NumPy array uint8 [H, W, 3] or a
                torch tensor uint8 [3, H, W]. Several: a folder (with its subfolders, sorted), a pattern such as
                ``scans/*.jpg``, or any iterable of images. Files and their bytes are turned by their EXIF
                orientation; everything else is taken as it is. With ``stream``, a video: a file, an address such as
                rtsp://…, or a camera such as /dev/video0 (video.py says what becomes of frames that come too fast, and
                of a camera that is lost); its Detections have a ``frame``.
            batch: images at a time; of a live video at most, as it does not wait for frames.
            stream: give an iterator that predicts while it is read; from an iterator it takes a batch at a time, so
                that a camera never ends.
            skip_damaged: an image that cannot be read gives Detections without objects, which have an ``error``; a
                video file that is damaged or cut off ends with a warning in place of an error.
            every: of a video, detect in each n-th frame only.
            track: of a video, give the same object the same number in every frame (Detections.tracks).

        Returns:
            Detections of one image, a list of them for several, or with ``stream`` an iterator of them.

        Raises:
            OdtkError: something is not an image, or cannot be read; the sentence names it.
        """
        if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
            raise OdtkError(f"batch: {batch!r} is not a positive whole number.")
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise OdtkError(f"every: {every!r} is not a positive whole number.")
        if isinstance(images, (str, os.PathLike)) and is_video(images):
            if not stream:
                raise OdtkError(
                    f"{shown_name(os.fspath(images))} is a video: pass stream=True to get frame after frame."
                )
            return self._predict_video(VideoConfig(os.fspath(images), every, track=track), batch, skip_damaged)
        if every != 1 or track:
            raise OdtkError(f"{'track' if track else 'every'} is for a video, and this is none.")
        single = isinstance(images, (str, os.PathLike, bytes, bytearray, PILImage.Image, np.ndarray, Tensor))
        groups: Iterable[Sequence[ImageLike]]
        if isinstance(images, (str, os.PathLike)):
            paths = listed(images)
            single, groups = os.path.isfile(os.path.expanduser(images)), [paths]
        elif single:
            groups = [[images]]  # type: ignore[list-item]
        elif not isinstance(images, Iterable):
            groups = [[pixels_of(images)]]  # raises
        elif isinstance(images, (list, tuple)) and all(isinstance(image, (str, os.PathLike)) for image in images):
            groups = [images]
        else:
            groups = chunks(images, batch)  # type: ignore[arg-type]
        found = self._predict(groups, batch, skip_damaged)
        if stream:
            return found
        return list(found)[0] if single else list(found)

    def _predict(self, groups: Iterable[Sequence[ImageLike]], batch: int, skip: bool) -> Iterator[Detections]:
        """Detections of the images of all groups; batches do not reach over the end of a group."""
        done = 0
        for group in groups:
            yield from self._predict_group(group, done + 1, batch, skip)
            done += len(group)

    def _predict_video(self, config: VideoConfig, batch: int, skip: bool) -> Iterator[Detections]:
        with Video(config, device=self.data.device, log=warn) as video:
            yield from self.predict_frames(video, batch)
        if video.fault and not skip:
            raise OdtkError(f"{video.fault.rstrip('.')}; skip_damaged=True goes on without the rest.")
        if video.fault:
            warn(video.fault)

    def predict_frames(self, video: Video, batch: int) -> Generator[Detections, None, None]:
        """The Detections of a video's frames as they come, each with its ``frame``."""
        tracker = tracker_of(video)
        while frames := video.take(batch if video.live else batch * VIDEO_BATCHES):
            images = {f.index: in_memory(f.pixels, f.index, video.name, self.rotated) for f in frames}
            found = self._detect(images, batch)
            for frame in frames:
                rows, image = next(found), images[frame.index]
                assert not isinstance(rows, ImageError)  # there is no file that could be damaged
                one = Detections(rows, self.categories, (image.width, image.height), frame.index, frame=frame)
                if tracker is not None:
                    one = dataclasses.replace(one, tracks=tracker.update(one.boxes, one.scores, one.labels, frame.time))
                yield one
            next(found, None)  # to its end, where the loader is put back

    def _predict_group(self, group: Sequence[ImageLike], first: int, batch: int, skip: bool) -> Iterator[Detections]:
        numbered = list(enumerate(group, start=first))
        paths = {
            number: Path(os.path.expanduser(image))
            for number, image in numbered
            if isinstance(image, (str, os.PathLike))
        }
        headers = dict(zip(paths, read_headers(list(paths.values())), strict=True))
        readable: dict[int, Image] = {}
        skipped: dict[int, Detections] = {}
        for number, image in numbered:
            try:
                readable[number] = record(image, number, headers.get(number), self.rotated)
            except ImageError as error:
                skipped[number] = self._unreadable(image, number, error, skip)
        found = self._detect(readable, batch)
        for number, image in numbered:
            if number in skipped:
                yield skipped[number]
                continue
            rows = next(found)
            if isinstance(rows, ImageError):
                yield self._unreadable(image, number, rows, skip)
                continue
            one = readable[number]
            path = one.path if one.pixels is None else None
            yield Detections(rows, self.categories, (one.width, one.height), number, path)
        next(found, None)  # to its end, where the loader is put back

    def _detect(self, images: dict[int, Image], batch: int) -> Iterator[np.ndarray | ImageError]:
        """The rows of each image, by descending score, or why it proved damaged while it was decoded."""
        if not images:
            return
        batch = min(batch, self.backend.max_batch or batch)
        dataset = Dataset(list(images.values()), (), rotated=self.rotated)
        with self._lock:
            idle = self._idle.setdefault(batch, [])
            loader = idle.pop() if idle else None
        if loader is None:
            loader = create_loader(dataset, dataclasses.replace(self.data, batch=batch))
        else:
            loader.use(dataset)
        if self.tiles is None:
            yield from self._detect_whole(loader, images)
        else:
            for _, rows in detect_tiles(self.backend, loader, images.values(), self.tiles):
                yield rows
        loader.sampler.dataset.images.clear()  # the idle loader keeps no pixels
        with self._lock:
            idle.append(loader)

    def _detect_whole(self, loader: Loader, images: dict[int, Image]) -> Iterator[np.ndarray | ImageError]:
        """As _detect, by a loader of the images as they are."""
        for prepared, (ids, rows) in detect_batches(self.backend, loader):
            for place, number in enumerate(prepared.ids.tolist()):
                if prepared.damaged is not None and prepared.damaged[place]:
                    yield reason(images[number])
                    continue
                own = rows[ids == number]
                yield own[np.argsort(-own[:, 1], kind="stable")]

    def _unreadable(self, image: ImageLike, number: int, error: ImageError, skip: bool) -> Detections:
        """The item of a damaged image.

        Raises:
            OdtkError: damaged images are not skipped.
        """
        if not skip:
            raise OdtkError(
                f"Cannot read {name_of(image, number)}: {error}; skip_damaged=True goes on without it."
            ) from error
        path = Path(image) if isinstance(image, (str, os.PathLike)) else None
        rows = np.zeros((0, 7 if self.rotated else 6))
        return Detections(rows, self.categories, (0, 0), number, path, str(error))


def reason(image: Image) -> ImageError:
    """Why an image that was found to be damaged cannot be decoded."""
    try:
        image.decode()
    except ImageError as error:
        return error
    return ImageError("the file changed while it was read")


def chunks(images: Iterable[ImageLike], size: int) -> Iterator[list[ImageLike]]:
    """Lists of ``size`` images, the last one of fewer."""
    iterator = iter(images)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk
