"""Stacked bars as inline SVG; colours and fonts come from the page's style sheet."""

from collections.abc import Mapping, Sequence
from html import escape

from dist_vse.tools.report.numbers import figure

WIDTH, ROW, BAR, LEFT, RIGHT = 960, 30, 18, 250, 74  # of the drawing, in its own units


def stacked_bars(
    title: str, rows: Sequence[tuple[str, Mapping[str, float]]], styles: Mapping[str, str]
) -> str:
    """Draw a bar a row, its parts side by side in the order of `styles` (part to CSS class)."""
    most = max((sum(parts.values()) for _, parts in rows), default=0.0) or 1.0
    scale = (WIDTH - LEFT - RIGHT) / most
    spoken = "; ".join(f"{name}: {figure(sum(parts.values()))}" for name, parts in rows)
    body = []
    for number, (name, parts) in enumerate(rows):
        y, x = number * ROW + 6, float(LEFT)
        middle = y + BAR / 2
        body.append(
            f'<text x="{LEFT - 10}" y="{middle}" dy=".35em" text-anchor="end">{escape(name)}</text>'
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
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}: '
        f'{escape(spoken)}">{"".join(body)}</svg>'
    )


def legend(styles: Mapping[str, str]) -> str:
    """Return the names of the parts, each beside its colour."""
    items = "".join(
        f'<span><svg viewBox="0 0 12 12" aria-hidden="true"><rect class="bar {style}" width="12" '
        f'height="12" rx="2"/></svg>{escape(part)}</span>'
        for part, style in styles.items()
    )
    return f'<div class="keys">{items}</div>'
