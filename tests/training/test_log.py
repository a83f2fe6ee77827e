"""What a run logs: readable by others, and never a reason to stop or wait."""

import dataclasses
import errno
import os
import struct
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c

from odtk.config import LoaderConfig, ModelConfig, OdtkError, TrainConfig
from odtk.evaluation.evaluate import STATS, ClassMetrics, Metrics
from odtk.training import log
from odtk.training.log import RunLog
from odtk.training.validation import validated

METRICS = Metrics(tuple(i / 20 for i in range(12)), ())


def config(folder: Path) -> TrainConfig:
    return TrainConfig("m.pth", ModelConfig(), LoaderConfig("."), logdir=str(folder))


def of_class(name: str, ap: float) -> ClassMetrics:
    return ClassMetrics(1, name, ap, ap, 1, 1)


def events(folder: Path) -> list[Event]:
    """What TensorBoard reads, each record's checksums compared."""
    (path,) = folder.glob("events.out.tfevents.*")
    content, found = path.read_bytes(), []
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        data = content[12 : 12 + length]
        assert struct.unpack("<I", content[8:12]) == (masked_crc32c(content[:8]),)
        assert struct.unpack("<I", content[12 + length : 16 + length]) == (masked_crc32c(data),)
        found.append(Event.FromString(data))
        content = content[16 + length :]
    return found


def test_tensorboard_gets_every_value_and_picture(tmp_path: Path) -> None:
    with RunLog(config(tmp_path), 0, 10) as run:
        run.training(1, {"loss": 0.5, "cls": 0.25}, 0.01, 7.0)
        run.validation(2, validated(METRICS, [np.zeros((4, 6, 3), np.uint8)]))
    first, *rest = events(tmp_path)
    assert first.file_version == "brain.Event:2"
    values = [(e.step, v.tag, round(v.simple_value, 6)) for e in rest for v in e.summary.value]
    named = [(2, name.replace(" ", "_"), i / 20) for i, name in enumerate(STATS)]
    training = [(1, "loss", 0.5), (1, "cls", 0.25), (1, "lr", 0.01), (1, "images_per_second", 7.0)]
    assert values == [*training, *named, (2, "validation/0", 0.0)]
    picture = rest[-1].summary.value[0].image
    assert (picture.height, picture.width) == (4, 6) and picture.encoded_image_string.startswith(b"\x89PNG")


def test_a_full_disk_stops_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Many more entries than any queue holds; once there is room again, the log goes on."""
    real, full = log.append, True

    def append(file: Any, data: bytes) -> None:
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(file, data)

    with RunLog(config(tmp_path), 0, 1000) as run:
        monkeypatch.setattr(log, "append", append)
        start = time.monotonic()
        for iteration in range(1, 501):
            run.training(iteration, {"loss": 0.5}, 0.01, 7.0)
            run.validation(iteration, validated(METRICS, [np.zeros((4, 6, 3), np.uint8)]))
        assert time.monotonic() - start < 10
        deadline = time.monotonic() + 30
        while not run.writers[0].waiting.empty() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        full = False
        run.training(501, {"loss": 0.5}, 0.01, 7.0)
    said = [line for line in capsys.readouterr().err.splitlines() if "takes no more" not in line]
    assert said == [f"Warning: --logdir {tmp_path} fails (No space left on device); training goes on."]
    assert [event.step for event in events(tmp_path)] == [0, 501, 501, 501]
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 1


def test_a_disk_that_does_not_answer_holds_up_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    answered = threading.Event()
    monkeypatch.setattr(log, "CLOSE_SECONDS", 0.2)
    run = RunLog(config(tmp_path), 0, 1000)
    monkeypatch.setattr(log, "append", lambda file, data: answered.wait())
    start = time.monotonic()
    with run:
        for iteration in range(1, 501):
            run.training(iteration, {"loss": 0.5}, 0.01, 7.0)
    assert time.monotonic() - start < 10
    answered.set()
    said = f"Warning: --logdir {tmp_path} takes no more entries, which are lost until it does again; training goes on."
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "run.html" not in line] == [said]  # 500 at once are too many for the page too


def test_a_terminal_that_is_gone_stops_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a closed SSH connection: every write to it fails."""

    class Gone:
        def __getattr__(self, name: str) -> Any:
            def fail(*_: object, **__: object) -> None:
                raise OSError(errno.EIO, os.strerror(errno.EIO))

            return fail

    run = RunLog(dataclasses.replace(config(tmp_path), logdir=None), 0, 10)
    run.bar = log.progress_bar(0, 10)
    with run:
        monkeypatch.setattr(run.bar, "stop", Gone().stop)
        monkeypatch.setattr(run.bar.console, "print", Gone().print)
        run.training(1, {"loss": 0.5}, 0.01, 7.0)
        run.validation(1, validated(METRICS, []))
    monkeypatch.undo()
    run.bar.stop()


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OdtkError, match="Cannot write in --logdir .*file"):
        RunLog(config(tmp_path / "file"), 0, 10)


def test_the_line_of_the_classes() -> None:
    def line(*classes: ClassMetrics) -> str:
        return log.classes_line(Metrics((0.5,) * 12, classes))

    assert line(of_class("a", 0.5)) == "" == line()
    assert line(of_class("a", 0.5), of_class("none here", -1), of_class("b", 0.25)) == "a 0.500, b 0.250"
    many = [of_class(str(i), (i * 7 % 20) / 20) for i in range(20)]
    assert line(*many).startswith("worst of 20 classes: 0 0.000, 3 0.050, 6 0.100, ")
    assert line(*many).count(",") == 7


def test_names_of_classes_are_no_markup_of_the_terminal(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    with RunLog(config(tmp_path), 0, 4) as one:
        metrics = Metrics((0.5,) * 12, (of_class("[/red]", 0.5), of_class("[bold]", 0.25)))
        one.validation(2, validated(metrics, []))
    assert "[/red] 0.500, [bold] 0.250" in capsys.readouterr().out
