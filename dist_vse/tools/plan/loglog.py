"""A line chart on two logarithmic axes, as a self-contained SVG for light and dark pages."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from dist_vse.tools.report.numbers import figure, short

WIDTH, HEIGHT = 640, 360
LEFT, RIGHT, TOP, BOTTOM = 58, 130, 34, 44  # margins; labels of the lines stand to the right
SPAN = 5.5  # powers of ten that are shown at most below the largest value
LABEL_HEIGHT = 15
MARKS = 6  # across, about
_LIGHT = ("#1c2024", "#2458b8", "#14794a", "#b3530e", "#8a3ab0", "#a8326a", "#6b6a1d")
_DARK = ("#e9eaec", "#86aff5", "#6fce9b", "#f0a264", "#cf9bf0", "#f290bb", "#d3d06a")
_STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#5a626b}.title{font-weight:600;fill:#1c2024}"
    ".grid{stroke:#e3e1dc}.back{fill:#ffffff}path{fill:none;stroke-width:2}{light}"
    "@media (prefers-color-scheme:dark){text{fill:#a3abb4}.title{fill:#e9eaec}"
    ".grid{stroke:#30363c}.back{fill:#1c2024}{dark}}"
)


@dataclass(frozen=True)
class Curve:
    """A line; points that are not above 0 are left out."""

    label: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class _Frame:
    """What of the plane is shown: powers of two across, of ten upwards."""

    left: float
    right: float
    bottom: float
    top: float

    @staticmethod
    def around(curves: Sequence[Curve]) -> "_Frame":
        xs = [math.log2(x) for curve in curves for x, _ in curve.points]
        ys = [math.log10(y) for curve in curves for _, y in curve.points]
        if max(ys) - min(ys) < 1:  # between marks 1, 2 and 5
            return _Frame(min(xs), max(xs), _mark_below(min(ys)), _mark_above(max(ys)))
        top = math.ceil(max(ys) - 1e-9)
        return _Frame(min(xs), max(xs), max(math.floor(min(ys) + 1e-9), top - SPAN), top)

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Return where a point lies on the drawing."""
        across = (math.log2(x) - self.left) / ((self.right - self.left) or 1)
        up = (math.log10(y) - self.bottom) / ((self.top - self.bottom) or 1)
        return (
            LEFT + across * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - up * (HEIGHT - BOTTOM - TOP),
        )

    def shows(self, y: float) -> bool:
        """Tell whether a value is not below the drawing."""
        return math.log10(y) >= self.bottom - 1e-9

    def marks(self) -> list[float]:
        """Return the values that get a line across."""
        low, high = math.floor(self.bottom), math.ceil(self.top)
        steps = (1, 2, 5) if self.top - self.bottom < 2 else (1,)
        every = [step * 10.0**power for power in range(low, high + 1) for step in steps]
        return [y for y in every if self.bottom - 1e-9 <= math.log10(y) <= self.top + 1e-9]


def draw(title: str, x_label: str, curves: Sequence[Curve]) -> str:
    """Return the chart; the label of a line stands at its end, in its colour."""
    drawn = _above(curves, lambda y: y > 0)
    frame = _Frame.around(drawn)
    drawn = _above(drawn, frame.shows)
    spoken = "; ".join(f"{c.label} ends at {figure(c.points[-1][1])}" for c in drawn)
    style = _STYLE.replace("{light}", _colours(_LIGHT)).replace("{dark}", _colours(_DARK))
    body = _axes(frame, title, x_label, drawn) + _lines(frame, drawn)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)}, by {escape(x_label)}: {escape(spoken)}">'
        f"<style>{style}</style>{body}</svg>\n"
    )


def _above(curves: Sequence[Curve], shown: Callable[[float], bool]) -> list[Curve]:
    """Leave out points that are not shown, and lines without any."""
    left = [Curve(c.label, [p for p in c.points if shown(p[1])]) for c in curves]
    return [curve for curve in left if curve.points]


def _axes(frame: _Frame, title: str, x_label: str, curves: Sequence[Curve]) -> str:
    parts = [
        f'<rect class="back" width="{WIDTH}" height="{HEIGHT}" rx="8"/>',
        f'<text class="title" x="{LEFT}" y="20">{escape(title)}</text>',
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">'
        f"{escape(x_label)}</text>",
    ]
    for value in frame.marks():
        y = frame.place(1, value)[1]
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(
            f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{short(value)}</text>'
        )
    xs = sorted({x for curve in curves for x, _ in curve.points})
    for x in xs[:: -(-len(xs) // MARKS)]:
        across = frame.place(x, 1)[0]
        parts.append(
            f'<text x="{across:.1f}" y="{HEIGHT - 24}" text-anchor="middle">{_binary(x)}</text>'
        )
    return "".join(parts)


def _lines(frame: _Frame, curves: Sequence[Curve]) -> str:
    parts = []
    labels = _spread([frame.place(*curve.points[-1])[1] for curve in curves])
    for i, (curve, label) in enumerate(zip(curves, labels, strict=True)):
        spots = (frame.place(x, y) for x, y in curve.points)
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in spots)
        x, y = curve.points[-1]
        parts.append(
            f'<path class="c{i}" d="M{path}"><title>{escape(curve.label)}: {figure(y)} at '
            f'{x:,.0f}</title></path><text class="t{i}" x="{frame.place(x, y)[0] + 8:.1f}" '
            f'y="{label + 4:.1f}">{escape(curve.label)}</text>'
        )
    return "".join(parts)


def _colours(colours: Sequence[str]) -> str:
    return "".join(f".c{i}{{stroke:{c}}}.t{i}{{fill:{c}}}" for i, c in enumerate(colours))


def _mark_below(exponent: float) -> float:
    """Return the logarithm of the nearest 1, 2 or 5 times a power of ten that is not above."""
    return max(mark for mark in _near(exponent) if mark <= exponent + 1e-9)


def _mark_above(exponent: float) -> float:
    return min(mark for mark in _near(exponent) if mark >= exponent - 1e-9)


def _near(exponent: float) -> list[float]:
    return [math.floor(exponent) + math.log10(size) for size in (1, 2, 5, 10)]


def _binary(value: float) -> str:
    """Write a power of two as people say it: 512, 4k, 1M."""
    for size, letter in ((2**20, "M"), (2**10, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def _spread(places: Sequence[float]) -> list[float]:
    """Move labels apart that would lie on each other."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    moved = list(places)
    for before, after in pairwise(order):
        moved[after] = max(moved[after], moved[before] + LABEL_HEIGHT)
    return moved
