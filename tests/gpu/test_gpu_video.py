"""NVDEC's frames are those of PyAV: numbers, times, rotation, and pixels to rounding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from odtk.config import VideoConfig
from odtk.inference.video import Frame, Video
from tests.videos import make_video, turn_video

pytest.importorskip("av", reason="PyAV is not installed (pip install av)")
SIZE = (256, 192)  # NVDEC takes none below 128 × 128 of VP9 and AV1, and 144 × 144 of HEVC
ENCODERS = ("libx264", "libx265", "libvpx-vp9", "libsvtav1")


@pytest.fixture(scope="module", autouse=True)
def nvc(gpu: str) -> object:
    """PyNvVideoCodec, where it and the driver's libnvcuvid and libnvidia-encode are."""
    try:
        import PyNvVideoCodec
    except Exception as error:
        pytest.skip(f"PyNvVideoCodec cannot be used: {str(error).partition(chr(10))[0]}")
    return PyNvVideoCodec


def read(path: str, device: str, said: list[str]) -> list[Frame]:
    with Video(VideoConfig(path), device=device, log=said.append) as opened:
        frames = list(opened)
    assert opened.fault is None
    return frames


@pytest.mark.parametrize("kind", ["mp4", "mkv"])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_frames_are_those_of_pyav(encoder: str, kind: str, tmp_path: Path) -> None:
    import av

    if encoder not in av.codecs_available:
        pytest.skip(f"PyAV has no {encoder}")
    random = np.random.default_rng(0)
    pictures = [random.integers(40, 216, (12, 16, 3), dtype=np.uint8).repeat(16, 0).repeat(16, 1) for _ in range(30)]
    times = np.cumsum(random.integers(10, 90, len(pictures))) / 1000
    path = make_video(tmp_path / f"a.{kind}", size=SIZE, pictures=pictures, times=times.tolist(), encoder=encoder)
    if kind == "mp4":
        turn_video(path)
    said: list[str] = []
    frames, expected = read(path, "cuda:0", said), read(path, "cpu", said)
    assert not said
    assert [f.index for f in frames] == [f.index for f in expected] == list(range(30))
    assert [f.time for f in frames] == pytest.approx([f.time for f in expected], abs=1e-9)
    for one, same in zip(frames, expected, strict=True):
        assert one.pixels.shape == same.pixels.shape
        assert np.abs(one.pixels.astype(int) - same.pixels).max() <= 4
