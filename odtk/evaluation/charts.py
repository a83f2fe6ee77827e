"""Line charts as SVG inside a page (page.py), in the page's colors; lines differ in their dashes too."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .page import Markup, text

WIDTH, HEIGHT = 640, 260  # units of the SVG, which is as wide as its column
LEFT, RIGHT, TOP, BOTTOM = 64, 14, 10, 44  # margins
DASHES = ("", "7 3", "2 3", "9 3 2 3", "4 2", "1 2")
COLORS = len(DASHES)  # --c0 … of page.STYLE
MOST_POINTS = 400  # of a line; longer ones are averaged
MARKED = 30  # up to so many points of a line are marked


@dataclass(frozen=True)
class Line:
    """A line of a chart; points that are not finite interrupt it.

    Attributes:
        name: for the legend, plain text.
        points: (x, y), x ascending.
    """

    name: str
    points: Sequence[tuple[float, float]]


def line_chart(
    title: str,
    lines: Sequence[Line],
    x_label: str,
    *,
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
    markers: Sequence[tuple[float, str]] = (),
) -> Markup:
    """A chart with its legend.

    Args:
        title: what it shows, plain text, above it.
        x_range, y_range: ends of the axes; None: those of the points.
        markers: vertical lines, x and what it is.
    """
    lines = [Line(line.name, thinned(line.points)) for line in lines]
    every = [(x, y) for line in lines for x, y in line.points if math.isfinite(x) and math.isfinite(y)]
    if not every:
        return Markup(f"<figure><figcaption>{text(title)}: nothing to show.</figcaption></figure>")
    xs, ys = ticks(*(x_range or span([x for x, _ in every]))), ticks(*(y_range or span([y for _, y in every])))
    (x0, x1), (y0, y1) = x_range or (xs[0], xs[-1]), y_range or (ys[0], ys[-1])

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - x0) / ((x1 - x0) or 1) * (WIDTH - LEFT - RIGHT)
        return across, HEIGHT - BOTTOM - (y - y0) / ((y1 - y0) or 1) * (HEIGHT - TOP - BOTTOM)

    parts = []
    for y in ys:
        _, v = place(x0, y)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{v:.1f}" y2="{v:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{v + 4:.1f}" text-anchor="end">{number(y)}</text>')
    for x in xs:
        u, _ = place(x, y0)
        parts.append(f'<line class="grid" x1="{u:.1f}" x2="{u:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text x="{u:.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{number(x)}</text>')
    for x, name in markers:
        u, _ = place(x, y0)
        parts.append(
            f'<line x1="{u:.1f}" x2="{u:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" stroke="var(--fg)" stroke-width="1.5" '
            f'stroke-dasharray="3 3"><title>{text(name)}</title></line>'
        )
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 5}" text-anchor="middle">{text(x_label)}</text>')
    for i, line in enumerate(lines):
        parts += drawn([place(x, y) for x, y in line.points], i % COLORS)
    keys = "".join(legend(line.name, i % COLORS) for i, line in enumerate(lines)) if len(lines) > 1 else ""
    marked = "".join(f'<span class="key">┆ {text(name)}</span>' for _, name in markers)
    label = f"{title}, {x_label} from {number(x0)} to {number(x1)}: " + "; ".join(map(summary, lines))
    return Markup(
        f'<figure><figcaption>{text(title)}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{text(label)}">{"".join(parts)}</svg><div>{keys}{marked}</div></figure>'
    )


def drawn(points: Sequence[tuple[float, float]], color: int) -> list[str]:
    """A line through points in units of the SVG, in as many pieces as it has."""
    pieces: list[list[tuple[float, float]]] = [[]]
    for point in points:
        if all(map(math.isfinite, point)):
            pieces[-1].append(point)
        elif pieces[-1]:
            pieces.append([])
    style = f'stroke="var(--c{color})" stroke-dasharray="{DASHES[color]}"'
    parts = [
        f'<polyline {style} points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in piece)}"/>'
        for piece in pieces
        if len(piece) > 1
    ]
    if len(points) <= MARKED:
        dots = [point for piece in pieces for point in piece]
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="var(--c{color})"/>' for x, y in dots]
    return parts


def legend(name: str, color: int) -> str:
    """An entry of the legend."""
    return (
        '<span class="key"><svg viewBox="0 0 30 8" aria-hidden="true"><polyline points="0,4 30,4" '
        f'stroke="var(--c{color})" stroke-dasharray="{DASHES[color]}"/></svg>{text(name)}</span>'
    )


def summary(line: Line) -> str:
    """A line in words: its last and its extreme values."""
    values = [y for _, y in line.points if math.isfinite(y)]
    if not values:
        return f"{line.name} has no values"
    return f"{line.name} ends at {number(values[-1])}, lowest {number(min(values))}, highest {number(max(values))}"


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MOST_POINTS points: means of as many neighbors as that takes."""
    step = math.ceil(len(points) / MOST_POINTS)
    if step <= 1:
        return list(points)
    groups = [points[i : i + step] for i in range(0, len(points), step)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def span(values: Sequence[float]) -> tuple[float, float]:
    """The lowest and the highest value; zero with them if it is near."""
    low, high = min(values), max(values)
    return (0.0 if 0 < low < high / 2 else low), high


def ticks(low: float, high: float) -> list[float]:
    """Four to eight round numbers, the first at or below ``low`` and the last at or above ``high``."""
    if not high > low:
        return [low, low + (abs(low) or 1.0)]
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next((power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw), 10 * power)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def number(value: float) -> str:
    """A number for an axis."""
    if abs(value) >= 10000 and value == round(value):
        return f"{value:,.0f}".replace(",", "\u2009")
    return f"{value:.4g}"
