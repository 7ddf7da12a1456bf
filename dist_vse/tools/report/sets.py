"""What training measured besides its own split: the further sets, and the validation loss."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from dist_vse.config.evaluation import VAL_LOSS, EvalSetConfig
from dist_vse.tools.report.chart import Series, line_figure
from dist_vse.tools.report.lines import Line, extremes, points
from dist_vse.tools.report.record import Record, watched_columns
from dist_vse.tools.report.results import RESULT_ROWS, Groups, column_table

RECALL_CURVES = {
    "image to text R@1": "i2t_r1",
    "text to image R@1": "t2i_r1",
    "image to text R@10": "i2t_r10",
    "text to image R@10": "t2i_r10",
}
_ACCURACY = {"top1": "top 1, %", "top5": "top 5, %", "mean_per_class": "mean per class, %"}
_ACCURACY_CURVES = {label.removesuffix(", %"): field for field, label in _ACCURACY.items()}


@dataclass(frozen=True)
class Measured:
    """One thing that training measured, and how a page shows it."""

    title: str
    groups: Groups
    columns: dict[str, dict[str, float]]  # as a `Result` has them


def measured_sets(record: Record) -> list[Measured]:
    """Return what was measured, the sets in their order in the config and the loss last."""
    found = []
    for item in record.config.eval_sets:
        columns = watched_columns(record.metrics.evals, f"{item.name}/")
        if item.split:
            protocol = [item.protocol] if item.protocol != "plain" else []
            title = ", ".join([f"“{item.name}”: split “{item.split}”", *protocol])
            found.append(Measured(title, RESULT_ROWS, columns))
            continue
        last = columns.get("trained") or columns.get("untrained", {})
        rows = {field: label for field, label in _ACCURACY.items() if field in last}
        if "chance" in last:
            of_first = last["chance"]  # that a class stands first
            columns["chance"] = {f: (5 if f == "top5" else 1) * of_first for f in rows}
        found.append(Measured(f"“{item.name}”: zero-shot classification", {None: rows}, columns))
    of_loss = {
        name: {VAL_LOSS: values[VAL_LOSS]}
        for name, values in watched_columns(record.metrics.evals).items()
        if VAL_LOSS in values
    }
    title = f"Validation loss, split “{record.config.data.eval_split}”"
    found.append(Measured(title, {None: {VAL_LOSS: "mean over global batches"}}, of_loss))
    return [one for one in found if one.columns]


def set_tables(record: Record) -> str:
    """Show each set before training and at the last evaluation; nothing where there are none."""
    found = measured_sets(record)
    if not found:
        return ""
    step = record.metrics.evals.last["step"]
    note = f"As training measured them; the last evaluation was at step {step:,}."
    return f'<h2>Further sets</h2><p class="note">{note}</p>' + "".join(
        column_table(
            escape(one.title),
            {record.column_name(name): values for name, values in one.columns.items()},
            one.groups,
        )
        for one in found
    )


def set_charts(item: EvalSetConfig, lines: Sequence[Line]) -> str:
    """Draw a set's recalls or accuracies along the run."""
    curves = RECALL_CURVES if item.split else _ACCURACY_CURVES
    series = [
        Series(label, f"s{number}", found, extremes(lines, f"{item.name}/{field}"))
        for number, (label, field) in enumerate(curves.items(), 1)
        if (found := points(lines, "step", f"{item.name}/{field}"))
    ]
    unit = "% of queries" if item.split else "% of images"
    if not series:
        return ""
    return line_figure(escape(item.name), series, unit=unit, from_zero=True, x_label="steps")
