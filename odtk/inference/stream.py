"""A video through a model: the detections of each frame as a line of JSON, and drawn, as they come."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image as PILImage

from ..config import InferConfig, OdtkError
from ..files import append, atomic_write, check_writable, make_folder, os_error_reason, remove_all_abandoned
from ..text import plural, printable, say
from .drawing import annotate, coco_to_shapes
from .infer import describe_size
from .predict import Detections, Model
from .video import Video, import_av

DRAW_THRESHOLD = 0.3  # of the score of what is drawn, where none is asked for, as of `odtk visualize`
PROGRESS_SECONDS = 10.0  # between lines of progress where the output is not a terminal
TIME_BASE = Fraction(1, 90000)  # of the timestamps of a video that is written, seconds: that of MPEG
ENCODERS = ("libx264", "libopenh264", "mpeg4")  # the first that PyAV has
BT709 = 1  # in FFmpeg's enumerations of primaries, transfer and matrix

Sink = Callable[[Detections], None]


def infer_video(config: InferConfig, rank: int = 0, world: int = 1) -> None:
    """Detects in the frames of config.video and writes each output as it goes.

    SIGINT, SIGTERM and SIGHUP end it well: what is done is written. They are the usual end of a live source.

    Args:
        config: its outputs are ``-`` or .jsonl (lines of JSON) and .mp4 (the video with boxes); its ``draw`` is a
            folder for the frames as pictures.
        rank, world: as launch calls its jobs; a video runs on one device.

    Raises:
        OdtkError: as Video and Model.load, or an output cannot be written, or a file was damaged and data.skip_damaged
            is false, or a file was interrupted; the last two after everything was written.
    """
    assert config.video is not None
    log: Callable[[str], None] = partial(print_line, sys.stderr) if "-" in config.output else say
    for path in config.output:
        if path != "-":
            check_writable(path)
        if path.endswith(".mp4") and os.path.exists(path) and not os.path.isfile(path):
            raise OdtkError(f"Cannot write {path}: an .mp4 needs a regular file, as its index is written last.")
    model = Model.load(config, log=log)
    with Video(config.video, device=model.data.device, log=partial(print_line, sys.stderr)) as video:
        length = "live" if video.live else plural(video.total, "frame") if video.total else "a file of unknown length"
        device = config.data.device.partition(":")[0]
        log(
            f"{model.name} on 1 × {device}: {video.name}, {length}, {describe_size(model.data, model.tiles)}, "
            f"precision {model.precision}."
        )
        for path in config.output:
            if path.endswith(".mp4") and video.has_audio:
                log(f"{path} gets no sound: only the pictures of {video.name} are written.")
        counts = Counts(video, log)
        with contextlib.ExitStack() as stack:
            stop = stack.enter_context(stopping_at_signals(video))  # first, so that none comes before it
            sinks = open_sinks(config, video, stack)
            with contextlib.closing(model.predict_frames(video, config.data.batch)) as found:
                for one in found:
                    for sink in sinks:
                        sink(one)
                    counts.add(one)
        log(counts.summary(config))
        finish(video, counts, stop.is_set(), strict=not config.data.skip_damaged)


def finish(video: Video, counts: Counts, stopped: bool, *, strict: bool) -> None:
    """Says how a video ended.

    Raises:
        OdtkError: a file was damaged and ``strict``, or it was not read to its end.
    """
    if stopped and not video.live:
        whole = f" of {video.total}" if video.total else ""
        raise OdtkError(f"Interrupted after {counts.frames}{whole} frames of {video.name}; these are written.")
    if video.fault and strict:
        raise OdtkError(video.fault)
    if video.fault:
        print_line(sys.stderr, f"Warning: {video.fault}")


def print_line(file: IO[str], line: str) -> None:
    print(printable(line), file=file, flush=True)


@contextlib.contextmanager
def stopping_at_signals(video: Video) -> Iterator[threading.Event]:
    """Within it, the first signal to stop ends the video and sets the event; a second one ends the program."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # only that one gets signals
        yield stopped
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}

    def stop(number: int, frame: Any) -> None:
        for each, handler in before.items():
            signal.signal(each, handler)
        stopped.set()
        video.stop()

    try:
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:  # nohup
                signal.signal(number, stop)
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Counts:
    """What was done so far; says it every PROGRESS_SECONDS."""

    def __init__(self, video: Video, log: Callable[[str], None]) -> None:
        self.video, self.log = video, log
        self.frames = self.filled = self.detections = 0
        self.start = self.last = time.monotonic()

    def add(self, found: Detections) -> None:
        self.frames += 1
        self.filled += bool(len(found))
        self.detections += len(found)
        if time.monotonic() - self.last > PROGRESS_SECONDS:
            self.last = time.monotonic()
            total = f"/{self.video.total}" if self.video.total else ""
            dropped = f", {self.video.dropped} dropped" if self.video.dropped else ""
            self.log(f"{self.frames}{total} frames, {self.speed:.1f} frames/s{dropped}")

    @property
    def speed(self) -> float:
        """Frames per second."""
        return self.frames / max(1e-9, time.monotonic() - self.start)

    def summary(self, config: InferConfig) -> str:
        parts = [
            f"{plural(self.detections, 'detection')} in {self.filled} of {plural(self.frames, 'frame')}",
            f"{self.speed:.1f} frames/s",
        ]
        if self.video.dropped:
            parts.append(f"{self.video.dropped} more dropped because they came faster")
        if self.video.disconnects:
            parts.append(f"connection lost {plural(self.video.disconnects, 'time')}")
        parts += [path for path in config.output if path != "-"]
        return ", ".join([*parts, config.draw] if config.draw else parts)


# ---------------------------------------------------------------------------------------------------------------------
# Outputs


def open_sinks(config: InferConfig, video: Video, stack: contextlib.ExitStack) -> list[Sink]:
    """What is to be done with the detections of each frame; the stack closes it."""
    threshold = DRAW_THRESHOLD if config.draw_threshold is None else config.draw_threshold
    sinks: list[Sink] = []
    for path in config.output:
        if path.endswith(".mp4"):
            assert config.video is not None
            rate = (video.rate or Fraction(25)) / config.video.every
            sinks.append(stack.enter_context(mp4_writer(path, rate, threshold)))
        else:
            sinks.append(stack.enter_context(json_lines(path)))
    if config.draw:
        folder = make_folder(config.draw)
        remove_all_abandoned(folder, r"frame\d+\.jpg")
        sinks.append(partial(write_picture, folder, threshold=threshold))
    return sinks


@contextlib.contextmanager
def json_lines(path: str) -> Iterator[Sink]:
    """Writes a line per frame at once: {"frame": index, "time": seconds, "detections": COCO results}.

    A file that exists is replaced when the first frame comes, so that a source that never answers costs nothing.

    Args:
        path: of the file; ``-`` is the standard output.

    Raises:
        OdtkError: the file cannot be written.
    """
    with contextlib.ExitStack() as stack:
        file: io.FileIO | None = None

        def write(found: Detections) -> None:
            nonlocal file
            line = json.dumps(line_of(found)) + "\n"
            if path == "-":
                print(line, end="", flush=True)
                return
            try:
                if file is None:
                    file = stack.enter_context(open(path, "wb", buffering=0))
                append(file, line.encode())
            except OSError as error:
                raise OdtkError(f"Cannot write {path}: {os_error_reason(error)}.") from error

        yield write


def line_of(found: Detections) -> dict[str, Any]:
    """One frame for JSON: its detections are COCO results, whose ``image_id`` is the frame's index."""
    assert found.frame is not None
    return {"frame": found.frame.index, "time": round(found.frame.time, 6), "detections": found.to_coco()}


def draw_frame(found: Detections, threshold: float) -> PILImage.Image:
    """A frame with what scores above a threshold."""
    assert found.frame is not None
    return annotate(PILImage.fromarray(found.frame.pixels), coco_to_shapes(found.above(threshold).to_coco()))


def write_picture(folder: Path, found: Detections, *, threshold: float) -> None:
    """Writes folder/frame000012.jpg."""
    assert found.frame is not None
    with atomic_write(folder / f"frame{found.frame.index:06d}.jpg", one_of_many=True) as file:
        draw_frame(found, threshold).save(file, "JPEG", quality=90)


@contextlib.contextmanager
def mp4_writer(path: str, rate: Fraction, threshold: float) -> Iterator[Sink]:
    """Writes the frames with their boxes as a video, complete or not at all (files.atomic_write).

    Args:
        rate: frames per second on average, for the encoder; each frame keeps its own time after the first.
        threshold: detections are drawn that score above this.

    Raises:
        OdtkError: the file cannot be written.
    """
    av = import_av()
    with atomic_write(path) as file:
        writer = Mp4(av, file, rate)
        try:

            def write(found: Detections) -> None:
                assert found.frame is not None
                writer.write(np.asarray(draw_frame(found, threshold)), found.frame.time, found.frame.aspect)

            yield write
            writer.close()
        except av.error.FFmpegError as error:
            if isinstance(error, OSError):  # atomic_write says it
                raise
            raise OdtkError(f"{path} could not be encoded ({error.strerror}).") from error
        finally:
            writer.abandon()


class Mp4:
    """Frames → H.264 (MPEG-4 where PyAV has no encoder of it) in an .mp4, with their own timestamps, without sound.

    All frames get the size and the pixel aspect ratio of the first one, whose odd sides are extended by their last
    pixels, as 4:2:0 needs.
    """

    def __init__(self, av: Any, file: IO[bytes], rate: Fraction) -> None:
        self._av, self._rate = av, rate.limit_denominator(1001)
        self._container = av.open(file, "w", format="mp4")
        self._stream: Any = None
        self._first = 0.0
        self._last = -1

    def write(self, pixels: np.ndarray, at: float, aspect: Fraction = Fraction(1)) -> None:
        """Adds a frame uint8 [H, W, 3] RGB at its time in seconds; ``aspect`` is a pixel's width / its height."""
        pixels = np.pad(pixels, ((0, pixels.shape[0] % 2), (0, pixels.shape[1] % 2), (0, 0)), mode="edge")
        if self._stream is None:
            self._open(pixels.shape[1], pixels.shape[0], aspect)
            self._first = at
        frame = self._av.VideoFrame.from_ndarray(pixels, format="rgb24")
        stream = self._stream
        frame = frame.reformat(stream.width, stream.height, "yuv420p", dst_colorspace="ITU709")
        self._last = max(round((at - self._first) / TIME_BASE), self._last + 1)
        frame.pts, frame.time_base = self._last, TIME_BASE
        self._container.mux(stream.encode(frame))

    def close(self) -> None:
        """Writes what the encoder still holds, and the index."""
        if self._stream is not None:
            self._container.mux(self._stream.encode())
        container, self._container = self._container, None
        container.close()

    def abandon(self) -> None:
        """Lets go of the file, if it was not closed."""
        container, self._container = self._container, None
        if container is not None:
            with contextlib.suppress(Exception):  # whatever failed was raised already
                container.close()

    def _open(self, width: int, height: int, aspect: Fraction) -> None:
        name = next(name for name in ENCODERS if name in self._av.codecs_available)
        options = {"libx264": {"crf": "20", "preset": "veryfast"}}.get(name, {})
        stream = self._container.add_stream(name, rate=self._rate, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        context = stream.codec_context
        context.time_base = TIME_BASE if name != "mpeg4" else Fraction(1, 60000)  # whose field has 16 bits
        context.sample_aspect_ratio = aspect
        context.colorspace = context.color_primaries = context.color_trc = BT709
        if name != "libx264":
            stream.bit_rate = max(500_000, round(0.2 * width * height * float(self._rate)))  # bits per second
        self._stream = stream
