"""The curve of rsum against batch, as SVG that follows light and dark colours."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.support.batch_runs import half_interval

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 840, 440, 64, 150, 58, 56
COLOURS = {  # light, dark: the Okabe-Ito palette, lightened for dark pages
    "convse": ("#0072b2", "#56b4e9"),
    "convse++": ("#d55e00", "#ff9248"),
    "info_nce": ("#009e73", "#3fcf9f"),
    "siglip": ("#a05195", "#d391c9"),
    "vse++": ("#8a6d00", "#e6c229"),
    "dcl": ("#57606a", "#b1bac4"),
}
SHIFT = 5  # pixels between losses at one batch, so that intervals do not hide each other


def draw(cells: Sequence[dict[str, Any]]) -> str:
    """Return the picture of the cells that have a value on test."""
    points: dict[str, list[tuple[int, float, float]]] = {}
    for cell in cells:
        values = cell["test"]
        if not values:  # a rate was searched, but no seed was evaluated on test
            continue
        half = half_interval(values) or 0.0
        points.setdefault(cell["loss"], []).append((cell["batch"], statistics.fmean(values), half))
    everything = [point for of_loss in points.values() for point in of_loss]
    batches = sorted({batch for batch, _, _ in everything})
    low = math.floor(min(mean - half for _, mean, half in everything) / 20) * 20
    high = math.ceil(max(mean + half for _, mean, half in everything) / 20) * 20

    def x_of(batch: int) -> float:
        span = math.log2(batches[-1] / batches[0]) or 1.0
        return LEFT + 20 + (WIDTH - LEFT - RIGHT - 40) * math.log2(batch / batches[0]) / span

    def y_of(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low)

    parts = [_axes(batches, low, high, x_of, y_of)]
    ends = []
    for number, (loss, of_loss) in enumerate(points.items()):
        shift = (number - (len(points) - 1) / 2) * SHIFT
        places = [(x_of(batch) + shift, y_of(mean), mean, half) for batch, mean, half in of_loss]
        style = _style(loss)
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y, _, _ in places)
        parts.append(f'<polyline class="line {style}" points="{line}"/>')
        for x, y, mean, half in places:
            top, bottom = y_of(mean + half), y_of(mean - half)
            parts.append(f'<path class="bar {style}" d="M{x:.1f} {top:.1f}V{bottom:.1f}"/>')
            parts.append(f'<circle class="dot {style}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>')
        ends.append((places[-1][1], loss))
    parts += _labels(ends)
    spoken = "; ".join(
        f"{loss}: " + ", ".join(f"{mean:.0f} at {batch}" for batch, mean, _ in of_loss)
        for loss, of_loss in points.items()
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">\n'
        f"<title>rsum on test against the batch. {spoken}</title>\n{_css()}\n"
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _style(loss: str) -> str:
    return "l-" + loss.replace("+", "p").replace("_", "-")


def _axes(batches: Sequence[int], low: int, high: int, x_of: Any, y_of: Any) -> str:
    parts = [
        f'<rect class="page" width="{WIDTH}" height="{HEIGHT}" rx="6"/>',
        f'<text class="head" x="{LEFT - 40}" y="28">The same number of pairs, each loss and batch '
        "at its best learning rate</text>",
        f'<text class="about" x="{LEFT - 40}" y="46">rsum on test; bars: 95 % interval over the '
        "seeds</text>",
    ]
    step = 20 if high - low <= 120 else 40
    for value in range(low, high + 1, step):
        y = y_of(value)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT + 10}"/>')
        parts.append(_text("tick", LEFT - 8, y + 4, str(value), "end"))
    for batch in batches:
        x = x_of(batch)
        parts.append(_text("tick", x, HEIGHT - BOTTOM + 22, f"{batch:,}", "middle"))
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(_text("about", middle, HEIGHT - 12, "global batch, pairs", "middle"))
    return "\n".join(parts)


def _text(style: str, x: float, y: float, text: str, anchor: str) -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'


def _labels(ends: Sequence[tuple[float, str]]) -> list[str]:
    """Return the losses' names at the right, moved apart where they would overlap."""
    placed: list[tuple[float, str]] = []
    for y, loss in sorted(ends):
        placed.append((max(y, placed[-1][0] + 17 if placed else y), loss))
    over = max(0.0, placed[-1][0] - (HEIGHT - BOTTOM))
    x = WIDTH - RIGHT + 22
    return [
        f'<text class="name {_style(loss)}" x="{x}" y="{y - over + 4:.1f}">{loss}</text>'
        for y, loss in placed
    ]


def _css() -> str:
    light = "\n".join(
        f"  .{_style(loss)} {{ stroke: {colour}; fill: {colour} }}"
        for loss, (colour, _) in COLOURS.items()
    )
    dark = "\n".join(
        f"    .{_style(loss)} {{ stroke: {colour}; fill: {colour} }}"
        for loss, (_, colour) in COLOURS.items()
    )
    return f"""<style>
  text {{ font-family: system-ui, "Segoe UI", "DejaVu Sans", sans-serif }}
  text {{ font-size: 13px; fill: #1c2733 }}
  .page {{ fill: #f8fafc }}
  .head {{ font-size: 15px; font-weight: 600 }}
  .about {{ fill: #57677a }}
  .grid {{ stroke: #d5dce4; stroke-width: 1 }}
{light}
  .line {{ fill: none; stroke-width: 2 }}
  .bar {{ stroke-width: 1.5; opacity: .6 }}
  .name {{ stroke: none; font-weight: 600 }}
  .dot {{ stroke: none }}
  @media (prefers-color-scheme: dark) {{
    text {{ fill: #dbe4ee }}
    .page {{ fill: #0f1620 }}
    .about {{ fill: #9fb0c3 }}
    .grid {{ stroke: #2a3644 }}
{dark}
    .line {{ fill: none }}
    .name, .dot {{ stroke: none }}
  }}
</style>"""
