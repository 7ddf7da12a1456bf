"""The tables of retrieval: which metrics they show, and how."""

from collections.abc import Mapping, Sequence
from html import escape

from dist_vse.config.evaluation import VAL_LOSS
from dist_vse.tools.report.record import Record, Result

Groups = Mapping[str | None, Mapping[str, str]]
"""The rows of a table, in groups with a title or without: fields and their labels."""
RESULT_ROWS: Groups = {
    "Image to text": {
        "i2t_r1": "R@1, %",
        "i2t_r5": "R@5, %",
        "i2t_r10": "R@10, %",
        "i2t_map": "mAP@R, %",
        "i2t_medr": "median rank",
        "i2t_meanr": "mean rank",
    },
    "Text to image": {
        "t2i_r1": "R@1, %",
        "t2i_r5": "R@5, %",
        "t2i_r10": "R@10, %",
        "t2i_map": "mAP@R, %",
        "t2i_medr": "median rank",
        "t2i_meanr": "mean rank",
    },
    "Both": {"rsum": "sum of the six recalls (rsum)"},
}


def result_tables(record: Record) -> str:
    """Show the model before training, the trained one and chance side by side, split by split."""
    return (
        "<h2>Retrieval</h2>"
        '<p class="note">A query counts for R@K if a right answer is among its first K; the rank '
        "of an image is that of its best-placed caption. Equal scores count as the mean over "
        "their orders. mAP@R counts how many of a query's R right answers are among its first R, "
        "the higher ones more. Chance is exact: what random ranks would give. In brackets: 95 % "
        "bootstrap intervals, where <code>dist-vse eval --bootstrap</code> drew them.</p>"
        + "".join(_result_table(record, result) for result in record.results)
    )


def table_title(result: Result, *details: str) -> str:
    """Name what was measured: the split, the protocol unless it is plain, and the details."""
    protocol = [result.protocol] if result.protocol != "plain" else []
    return escape(", ".join([f"Split “{result.split}”", *protocol, *details]))


def _result_table(record: Record, result: Result) -> str:
    other = [f"data {result.data[:8]}"] if record.on_other_data(result) else []
    title = table_title(result, result.checkpoint, *other)
    columns = {record.column_name(name): values for name, values in result.columns.items()}
    return column_table(title, columns, RESULT_ROWS, result.intervals)


def column_table(
    title: str,
    columns: Mapping[str, Mapping[str, float]],
    groups: Groups,
    intervals: Mapping[str, Sequence[float]] | None = None,
) -> str:
    """Show columns side by side; `intervals` are of the fields of the column `trained`."""
    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in columns)
    rows = []
    for group, fields in groups.items():
        if group is not None:
            rows.append(f'<tr class="group"><th colspan="{len(columns) + 1}">{group}</th></tr>')
        for field, label in fields.items():
            cells = "".join(
                f'<td class="{name}">{cell(field, values.get(field), band)}</td>'
                for name, values in columns.items()
                for band in [(intervals or {}).get(field) if name == "trained" else None]
            )
            rows.append(f'<tr><th scope="row">{label}</th>{cells}</tr>')
    return (
        f'<div class="card scroll"><table><caption>{title}</caption>'
        f"<thead><tr><td></td>{heads}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def cell(field: str, value: float | None, band: Sequence[float] | None = None) -> str:
    """Write a metric as people read it, with its interval; nothing where a run lacks it."""
    if value is None:
        return ""
    if band is not None:
        return f"{cell(field, value)} [{cell(field, band[0])}, {cell(field, band[1])}]"
    if field == VAL_LOSS:
        return f"{value:,.3f}"
    if field.endswith("_medr"):
        return f"{value:,.0f}"
    return f"{value:,.1f}" if value >= 1 or value == 0 else f"{value:.2g}"
