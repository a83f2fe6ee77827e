"""Video files and cameras as frames, decoded ahead of their use in a thread.

A file or pipe gives every frame. A live source (rtsp://, rtmp://, /dev/video0 …) that is used more slowly than it
sends drops the oldest frames and counts them; its end, its silence and its errors are disconnects, after which it is
opened again.

PyAV (FFmpeg's libraries, package av) decodes; it is imported when a video is opened. Where the model runs on a GPU and
PyNvVideoCodec is installed, the GPU decodes the files that it can (gpu_video.py).
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from ..config import OdtkError, VideoConfig
from ..text import plural, say
from .gpu_video import GpuDecoder, NotOnGpuError, open_decoder

LIVE = ("rtsp", "rtsps", "rtmp", "rtmps", "rtp", "udp", "tcp", "srt", "mms")  # schemes of sources that never end
SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ts", ".m2ts", ".mts", ".mpg", ".mpeg", ".wmv", ".flv"),
    *(".3gp", ".ogv", ".mxf", ".y4m", ".h264", ".264", ".h265", ".265", ".hevc", ".mjpeg", ".mjpg"),
)
AHEAD = 8  # frames decoded ahead of their use, of a file
LIVE_AHEAD = 2  # of a live source: those that wait longer are old
OPEN_SECONDS = 15.0  # for a live source to answer
STALL_SECONDS = 5.0  # without data, after which a live source is opened again; FFmpeg may wait twice as long
RETRY_SECONDS = (1.0, 30.0)  # between two attempts to open a source again: at first, and at most; doubled in between
JOIN_SECONDS = 2.0  # for the thread to notice that it is to end; a read that hangs ends with the process
SLACK_FRAMES = 2.0  # by which a file may be shorter than it says
SAME_SECONDS = 1e-6  # between two times of the same frame


@dataclass(frozen=True, eq=False)
class Frame:
    """One frame of a video.

    Attributes:
        index: among all frames that the source gave, from 0; those left out or dropped are counted too.
        time: its timestamp in seconds. Of a file, as it is in the file; of a live source, since its first frame, and
            going on over disconnects.
        pixels: uint8 [H, W, 3] RGB, turned by the rotation that the video says.
        aspect: width of a pixel / its height, as players show it; > 0.
    """

    index: int
    time: float
    pixels: np.ndarray
    aspect: Fraction = Fraction(1)


def is_video(source: str | os.PathLike[str]) -> bool:
    """Whether a path or an address names a video rather than an image: by its scheme or its suffix, or a device."""
    text = os.fspath(source)
    if scheme_of(text):
        return True
    return text.startswith("/dev/video") or os.path.splitext(text)[1].lower() in SUFFIXES


def scheme_of(source: str) -> str:
    """The scheme of an address, in lower case; empty for a path."""
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", source)
    return found[1].lower() if found else ""


def shown_name(source: str) -> str:
    """A source for messages: without the password that its address may hold."""
    return re.sub(r"(?<=://)[^/]*@", "***@", source)


class Video:
    """The frames of a video, in order; iterate over it, or take several at a time. Close it, or use it in a with.

    Attributes:
        name: of the source, for messages.
        live: whether it never ends by itself and is opened again when it does.
        rate: frames per second on average, before any are left out; None if it is not known.
        has_audio: whether it has sound, which is not read.
        total: frames that will be given, as far as the file says; None if it does not, or if it is live.
        read: frames decoded so far, those left out and dropped too.
        dropped: frames that were not taken in time, of a live source or in real time.
        disconnects: how often a live source was lost.
        fault: one sentence if a file proved damaged or shorter than it says; known at its end.
    """

    def __init__(self, config: VideoConfig, *, device: str = "cpu", log: Callable[[str], None] = say) -> None:
        """Opens the source and starts to decode.

        Args:
            device: that the model runs on; a GPU may decode too.
            log: takes what becomes of the source.

        Raises:
            OdtkError: PyAV is not installed, or there is no such video, or nothing in it that can be decoded.
        """
        self.config, self._device, self._log = config, device, log
        self.name = shown_name(config.source)
        self.read = self.dropped = self.disconnects = self._damaged = 0
        self.fault: str | None = None
        self._file_end = 0.0  # seconds, of what was read of a file
        self._after: float | None = None  # the CPU goes on after this time, where the GPU failed
        self._closed = threading.Event()
        container = open_container(config)
        stream = container.streams.video[0]
        self.live = is_live(config.source, container)
        self.rate: Fraction | None = stream.average_rate or stream.guessed_rate
        self.has_audio = bool(container.streams.audio)
        self._aspect = Fraction(stream.sample_aspect_ratio or 1)
        if self._aspect != 1:
            self._log(
                f"{self.name} has non-square pixels ({self._aspect.numerator}:{self._aspect.denominator}): the model "
                "sees its frames as they are stored, not stretched as players show them."
            )
        self.total = None if self.live else expected_frames(container, config.every)
        self._clock = Clock(self.live, self.rate)
        dropping = self.live or config.realtime
        self._queue = FrameQueue(LIVE_AHEAD if dropping else AHEAD, dropping)
        self._thread = threading.Thread(target=self._run, args=(container,), name="odtk-video", daemon=True)
        self._thread.start()

    def __enter__(self) -> Video:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Frame]:
        while frames := self.take(1):
            yield from frames

    def take(self, count: int) -> list[Frame]:
        """The next frames, at least one, at most ``count``; none at the end. A live source gives those that are there.

        Raises:
            OdtkError: no frame of the file could be decoded.
        """
        frames = self._queue.take(count)
        self.dropped = self._queue.dropped
        if not frames and not self.read and not self._closed.is_set():
            raise OdtkError(f"No frame of {self.name} could be decoded: is it a whole video file?")
        return frames

    def stop(self) -> None:
        """Ends the video here; frames not yet taken are lost. May be called from any thread and by a signal."""
        self._closed.set()
        self._queue.close()

    def close(self) -> None:
        """As stop, and waits for the thread that decodes."""
        self.stop()
        self._thread.join(JOIN_SECONDS)

    def _run(self, container: Any) -> None:
        try:
            if self.live:
                self._read_live(container)
            else:
                self._read_file(container)
            self._queue.close(keep=True)
        except BaseException as error:  # for the thread that takes the frames
            self._queue.close(error, keep=True)

    def _read_file(self, container: Any) -> None:
        gpu = None
        try:
            gpu = self._open_gpu(container)
            reason = self._decode(container, gpu)
        except NotOnGpuError as error:
            rest = f" from frame {self.read} on" if self.read else ""
            self._log(f"{self.name} is decoded on the CPU{rest}: {error}.")
            container.close()
            container, gpu = open_container(self.config), None
            self._damaged, self._after = 0, self._clock.last
            reason = self._decode(container)
        self._damaged += gpu.damaged if gpu else 0
        duration = duration_of(container)  # seconds from the file's start
        found = []
        if reason:
            found.append(f"it could not be read further ({reason})")
        if self._damaged:
            found.append(f"{plural(self._damaged, 'part')} of it could not be decoded")
        step = float(1 / self.rate) if self.rate else 0.04
        if duration is not None and self._file_end < duration - SLACK_FRAMES * step:
            found.append(f"it ends after {max(0.0, self._file_end):.2f} of {duration:.2f} s")
        if found:
            frames = plural(self.read, "frame")
            self.fault = f"{self.name} is damaged: {' and '.join(found)}; {frames} were decoded."
        container.close()

    def _open_gpu(self, container: Any) -> GpuDecoder | None:
        """What decodes a file in place of PyAV, if anything does; only a regular file can be opened again."""
        if not os.path.isfile(os.path.expanduser(self.config.source)):
            return None
        return open_decoder(container.streams.video[0], lambda: first_frame(self.config), self._device)

    def _read_live(self, container: Any) -> None:
        """Decodes a live source until it is closed; opens it again whenever it is lost."""
        least, most = RETRY_SECONDS
        while True:
            before = self.read
            reason = self._decode(container) or "it ended"
            container.close()
            if self._closed.is_set():
                return
            if self._clock.lost is None or self.read > before:
                self.disconnects += 1
                self._clock.lost = time.monotonic()
                self._log(f"{self.name} was lost after {plural(self.read, 'frame')} ({reason}): connecting again.")
                delay = least
            while True:  # the first frame, not the connection, ends the outage
                if self._closed.wait(delay):
                    return
                delay = min(2 * delay, most)
                with contextlib.suppress(OdtkError):
                    container = open_container(self.config)
                    break
            self._clock.restart()

    def _decode(self, container: Any, gpu: GpuDecoder | None = None) -> str:
        """Hands on the frames of an open container; returns why it ended before its end, or an empty string.

        Raises:
            NotOnGpuError: the CPU is to decode what was not handed on.
        """
        import av

        stream = container.streams.video[0]
        packets = container.demux(stream)
        while not self._closed.is_set():
            try:
                packet = next(packets, None)
            except av.error.FFmpegError as error:
                return reason_of(error)
            if packet is None:
                return ""
            end = None  # of the packet, before it is decoded and perhaps emptied
            if packet.pts is not None and not self.live:
                end = float((packet.pts - (stream.start_time or 0) + packet.duration) * stream.time_base)
            try:
                decoded = gpu.decode(packet) if gpu else packet.decode()
            except av.error.FFmpegError:
                self._damaged += 1  # a part of the file, or a packet that the network lost
                continue
            self._file_end = max(self._file_end, end or 0.0)
            for frame in decoded:
                self._hand_on(frame)
        return ""

    def _hand_on(self, frame: Any) -> None:
        if self._after is not None and frame.time is not None and frame.time < self._after + SAME_SECONDS:
            return
        index = self.read
        pixels = None if index % self.config.every else pixels_of(frame)  # before it counts: it may fail on a GPU
        at = self._clock.time(frame.time)
        self.read += 1
        if self._clock.lost is not None and self.live:
            self._log(f"{self.name} is back after {time.monotonic() - self._clock.lost:.0f} s.")
            self._clock.lost = None
        if pixels is None:
            return
        if self.config.realtime and not self.live and self._closed.wait(self._clock.early(at)):
            return
        self._queue.put(Frame(index, at, pixels, 1 / self._aspect if quarter_turns(frame) % 2 else self._aspect))


class Clock:
    """Timestamps of frames in seconds, which never go back.

    Attributes:
        lost: when a live source was lost (time.monotonic()); None while it sends.
        last: the time of the last frame; None before the first.
    """

    def __init__(self, live: bool, rate: Fraction | None) -> None:
        self.live, self.lost = live, None  # type: bool, float | None
        self._step = float(1 / rate) if rate else 0.04
        self._start: float | None = None  # of the wall clock, at the first frame
        self._first = 0.0
        self.last: float | None = None
        self._offset: float | None = None  # from the stream's own timestamps to ours

    def restart(self) -> None:
        """The stream's own timestamps begin anew."""
        self._offset = None

    def time(self, stamp: float | None) -> float:
        """The time of the next frame, given its own timestamp, which may be missing."""
        now = time.monotonic()
        if self._start is None:
            self._start = now
        if not self.live:
            found = stamp if stamp is not None else 0.0 if self.last is None else self.last + self._step
        elif stamp is None:
            found = now - self._start
        else:
            if self._offset is None:
                self._offset = now - self._start - stamp
            found = stamp + self._offset
        if self.last is None:
            self._first = found
        self.last = found if self.last is None else max(found, self.last)
        return self.last

    def early(self, at: float) -> float:
        """Seconds until a frame of a file is due, if the file is played at its own speed from its first frame."""
        assert self._start is not None
        return max(0.0, at - self._first - (time.monotonic() - self._start))


class FrameQueue:
    """Frames between the thread that decodes and the one that uses them, at most so many.

    Attributes:
        dropped: frames that made room for newer ones.
    """

    def __init__(self, size: int, dropping: bool) -> None:
        self.size, self.dropping, self.dropped = size, dropping, 0
        self._frames: deque[Frame] = deque()
        self._changed = threading.Condition()
        self._open = True
        self._error: BaseException | None = None

    def put(self, frame: Frame) -> None:
        """Adds a frame; where the queue is full, drops the oldest or waits."""
        with self._changed:
            while self._open and len(self._frames) >= self.size:
                if self.dropping:
                    self._frames.popleft()
                    self.dropped += 1
                else:
                    self._changed.wait()
            if self._open:
                self._frames.append(frame)
                self._changed.notify_all()

    def take(self, count: int) -> list[Frame]:
        """The oldest frames: of a queue that drops, those that are there, else ``count`` of them, fewer at the end."""
        taken: list[Frame] = []
        with self._changed:
            while len(taken) < count:
                if self._frames:
                    with contextlib.suppress(IndexError):  # a signal closed the queue just now
                        taken.append(self._frames.popleft())
                    self._changed.notify_all()
                elif not self._open or (taken and self.dropping):
                    break
                else:
                    self._changed.wait()
            if not taken and self._error is not None:
                raise self._error
        return taken

    def close(self, error: BaseException | None = None, *, keep: bool = False) -> None:
        """No frame is added any more; without ``keep`` none is given either. An error is raised at the end."""
        with self._changed:
            self._open, self._error = False, self._error or error
            if not keep:
                self._frames.clear()
            self._changed.notify_all()


def open_container(config: VideoConfig) -> Any:
    """An open container (av.container.InputContainer) that has a video track.

    Raises:
        OdtkError: PyAV is missing, or the source cannot be opened.
    """
    av = import_av()
    source, name, scheme = config.source, shown_name(config.source), scheme_of(config.source)
    path = os.path.expanduser(source)
    if not scheme and os.path.isdir(path):
        raise OdtkError(f"{name} is a folder: --video takes a video file, an address or a camera.")
    waits = bool(scheme) or is_camera(path)
    options = {"rtsp_transport": config.transport} if scheme.startswith("rtsp") else {}
    more: dict[str, Any] = {"timeout": (OPEN_SECONDS, STALL_SECONDS)} if waits else {}
    if path.startswith("/dev/video"):
        more["format"] = "v4l2"
    try:
        container = av.open(source if scheme else path, options=options, **more)
    except FileNotFoundError as error:
        raise OdtkError(f"There is no video {name}.") from error
    except (av.error.FFmpegError, OSError, ValueError) as error:
        what = "cannot be opened" if waits else "is not a whole video file"
        raise OdtkError(f"The video {name} {what} ({reason_of(error)}).") from error
    if not container.streams.video:
        container.close()
        raise OdtkError(f"{name} has no video track.")
    # Threads over frames decode a file fastest, but hold back as many frames as there are threads.
    container.streams.video[0].thread_type = "SLICE" if is_live(source, container) else "AUTO"
    return container


def first_frame(config: VideoConfig) -> Any:
    """The first frame of a file (av.VideoFrame); None if it cannot be decoded."""
    with open_container(config) as container, contextlib.suppress(import_av().error.FFmpegError):
        return next(container.decode(video=0), None)


def import_av() -> Any:
    """The module av.

    Raises:
        OdtkError: it is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise OdtkError("Video needs the package av: install it with `pip install 'odtk[video]'`.") from error
    return av


def is_live(source: str, container: Any) -> bool:
    """Whether a source is live: a camera, or an address that says of no length."""
    scheme = scheme_of(source)
    if not scheme:
        return is_camera(os.path.expanduser(source))
    return scheme in LIVE or (scheme != "file" and container.duration is None)


def is_camera(path: str) -> bool:
    """Whether a path is a camera: a device, or /dev/video0 and so on, also while it is unplugged.

    Regular files in /dev/shm and pipes such as /dev/stdin are none: they end, and no frame of them is dropped.
    """
    if path.startswith("/dev/video"):
        return True
    try:
        return stat.S_ISCHR(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


def duration_of(container: Any) -> float | None:
    """Seconds that a file's video track says that it lasts; None if it does not say."""
    stream = container.streams.video[0]
    if stream.duration is not None:
        return float(stream.duration * stream.time_base)
    if container.duration is None or len(container.streams) > 1:  # that of the longest track
        return None
    return container.duration / 1e6  # in microseconds


def expected_frames(container: Any, every: int) -> int | None:
    """How many frames of a file will be given, if that is known."""
    stream = container.streams.video[0]
    frames = stream.frames
    if not frames and container.duration and stream.average_rate:
        frames = round(container.duration / 1e6 * stream.average_rate)
    return -(-frames // every) or None


def pixels_of(frame: Any) -> np.ndarray:
    """The pixels of a decoded frame, uint8 [H, W, 3] RGB, turned as the video says."""
    pixels = frame.to_ndarray(format="rgb24")
    turns = quarter_turns(frame)
    return np.ascontiguousarray(np.rot90(pixels, turns)) if turns else pixels


def quarter_turns(frame: Any) -> int:
    """By how many quarters a decoded frame is to be turned, counterclockwise, 0 to 3."""
    return round(frame.rotation / 90) % 4


def reason_of(error: BaseException) -> str:
    """An error of FFmpeg in a few words."""
    import av

    if isinstance(error, (av.error.ExitError, av.error.TimeoutError)):
        return "it does not answer"
    return (getattr(error, "strerror", None) or str(error).partition("\n")[0]).rstrip(".")
