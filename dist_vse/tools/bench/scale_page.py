"""The page of `dist-vse bench scale`: one HTML file with its plots, which needs no other."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from dist_vse.common.step_timer import OTHER, PARTS
from dist_vse.tools.bench.scale_cases import BASE, INDEPENDENT, STRONG, WEAK
from dist_vse.tools.bench.scale_rows import label
from dist_vse.tools.bench.scale_tables import MEMORY, MIB
from dist_vse.tools.report.bars import legend, stacked_bars
from dist_vse.tools.report.chart import Point, Series, line_chart
from dist_vse.tools.report.page import document

Row = dict[str, Any]
_COLOURS = ("c6", "c1", "c4", "c5", "c3", "c2", "c7", "c8")
_STYLE = """<style>
.keys { display: flex; flex-wrap: wrap; gap: 2px 18px; font-size: .8125rem; color: var(--soft);
  margin: 2px 0 8px; }
.keys svg { display: inline-block; width: 12px; height: 12px; margin-right: 6px; }
.bar.c1 { fill: var(--s1); } .bar.c2 { fill: var(--s2); } .bar.c3 { fill: var(--c3); }
.bar.c4 { fill: var(--c4); } .bar.c5 { fill: var(--c5); } .bar.c6 { fill: var(--c6); }
.bar.c7 { fill: var(--soft); } .bar.c8 { fill: var(--line); }
.wide { margin-top: 16px; }
</style>"""


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
        _STYLE,
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
    path.write_text(document("Scaling", "\n".join(parts)), encoding="utf-8")


def _mib(memory: dict[str, int]) -> dict[str, float]:
    """Return what stands at the peak: of encoders and loss only the larger, as they take turns."""
    lesser = "loss" if memory["encoders"] >= memory["loss"] + memory["kept_graphs"] else "encoders"
    return {name: memory[name] / MIB for name in MEMORY if name != lesser}


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
    drawn = line_chart(title, series, from_zero=True, x_label="processes")
    keys = legend({s.label: s.style for s in series})
    return (
        f'<div class="charts"><figure class="card"><header><h3>{title}</h3></header>{keys}'
        f"{drawn}</figure></div>"
    )


def _bars(title: str, rows: Sequence[tuple[str, dict[str, float]]], names: Sequence[str]) -> str:
    spoken = {name: name.replace("_", " ") for name in names}
    styles = dict(zip(spoken.values(), _COLOURS, strict=False))
    renamed = [
        (row, {spoken[n]: v for n, v in parts.items() if n in spoken}) for row, parts in rows
    ]
    return (
        f'<figure class="card wide"><header><h3>{title}</h3></header>{legend(styles)}'
        f"{stacked_bars(title, renamed, styles)}</figure>"
    )
