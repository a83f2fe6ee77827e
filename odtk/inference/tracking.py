"""The same object in one frame after another: ByteTrack (https://arxiv.org/abs/2110.06864) of the package trackers."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..config import OdtkError

RATE = 25.0  # frames per second, where the video does not say
SMALLEST_STEP = 1e-6  # seconds between two frames; ByteTrack takes no two of the same time


class Tracker:
    """Gives the detections of a video's frames the numbers of their objects.

    Objects are matched by where they are expected, not by their class: one whose class flickers stays one.
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
        self._tracker: Any = ByteTrackTracker(
            frame_rate=rate or RATE, track_activation_threshold=threshold, high_conf_det_threshold=threshold
        )
        self._last = -np.inf

    def update(self, boxes: np.ndarray, scores: np.ndarray, at: float) -> np.ndarray:
        """The track of each detection of the next frame.

        Args:
            boxes: float64 [n, 4] (x1, y1, x2, y2) in pixels.
            scores: [n], in (0, 1].
            at: time of the frame in seconds, which may jump over frames that were left out, but not back.

        Returns:
            int64 [n]: from 1 on, and 0 for a detection that belongs to no track, or to one that began in this frame:
            the second frame makes it sure.
        """
        import supervision

        at = max(at, self._last + SMALLEST_STEP)
        self._last = at
        given = supervision.Detections(
            xyxy=boxes.astype(np.float32).reshape(-1, 4),
            confidence=scores.astype(np.float32),
            class_id=np.zeros(len(boxes), dtype=int),
            data={"row": np.arange(len(boxes))},
        )
        found = self._tracker.update(given, timestamp=at)
        tracks = np.zeros(len(boxes), dtype=np.int64)
        if len(found):  # in another order
            tracks[found.data["row"]] = found.tracker_id + 1  # theirs begin at 0, and -1 is none
        return tracks
