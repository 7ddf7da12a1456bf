"""The page of `dist-vse bench scale`: one HTML file with its plots, which needs no other."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from dist_vse.common.files import atomic_output
from dist_vse.common.step_timer import OTHER, PARTS
from dist_vse.tools.bench.scale_cases import BASE, INDEPENDENT, STRONG, WEAK
from dist_vse.tools.bench.scale_rows import label
from dist_vse.tools.bench.scale_tables import MEMORY, MIB
from dist_vse.tools.report.chart import Point, Series, bars_figure, line_figure
from dist_vse.tools.report.page import document

Row = dict[str, Any]
_COLOURS = ("c6", "c1", "c4", "c5", "c3", "c2", "c7", "c8")


def write_page(report: dict[str, Any], path: Path) -> None:
    """Write the page of a report to `path`."""
    rows = report["rows"]
    versions, machine = report["versions"], report["machine"]
    about = (
        f"{machine['host']}, {machine['cores']} cores, {machine['device']}; torch "
        f"{versions['torch']}, deepspeed {versions['deepspeed']}; commit {report['commit']}, "
        f"{report['date']}. Settings: {' '.join(report['settings']) or 'the small model'}."
    )
    parts = [
        f'<h1>Scaling</h1><p class="lead">{escape(about)}</p>',
        _speed(rows),
        _bars(
            "Seconds of a step",
            [(label(row), row["seconds"]) for row in rows],
            (*PARTS, OTHER),
        ),
        _bars(
            "MiB of a process, by what they are for",
            [(label(row), _mib(row["memory_bytes"])) for row in rows],
            MEMORY,
        ),
    ]
    with atomic_output(path) as temporary:
        temporary.write_text(document("Scaling", "\n".join(parts)), encoding="utf-8")


def _mib(memory: dict[str, int]) -> dict[str, float]:
    """Return what is held at the peak: of encoders and loss only the larger, as one ends first."""
    smaller = "loss" if memory["encoders"] >= memory["loss"] + memory["kept_graphs"] else "encoders"
    return {name: memory[name] / MIB for name in MEMORY if name != smaller}


def _speed(rows: Sequence[Row]) -> str:
    """Draw pairs a second over the processes, if there are several numbers of them."""
    points: dict[str, list[Point]] = {STRONG: [], WEAK: [], INDEPENDENT: []}
    base = next(row for row in rows if row["series"] == BASE)
    for row in rows:
        size = float(row["world_size"] * row["runs"])
        for series in points if row is base else {row["series"]} & points.keys():
            points[series].append((size, row["pairs_per_s"]))
    styles = {STRONG: "c1", WEAK: "c2", INDEPENDENT: "c3"}
    series = [
        Series(name, styles[name], sorted(found))
        for name, found in points.items()
        if len(found) > 1
    ]
    if not series:
        return ""
    title = "Pairs a second over processes"
    drawn = line_figure(title, series, from_zero=True, x_label="processes")
    return f'<div class="charts">{drawn}</div>'


def _bars(title: str, rows: Sequence[tuple[str, dict[str, float]]], names: Sequence[str]) -> str:
    spoken = {name: name.replace("_", " ") for name in names}
    styles = dict(zip(spoken.values(), _COLOURS, strict=False))
    renamed = [
        (row, {spoken[n]: v for n, v in parts.items() if n in spoken}) for row, parts in rows
    ]
    return bars_figure(title, renamed, styles)
