"""LOGDIR/run.html: the page on which a run can be watched, from a file, in any browser.

It is written anew every few seconds, whole or not at all, and so seldom that it takes at most one part in SHARE of the
time. A run that is resumed goes on from the files of LOGDIR: curves from metrics.jsonl, pictures from the page itself.
"""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PILImage

from .. import __version__
from ..config import OdtkError, RunConfig
from ..evaluation.charts import Line, line_chart
from ..evaluation.curves import PER_CLASS, plot_of, read_curves
from ..evaluation.page import Markup, Section, image_tag, join, page, paragraph, table, text
from ..files import atomic_write
from ..text import in_words

NAME = "run.html"
SECONDS = 5.0  # at least, from one page to the next
SHARE = 200  # writing takes at most one part in so many of the time
MOMENTS = 8  # validations whose pictures are kept: the first, the last, and some between
PICTURE_SIDE = 640  # pixels of a picture's longer side, at most
CHART_CLASSES = 12  # up to so many classes have their AP in a chart; the table has all
PICTURE = re.compile(
    r'<figure data-iteration="(\d+)">(<img src="data:image/jpeg;base64,[A-Za-z0-9+/=]+" alt="[\w ]+"[\w ="]*>)'
)
TITLES = {  # of the charts, in their order, and the values that each shows
    "Loss": "loss",
    "AP": "validation AP",
    "AP by the area of the object": "validation AP",
    "AP of each class": "AP per class",
    "Recall": "validation AR",
    "Answers": "validation accuracy",
    "F1 of each class": "F1 per class",
    "Learning rate": "learning rate",
    "Images per second": "images per second",
}
RELOAD = """
const box = document.getElementById("reload"), key = "odtk reload";
let timer;
function plan() {
  clearTimeout(timer);
  if (box.checked) timer = setTimeout(() => location.reload(), 15000);
}
try { box.checked = sessionStorage.getItem(key) !== "no"; } catch (error) {}
box.addEventListener("change", () => {
  try { sessionStorage.setItem(key, box.checked ? "yes" : "no"); } catch (error) {}
  plan();
});
plan();
const written = document.getElementById("written");
function age() {
  const seconds = Math.round(Date.now() / 1000 - Number(written.dataset.time));
  written.textContent = seconds < 120 ? seconds + " s ago" : Math.round(seconds / 60) + " minutes ago";
}
age();
setInterval(age, 1000);
"""


class RunPage:
    """The page of one run, a writer of the log (log.Writer).

    Args:
        start: iterations done so far.
        iters: iterations of the whole run.

    Attributes:
        why: the run ends before its last iteration; empty unless it does so by itself.
    """

    def __init__(self, config: RunConfig, start: int, iters: int) -> None:
        assert config.logdir is not None
        self.why = ""
        self.config, self.start, self.iters, self.iteration = config, start, iters, start
        self.path = Path(config.logdir, NAME)
        self.curves: dict[str, list[tuple[int, float]]] = {}
        self.pictures: dict[int, list[Markup]] = {}  # img elements by iteration
        self.began, self.due = time.time(), 0.0
        self.closed = False
        with suppress(OdtkError, OSError, ValueError):  # it is a page only: without its past it begins anew
            self.resume() if start else self.keep_earlier()

    def resume(self) -> None:
        """Takes up the curves and pictures of the run before it was interrupted."""
        for name, points in read_curves(self.path.with_name("metrics.jsonl")).items():
            self.curves[name] = [(iteration, value) for iteration, value in points if iteration <= self.start]
        for iteration, element in PICTURE.findall(self.path.read_text()):
            if int(iteration) <= self.start:
                self.pictures.setdefault(int(iteration), []).append(Markup(element))

    def keep_earlier(self) -> None:
        """Renames the page of another run, as LogFiles does with its metrics."""
        if self.path.exists():
            names = (self.path.with_name(f"run.{n}.html") for n in itertools.count(1))
            self.path.rename(next(name for name in names if not name.exists()))

    def write(self, item: tuple[dict[str, float], Sequence[np.ndarray]]) -> None:
        """Takes an entry and its pictures; writes the page if that is due.

        Raises:
            OdtkError: it cannot be written; the page before stays.
        """
        entry, pictures = item
        self.iteration = int(entry["iteration"])
        for name, value in entry.items():
            if name not in ("iteration", "time") and not (plot_of(name).startswith("validation") and value < 0):
                self.curves.setdefault(name, []).append((self.iteration, value))
        if len(pictures):
            self.pictures[self.iteration] = [
                image_tag(reduced(one), f"validation image {number} at iteration {self.iteration}")
                for number, one in enumerate(pictures, 1)
            ]
            forget_moments(self.pictures)
        if time.monotonic() >= self.due:
            self.save()

    def close(self) -> None:
        """Writes the last page.

        Raises:
            OdtkError: it cannot be written.
        """
        self.closed = True
        self.save()

    def save(self) -> None:
        """Writes the page, and says when the next is due."""
        began = time.thread_time()  # of a processor: waiting for a disk takes nothing from the training
        try:
            content = self.content().encode(errors="replace")
            with atomic_write(self.path) as file:
                file.write(content)
        finally:
            took = time.thread_time() - began
            self.due = time.monotonic() + max(SECONDS, SHARE * took)

    def content(self) -> str:
        """The page as it stands."""
        sections = [Section("curves", "Curves", self.charts())]
        for prefix in PER_CLASS:
            found = {name[3:]: points[-1][1] for name, points in self.curves.items() if name.startswith(prefix)}
            if found:
                rows = [[name, f"{value:.3f}"] for name, value in found.items()]
                columns = ["class", f"{prefix[:-1]} at the last validation"]
                sections.append(Section("classes", "Classes", table(columns, rows)))
        if self.pictures:
            sections.append(Section("pictures", "Pictures", self.picture_rows()))
        if self.config.settings:
            sections.append(Section("settings", "Settings", settings_table(self.config.settings)))
        name = Path(self.config.path).name
        return page(f"Training {name}", self.opening(), sections, "" if self.closed else RELOAD)

    def opening(self) -> list[Markup]:
        """How far the run is, and how good."""
        done, iters = self.iteration, self.iters
        early = f"ended early: {self.why}" if self.why else "stopped"
        state = "finished" if done >= iters else early if self.closed else "running"
        lines = [
            Markup(f'<p class="big"><b>Iteration {done} of {iters}</b>, {text(state)}</p>'),
            Markup(f'<p><progress value="{done}" max="{iters}" aria-label="iterations done"></progress></p>'),
        ]
        facts = []
        if done < iters and not self.closed and done > self.start:
            left = (time.time() - self.began) / (done - self.start) * (iters - done)
            facts.append(f"about {duration(left)} left")
        name = self.config.SCORE
        if scores := self.curves.get(name):
            best = max(scores, key=lambda point: (point[1], point[0]))
            facts.append(f"best {name} {best[1]:.3f} at iteration {best[0]}, last {scores[-1][1]:.3f}")
        if speed := self.curves.get("images_per_second"):
            facts.append(f"{speed[-1][1]:.1f} images per second")
        lines.append(paragraph("; ".join(facts) or "The first figures are still to come."))
        stamp = time.time()
        written = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(stamp))
        if self.closed:
            lines.append(paragraph(f"Written {written} by odtk {__version__}.", "soft"))
        else:
            age = f'<span id="written" data-time="{stamp:.0f}"></span>'
            box = '<label><input type="checkbox" id="reload" checked> Reload every 15 seconds</label>'
            lines.append(Markup(f'<p class="soft">Written {written}, {age}, by odtk {__version__}. {box}</p>'))
        return lines

    def charts(self) -> Markup:
        """A chart for each kind of value."""
        parts = []
        for title, group in TITLES.items():
            names = [name for name in self.curves if plot_of(name) == group]
            if group == "validation AP":
                names = [name for name in names if (" " in name) == (" " in title)]  # AP small … apart
            if group in PER_CLASS.values() and len(names) > CHART_CLASSES:
                continue
            lines = [Line(label(name), self.curves[name]) for name in names]
            if lines:
                bounded = group in PER_CLASS.values() or group.startswith("validation")
                bounds = (0.0, 1.0) if bounded else None
                parts.append(line_chart(title, lines, "iteration", y_range=bounds))
        return Markup(f'<div class="charts">{join(parts)}</div>') if parts else paragraph("There are no figures yet.")

    def picture_rows(self) -> Markup:
        """The validation pictures, the newest first."""
        parts: list[Markup] = [paragraph("The first validation images, with the detections that score above 0.5.")]
        for iteration in sorted(self.pictures, reverse=True):
            elements = self.pictures[iteration]
            figures = [Markup(f'<figure data-iteration="{iteration}">{element}</figure>') for element in elements]
            parts.append(Markup(f'<h3>Iteration {iteration}</h3><div class="pictures">{join(figures)}</div>'))
        return join(parts)


def label(name: str) -> str:
    """The name of a value in a legend."""
    return name[3:] if name[:3] in PER_CLASS else {"lr": "learning rate"}.get(name, name.replace("_", " "))


def settings_table(settings: dict[str, Any]) -> Markup:
    """Every setting of the run: what was given, what the plan decided and why, and the rest."""
    given, planned = settings.get("given", ()), settings.get("planned") or {}
    hidden = {"given", "planned", "held_out", "data"}
    origin = {
        name: "given" if name in given else str(planned[name]) if name in planned else ""
        for name in settings
        if name not in hidden
    }
    order = sorted(origin, key=lambda name: (name not in given, name not in planned))
    rows = [
        [name, *(Markup(f'<td class="why">{text(cell)}</td>') for cell in (in_words(settings[name]), origin[name]))]
        for name in order
    ]
    meaning = "Given settings first, then those that were decided, with the reason; the others are defaults."
    return join([paragraph(meaning), table(["setting", "value", "why"], rows)])


def reduced(pixels: np.ndarray) -> PILImage.Image:
    """A picture, uint8 [H, W, 3] RGB, of at most PICTURE_SIDE."""
    image = PILImage.fromarray(pixels)
    image.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    return image


def forget_moments(moments: dict[int, Any]) -> None:
    """Drops what lies closest between its neighbors until MOMENTS are left; never the first or the last."""
    while len(moments) > MOMENTS:
        order = sorted(moments)
        gaps = {order[i]: order[i + 1] - order[i - 1] for i in range(1, len(order) - 1)}
        del moments[min(gaps, key=lambda iteration: gaps[iteration])]


def duration(seconds: float) -> str:
    """A time span in words."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
