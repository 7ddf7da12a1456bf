"""Line charts as inline SVG; colours and fonts come from the page's style sheet."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from dist_vse.tools.report.numbers import figure, short

WIDTH, HEIGHT = 400, 210  # of the drawing, in its own units
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 10, 26  # margins
MAX_POINTS = 200
"""Longer curves become means over bins, drawn on the band between each bin's extremes."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One line; its points are (x, y), x rising. `style` is one of the page's s1, s2, s3, s4."""

    label: str
    style: str
    points: Sequence[Point]


@dataclass(frozen=True)
class Axis:
    """A range of values and its round marks, mapped onto `start` to `end` of the drawing."""

    low: float
    high: float
    ticks: list[float]
    start: float
    end: float

    def place(self, value: float) -> float:
        """Return where the value lies."""
        share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)


def line_chart(title: str, series: Sequence[Series], *, from_zero: bool, x_label: str) -> str:
    """Draw the series as one SVG; points that are not finite are left out."""
    finite = [
        Series(s.label, s.style, [p for p in s.points if math.isfinite(p[1])]) for s in series
    ]
    points = [point for s in finite for point in s.points]
    if not points:
        return '<p class="note">No finite value.</p>'
    xs, ys = [x for x, _ in points], [y for _, y in points]
    whole = all(x == int(x) for x in xs)  # such as steps: no marks between
    x_axis = _axis(min(xs), max(xs), 5, LEFT, WIDTH - RIGHT, tight=True, least=float(whole))
    y_axis = _axis(0 if from_zero else min(ys), max(ys), 4, HEIGHT - BOTTOM, TOP, tight=False)
    spoken = "; ".join(
        f"{s.label} from {figure(s.points[0][1])} to {figure(s.points[-1][1])}"
        for s in finite
        if s.points
    )
    body = _grid(x_axis, y_axis, x_label) + "".join(_draw(s, x_axis, y_axis) for s in finite)
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}: '
        f'{escape(spoken)}">{body}</svg>'
    )


def _axis(
    low: float,
    high: float,
    count: int,
    start: float,
    end: float,
    *,
    tight: bool,
    least: float = 0.0,
) -> Axis:
    """Choose marks 1, 2 or 5 times a power of ten apart; `tight` ends the range at the data.

    Marks are at least `least` apart.
    """
    if high - low <= 1e-9 * abs(high):  # a flat line lies in the middle of a band round it
        spread = abs(high) / 2 or 1.0
        low, high = (low, high + spread) if low == 0 else (low - spread, high + spread)
    raw = max((high - low) / count, least)
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [i * step for i in range(first, last + 1)]
    if tight:
        margin = 1e-9 * (high - low)
        ticks = [tick for tick in ticks if low - margin <= tick <= high + margin]
        return Axis(low, high, ticks, start, end)
    return Axis(ticks[0], ticks[-1], ticks, start, end)


def _grid(x_axis: Axis, y_axis: Axis, x_label: str) -> str:
    parts = []
    for tick in y_axis.ticks:
        y = f"{y_axis.place(tick):.1f}"
        parts.append(f'<path class="grid" d="M{LEFT} {y}H{WIDTH - RIGHT}"/>')
        label = short(round(tick, 12))
        parts.append(f'<text x="{LEFT - 7}" y="{y}" dy=".35em" text-anchor="end">{label}</text>')
    for tick in x_axis.ticks:
        x = x_axis.place(tick)
        label = short(round(tick, 12)) + (f" {x_label}" if tick == x_axis.ticks[-1] else "")
        anchor = "end" if x > WIDTH - RIGHT - 24 else "middle"
        x_end = min(x + (10 if anchor == "end" else 0), WIDTH)
        parts.append(
            f'<text x="{x_end:.1f}" y="{HEIGHT - 8}" text-anchor="{anchor}">{label}</text>'
        )
    return "".join(parts)


def _draw(series: Series, x_axis: Axis, y_axis: Axis) -> str:
    if not series.points:
        return ""
    line, low, high = _bins(series.points)

    def path(points: Sequence[Point]) -> str:
        return "L".join(f"{x_axis.place(x):.1f} {y_axis.place(y):.1f}" for x, y in points)

    band = (
        f'<path class="band {series.style}" d="M{path([*low, *reversed(high)])}Z"/>' if low else ""
    )
    x, y = line[-1]
    dots = line if len(line) <= 12 else [(x, y)]
    return f'{band}<path class="line {series.style}" d="M{path(line)}"/>' + "".join(
        f'<circle class="dot {series.style}" r="3" cx="{x_axis.place(x):.1f}" '
        f'cy="{y_axis.place(y):.1f}"><title>{escape(series.label)}: {figure(y)} at '
        f"{x:,.0f}</title></circle>"
        for x, y in dots
    )


def _bins(points: Sequence[Point]) -> tuple[Sequence[Point], list[Point], list[Point]]:
    """Return the line and, where it is made of bins, their least and largest values."""
    if len(points) <= MAX_POINTS:
        return points, [], []
    line, low, high = [], [], []
    for i in range(MAX_POINTS):
        part = points[i * len(points) // MAX_POINTS : (i + 1) * len(points) // MAX_POINTS]
        x, ys = sum(x for x, _ in part) / len(part), [y for _, y in part]
        line.append((x, sum(ys) / len(ys)))
        low.append((x, min(ys)))
        high.append((x, max(ys)))
    return line, low, high
