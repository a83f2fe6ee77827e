"""Tracks over the frames of a video: whose number is whose, and ByteTrack itself where it is installed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import odtk
from odtk.cli import main
from odtk.config import ModelConfig, OdtkError
from odtk.inference.drawing import coco_to_shapes
from odtk.inference.tracking import Tracker
from odtk.settings import InferSettings
from tests.random_models import detector_of, save
from tests.videos import make_video, picture

pytest.importorskip("supervision")


class Reversing:
    """Stands for ByteTrack: gives what it gets in reverse order, with numbers 10 · score, of which 0 to 4 are −1."""

    times: list[float] = []

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def update(self, detections: Any, timestamp: float) -> Any:
        self.times.append(timestamp)
        found = detections[np.arange(len(detections))[::-1]]
        numbers = np.floor(10 * found.confidence).astype(int)
        found.tracker_id = np.where(numbers < 5, -1, numbers)
        return found


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = ModuleType("trackers")
    module.ByteTrackTracker = Reversing
    monkeypatch.setitem(sys.modules, "trackers", module)
    Reversing.times = []


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    config = ModelConfig(backbones=("ResNet18C4",), classes=2)
    return save(detector_of(config, bias=0.0), tmp_path_factory.mktemp("model"))


def test_numbers_return_to_their_detections(stub: None) -> None:
    tracker = Tracker(25, 0.3)
    boxes = np.array([[0, 0, 10, 10], [20, 20, 30, 30], [40, 40, 50, 50]], dtype=float)
    scores, labels = np.array([0.95, 0.75, 0.15]), np.array([0, 0, 0])
    assert tracker.update(boxes, scores, labels, 1.0).tolist() == [2, 1, 0], "in the order of ByteTrack's answers"
    assert tracker.update(boxes[:0], scores[:0], labels[:0], 1.0).tolist() == []
    assert tracker.update(boxes, scores, np.array([0, 1, 1]), 1.0).tolist() == [2, 3, 0], (
        "another class, another object"
    )
    assert Reversing.times[1] > Reversing.times[0], "no two frames have the same time"


def test_tracks_in_python_and_in_the_lines(stub: None, model: str, tmp_path: Path) -> None:
    source = make_video(tmp_path / "a.mp4", 3, pictures=[picture(i, (320, 240)) for i in range(3)], size=(320, 240))
    loaded = odtk.load(model, device="cpu", resize=48, max_size=80)
    found = list(loaded.predict(source, stream=True, track=True))
    known: dict[Any, int] = {}
    for one in found:
        assert one.tracks is not None and len(one.tracks) == len(one)
        for label, score, track in zip(one.labels, one.scores.astype(np.float32), one.tracks.tolist(), strict=True):
            number = int(10 * score)
            assert bool(track) == (number >= 5) and (not track or known.setdefault((label, number), track) == track)
        assert [d.get("track_id", 0) for d in one.to_coco()] == one.tracks.tolist()
        assert one.to_supervision().tracker_id.tolist() == one.tracks.tolist()
        some = one.above(0.55)
        assert some.tracks is not None and len(some.tracks) == len(some) < len(one)
        assert (some.tracks == one.tracks[one.scores > 0.55]).all()
    kinds = {track > 0 for one in found if one.tracks is not None for track in one.tracks.tolist()}
    assert kinds == {True, False}, "both are tested"
    argv = ["infer", model, "--video", source, "--track", "--resize", "48", "--max-size", "80", "--devices", "cpu"]
    assert main([*argv, "--output", str(tmp_path / "o.jsonl"), str(tmp_path / "o.mp4")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert [line["detections"] for line in lines] == [one.to_coco() for one in found]
    assert all(one.tracks is None for one in loaded.predict(source, stream=True))


def test_a_track_is_written_beside_the_box() -> None:
    entry = {"bbox": [1, 2, 3, 4], "category_id": 1, "category": "cell", "score": 0.5, "track_id": 7}
    assert [shape.label for shape in coco_to_shapes([entry])] == ["cell 0.50 #7"]


def test_without_the_package_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trackers", None)
    with pytest.raises(OdtkError, match=r"pip install 'odtk\[track\]'"):
        Tracker(25, 0.3)


def test_settings() -> None:
    for more, words in (({"track": True}, "--track needs --video"), ({"track_threshold": 0.5}, "needs --track")):
        values: dict[str, Any] = {"model": "m.pth", **more}
        with pytest.raises(OdtkError, match=words):
            InferSettings(**values)


# ---------------------------------------------------------------------------------------------------------------------
# ByteTrack itself


def test_two_objects_that_cross_keep_their_numbers() -> None:
    """One moves right and one moves left, a few rows apart; the detector misses each for some frames."""
    pytest.importorskip("trackers", reason="the package trackers is not installed (pip install 'odtk[track]')")
    tracker = Tracker(25, 0.3)
    seen: dict[str, set[int]] = {"right": set(), "left": set()}
    weak = 0
    for i in range(60):
        right, left = [10.0 + 3 * i, 20, 40 + 3 * i, 60], [200.0 - 3 * i, 50, 230 - 3 * i, 90]
        objects = {"left": left, "right": right} if i % 2 else {"right": right, "left": left}
        for name, missed in (("right", range(20, 25)), ("left", range(40, 44))):
            if i in missed:
                del objects[name]
        scores = np.array([0.15 if i == 10 else 0.8] * len(objects))  # weak ones continue a track
        tracks = tracker.update(np.array(list(objects.values())), scores, np.zeros(len(scores), dtype=int), 0.04 * i)
        if i < 2:
            continue
        for name, track in zip(objects, tracks.tolist(), strict=True):
            seen[name].add(track)
        weak += int(i == 10 and tracks.all())
    assert seen == {"right": {1}, "left": {2}} and weak == 1, seen


def test_overlapping_boxes_of_two_classes_keep_their_numbers() -> None:
    pytest.importorskip("trackers", reason="the package trackers is not installed (pip install 'odtk[track]')")
    tracker = Tracker(25, 0.3)
    found = []
    for i in range(20):
        boxes = np.array([[10.0 + i, 20, 60 + i, 70], [12.0 + i, 21, 61 + i, 72]])
        order = [0, 1] if i % 3 else [1, 0]  # of descending scores
        tracks = tracker.update(boxes[order], np.array([0.8, 0.7]), np.array([0, 1])[order], 0.04 * i)
        found.append(tuple(tracks[np.argsort(order)].tolist()))
    assert found[0] == (0, 0) and set(found[1:]) in ({(1, 2)}, {(2, 1)}), found


def test_a_gap_in_time_is_a_gap_for_the_tracker() -> None:
    """Half a second of dropped frames: the object has moved on, and its speed finds it."""
    pytest.importorskip("trackers", reason="the package trackers is not installed (pip install 'odtk[track]')")
    tracker = Tracker(25, 0.3)
    found = []
    for i in [*range(20), *range(32, 40)]:
        box = np.array([[10.0 + 5 * i, 20, 60 + 5 * i, 70]])
        found.append(int(tracker.update(box, np.array([0.9]), np.array([3]), 0.04 * i)[0]))
    assert set(found[2:]) == {1}, found
