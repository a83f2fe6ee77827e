"""LOGDIR/run.html: what it shows, that it goes on when a run is resumed, what it costs, and how a browser shows it."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from odtk.config import LoaderConfig, ModelConfig, TrainConfig
from odtk.evaluation.evaluate import ClassMetrics, Metrics
from odtk.training import run_page
from odtk.training.log import RunLog
from odtk.training.run_page import MOMENTS, SHARE, RunPage, forget_moments
from odtk.training.validation import validated
from tests.browser import Browser, check_page

EVIL = "<script>alert(1)</script>&\"'"
SETTINGS = {"lr": 0.001, "iters": 40, "model": EVIL, "given": ["lr"], "planned": {"iters": f"few images {EVIL}"}}


@pytest.fixture
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    opened = Browser(tmp_path_factory.mktemp("browser"))
    yield opened
    opened.close()


def config(folder: Path) -> TrainConfig:
    return TrainConfig(f"{EVIL}.pth", ModelConfig(), LoaderConfig("."), logdir=str(folder), settings=SETTINGS)


def entry(iteration: int, **values: float) -> tuple[dict[str, float], list[np.ndarray]]:
    return {"iteration": iteration, "time": time.time(), **values}, []


def picture(shade: int) -> np.ndarray:
    return np.full((500, 900, 3), shade, np.uint8)


def log_run(folder: Path, start: int, end: int, iters: int = 40) -> str:
    """Logs as training does, with a validation every 10 iterations; returns the page."""
    with RunLog(config(folder), start, iters) as log:
        for i in range(start + 1, end + 1):
            log.training(i, {"loss": 1 / i, "classification": 0.5 / i}, 0.01, 30.0)
            if i % 10 == 0:
                classes = (ClassMetrics(1, EVIL, i / 80, 0.5, 3, 3), ClassMetrics(2, "dog", -1, -1, 0, 0))
                log.validation(
                    i, validated(Metrics((i / 100, 0.5, 0.4, -1.0, *[0.3] * 8), classes), [picture(i), picture(2 * i)])
                )
    return (folder / "run.html").read_text()


@pytest.mark.slow
def test_a_browser_shows_a_run_that_is_running_and_one_that_is_over(tmp_path: Path, browser: Browser) -> None:
    log_run(tmp_path, 0, 40)
    path = tmp_path / "run.html"
    check_page(browser, path)
    assert browser.ask("document.scripts.length") == 0 and "finished" in browser.ask("document.body.innerText")
    running = RunPage(config(tmp_path / "other"), 0, 40)
    (tmp_path / "other").mkdir()
    running.write((entry(10, **{"AP": 0.3, f"AP/{EVIL}": 0.2})[0], [picture(99)]))
    check_page(browser, running.path)
    assert browser.ask("document.title") == "Training " + Path(f"{EVIL}.pth").name
    assert re.search(r"\d+ s ago", browser.ask("document.body.innerText"))
    assert browser.ask("document.images.length") == 1 and browser.ask("document.scripts.length") == 1
    running.close()
    browser.ask("document.getElementById('reload').click()")
    assert not browser.ask("document.getElementById('reload').checked")
    assert EVIL in browser.ask("document.body.innerText")


def test_the_page_of_a_run(tmp_path: Path) -> None:
    shown = log_run(tmp_path, 0, 25)
    assert "<b>Iteration 25 of 40</b>, stopped" in shown and "best AP 0.200 at iteration 20" in shown
    assert shown.count("data:image/jpeg") == 4 and "<script" not in shown
    for title in ("Loss", "AP", "AP of each class", "Recall", "Learning rate", "Images per second"):
        assert f"<figcaption>{title}</figcaption>" in shown
    assert "few images &lt;script&gt;" in shown and ">given<" in shown
    assert "AP small" not in shown and "dog" not in shown  # nothing was there to find
    assert max(map(int, re.findall(r'width="(\d+)" height="\d+">', shown))) == 640


def test_a_resumed_run_goes_on_with_its_curves_and_pictures(tmp_path: Path) -> None:
    before = log_run(tmp_path, 0, 25)
    resumed = log_run(tmp_path, 20, 40)  # the last checkpoint was that of iteration 20
    whole = log_run(tmp_path / "undisturbed", 0, 40)
    assert resumed.count("data:image/jpeg") == 8 and "finished" in resumed
    first = re.findall(r'data-iteration="10">(<img[^>]+>)', before)
    assert first == re.findall(r'data-iteration="10">(<img[^>]+>)', resumed)
    charts = [re.findall(r'aria-label="(Loss[^"]+|AP, [^"]+)"', one) for one in (resumed, whole)]
    assert charts[0] == charts[1] and len(charts[0]) == 2


def test_another_run_leaves_the_page_of_the_first(tmp_path: Path) -> None:
    first = log_run(tmp_path, 0, 12)
    second = log_run(tmp_path, 0, 11)
    assert (tmp_path / "run.1.html").read_text() == first and "Iteration 11 of 40" in second


def test_a_damaged_page_is_begun_anew(tmp_path: Path) -> None:
    log_run(tmp_path, 0, 20)
    injected = '<figure data-iteration="10"><img src="data:image/jpeg;base64,AA" alt="x" onerror=alert(1)></figure>'
    (tmp_path / "run.html").write_text(injected)
    assert "onerror" not in log_run(tmp_path, 20, 21)
    (tmp_path / "run.html").write_bytes(b"\xff\xfe\x00")
    assert "Iteration 22 of 40" in log_run(tmp_path, 21, 22)


def test_a_page_that_cannot_be_written_stops_no_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with RunLog(config(tmp_path), 0, 40) as log:
        (tmp_path / "run.html").mkdir()
        log.training(1, {"loss": 1.0}, 0.01, 30.0)
    said = capsys.readouterr().err
    assert said.count("Warning") == 1 and f"the page {tmp_path}/run.html fails" in said
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 1
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]


def test_writing_takes_little_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock of our own: each page takes 0.1 s, an iteration 0.5 s."""
    now, pages = [0.0], []
    page = RunPage(config(tmp_path), 0, 1000)

    def content() -> str:
        now[0] += 0.1
        pages.append(now[0])
        return ""

    monkeypatch.setattr(run_page.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(run_page.time, "thread_time", lambda: now[0])
    monkeypatch.setattr(page, "content", content)
    for i in range(1000):
        now[0] += 0.5
        page.write(entry(i + 1, loss=1.0))
    assert len(pages) > 10 and 0.1 * len(pages) < now[0] / SHARE + 0.2


def test_moments_are_kept_from_all_of_the_run() -> None:
    moments: dict[int, Any] = {}
    for iteration in range(100, 10100, 100):
        moments[iteration] = None
        forget_moments(moments)
    kept = sorted(moments)
    assert len(kept) == MOMENTS and kept[0] == 100 and kept[-1] == 10000
    assert max(np.diff(kept)) <= 4 * min(np.diff(kept)[:-1])
