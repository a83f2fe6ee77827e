"""The same object in one frame after another: ByteTrack (https://arxiv.org/abs/2110.06864) of the package trackers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from ..config import OdtkError

RATE = 25.0  # frames per second, where the video does not say
SMALLEST_STEP = 1e-6  # seconds between two frames; ByteTrack takes no two of the same time


class Tracker:
    """Gives the detections of a video's frames the numbers of their objects.

    Each class is tracked by itself, as NMS works per class: an object may have overlapping boxes of two classes, and a
    common track would jump between them.
    """

    def __init__(self, rate: float | None, threshold: float) -> None:
        """
        Args:
            rate: frames per second.
            threshold: of the score from which on a detection starts a track; weaker ones only continue tracks.

        Raises:
            OdtkError: the package is not installed.
        """
        try:
            from trackers import ByteTrackTracker
        except ImportError as error:
            raise OdtkError(
                f"Tracking needs the package trackers ({error}): install it with `pip install 'odtk[track]'`."
            ) from error
        self._new: Callable[[], Any] = partial(
            ByteTrackTracker,
            frame_rate=rate or RATE,
            track_activation_threshold=threshold,
            high_conf_det_threshold=threshold,
        )
        self._trackers: dict[int, Any] = {}  # by class
        self._numbers: dict[tuple[int, int], int] = {}  # of (class, number in its tracker)
        self._last = -np.inf

    def update(self, boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, at: float) -> np.ndarray:
        """The track of each detection of the next frame.

        Args:
            boxes: float64 [n, 4] (x1, y1, x2, y2) in pixels.
            scores: [n], in (0, 1].
            labels: int64 [n], class indices.
            at: time of the frame in seconds, which may jump over frames that were left out, but not back.

        Returns:
            int64 [n]: from 1 on, and 0 for a detection that belongs to no track, or to one that began in this frame:
            the second frame makes it sure.
        """
        at = max(at, self._last + SMALLEST_STEP)
        self._last = at
        for label in labels.tolist():
            if label not in self._trackers:
                self._trackers[label] = self._new()
        tracks = np.zeros(len(boxes), dtype=np.int64)
        for label, tracker in self._trackers.items():  # those without detections age
            rows = np.flatnonzero(labels == label)
            for row, number in zip(*self._matched(tracker, boxes, scores, rows, at), strict=True):
                if number >= 0:  # -1 is none
                    tracks[row] = self._numbers.setdefault((label, number), len(self._numbers) + 1)
        return tracks

    @staticmethod
    def _matched(
        tracker: Any, boxes: np.ndarray, scores: np.ndarray, rows: np.ndarray, at: float
    ) -> tuple[list[int], list[int]]:
        """Some rows of the detections, in an order of ByteTrack's own, and its number for each."""
        import supervision

        given = supervision.Detections(
            xyxy=boxes[rows].astype(np.float32).reshape(-1, 4),
            confidence=scores[rows].astype(np.float32),
            class_id=np.zeros(len(rows), dtype=int),
            data={"row": rows},
        )
        found = tracker.update(given, timestamp=at)
        return (found.data["row"].tolist(), found.tracker_id.tolist()) if len(found) else ([], [])
