"""What a larger batch would be worth, from the lines that `batch_report` wrote."""

import math
from collections.abc import Sequence

from dist_vse.tools.report.lines import Line
from dist_vse.tools.report.record import Record

MIN_LINES = 3  # fewer give no uncertainty


def batch_section(record: Record) -> str:
    """Say which share of a step's gain batches have; empty where a run has no batch report."""
    lines = record.metrics.newest
    if len(lines) < MIN_LINES:
        return ""
    total = record.config.global_batch_size
    rows = "".join(_row(lines, total, factor) for factor in (1, 4, 16))
    biases = "".join(
        f"<tr><td>{size:,}</td><td>{mean:.1%} ± {error:.1%}</td></tr>"
        for size, mean, error in _biases(lines)
    )
    few = (
        "<p>With fewer negatives the expected gradient points elsewhere, by this share of its "
        f"length from that of {total:,} pairs:</p>"
        f"<table><tr><th>pairs</th><th>bias</th></tr>{biases}</table>"
        if biases
        else ""
    )
    return (
        "<h2>The batch</h2><p>A step's gain, of what it would be with endlessly many pairs, by "
        f"the gradient's noise in the newest {len(lines)} log steps; ± is two standard errors.</p>"
        f"<table><tr><th>pairs</th><th>gain of a step</th><th>steps for the same</th>"
        f"<th>pairs seen for the same</th></tr>{rows}</table>{few}"
        '<p class="note">The noise is that of the last layers of both heads, and the gain is for '
        "small steps at the best rate. docs/explain/batch.md defines both estimates.</p>"
    )


def gain(lines: Sequence[Line], size: int) -> tuple[float, float] | None:
    """Return the gain of a batch of `size` and its standard error, by leaving lines out in turn.

    The noise and the signal are averaged before they are divided: each is unbiased, their ratio is
    not. None where the lines cannot distinguish the signal from zero.
    """
    noise, signal = ([float(line[name]) for line in lines] for name in ("noise", "signal"))

    def of(left_out: int | None) -> float | None:
        pairs = [pair for i, pair in enumerate(zip(noise, signal, strict=True)) if i != left_out]
        n, s = (sum(column) for column in zip(*pairs, strict=True))
        return size * s / (size * s + max(0.0, n)) if s > 0 else None

    whole, parts = of(None), [of(i) for i in range(len(lines))]
    known = [part for part in parts if part is not None]
    if whole is None or len(known) < len(parts):
        return None
    mean, count = sum(known) / len(known), len(known)
    spread = sum((part - mean) ** 2 for part in known) * (count - 1) / count
    return whole, math.sqrt(spread)


def _row(lines: Sequence[Line], total: int, factor: int) -> str:
    here, there = gain(lines, total), gain(lines, total * factor)
    if here is None or there is None:
        return f"<tr><td>{total * factor:,}</td><td>not known: too much noise</td><td/><td/></tr>"
    steps = here[0] / there[0]
    cells = (
        f"{total * factor:,}",
        f"{there[0]:.0%} ± {2 * there[1]:.0%}",
        f"{steps:.0%}",
        f"{steps * factor:.0%}",
    )
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _biases(lines: Sequence[Line]) -> list[tuple[int, float, float]]:
    """Return each smaller batch with its mean bias and two standard errors, over the lines."""
    names = sorted(
        {
            name
            for line in lines
            for name in line
            if name.startswith("bias_of_") and not name.endswith("_error")
        },
        key=lambda name: int(name.split("_")[2]),
    )
    found = []
    for name in names:
        values = [float(line[name]) for line in lines if name in line]
        mean, count = sum(values) / len(values), len(values)
        spread = math.sqrt(sum((v - mean) ** 2 for v in values) / max(1, count - 1) / count)
        found.append((int(name.split("_")[2]), mean, 2 * spread))
    return found
