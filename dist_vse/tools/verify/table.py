"""Comparison of a gradient with the exact one, and the table of comparisons."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

SCALE_CLEAR = 0.999  # above this cosine only the length of a gradient is off, not its direction


@dataclass(frozen=True)
class Row:
    """What was found for one thing that must be exact."""

    section: str
    name: str
    factor: float
    """Projection on the exact one, <g, g*> / <g*, g*>: 1 if exact, 1/W for the classic error."""
    cosine: float
    error: float
    """|g - g*| / |g*|."""
    tolerance: float

    @property
    def exact(self) -> bool:
        """Return whether the error is within its tolerance; NaN never is."""
        return self.error <= self.tolerance


def compare(section: str, name: str, found: Tensor, exact: Tensor, tolerance: float) -> Row:
    """Compare two tensors of one shape, of which the exact one isn't zero."""
    found, exact = (x.detach().double().cpu().reshape(-1) for x in (found, exact))
    square = exact @ exact
    assert square > 0, f"{name}: nothing to compare with"
    cosine = found @ exact / (found.norm() * square.sqrt()).clamp(min=1e-300)
    error = (found - exact).norm() / square.sqrt()
    return Row(section, name, float(found @ exact / square), float(cosine), float(error), tolerance)


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Return |found - exact| / |exact|."""
    return compare("", "", found, exact, 0.0).error


def render(title: str, rows: Sequence[Row]) -> str:
    """Return the table as plain lines, one section of rows below the other."""
    width = max(len(row.name) for row in rows)
    heading = f"{'':{width}}  {'factor':>9}  {'cosine':>9}  {'error':>5}  {'at most':>7}"
    lines = [title]
    for number, row in enumerate(rows):
        if number == 0 or row.section != rows[number - 1].section:
            lines += ["", row.section, heading]
        lines.append(
            f"{row.name:{width}}  {row.factor:9.6f}  {row.cosine:9.6f}  {row.error:5.0e}"
            f"  {row.tolerance:7.0e}  {'ok' if row.exact else 'OFF'}"
        )
    return "\n".join(lines)


def verdict(rows: Sequence[Row], world_size: int) -> str:
    """Say in words which rows are off, and what their factors mean."""
    wrong = [row for row in rows if not row.exact]
    if not wrong:
        return f"exact: all {len(rows)} within their tolerance"
    return "\n".join(
        f"off: {row.section}, {row.name}: {_explain(row, world_size)}" for row in wrong
    )


def _explain(row: Row, world_size: int) -> str:
    if not math.isfinite(row.error):
        return "not a finite number"
    if row.cosine < SCALE_CLEAR:
        return f"another direction (cosine {row.cosine:.4f}, error {row.error:.0e})"
    text = f"{row.factor:.4g} times what one process has (error {row.error:.0e})"
    for factor, name, reason in (
        (1 / world_size, "1/W", "a mean stands where a sum belongs"),
        (world_size, "W", "a sum stands where a mean belongs"),
    ):
        if world_size > 1 and abs(row.factor / factor - 1) < 1e-2:
            return f"{text}: {name}, {reason}"
    return text
