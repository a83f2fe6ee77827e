"""Videos as frames: order, timestamps, rotation, damage, queues, and live sources that fall silent."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import odtk
from odtk.config import ModelConfig, OdtkError, VideoConfig
from odtk.inference import video
from odtk.inference.predict import Model
from odtk.inference.video import Clock, Frame, FrameQueue, Video, is_video, shown_name
from tests.random_models import detector_of, save
from tests.videos import cut, make_video, number_of, turn_video

pytest.importorskip("av", reason="PyAV is not installed (pip install av)")


def frames_of(source: str, **more: Any) -> list[Frame]:
    with Video(VideoConfig(source, **more)) as opened:
        return list(opened)


# ---------------------------------------------------------------------------------------------------------------------
# Files


def test_every_frame_comes_once_with_its_number_and_time(tmp_path: Path) -> None:
    frames = frames_of(make_video(tmp_path / "a.mp4", 43))
    assert [f.index for f in frames] == list(range(43))
    assert [number_of(f.pixels) for f in frames] == [i % 10 for i in range(43)]
    assert [f.time for f in frames] == pytest.approx([0.04 * i for i in range(43)])


def test_a_variable_frame_rate_keeps_its_timestamps(tmp_path: Path) -> None:
    times = [0.0, 0.04, 0.05, 0.5, 2.0, 2.033, 2.066]
    assert [f.time for f in frames_of(make_video(tmp_path / "a.mp4", 7, times=times))] == pytest.approx(times, abs=1e-3)


def test_every_nth_frame_keeps_its_own_number(tmp_path: Path) -> None:
    frames = frames_of(make_video(tmp_path / "a.mkv", 10), every=4)
    assert [(f.index, number_of(f.pixels)) for f in frames] == [(0, 0), (4, 4), (8, 8)]
    assert [f.time for f in frames] == pytest.approx([0, 0.16, 0.32])


def test_frames_are_turned_as_the_video_says(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", 2)
    turn_video(path)
    pixels = frames_of(path)[0].pixels
    assert pixels.shape == (64, 48, 3)
    assert pixels[:16, -12:].mean() < 5 and pixels[:16, :12].mean() > 30, "the black corner is at the upper right"


def test_odd_sizes(tmp_path: Path) -> None:
    assert frames_of(make_video(tmp_path / "a.mp4", 2, size=(63, 47)))[1].pixels.shape == (47, 63, 3)


def slow_frames(source: str) -> list[int]:
    """The numbers of a video's frames, taken more slowly than they are decoded."""
    with Video(VideoConfig(source)) as opened:
        assert not opened.live
        time.sleep(0.3)
        numbers = [frame.index for frame in opened]
    assert opened.dropped == opened.disconnects == 0
    return numbers


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="no /dev/shm")
def test_a_file_under_dev_is_no_camera() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        assert slow_frames(make_video(Path(folder, "a.ts"), 30)) == list(range(30))
        Path(folder, "b.ts").write_bytes(b"no video" * 100)
        with pytest.raises(OdtkError, match="is not a whole video file"):
            Video(VideoConfig(f"{folder}/b.ts"))
    for path, camera in (("/dev/null", True), ("/dev/video99", True), ("/dev/shm", False), ("/dev/none", False)):
        assert video.is_camera(path) is camera


def test_a_pipe_gives_every_frame_and_ends(tmp_path: Path) -> None:
    content, pipe = Path(make_video(tmp_path / "a.ts", 30)).read_bytes(), tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(content,))
    writer.start()
    assert slow_frames(str(pipe)) == list(range(30))
    writer.join()
    code = (
        "import json; from tests.inference.test_video import slow_frames; print(json.dumps(slow_frames('/dev/stdin')))"
    )
    out = subprocess.run([sys.executable, "-c", code], input=content, stdout=subprocess.PIPE, check=True, timeout=120)
    assert json.loads(out.stdout) == list(range(30))


def test_non_square_pixels_are_said_once_and_turn_with_the_frames(tmp_path: Path) -> None:
    path, said = make_video(tmp_path / "a.mp4", 3, aspect=Fraction(64, 45)), []  # type: str, list[str]
    with Video(VideoConfig(path), log=said.append) as opened:
        assert [(frame.aspect, frame.pixels.shape) for frame in opened] == [(Fraction(64, 45), (48, 64, 3))] * 3
    assert len(said) == 1 and f"{path} has non-square pixels (64:45)" in said[0]
    turn_video(path)
    assert {frame.aspect for frame in frames_of(path)} == {Fraction(45, 64)}
    said.clear()
    with Video(VideoConfig(make_video(tmp_path / "b.mp4", 3)), log=said.append) as opened:
        assert {frame.aspect for frame in opened} == {1} and not said


def test_a_slow_reader_of_a_file_gets_every_frame(tmp_path: Path) -> None:
    with Video(VideoConfig(make_video(tmp_path / "a.mp4", 30))) as opened:
        time.sleep(0.2)  # the thread has filled the queue
        frames = []
        while taken := opened.take(7):
            frames.append(len(taken))
    assert frames == [7, 7, 7, 7, 2] and opened.dropped == 0 and opened.fault is None
    assert opened.total == opened.read == 30


def test_in_real_time_a_file_takes_its_time_and_drops_what_waits_too_long(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", 10)
    start = time.monotonic()
    with Video(VideoConfig(path, realtime=True)) as opened:
        frames = []
        for frame in opened:
            frames.append(frame.index)
            time.sleep(0.15)  # a detector of 6 frames a second
    assert time.monotonic() - start > 0.36, "the last frame is due after 0.36 s"
    assert frames == sorted(set(frames)) and frames[-1] == 9, "the newest frames are kept"
    assert opened.dropped == 10 - len(frames) > 0


@pytest.mark.parametrize("kind", ["mkv", "mp4"])
def test_a_truncated_file_gives_what_is_there_and_says_so(kind: str, tmp_path: Path) -> None:
    path = make_video(tmp_path / f"a.{kind}", 50, options={"movflags": "faststart"} if kind == "mp4" else None)
    with Video(VideoConfig(cut(path, 0.7))) as opened:
        frames = list(opened)
    assert 0 < len(frames) < 50 and [number_of(f.pixels) for f in frames] == [i % 10 for i in range(len(frames))]
    assert opened.fault is not None and opened.fault.startswith(f"{path} is damaged: ")
    assert "of 2.00 s" in opened.fault and f"{len(frames)} frames were decoded" in opened.fault


def test_a_damaged_part_does_not_end_a_video(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", 50, options={"movflags": "faststart"})
    content = bytearray(Path(path).read_bytes())
    middle = (content.find(b"mdat") + len(content)) // 2
    content[middle : middle + 300] = b"\xff" * 300
    Path(path).write_bytes(content)
    with Video(VideoConfig(path)) as opened:
        frames = list(opened)
    assert 30 < len(frames) < 50 and number_of(frames[-1].pixels) == 9, "it goes on after the damage"
    assert opened.fault is not None and "of it could not be decoded; " in opened.fault


def test_what_is_no_video_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"no video" * 100)
    for source, words in (
        (tmp_path / "none.mp4", "There is no video"),
        (tmp_path, "is a folder"),
        (tmp_path / "a.mp4", "is not a whole video file"),
        (cut(make_video(tmp_path / "b.mp4"), 0.5), "is not a whole video file"),  # its index is at its end
        ("rtsp://me:secret@127.0.0.1:9/x", r"rtsp://\*\*\*@127.0.0.1:9/x cannot be opened"),
    ):
        with pytest.raises(OdtkError, match=words) as error:
            Video(VideoConfig(str(source)))
        assert "secret" not in str(error.value)


def test_an_audio_file_has_no_video_track(tmp_path: Path) -> None:
    import av

    path = str(tmp_path / "a.wav")
    container: Any
    with av.open(path, "w") as container:
        stream: Any = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        sound: Any = av.AudioFrame.from_ndarray(np.zeros((1, 800), dtype=np.int16), format="s16", layout="mono")
        sound.rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    with pytest.raises(OdtkError, match="no video track"):
        Video(VideoConfig(path))


def test_without_pyav_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(OdtkError, match=r"pip install 'odtk\[video\]'"):
        Video(VideoConfig("a.mp4"))


def test_closing_early_ends_the_thread(tmp_path: Path) -> None:
    opened = Video(VideoConfig(make_video(tmp_path / "a.mp4", 60)))
    assert opened.take(1)
    opened.close()
    assert not opened._thread.is_alive() and opened.take(1) == []


def test_which_sources_are_videos() -> None:
    for source in ("a.MP4", "/dev/video0", "rtsp://host/x", "http://host/stream", Path("b.mkv")):
        assert is_video(source)
    for source in ("a.jpg", "folder", "scans/*.png", "a.gif", Path("/dev/stdin")):
        assert not is_video(source)
    assert shown_name("rtsp://me:pass@host/a@b") == "rtsp://***@host/a@b"
    assert shown_name("rtsp://host/a") == "rtsp://host/a"


# ---------------------------------------------------------------------------------------------------------------------
# Queues and clocks


def frame(index: int) -> Frame:
    return Frame(index, 0.04 * index, np.zeros((1, 1, 3), dtype=np.uint8))


def test_a_queue_that_drops_keeps_the_newest() -> None:
    queue = FrameQueue(2, dropping=True)
    for i in range(5):
        queue.put(frame(i))
    assert [f.index for f in queue.take(9)] == [3, 4] and queue.dropped == 3


def test_a_queue_that_waits_loses_nothing() -> None:
    queue = FrameQueue(2, dropping=False)

    def fill() -> None:
        for i in range(50):
            queue.put(frame(i))
        queue.close(keep=True)

    thread = threading.Thread(target=fill)
    thread.start()
    taken: list[int] = []
    while frames := queue.take(3):
        taken += [f.index for f in frames]
    thread.join()
    assert taken == list(range(50)) and queue.dropped == 0


def test_the_error_of_the_reader_comes_after_its_frames() -> None:
    queue = FrameQueue(4, dropping=False)
    queue.put(frame(0))
    queue.close(OSError("lost"), keep=True)
    assert len(queue.take(2)) == 1
    with pytest.raises(OSError, match="lost"):
        queue.take(1)


def test_live_timestamps_start_at_zero_and_go_on_over_a_disconnect(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(video.time, "monotonic", lambda: now[0])
    clock = Clock(True, None)
    found = []
    for at, stamp in ((100.0, 7.0), (100.1, 7.04), (100.1, 7.08)):  # frames may come in bursts
        now[0] = at
        found.append(clock.time(stamp))
    clock.restart()
    for at, stamp in ((110.0, 0.0), (110.04, 0.04), (110.08, 0.02)):
        now[0] = at
        found.append(clock.time(stamp))
    assert found == pytest.approx([0, 0.04, 0.08, 10.0, 10.04, 10.04])


def test_missing_timestamps() -> None:
    clock = Clock(False, Fraction(10))
    assert [clock.time(stamp) for stamp in (None, None, 0.5, None)] == pytest.approx([0, 0.1, 0.5, 0.6])


# ---------------------------------------------------------------------------------------------------------------------
# Live sources, as files that are taken for one: each opening of the file is one connection


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "is_live", lambda source, container: True)
    monkeypatch.setattr(video, "RETRY_SECONDS", (0.05, 0.2))
    monkeypatch.setattr(video, "LIVE_AHEAD", 1000)


def test_the_end_of_a_live_source_is_a_disconnect_said_once(tmp_path: Path, live: None) -> None:
    path = make_video(tmp_path / "a.mp4", 6)
    said: list[str] = []
    with Video(VideoConfig(path), log=said.append) as opened:
        taken: list[Frame] = []
        while len(taken) < 6:
            taken += opened.take(1)
        away = path + ".away"
        Path(path).rename(away)
        time.sleep(0.6)  # several attempts fail
        Path(away).rename(path)
        while len(taken) < 8:
            taken += opened.take(1)
    assert [f.index for f in taken[:8]] == list(range(8))
    assert [f.time for f in taken] == sorted(f.time for f in taken) and taken[6].time > 0.2
    assert said[0] == f"{path} was lost after 6 frames (it ended): connecting again." and "is back after" in said[1]
    assert len([line for line in said if "lost after 6 frames" in line]) == 1


def test_a_source_that_answers_but_sends_nothing_is_one_outage(
    tmp_path: Path, live: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    calls: list[int] = []

    def decode(self: Video, container: Any) -> str:
        calls.append(1)
        if len(calls) == 1:
            return original(self, container)
        return "it does not answer"

    original = Video._decode
    monkeypatch.setattr(Video, "_decode", decode)
    with Video(VideoConfig(make_video(tmp_path / "a.mp4", 3)), log=said.append) as opened:
        while len(calls) < 4:
            time.sleep(0.02)
    assert len(said) == 1 and opened.disconnects == 1


# ---------------------------------------------------------------------------------------------------------------------
# From Python


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    config = ModelConfig(backbones=("ResNet18C4",), classes=2)
    path = save(detector_of(config, bias=0.0), tmp_path_factory.mktemp("model"))
    return odtk.load(path, device="cpu", resize=48, max_size=80)


def test_predict_finds_in_a_video_what_it_finds_in_its_frames(model: Model, tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", 11)
    found = list(model.predict(path, stream=True))
    frames = frames_of(path)
    assert [f.image_id for f in found] == list(range(11)) and all(len(f) for f in found)
    expected = model.predict([f.pixels for f in frames])
    for one, same, source in zip(found, expected, frames, strict=True):
        np.testing.assert_array_equal(one.rows, same.rows)
        assert one.frame is not None and one.frame.time == source.time and one.size == (64, 48)
    assert found[3].draw().size == (64, 48)
    assert [f.image_id for f in model.predict(path, stream=True, every=5)] == [0, 5, 10]


def test_predict_of_a_video_that_is_damaged(model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = cut(make_video(tmp_path / "a.mkv", 20), 0.7)
    found = []
    with pytest.raises(OdtkError, match="skip_damaged=True goes on"):
        found += [one.image_id for one in model.predict(path, stream=True)]
    assert len(list(model.predict(path, stream=True, skip_damaged=True))) > 2
    assert "is damaged: it ends after" in capsys.readouterr().err


def test_predict_takes_a_video_only_as_a_stream(model: Model) -> None:
    with pytest.raises(OdtkError, match="is a video: pass stream=True"):
        model.predict("a.mp4")
    with pytest.raises(OdtkError, match="every: 0"):
        model.predict("a.mp4", stream=True, every=0)


def test_what_is_for_a_video_is_refused_of_images(model: Model) -> None:
    for given, word in (({"every": 2}, "every"), ({"track": True}, "track")):
        with pytest.raises(OdtkError, match=f"{word} is for a video, and this is none"):
            model.predict(np.zeros((64, 64, 3), np.uint8), stream=True, **given)
