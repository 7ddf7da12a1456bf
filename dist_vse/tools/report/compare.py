"""Several runs side by side: what differs between their settings, their results, their curves."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from dist_vse.common.errors import UserError
from dist_vse.config import flat_config
from dist_vse.config.evaluation import VAL_LOSS
from dist_vse.tools.report.chart import Series, legend, line_figure
from dist_vse.tools.report.lines import extremes, points
from dist_vse.tools.report.page import document, write_page
from dist_vse.tools.report.record import Record, Result, read_record
from dist_vse.tools.report.results import RESULT_ROWS, cell, table_title
from dist_vse.tools.report.sets import measured_sets

COLOURS = 6
"""Runs that the page has colours for."""
_Group = tuple[str | None, Sequence[tuple[str, Sequence[str]]]]  # its title and its rows
_NOT_COMPARED = {"output_dir"}


def write_comparison(run_dirs: Sequence[Path], out: Path) -> Path:
    """Write one page about several runs by one rename; return its path.

    Raises UserError for more runs than there are colours, as `read_record` does, and where `out`
    cannot be written.
    """
    if len(run_dirs) > COLOURS:
        raise UserError(f"{len(run_dirs)} runs are too many for one page; give at most {COLOURS}")
    records = [read_record(run_dir) for run_dir in run_dirs]
    names = _names(run_dirs)
    parts = [_header(names), _settings(records, names), _results(records, names)]
    parts += [_sets(records, names), _charts(records, names)]
    return write_page(document("Runs side by side", "\n".join(parts)), out)


def _names(run_dirs: Sequence[Path]) -> list[str]:
    """Name the runs by their folders, by whole paths where two folders have one name."""
    short = [run_dir.resolve().name for run_dir in run_dirs]
    return short if len({*short}) == len(short) else [str(run_dir) for run_dir in run_dirs]


def _header(names: Sequence[str]) -> str:
    styles = {name: f"c{number}" for number, name in enumerate(names, 1)}
    return f"<h1>Runs side by side</h1>{legend(styles)}"


def _settings(records: Sequence[Record], names: Sequence[str]) -> str:
    flat = [flat_config(record.config) for record in records]
    rows: list[tuple[str, list[str]]] = []
    for key in flat[0]:
        values = [str(config.get(key)) for config in flat]
        if key not in _NOT_COMPARED and any(value != values[0] for value in values):
            rows.append((key, values))
    made = [record.environment["versions"] if record.environment else {} for record in records]
    for package in sorted({name for versions in made for name in versions}):
        values = [versions.get(package, "unknown") for versions in made]
        if len({*values}) > 1:
            rows.append((f"version of {package}", values))
    found = [
        ", ".join(sorted(record.environment["data"].values())) if record.environment else "unknown"
        for record in records
    ]
    if len({*found}) > 1:
        rows.append(("data fingerprint", found))
    note = "All settings are equal." if not rows else "Only what differs is shown."
    return f'<h2>What differs</h2><p class="note">{note}</p>' + (
        _table(names, [(None, rows)]) if rows else ""
    )


def _results(records: Sequence[Record], names: Sequence[str]) -> str:
    """Show the newest result of each run, a table a split, protocol and data set."""
    kinds: dict[tuple[str, str, str], list[Result | None]] = {}
    for number, record in enumerate(records):
        for result in record.results:  # of a kind, the newest first
            kind = (result.split, result.protocol, result.data)
            found = kinds.setdefault(kind, [None] * len(records))
            found[number] = found[number] or result
    several = len({data for _, _, data in kinds}) > 1
    note = (
        '<p class="note">These were measured on several data sets; a table holds those of one.</p>'
    )
    tables = [_result_table(found, names, several) for found in kinds.values()]
    return f"<h2>Retrieval</h2>{note if several else ''}{''.join(tables)}"


def _sets(records: Sequence[Record], names: Sequence[str]) -> str:
    """Show what each run measured in training besides its split, at its last evaluation."""
    measured = [{one.title: one for one in measured_sets(record)} for record in records]
    tables = []
    for title in dict.fromkeys(title for of_run in measured for title in of_run):
        of_runs = [of_run.get(title) for of_run in measured]
        shown = next(one for one in of_runs if one is not None).groups
        columns = [one.columns.get("trained", {}) if one else {} for one in of_runs]
        groups: list[_Group] = [
            (group, [(label, [cell(f, c.get(f)) for c in columns]) for f, label in fields.items()])
            for group, fields in shown.items()
        ]
        tables.append(_table(names, groups, escape(f"{title}, last evaluation")))
    return f"<h2>Further sets</h2>{''.join(tables)}" if tables else ""


def _result_table(found: Sequence[Result | None], names: Sequence[str], several: bool) -> str:
    """Show a result of one kind for each run; `several` data sets are named in the title."""
    one = next(result for result in found if result is not None)
    data = [f"data {one.data[:8] or 'not recorded'}"] if several else []
    groups: list[_Group] = [(None, [("checkpoint", [r.checkpoint if r else "" for r in found])])]
    for group, fields in RESULT_ROWS.items():
        rows = [(label, [_trained(r, field) for r in found]) for field, label in fields.items()]
        groups.append((group, rows))
    return _table(names, groups, table_title(one, "trained", *data))


def _trained(result: Result | None, field: str) -> str:
    if result is None or "trained" not in result.columns:
        return ""
    return cell(field, result.columns["trained"].get(field), result.intervals.get(field))


def _table(
    names: Sequence[str],
    groups: Sequence[_Group],
    caption: str = "",
) -> str:
    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    rows = []
    for group, lines in groups:
        if group is not None:
            rows.append(f'<tr class="group"><th colspan="{len(names) + 1}">{group}</th></tr>')
        for label, values in lines:
            cells = "".join(f"<td>{escape(value)}</td>" for value in values)
            rows.append(f'<tr><th scope="row">{escape(label)}</th>{cells}</tr>')
    title = f"<caption>{caption}</caption>" if caption else ""
    return (
        f'<div class="card scroll"><table>{title}<thead><tr><td></td>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _charts(records: Sequence[Record], names: Sequence[str]) -> str:
    drawn = []
    lines = {
        "train": [record.metrics.train.by_step() for record in records],
        "eval": [record.metrics.evals.by_step() for record in records],
    }
    for title, unit, kind, field, from_zero in (
        ("rsum", "sum of six recalls", "eval", "rsum", True),
        ("Loss", "of the training batch", "train", "loss", False),
        ("Validation loss", "of the evaluated split", "eval", VAL_LOSS, False),
        ("Throughput", "pairs a second", "train", "pairs_per_s", True),
        ("Memory", "peak of a rank, GiB", "train", "memory_gib", True),
    ):
        series = [
            Series(name, f"c{number}", found, extremes(own, field))
            for number, (name, own) in enumerate(zip(names, lines[kind], strict=True), 1)
            if (found := points(own, "samples_seen", field))
        ]
        if series:
            drawn.append(
                line_figure(title, series, unit=unit, from_zero=from_zero, x_label="pairs")
            )
    return f'<h2>Training</h2><div class="charts">{"".join(drawn)}</div>'
