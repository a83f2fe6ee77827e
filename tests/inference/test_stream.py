"""Videos through `odtk infer`: lines of JSON, drawn videos and pictures, damage, signals, full disks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import odtk
from odtk.cli import main
from odtk.config import ModelConfig, OdtkError
from odtk.inference import stream, video
from odtk.settings import InferSettings
from tests.random_models import detector_of, save
from tests.videos import cut, make_video, number_of, picture, turn_video

av = pytest.importorskip("av", reason="PyAV is not installed (pip install av)")

SIZE = ["--resize", "48", "--max-size", "80", "--devices", "cpu"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    config = ModelConfig(backbones=("ResNet18C4",), classes=2)
    return save(detector_of(config, bias=0.0), tmp_path_factory.mktemp("model"))


def infer(model: str, source: str, *more: Any) -> int:
    return main(["infer", model, "--video", source, *SIZE, *map(str, more)])


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def decoded(path: Path) -> list[tuple[float, np.ndarray]]:
    with av.open(str(path)) as container:
        return [(float(frame.time), frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]


# ---------------------------------------------------------------------------------------------------------------------
# What is written


def test_each_frame_is_a_line_with_the_detections_of_predict(model: str, tmp_path: Path) -> None:
    times = [0.0, 0.04, 0.05, 0.5, 2.0, 2.033, 2.066]
    source = make_video(tmp_path / "a.mp4", 7, times=times)
    out = tmp_path / "o.jsonl"
    out.write_text("of before")
    assert infer(model, source, "--output", out) == 0
    lines = lines_of(out)
    assert [line["frame"] for line in lines] == list(range(7))
    assert [line["time"] for line in lines] == pytest.approx(times, abs=1e-3)
    loaded = odtk.load(model, device="cpu", resize=48, max_size=80)
    expected = [found.to_coco() for found in loaded.predict(source, stream=True)]
    assert [line["detections"] for line in lines] == expected and all(expected)
    assert {"image_id", "category_id", "category", "bbox", "score"} == set(expected[0][0])
    assert expected[6][0]["image_id"] == 6


def test_standard_output_holds_the_lines_alone(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert infer(model, make_video(tmp_path / "a.mp4", 5), "--output", "-", "--every", 2) == 0
    printed = capsys.readouterr()
    assert [json.loads(line)["frame"] for line in printed.out.splitlines()] == [0, 2, 4]
    assert "5 frames" not in printed.out and "in 3 of 3 frames" in printed.err


def test_the_drawn_video_keeps_times_and_size_and_has_the_boxes(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    times = [0.08, 0.12, 0.13, 0.5, 2.0, 2.033, 2.066]
    pictures = [picture(0, (320, 240))] * 7
    source = make_video(tmp_path / "a.mp4", size=(320, 240), times=times, pictures=pictures)
    none, drawn = tmp_path / "none.mp4", tmp_path / "drawn.mp4"
    assert infer(model, source, "--output", none, "--draw-threshold", 1) == 0
    assert infer(model, source, "--output", drawn, "--draw-threshold", 0.1) == 0
    for path in (none, drawn):
        assert [at for at, _ in decoded(path)] == pytest.approx([t - times[0] for t in times], abs=1e-3)
        assert all(pixels.shape == (240, 320, 3) for _, pixels in decoded(path))
    for (_, plain), (_, boxes) in zip(decoded(none), decoded(drawn), strict=True):
        np.testing.assert_allclose(plain[70:, 90:], 40, atol=3)
        assert (abs(boxes[70:, 90:].astype(int) - 40) > 60).any()
    with av.open(str(drawn)) as container:
        assert 1.98 < container.duration / 1e6 < 2.4, "the last frame lasts as long as the average one"
    assert "drawn.mp4" in capsys.readouterr().out


def test_odd_sizes_are_extended_by_their_last_pixels(model: str, tmp_path: Path) -> None:
    source = make_video(tmp_path / "a.mp4", 3, size=(63, 47))
    assert infer(model, source, "--output", tmp_path / "o.mp4", "--draw-threshold", 1) == 0
    found = decoded(tmp_path / "o.mp4")
    assert [pixels.shape for _, pixels in found] == [(48, 64, 3)] * 3
    assert [number_of(pixels) for _, pixels in found] == [0, 1, 2]
    np.testing.assert_allclose(found[2][1][-1, 30:], found[2][1][-2, 30:], atol=3)


def test_a_turned_video_is_written_upright(model: str, tmp_path: Path) -> None:
    source = make_video(tmp_path / "a.mp4", 2)
    turn_video(source)
    assert infer(model, source, "--output", tmp_path / "o.mp4", tmp_path / "o.jsonl", "--draw-threshold", 1) == 0
    pixels = decoded(tmp_path / "o.mp4")[0][1]
    assert pixels.shape == (64, 48, 3) and pixels[:14, -10:].mean() < 8 < 30 < pixels[:14, :10].mean()
    boxes = np.array([d["bbox"] for d in lines_of(tmp_path / "o.jsonl")[0]["detections"]])
    assert (boxes[:, 0] + boxes[:, 2]).max() <= 48 < (boxes[:, 1] + boxes[:, 3]).max() <= 64


def test_non_square_pixels_stay_so_in_the_drawn_video(model: str, tmp_path: Path, capsys) -> None:
    source, out = make_video(tmp_path / "a.mp4", 2, aspect=video.Fraction(64, 45)), tmp_path / "o.mp4"
    for aspect in (video.Fraction(64, 45), video.Fraction(45, 64)):
        assert infer(model, source, "--output", out) == 0
        with av.open(str(out)) as container:
            assert container.streams.video[0].sample_aspect_ratio == aspect
        assert capsys.readouterr().err.count("non-square pixels") == 1
        turn_video(source)


def test_colors_are_those_of_the_frames(tmp_path: Path) -> None:
    pixels = np.zeros((64, 96, 3), dtype=np.uint8)
    colors = [(200, 30, 40), (30, 180, 50), (40, 50, 220)]
    for i, color in enumerate(colors):
        pixels[:, 32 * i : 32 * (i + 1)] = color
    path = tmp_path / "o.mp4"
    with open(path, "wb") as file:
        writer = stream.Mp4(av, file, video.Fraction(25))
        writer.write(pixels, 5.0)
        writer.write(pixels, 5.5)
        writer.close()
    (first, found), (second, _) = decoded(path)
    assert (first, second) == (0, 0.5)
    for i, color in enumerate(colors):
        np.testing.assert_allclose(found[8:56, 32 * i + 8 : 32 * i + 24].mean((0, 1)), color, atol=6)


def test_without_h264_the_video_is_mpeg4(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "ENCODERS", ("mpeg4",))
    path = tmp_path / "o.mp4"
    with stream.mp4_writer(str(path), video.Fraction(25), 0.3) as _, open(tmp_path / "p.mp4", "wb") as file:
        writer = stream.Mp4(av, file, video.Fraction(25))
        for i in range(4):
            writer.write(picture(i), i * 0.1)
        writer.close()
    found = decoded(tmp_path / "p.mp4")
    assert [round(at, 3) for at, _ in found] == [0, 0.1, 0.2, 0.3]
    assert [number_of(pixels) for _, pixels in found] == [0, 1, 2, 3]


def test_frames_as_pictures(model: str, tmp_path: Path) -> None:
    source = make_video(tmp_path / "a.mp4", 5)
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in (".frame000002.jpg.123.tmp", ".mine.jpg.123.tmp"):
        (folder / name).touch()
    argv = ["--every", 4, "--output", tmp_path / "o.jsonl", "--draw", folder, "--draw-threshold", 1]
    assert infer(model, source, *argv) == 0
    assert sorted(path.name for path in folder.iterdir()) == [
        ".frame000002.jpg.123.tmp",  # of an older odtk, which did not say of which machine
        ".mine.jpg.123.tmp",
        "frame000000.jpg",
        "frame000004.jpg",
    ]
    assert number_of(np.asarray(Image.open(folder / "frame000004.jpg"))) == 4


def test_sound_is_said_to_be_lost(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    silent, path = make_video(tmp_path / "silent.mp4", 3), str(tmp_path / "a.mp4")
    source: Any
    with av.open(silent) as source, av.open(path, "w") as container:
        copied = container.add_stream_from_template(source.streams.video[0])
        sound = container.add_stream("aac", rate=8000, layout="mono")
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        samples.sample_rate, samples.pts = 8000, 0
        container.mux(sound.encode(samples))
        container.mux(sound.encode())
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = copied
                container.mux(packet)
    assert infer(model, path, "--output", tmp_path / "o.mp4") == 0
    assert f"o.mp4 gets no sound: only the pictures of {path} are written." in capsys.readouterr().out
    assert infer(model, silent, "--output", tmp_path / "o.mp4") == 0
    assert "gets no sound" not in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# Damage, signals, full disks


def test_of_a_truncated_file_what_is_there_is_written(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = cut(make_video(tmp_path / "a.mkv", 50), 0.7)
    outputs = tmp_path / "o.jsonl", tmp_path / "o.mp4"
    for strict, code in (((), 0), (("--strict",), 1)):
        for path in outputs:
            path.unlink(missing_ok=True)
        assert infer(model, source, "--output", *outputs, *strict) == code
        lines = lines_of(outputs[0])
        assert 0 < len(lines) < 50 and len(decoded(outputs[1])) == len(lines)
        error = capsys.readouterr().err
        assert f"{source} is damaged: it ends after" in error and error.count("\n") == 1
        assert error.startswith("odtk: " if strict else "Warning: ")


def test_an_output_of_before_survives_a_source_that_gives_nothing(model: str, tmp_path: Path, capsys) -> None:
    for name in ("o.jsonl", "o.mp4"):
        (tmp_path / name).write_text("of before")
        assert infer(model, str(tmp_path / "none.mp4"), "--output", tmp_path / name) == 1
        assert infer(model, "rtsp://127.0.0.1:9/x", "--output", tmp_path / name) == 1
        assert (tmp_path / name).read_text() == "of before"
    assert "There is no video" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["o.jsonl", "o.mp4"]


def test_a_full_disk_is_one_sentence(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_video(tmp_path / "a.mp4", 3)
    os.symlink("/dev/full", tmp_path / "o.jsonl")
    assert infer(model, source, "--output", tmp_path / "o.jsonl") == 1
    assert "o.jsonl: No space left on device." in capsys.readouterr().err
    os.symlink("/dev/full", tmp_path / "o.mp4")
    assert infer(model, source, "--output", tmp_path / "o.mp4") == 1
    assert "an .mp4 needs a regular file" in capsys.readouterr().err


@pytest.mark.slow
def test_a_disk_that_fills_leaves_the_video_of_before(model: str, tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk."""
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 255, (240, 320, 3), dtype=np.uint8) for _ in range(12)]
    source = make_video(tmp_path / "a.mp4", pictures=pictures, size=(320, 240))
    (tmp_path / "o.mp4").write_text("of before")
    code = (
        "import resource, signal, sys; from odtk.cli import main; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); sys.exit(main(sys.argv[1:]))"
    )
    argv = ["infer", model, "--video", source, *SIZE, "--output", str(tmp_path / "o.mp4")]
    run = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True)
    assert run.returncode == 1 and "o.mp4 could not be written (File too large)" in run.stderr, run.stderr
    assert "Traceback" not in run.stderr and (tmp_path / "o.mp4").read_text() == "of before"
    assert sorted(os.listdir(tmp_path)) == ["a.mp4", "o.mp4"]


def test_a_signal_ends_a_live_source_well(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "is_live", lambda source, container: True)
    monkeypatch.setattr(video, "RETRY_SECONDS", (0.05, 0.2))
    outputs = tmp_path / "o.jsonl", tmp_path / "o.mp4"

    def kill() -> None:
        while not (outputs[0].exists() and len(outputs[0].read_text().splitlines()) > 4):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    assert infer(model, make_video(tmp_path / "a.mp4", 4), "--output", *outputs) == 0
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is before
    assert len(decoded(outputs[1])) == len(lines_of(outputs[0])) > 4


@pytest.mark.parametrize("size", [0, 1])
def test_an_interrupted_file_is_written_so_far(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], size: int
) -> None:
    outputs = tmp_path / "o.jsonl", tmp_path / "o.mp4"

    def kill() -> None:  # as soon as the file is there, or the first line
        while not outputs[0].exists() or outputs[0].stat().st_size < size:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    argv = ["--output", *outputs, "--batch", 1, "--realtime"]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        assert infer(model, make_video(tmp_path / "a.mp4", 400), *argv) == 1
    finally:
        signal.signal(signal.SIGINT, before)
    thread.join()
    count = len(lines_of(outputs[0]))
    assert size <= count < 400 and (len(decoded(outputs[1])) if count else 0) == count
    assert f"odtk: Interrupted after {count} of 400 frames" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Settings


def test_from_python(model: str, tmp_path: Path) -> None:
    source = make_video(tmp_path / "a.mp4", 3)
    out = str(tmp_path / "o.jsonl")
    assert odtk.infer(model, video=source, output=out, devices="cpu", resize=48) is None
    assert len(lines_of(tmp_path / "o.jsonl")) == 3


def test_settings_that_contradict_a_video(model: str) -> None:
    more: dict[str, Any]
    for more, words in (
        ({"images": "i"}, "takes the place of --images"),
        ({"annotations": "a.json"}, "takes the place of --annotations"),
        ({"output": "o.json"}, "must end in .jsonl or .mp4"),
        ({"output": "./v.mp4"}, "is the video itself"),
        ({"output": ("a.jsonl", "./a.jsonl")}, "--output ./a.jsonl is there twice"),
        ({"output": ("-", "a.jsonl", "-")}, "--output - is there twice"),
        ({"draw_threshold": 0.5}, "--draw-threshold needs"),
    ):
        with pytest.raises(OdtkError, match=words):
            InferSettings(model=model, video="v.mp4", **more)
    for more, words in (({"every": 2}, "--every needs --video"), ({"output": "-"}, "--output - is for --video")):
        with pytest.raises(OdtkError, match=words):
            InferSettings(model=model, **more)
    assert InferSettings(model=model, video="v.mp4").outputs == ("detections.jsonl",)
    assert InferSettings(model=model).outputs == ("detections.json",)
    with pytest.raises(OdtkError, match="--video runs on one device, not 2"):
        odtk.infer(model, video="v.mp4", devices="cpu:2")
