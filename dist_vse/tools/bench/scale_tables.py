"""The tables of `dist-vse bench scale`: speed, seconds by part, memory and bytes sent."""

from collections.abc import Sequence
from typing import Any

from dist_vse.common.step_timer import OTHER, PARTS
from dist_vse.tools.bench.scale_rows import label
from dist_vse.tools.bench.table import Table

Row = dict[str, Any]
MIB = 2**20
MEMORY = ("state", "inputs", "features", "encoders", "loss")
"""The first three are held all the time; the larger of the next two on top of them is the peak."""


def tables(rows: Sequence[Row]) -> list[Table]:
    """Return the tables of all rows."""
    return [_speed(rows), _seconds(rows), _memory(rows)]


def _speed(rows: Sequence[Row]) -> Table:
    baseline = any("of_baseline" in row for row in rows)
    mfu = any(row.get("mfu") for row in rows)
    headings = ["s a step", "pairs/s", "efficiency", "of independent runs"]
    headings += ["MFU"] * mfu + ["x baseline", "memory x baseline"] * baseline
    table = _table("speed", rows, *headings)
    for row in rows:
        cells = [f"{row['step_seconds']:.3f}", f"{row['pairs_per_s']:,.0f}"]
        cells += [_share(row["efficiency"]), _share(row.get("of_independent"))]
        if mfu:
            cells.append(_share(row.get("mfu")))
        if baseline:
            ratios = row.get("of_baseline", {})
            cells += [_times(ratios.get(name)) for name in ("pairs_per_s", "peak_bytes")]
        table.add_row(label(row), *cells)
    return table


def _seconds(rows: Sequence[Row]) -> Table:
    names = [name.replace("_", " ") for name in (*PARTS, OTHER)]
    table = _table("seconds of a step", rows, *names, "sum / step")
    for row in rows:
        taken = [row["seconds"][part] for part in (*PARTS, OTHER)]
        cells = [f"{seconds:.3f}" for seconds in taken]
        table.add_row(label(row), *cells, f"{sum(taken) / row['step_seconds']:.3f}")
    return table


def _memory(rows: Sequence[Row]) -> Table:
    titles = ("peak", *MEMORY, "gather sent", "reduce sent")
    table = _table("MiB of a process", rows, *titles)
    for row in rows:
        numbers = [row["memory_bytes"][name] for name in ("peak", *MEMORY)]
        numbers += [row["sent_bytes"].get(name, 0) for name in ("gather", "reduce")]
        table.add_row(label(row), *(f"{number / MIB:.1f}" for number in numbers))
    return table


def _table(title: str, rows: Sequence[Row], *headings: str) -> Table:
    base = rows[0]
    settings = f"chunks of {base['chunk_size']}, {base['loss']}, ZeRO {base['zero_stage']}"
    return Table(f"{title} ({settings})", ("row", *headings))


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
