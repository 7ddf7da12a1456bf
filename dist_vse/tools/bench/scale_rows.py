"""The rows of `dist-vse bench scale`: joined, and compared with each other and a baseline's."""

from collections.abc import Sequence
from typing import Any

from dist_vse.common.errors import UserError
from dist_vse.tools.bench.scale_cases import BASE, INDEPENDENT, STRONG, WEAK

Row = dict[str, Any]
_IDENTITY = (
    "world_size",
    "nodes",
    "runs",
    "global_batch",
    "chunk_size",
    "keep_graphs",
    "zero_stage",
    "coalesce",
    "precision",
    "loss",
    "transport",
    "workload",
    "varied",
)


def identity(row: Row) -> tuple[Any, ...]:
    """Return what a row has in common only with other measurements of the same case."""
    return tuple(row.get(key) for key in _IDENTITY)


def together(rows: Sequence[Row]) -> Row:
    """Join runs at the same time: their rates add up."""
    return {**rows[0], "pairs_per_s": sum(row["pairs_per_s"] for row in rows)}


def join(groups: Sequence[Sequence[Row]]) -> list[Row]:
    """Return the rows of several measurements as those of one.

    The base with the fewest processes is the base of all; what was a base on more of them becomes
    a strong or a weak row. What was measured twice is taken once.
    """
    rows = {identity(row): dict(row) for group in reversed(groups) for row in reversed(group)}
    ordered = [rows.pop(identity(r)) for group in groups for r in group if identity(r) in rows]
    bases = [row for row in ordered if row["series"] == BASE]
    if not bases:
        raise UserError("no row has the series base: read a whole file of `bench scale --out`")
    first = min(bases, key=_processes)
    for row in bases:
        if row is not first and row["global_batch"] == first["global_batch"]:
            row["series"] = STRONG
        elif row is not first:
            row["series"] = WEAK
    return [first, *(row for row in ordered if row is not first)]


def compare(rows: Sequence[Row]) -> None:
    """Note in every row how well it uses its processes.

    efficiency: pairs a second and process over those of the series' first row: the base, or for a
    setting that is varied the base's row on as many processes. of_independent: a weak row's pairs
    a second over those of as many independent runs at once.
    """
    first = next(row for row in rows if row["series"] == BASE)
    plain = {row["world_size"]: row for row in rows if row["series"] in (STRONG, BASE)}
    alone = {row["runs"]: row for row in rows if row["series"] == INDEPENDENT}
    for row in rows:
        varied = row["series"] not in (BASE, STRONG, WEAK, INDEPENDENT)
        reference = plain.get(row["world_size"], first) if varied else first
        row["efficiency"] = _rate(row) / _rate(reference)
        if row["series"] == WEAK and row["world_size"] in alone:
            single = alone[row["world_size"]]
            row["of_independent"] = row["pairs_per_s"] / single["pairs_per_s"]


def compare_with_baseline(rows: Sequence[Row], baseline: Sequence[Row]) -> None:
    """Note in every row that the baseline has as well what it is times the baseline's.

    Raises UserError if they have no row in common.
    """
    old = {identity(row): row for row in baseline}
    found = [(row, old[identity(row)]) for row in rows if identity(row) in old]
    if not found:
        raise UserError("the baseline has no row of these settings and numbers of processes")
    for row, before in found:
        row["of_baseline"] = {
            "pairs_per_s": row["pairs_per_s"] / before["pairs_per_s"],
            "peak_bytes": row["memory_bytes"]["peak"] / before["memory_bytes"]["peak"],
            "seconds": {
                part: taken / before["seconds"][part]
                for part, taken in row["seconds"].items()
                if before["seconds"].get(part)
            },
        }


def label(row: Row) -> str:
    """Say in a few words what a row is."""
    size, batch = row["world_size"], f"{row['global_batch']:,}"
    where = f"{size} processes" if size > 1 else "1 process"
    if row["nodes"] > 1:
        where += f" on {row['nodes']} nodes"
    series = row["series"]
    if series == INDEPENDENT:
        return f"{row['runs']} x 1 process at once, {batch} each"
    if series in (BASE, STRONG, WEAK):
        return f"{series}: {where}, {batch}"
    return f"{row['varied']}: {where}"


def _processes(row: Row) -> int:
    return int(row["world_size"] * row["runs"])


def _rate(row: Row) -> float:
    return float(row["pairs_per_s"] / _processes(row))
