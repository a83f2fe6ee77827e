"""Videos decoded by the GPU: with a stand-in for PyNvVideoCodec, which decodes on the CPU (tests/nvc.py)."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from odtk.config import InferConfig, LoaderConfig, OdtkError, VideoConfig
from odtk.inference import predict, stream
from odtk.inference.gpu_video import nv12_to_rgb
from odtk.inference.video import Frame, Video
from tests.nvc import StandIn
from tests.videos import cut, make_video, number_of, turn_video

av: Any = pytest.importorskip("av", reason="PyAV is not installed (pip install av)")


@pytest.fixture
def nvc(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """PyNvVideoCodec as its guide describes it, on a machine where torch believes in cuda:0."""
    stand_in = StandIn()
    monkeypatch.setitem(sys.modules, "PyNvVideoCodec", stand_in)  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "Stream", lambda gpu: SimpleNamespace(cuda_stream=77))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    return stand_in


def read(path: str, device: str = "cuda:0", **more: Any) -> tuple[list[Frame], list[str], Video]:
    """The frames, what was said, and the closed video."""
    said: list[str] = []
    with Video(VideoConfig(path, **more), device=device, log=said.append) as opened:
        frames = list(opened)
    return frames, said, opened


def assert_like_the_cpu(path: str, nvc: StandIn, **more: Any) -> list[Frame]:
    """The GPU gives what the CPU gives, to rounding, and nothing is said."""
    frames, said, opened = read(path, **more)
    expected, _, other = read(path, "cpu", **more)
    assert nvc.frames and not said, said
    assert [f.index for f in frames] == [f.index for f in expected]
    assert [f.time for f in frames] == pytest.approx([f.time for f in expected], abs=1e-9)
    for one, same in zip(frames, expected, strict=True):
        assert one.pixels.shape == same.pixels.shape and one.pixels.flags.c_contiguous
        assert np.abs(one.pixels.astype(int) - same.pixels).max() <= 4
    assert (opened.fault, opened.read) == (other.fault, other.read)
    return frames


# ---------------------------------------------------------------------------------------------------------------------
# As with the CPU


@pytest.mark.parametrize("kind", ["mp4", "mkv", "ts", "avi"])
def test_every_frame_comes_once_with_its_number_and_time(kind: str, nvc: StandIn, tmp_path: Path) -> None:
    frames = assert_like_the_cpu(make_video(tmp_path / f"a.{kind}", 43), nvc)
    assert [number_of(f.pixels) for f in frames] == [i % 10 for i in range(43)]
    assert nvc.created == [{"gpuid": 0, "codec": "H264", "cudastream": 77, "usedevicememory": True}]


@pytest.mark.parametrize("encoder", ["libx265", "libvpx-vp9", "libsvtav1"])
@pytest.mark.parametrize("kind", ["mp4", "mkv"])
def test_other_codecs(kind: str, encoder: str, nvc: StandIn, tmp_path: Path) -> None:
    if encoder not in av.codecs_available:
        pytest.skip(f"PyAV has no {encoder}")
    assert len(assert_like_the_cpu(make_video(tmp_path / f"a.{kind}", 25, (128, 96), encoder=encoder), nvc)) == 25


def test_a_variable_frame_rate_keeps_its_timestamps(nvc: StandIn, tmp_path: Path) -> None:
    times = [0.0, 0.04, 0.05, 0.5, 2.0, 2.033, 2.066]
    frames = assert_like_the_cpu(make_video(tmp_path / "a.mp4", 7, times=times), nvc)
    assert [f.time for f in frames] == pytest.approx(times, abs=1e-3)


def test_frames_that_are_left_out_stay_on_the_gpu(nvc: StandIn, tmp_path: Path) -> None:
    frames = assert_like_the_cpu(make_video(tmp_path / "a.mkv", 10), nvc, every=4)
    assert [f.index for f in frames] == [0, 4, 8] and nvc.frames == 10 and nvc.downloads == 3


def test_frames_are_turned_as_the_video_says(nvc: StandIn, tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", 3)
    turn_video(path)
    assert assert_like_the_cpu(path, nvc)[0].pixels.shape == (64, 48, 3)


@pytest.mark.parametrize("kind", ["mkv", "mp4"])
def test_a_truncated_file_gives_what_is_there_and_says_so(kind: str, nvc: StandIn, tmp_path: Path) -> None:
    path = make_video(tmp_path / f"a.{kind}", 50, options={"movflags": "faststart"} if kind == "mp4" else None)
    frames, said, opened = read(cut(path, 0.7))
    assert 0 < len(frames) < 50 and [number_of(f.pixels) for f in frames] == [i % 10 for i in range(len(frames))]
    assert opened.fault is not None and "of 2.00 s" in opened.fault and nvc.frames and not said


def test_a_damaged_part_does_not_end_a_video(nvc: StandIn, tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", 50, options={"movflags": "faststart"})
    content = bytearray(Path(path).read_bytes())
    middle = (content.find(b"mdat") + len(content)) // 2
    content[middle : middle + 300] = b"\xff" * 300
    Path(path).write_bytes(content)
    frames, said, opened = read(path)
    assert 30 < len(frames) < 50 and number_of(frames[-1].pixels) == 9 and nvc.frames and not said
    assert opened.fault is not None and "of it could not be decoded; " in opened.fault


def test_frames_that_the_gpu_keeps_for_itself_are_damage(nvc: StandIn, tmp_path: Path) -> None:
    nvc.lost = {7, 8}
    frames, _, opened = read(make_video(tmp_path / "a.mp4", 20))
    assert len(frames) == 18 and opened.fault is not None and "2 parts of it could not be decoded" in opened.fault


def test_what_an_edit_list_leaves_out_is_left_out(nvc: StandIn, tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", 20)
    content = bytearray(Path(path).read_bytes())
    place = content.find(b"elst") + 16  # ISO 14496-12: after version, count and the duration
    content[place : place + 4] = (int.from_bytes(content[place : place + 4], "big") + 3 * 640).to_bytes(4, "big")
    Path(path).write_bytes(content)
    frames = assert_like_the_cpu(path, nvc)
    assert 0 < len(frames) < nvc.frames == 20


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("space", [1, 2, 5, 7, 9])  # BT.709, not said, BT.601, SMPTE 240M, BT.2020
def test_colors_are_those_of_pyav(space: int, full: bool, nvc: StandIn, tmp_path: Path) -> None:
    colors = np.random.default_rng(0).integers(60, 196, (6, 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    path = str(tmp_path / "a.mp4")
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "4"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.colorspace, stream.codec_context.color_range = space, 1 + full
        frame = av.VideoFrame.from_ndarray(colors, format="rgb24").reformat(format="yuv420p")
        frame.colorspace, frame.color_range, frame.pts, frame.time_base = space, 1 + full, 0, Fraction(1, 25)
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert_like_the_cpu(path, nvc)


def test_black_white_and_gray() -> None:
    nv12 = torch.full((6, 4), 128, dtype=torch.uint8)
    nv12[0], nv12[1], nv12[2] = 16, 235, 255
    rgb = nv12_to_rgb(nv12, 0.299, 0.114, full=False)
    assert rgb.shape == (4, 4, 3) and rgb[:3].unique(dim=1).flatten().tolist() == [0] * 3 + [255] * 6
    assert nv12_to_rgb(nv12, 0.299, 0.114, full=True)[0].unique().item() == 16


# ---------------------------------------------------------------------------------------------------------------------
# What the CPU decodes after all


def failing_after(count: int) -> Callable[[StandIn], None]:
    return lambda nvc: setattr(nvc, "fails_after", count)


def test_where_the_gpu_fails_the_cpu_goes_on(nvc: StandIn, tmp_path: Path) -> None:
    nvc.fails_after = 12
    path = make_video(tmp_path / "a.mp4", 30)
    frames, said, opened = read(path)
    assert [number_of(f.pixels) for f in frames] == [i % 10 for i in range(30)] and opened.fault is None
    assert [f.index for f in frames] == list(range(30))
    assert [f.time for f in frames] == pytest.approx([0.04 * i for i in range(30)])
    (line,) = said
    assert line.startswith(f"{path} is decoded on the CPU from frame ")
    assert line.endswith(": the GPU failed (out of memory).") and nvc.frames


def test_a_frame_that_cannot_be_downloaded_is_not_lost(nvc: StandIn, tmp_path: Path) -> None:
    nvc.smaller = 5  # as after a change in the file
    frames, said, _ = read(path := make_video(tmp_path / "a.mp4", 9))
    assert [(f.index, number_of(f.pixels)) for f in frames] == [(i, i) for i in range(9)]
    reason = "a frame came as [48, 32], not as 64×48 pixels of NV12"
    assert said == [f"{path} is decoded on the CPU from frame 4 on: {reason}."]


@pytest.mark.parametrize(
    "file, change, words",
    [
        ("odd.mp4", None, "the GPU is used for 8 bits in 4:2:0, not for yuv444p"),
        ("a.h264", None, "not all of its packets have timestamps"),
        ("mpeg4.mp4", None, "the GPU is used for h264, hevc, vp9, av1, not for mpeg4"),
        ("interlaced.mp4", None, "it is interlaced"),
        ("a.mp4", {"supported": 0}, "this GPU does not decode h264 of 64×48 pixels"),
        ("a.mp4", {"height_min": 64}, "this GPU does not decode h264 of 64×48 pixels"),
        ("a.mp4", failing_after(0), "the GPU failed (out of memory)"),
    ],
)
def test_what_the_gpu_is_not_used_for(file: str, change: Any, words: str, nvc: StandIn, tmp_path: Path) -> None:
    if isinstance(change, dict):
        nvc.caps |= change
    elif change:
        change(nvc)
    path = make_video(tmp_path / file, 6, size=(63, 47) if "odd" in file else (64, 48), **KINDS.get(file, {}))
    frames, said, _ = read(path)
    assert [number_of(f.pixels) for f in frames] == list(range(6))
    assert said == [f"{path} is decoded on the CPU: {words}."]


KINDS: dict[str, dict[str, Any]] = {
    "mpeg4.mp4": {"encoder": "mpeg4"},
    "interlaced.mp4": {"encoder_options": {"x264-params": "interlaced=1"}},
}


def test_without_a_gpu_or_the_package_nothing_is_said(nvc: StandIn, tmp_path: Path, monkeypatch) -> None:
    path = make_video(tmp_path / "a.mp4", 3)
    assert len(read(path, "cpu")[0]) == 3 and not nvc.created
    monkeypatch.setitem(sys.modules, "PyNvVideoCodec", None)
    frames, said, _ = read(path)
    assert len(frames) == 3 and not said


def test_a_driver_that_is_missing_is_one_sentence(tmp_path: Path, monkeypatch, capfd) -> None:
    (tmp_path / "PyNvVideoCodec.py").write_text(
        "import logging\n"
        "logging.getLogger(__name__).error('System: Linux')\n"
        "raise RuntimeError('libnvidia-encode.so.1: no such file\\n\\n=== TROUBLESHOOTING STEPS ===')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "PyNvVideoCodec", raising=False)
    path = make_video(tmp_path / "a.mp4", 3)
    frames, said, _ = read(path)
    reason = "PyNvVideoCodec cannot be used (libnvidia-encode.so.1: no such file)"
    assert len(frames) == 3 and said == [f"{path} is decoded on the CPU: {reason}."]
    assert capfd.readouterr().err == ""


def test_a_video_is_opened_for_the_device_of_the_model(tmp_path: Path, monkeypatch) -> None:
    def opened(config: VideoConfig, *, device: str, log: Any) -> None:
        raise OdtkError(f"opened for {device}")

    model: Any = SimpleNamespace(data=LoaderConfig("", device="cuda:1"))
    monkeypatch.setattr(predict, "Video", opened)
    monkeypatch.setattr(stream, "Video", opened)
    monkeypatch.setattr(stream.Model, "load", lambda config, log: model)
    with pytest.raises(OdtkError, match="opened for cuda:1"):
        list(predict.Model._predict_video(model, VideoConfig("a.mp4"), 1, False))
    with pytest.raises(OdtkError, match="opened for cuda:1"):
        stream.infer_video(InferConfig("a.onnx", model.data, output=("-",), video=VideoConfig("a.mp4")))
