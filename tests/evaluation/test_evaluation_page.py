"""`odtk evaluate --report`: what stands on the page, and how a browser shows it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from odtk.cli import main
from odtk.config import OdtkError
from odtk.evaluation.bootstrap import MIN_IMAGES
from odtk.evaluation.breakdown import GROUPS, size_groups
from odtk.evaluation.charts import MOST_POINTS, Line, line_chart, thinned, ticks
from odtk.evaluation.evaluate import run_cocoeval
from odtk.evaluation.evaluation_page import MATRIX_CLASSES, evaluation_page
from odtk.evaluation.page import Section, page, paragraph, table
from odtk.settings import EvaluateSettings
from tests.browser import Browser, check_page

EVIL = "<script>alert(1)</script>&\"'<img src=x onerror=alert(2)>"


@pytest.fixture
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    opened = Browser(tmp_path_factory.mktemp("browser"))
    yield opened
    opened.close()


def write_set(folder: Path, *, images: int = 8, classes: int = 3, files: bool = True) -> tuple[Path, Path]:
    """Annotations and detections of a small set with every kind of error; names are markup. Returns their paths."""
    draw = np.random.default_rng(0)
    content: dict[str, Any] = {
        "images": [
            {"id": i, "file_name": f"<b>{i}&.jpg", "width": 120 + 40 * (i % 2), "height": 100}
            for i in range(1, images + 1)
        ],
        "categories": [{"id": 3 * c + 1, "name": f"{EVIL}{c}" if c < 2 else f"class {c}"} for c in range(classes)],
        "annotations": [],
    }
    found = []
    for image in content["images"]:
        if files:
            size = (image["width"], image["height"])
            Image.effect_noise(size, 60).convert("RGB").save(folder / image["file_name"])
        for place in range(4):
            category = 3 * int(draw.integers(classes)) + 1
            box = [25.0 * place, float(draw.uniform(0, 50)), 22.0, 30.0]
            entry = {"image_id": image["id"], "category_id": category, "bbox": box}
            content["annotations"].append({**entry, "id": len(content["annotations"]) + 1})
            for shift in draw.choice([0.0, 1.0, 12.0, 40.0], int(draw.integers(3))):
                said = category if draw.random() < 0.7 else 3 * int(draw.integers(classes)) + 1
                moved = [box[0], box[1] + float(shift), *box[2:]]
                score = round(float(draw.random()), 4)
                found.append({"image_id": image["id"], "category_id": said, "bbox": moved, "score": score})
    truth, detections = folder / "truth.json", folder / "<i>found.json"
    truth.write_text(json.dumps(content))
    detections.write_text(json.dumps(found))
    return truth, detections


def text_of(markup: str) -> list[str]:
    """The cells and paragraphs of a page as plain text."""
    return [re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", part)).strip() for part in re.split(r"</(?:td|th|p)>", markup)]


@pytest.mark.slow
def test_a_browser_shows_the_page(tmp_path: Path, browser: Browser) -> None:
    truth, detections = write_set(tmp_path)
    report = tmp_path / "out.html"
    assert main(["evaluate", str(detections), "--annotations", str(truth), "--report", str(report)]) == 0
    check_page(browser, report)
    assert browser.ask("document.images.length") >= 6
    assert (
        browser.ask("document.scripts.length") == 0 and browser.ask("document.title") == "<i>found.json on truth.json"
    )
    names = browser.ask("[...document.querySelectorAll('th.name')].map(e => e.textContent)")
    assert f"{EVIL}0" in names and f"{EVIL}1" in names
    captions = browser.ask("[...document.querySelectorAll('.pictures figcaption')].map(e => e.textContent)")
    assert all(re.fullmatch(r"<b>\d&\.jpg: \d+ (error|object)s?", caption) for caption in captions)
    browser.press("Tab")
    assert browser.ask("document.activeElement.className") == "skip"
    browser.press("Tab")
    assert browser.ask("document.activeElement.hash") == "#ap"
    opened = "document.querySelector('details').open"
    before = browser.ask(opened)
    browser.ask("document.querySelector('summary').focus()")
    browser.press("Enter")
    assert browser.ask(opened) is not before


def test_the_page_says_what_the_terminal_says(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    truth, detections = write_set(tmp_path)
    report = tmp_path / "out.html"
    assert main(["evaluate", str(detections), "--annotations", str(truth), "--report", str(report)]) == 0
    shown, said = text_of(report.read_text()), capsys.readouterr().out
    evaluation = run_cocoeval(str(detections), str(truth))
    for value in evaluation.stats:
        assert f"{value:.3f}" in shown if value >= 0 else "–" in shown
    assert f"Wrote {report}" in said and f"{evaluation.stats[0]:.3f}" in said
    assert shown.count("120 × 100") == 1 and shown.count("160 × 100") == 1
    missing = [name for name in ("AP", "Thresholds", "Confusion", "Calibration", "Sizes", "Errors") if name not in
               " ".join(shown)]  # fmt: skip
    assert missing == []


def test_without_images_the_page_says_why(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    truth, detections = write_set(tmp_path, files=False)
    report = tmp_path / "out.html"
    assert main(["evaluate", str(detections), "--annotations", str(truth), "--report", str(report)]) == 0
    assert "<img" not in report.read_text() and "There are no pictures: " in report.read_text()
    assert "--images DIR says where the images are" in capsys.readouterr().out


@pytest.mark.parametrize("more", [[], ["--segmentation"]])
def test_rotated_boxes_have_pictures_too(tmp_path: Path, more: list[str], capsys: pytest.CaptureFixture) -> None:
    truth, detections = write_set(tmp_path, images=MIN_IMAGES - 1)
    content = json.loads(truth.read_text())
    for entry in content["annotations"]:
        entry["bbox"].append(0.2)
    truth.write_text(json.dumps(content))
    report = tmp_path / "out.html"
    assert main(["evaluate", str(detections), "--annotations", str(truth), "--report", str(report), *more]) == 0
    assert "<img" in report.read_text() and "times with replacement" not in capsys.readouterr().out


def test_many_classes_few_images_and_nothing_at_all(tmp_path: Path) -> None:
    truth, detections = write_set(tmp_path, images=MIN_IMAGES - 1, classes=MATRIX_CLASSES + 20, files=False)
    content = json.loads(truth.read_text())
    shown = evaluation_page(run_cocoeval(str(detections), str(truth)), "many", {}, lambda _: None)
    assert f"The {MATRIX_CLASSES} of {MATRIX_CLASSES + 20} classes that are confused most" in shown
    assert f"Fewer than {MIN_IMAGES} images give no interval" in shown and "nan" not in shown
    for results, objects in (([], content["annotations"]), (json.loads(detections.read_text()), [])):
        nothing = evaluation_page(run_cocoeval(results, {**content, "annotations": objects}), "x", {}, lambda _: None)
        assert "nan" not in nothing and "–" in text_of(nothing)


def test_scores_that_are_no_probabilities(tmp_path: Path) -> None:
    truth, detections = write_set(tmp_path, files=False)
    found = [{**d, "score": 100 * d["score"]} for d in json.loads(detections.read_text())]
    shown = evaluation_page(run_cocoeval(found, json.loads(truth.read_text())), "x", {}, lambda _: None)
    assert "they are no probabilities" in shown


def test_detections_that_do_not_count(tmp_path: Path) -> None:
    """One inside a crowd alone."""
    truth, _ = write_set(tmp_path, files=False)
    content = json.loads(truth.read_text())
    crowd = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 10, 60, 60], "iscrowd": 1}
    found = [{"image_id": 1, "category_id": 1, "bbox": [20, 20, 20, 20], "score": 0.9}]
    for objects in ([crowd], [*content["annotations"], {**crowd, "id": 1000}]):
        shown = evaluation_page(run_cocoeval(found, {**content, "annotations": objects}), "x", {}, lambda _: None)
        assert "There are no detections that count." in shown and "nan" not in shown


@pytest.mark.parametrize("key", ["images", "categories"])
def test_nothing_to_evaluate_is_refused(key: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    truth, detections = write_set(tmp_path, files=False)
    truth.write_text(json.dumps({**json.loads(truth.read_text()), "annotations": [], key: []}))
    detections.write_text("[]")
    report = tmp_path / "out.html"
    assert main(["evaluate", str(detections), "--annotations", str(truth), "--report", str(report)]) == 1
    said = capsys.readouterr()
    assert said.err == f"odtk: {truth} has no {key}, so there is nothing to evaluate.\n" and not said.out
    assert not report.exists()


def test_a_page_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    truth, detections = write_set(tmp_path, files=False)
    with pytest.raises(OdtkError, match=r"--report .*json: the name of the page must end in .html"):
        EvaluateSettings(detections=str(detections), annotations=str(truth), report=str(detections))
    arguments = [
        "evaluate",
        str(detections),
        "--annotations",
        str(truth),
        "--report",
        str(tmp_path / "no" / "out.html"),
    ]
    assert main(arguments) == 1
    assert not (tmp_path / "no").exists()


def test_images_of_many_sizes_are_put_into_groups() -> None:
    few = size_groups([(20, 10), (10, 10), None, (20, 10)])
    assert few == [("10 × 10", [1]), ("20 × 10", [0, 3])]
    many = size_groups([(1000 + 10 * i, 1000) for i in range(40)] + [None])
    assert len(many) == GROUPS and sorted(i for _, members in many for i in members) == list(range(40))
    assert many[0][0] == "1.00 to 1.09 megapixels"


@pytest.mark.slow
def test_a_policy_lets_only_the_pages_own_script_run(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    body = table([EVIL, "b"], [[EVIL, EVIL]], EVIL)
    path.write_text(page(EVIL, [paragraph(EVIL)], [Section("one", EVIL, body)], "document.title += ' ran'"))
    check_page(browser, path)
    assert browser.ask("document.title") == f"{EVIL} ran"
    path.write_text(path.read_text().replace("' ran'", "' tampered'"))
    browser.open(path, width=800, dark=False)
    assert browser.ask("document.title") == EVIL and "Content Security Policy" in "".join(browser.complaints)


def test_charts_have_round_ticks_and_few_points() -> None:
    assert ticks(0.0, 1.0) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(3.0, 3.0) == [3.0, 6.0] and ticks(0.0, 0.0) == [0.0, 1.0]
    for low, high in ((0.013, 0.0871), (-3.0, 12345.0), (1e-7, 3e-7)):
        found = ticks(low, high)
        assert 3 <= len(found) <= 9 and found[0] <= low * (1 + 1e-9) and found[-1] >= high * (1 - 1e-9)
    points = [(float(i), float(i)) for i in range(10 * MOST_POINTS + 1)]
    assert len(thinned(points)) <= MOST_POINTS and thinned(points[:5]) == points[:5]
    broken = line_chart("t", [Line("a", [(0, 1.0), (1, float("nan")), (2, 1.5), (3, 2.0)])], "x")
    assert broken.count("<polyline") == 1 and broken.count("<circle") == 3
    assert "nothing to show" in line_chart("t", [Line("a", [])], "x")
