"""Line charts and stacked bars as inline SVG; colours and fonts are those of the style sheet."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from dist_vse.tools.report.numbers import figure, short

WIDTH, HEIGHT = 400, 210  # of the drawing, in its own units
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 10, 26  # margins
BARS_WIDTH, BARS_LEFT, BARS_RIGHT, ROW, BAR = 960, 250, 74, 30, 18
MAX_POINTS = 200
"""Longer curves become means over bins, drawn on the band between each bin's extremes."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One line; its points are (x, y), x rising. `style` is one of the page's s1, s2, s3, s4."""

    label: str
    style: str
    points: Sequence[Point]
    extremes: Sequence[Point] = ()  # least and largest value behind each point, if points are means


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
    finite = [_finite(s) for s in series]
    points = [point for s in finite for point in s.points]
    if not points:
        return '<p class="note">No finite value.</p>'
    xs = [x for x, _ in points]
    ys = [y for _, y in points] + [y for s in finite for ends in s.extremes for y in ends]
    whole = all(x == int(x) for x in xs)  # such as steps: no marks between
    x_axis = _axis(min(xs), max(xs), 5, LEFT, WIDTH - RIGHT, tight=True, min_step=float(whole))
    y_axis = _axis(0 if from_zero else min(ys), max(ys), 4, HEIGHT - BOTTOM, TOP, tight=False)
    spoken = "; ".join(
        f"{s.label} from {figure(s.points[0][1])} to {figure(s.points[-1][1])}"
        for s in finite
        if s.points
    )
    body = _grid(x_axis, y_axis, x_label) + "".join(_draw(s, x_axis, y_axis) for s in finite)
    axis = [x_axis.low, x_axis.high, x_axis.start, x_axis.end, WIDTH, TOP, HEIGHT - BOTTOM]
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" data-axis="{axis}" '
        f'aria-label="{escape(title)}: {escape(spoken)}">{body}</svg>'
    )


def _finite(series: Series) -> Series:
    kept = [number for number, point in enumerate(series.points) if math.isfinite(point[1])]
    found = [series.points[number] for number in kept]
    return Series(
        series.label,
        series.style,
        found,
        [series.extremes[number] for number in kept] if series.extremes else (),
    )


def line_figure(
    title: str, series: Sequence[Series], *, unit: str = "", from_zero: bool, x_label: str
) -> str:
    """Draw a line chart in its frame, with a legend where it has several lines."""
    keys = legend({s.label: s.style for s in series}) if len(series) > 1 else ""
    drawing = line_chart(title, series, from_zero=from_zero, x_label=x_label)
    unit = f'<span class="unit">{unit}</span>' if unit else ""
    return f'<figure class="card"><header><h3>{title}</h3>{unit}</header>{keys}{drawing}</figure>'


def bars_figure(
    title: str, rows: Sequence[tuple[str, Mapping[str, float]]], styles: Mapping[str, str]
) -> str:
    """Draw stacked bars in their frame, with a legend."""
    keys = legend(styles, mark='<rect class="bar {}" width="24" height="8" rx="2"/>')
    drawing = stacked_bars(title, rows, styles)
    return f'<figure class="card wide"><header><h3>{title}</h3></header>{keys}{drawing}</figure>'


def legend(styles: Mapping[str, str], mark: str = '<path class="line {}" d="M1 4H23"/>') -> str:
    """Return the labels, each after a mark in its style."""
    keys = "".join(
        f'<span><svg viewBox="0 0 24 8" aria-hidden="true">{mark.format(style)}</svg>'
        f"{escape(label)}</span>"
        for label, style in styles.items()
    )
    return f'<div class="legend">{keys}</div>'


def stacked_bars(
    title: str, rows: Sequence[tuple[str, Mapping[str, float]]], styles: Mapping[str, str]
) -> str:
    """Draw a bar a row, its parts side by side in the order of `styles` (part to CSS class)."""
    longest = max((sum(parts.values()) for _, parts in rows), default=0.0) or 1.0
    scale = (BARS_WIDTH - BARS_LEFT - BARS_RIGHT) / longest
    spoken = "; ".join(f"{name}: {figure(sum(parts.values()))}" for name, parts in rows)
    body = []
    for number, (name, parts) in enumerate(rows):
        y, x = number * ROW + 6, float(BARS_LEFT)
        middle = y + BAR / 2
        body.append(
            f'<text x="{BARS_LEFT - 10}" y="{middle}" dy=".35em" text-anchor="end">'
            f"{escape(name)}</text>"
        )
        for part, style in styles.items():
            value = parts.get(part, 0.0)
            if value > 0:
                body.append(
                    f'<rect class="bar {style}" x="{x:.1f}" y="{y}" width="{value * scale:.1f}" '
                    f'height="{BAR}"><title>{escape(f"{name}, {part}")}: {figure(value)}</title>'
                    "</rect>"
                )
                x += value * scale
        total = figure(sum(parts.values()))
        body.append(f'<text x="{x + 8:.1f}" y="{middle}" dy=".35em">{total}</text>')
    height = len(rows) * ROW + 6
    return (
        f'<svg viewBox="0 0 {BARS_WIDTH} {height}" role="img" aria-label="{escape(title)}: '
        f'{escape(spoken)}">{"".join(body)}</svg>'
    )


def _axis(
    low: float,
    high: float,
    count: int,
    start: float,
    end: float,
    *,
    tight: bool,
    min_step: float = 0.0,
) -> Axis:
    """Choose marks 1, 2 or 5 times a power of ten apart; `tight` ends the range at the data.

    Marks are at least `min_step` apart.
    """
    if high - low <= 1e-9 * abs(high):  # a flat line lies in the middle of a band round it
        spread = abs(high) / 2 or 1.0
        low, high = (low, high + spread) if low == 0 else (low - spread, high + spread)
    raw = max((high - low) / count, min_step)
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
    line, low, high = _bins(series)

    def path(points: Sequence[Point]) -> str:
        return "L".join(f"{x_axis.place(x):.1f} {y_axis.place(y):.1f}" for x, y in points)

    band = (
        f'<path class="band {series.style}" d="M{path([*low, *reversed(high)])}Z"/>' if low else ""
    )
    x, y = line[-1]
    dots = line if len(line) <= 12 else [(x, y)]
    values = json.dumps([(round(x, 2), float(f"{y:.5g}")) for x, y in line])
    drawn = (
        f'<path class="line {series.style}" d="M{path(line)}" '
        f'data-label="{escape(series.label)}" data-points="{values}"/>'
    )
    return f"{band}{drawn}" + "".join(
        f'<circle class="dot {series.style}" r="3" cx="{x_axis.place(x):.1f}" '
        f'cy="{y_axis.place(y):.1f}"><title>{escape(series.label)}: {figure(y)} at '
        f"{x:,.0f}</title></circle>"
        for x, y in dots
    )


def _bins(series: Series) -> tuple[Sequence[Point], list[Point], list[Point]]:
    """Return the line and, where it is made of bins or means, their least and largest values."""
    points = series.points
    if len(points) <= MAX_POINTS and not series.extremes:
        return points, [], []
    line, low, high = [], [], []
    bins = min(MAX_POINTS, len(points))
    for i in range(bins):
        part = slice(i * len(points) // bins, (i + 1) * len(points) // bins)
        xs, ys = zip(*points[part], strict=True)
        least, largest = zip(*series.extremes[part], strict=True) if series.extremes else (ys, ys)
        x = sum(xs) / len(xs)
        line.append((x, sum(ys) / len(ys)))
        low.append((x, min(least)))
        high.append((x, max(largest)))
    return line, low, high
