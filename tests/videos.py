"""Small videos for tests, whose frames say their own number."""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

STEP = 20  # gray values between two frames


def picture(number: int, size: tuple[int, int] = (64, 48)) -> np.ndarray:
    """A frame uint8 [H, W, 3]: gray by its number, and black in the upper left corner. ``size`` is (width, height)."""
    pixels = np.full((size[1], size[0], 3), 40 + STEP * (number % 10), dtype=np.uint8)
    pixels[: size[1] // 4, : size[0] // 4] = 0
    return pixels


def number_of(pixels: np.ndarray) -> int:
    """The number, modulo 10, of a picture that went through a codec."""
    height, width = pixels.shape[:2]
    return round((float(pixels[height // 3 :, width // 3 :].mean()) - 40) / STEP)


def make_video(
    path: Path,
    frames: int = 20,
    size: tuple[int, int] = (64, 48),
    times: Sequence[float] | None = None,
    pictures: Sequence[np.ndarray] | None = None,
    options: dict[str, str] | None = None,
    gop: int = 5,
    encoder: str = "libx264",
    encoder_options: dict[str, str] | None = None,
    aspect: Fraction | None = None,
) -> str:
    """Writes a video of 25 frames a second, or with these timestamps in seconds, and returns its path.

    Args:
        aspect: width of a pixel / its height.
    """
    import av

    container: Any
    with av.open(str(path), "w", options=options or {}) as container, own_priority():
        more = {"crf": "10"} if encoder == "libx264" else {}
        stream: Any = container.add_stream(encoder, rate=25, options={"g": str(gop), **more, **(encoder_options or {})})
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p" if not (size[0] % 2 or size[1] % 2) else "yuv444p"
        stream.codec_context.time_base = Fraction(1, 1000)
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        for i in range(frames if pictures is None else len(pictures)):
            pixels = picture(i, size) if pictures is None else pictures[i]
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = round(1000 * times[i]) if times else 40 * i, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return str(path)


@contextlib.contextmanager
def own_priority() -> Iterator[None]:
    """Gives the thread its scheduling back: libsvtav1, if root runs it, makes the thread that opens it a real-time one.

    All later tests of the process, and what they start, then stop everything else on their cores.
    """
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, parameters)


def turn_video(path: str) -> None:
    """Sets the matrix of an .mp4 (ISO 14496-12, tkhd) so that players turn it by a quarter, clockwise."""
    content = bytearray(Path(path).read_bytes())
    box = content.find(b"tkhd") - 4
    one = 1 << 16
    content[box + 48 : box + 84] = struct.pack(">9i", 0, one, 0, -one, 0, 0, 0, 0, 1 << 30)
    Path(path).write_bytes(content)


def cut(path: str, share: float) -> str:
    """Cuts a file off after a share of its bytes."""
    content = Path(path).read_bytes()
    Path(path).write_bytes(content[: int(len(content) * share)])
    return path
