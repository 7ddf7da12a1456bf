"""Read the runs of `benchmarks.batch_search`: rsum against batch for each loss at its best rate.

Rates are chosen on val with seed 0; what is reported is on test. An interval is that of Student's t
over the seeds. A cell whose best rate lies at an edge of those tried is marked.
"""

import argparse
import math
import statistics
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.batch_search import LOSSES
from benchmarks.result import Result
from benchmarks.support.batch_picture import draw
from benchmarks.support.batch_runs import (
    RATES,
    SAMPLES,
    SEEDS,
    Cell,
    best_rate,
    half_interval,
    has_report,
    next_rate,
    read_curve,
    read_noise_scale,
    read_test,
    tried,
)
from dist_vse.common.errors import UserError
from dist_vse.tools.bench.table import Table


def run(args: argparse.Namespace) -> Result:
    """Collect all runs; draw the picture if it is asked for."""
    folder = Path(args.folder)
    batches = sorted(args.batches)
    cells = [cell for loss in LOSSES for n in batches if (cell := read_cell(folder, loss, n))]
    if not cells:
        raise UserError(f"{folder}: no finished runs; make them with `benchmarks.batch_search`")
    for cell in cells:
        cell["samples_to"] = {f"{t:g}": samples_to(cell, t) for t in args.target}
    for cell in cells:  # all losses cost about as much, and the machine was shared
        cell["pairs_per_s"] = max(c["pairs_per_s"] for c in cells if c["batch"] == cell["batch"])
    figures = {"samples": SAMPLES, "cells": cells}
    if args.picture is not None:
        Path(args.picture).write_text(draw(cells), encoding="utf-8")
    tables = [
        _by_batch(
            f"rsum on test after {SAMPLES:,} pairs, each at its best rate", cells, batches, _rsum,
            "± is half of the 95 % interval over the seeds (Student's t). * a single seed.",
        ),
        _by_batch(
            "best rate on val", cells, batches, lambda cell: cell["best"] + "?" * cell["at_edge"],
            "? the best rate lies at an edge of those tried.",
        ),
        *(_until(cells, batches, f"{target:g}") for target in args.target),
        _rates(cells),
        *(t for target in args.target for t in _predictions(folder, cells, f"{target:g}")),
    ]  # fmt: skip
    return Result(figures, tables)


def read_cell(folder: Path, loss: str, batch: int) -> dict[str, Any] | None:
    """Return all that is known of a loss at a batch; None without a finished run."""
    found = tried(folder, loss, batch)
    if not any(map(math.isfinite, found.values())):
        return None
    rate = best_rate(found)
    repeated = [Cell(loss, batch, rate, seed) for seed in SEEDS]
    curves = [c for cell in repeated if (c := read_curve(folder, cell, "test"))]
    searched = read_curve(folder, Cell(loss, batch, rate))
    assert searched is not None, "the best rate came to its end"
    first = read_test(folder, Cell(loss, batch, rate))
    speeds = [
        SAMPLES / curve.seconds
        for r in found
        if (curve := read_curve(folder, Cell(loss, batch, r))) and math.isfinite(curve.seconds)
    ]
    return {
        "loss": loss,
        "batch": batch,
        "rates": {r: value for r, value in found.items() if math.isfinite(value)},
        "failed_rates": [r for r, value in found.items() if not math.isfinite(value)],
        "best": rate,
        "at_edge": next_rate(found) is not None,
        "val": found[rate],
        "test": ([first] if first is not None else []) + [curve.end for curve in curves],
        "curve_samples": searched.samples,
        "curve_rsum": searched.rsum,
        "pairs_per_s": max(speeds, default=0.0),
    }


def samples_to(cell: dict[str, Any], target: float) -> float | None:
    """Return the pairs after which the mean curve reaches the target; None if it does not."""
    points = list(zip(cell["curve_samples"], cell["curve_rsum"], strict=True))
    for (n0, r0), (n1, r1) in pairwise(points):
        if r1 >= target:
            return float(n0 + (n1 - n0) * (target - r0) / (r1 - r0))
    return None


def _rsum(cell: dict[str, Any]) -> str:
    values = cell["test"]
    if not values:
        return f"({cell['val']:.0f} on val)"
    half = half_interval(values)
    return f"{statistics.fmean(values):.1f}" + ("*" if half is None else f" ± {half:.1f}")


def _by_batch(
    title: str, cells: list[dict[str, Any]], batches: list[int], text: Any, note: str
) -> Table:
    table = Table(title, ("loss", *(f"{batch:,}" for batch in batches)), note=note)
    known = {(cell["loss"], cell["batch"]): cell for cell in cells}
    for loss in LOSSES:
        row = [known.get((loss, batch)) for batch in batches]
        if any(row):
            table.add_row(loss, *("" if cell is None else text(cell) for cell in row))
    return table


def _until(cells: list[dict[str, Any]], batches: list[int], target: str) -> Table:
    def text(cell: dict[str, Any]) -> str:
        needed, speed = cell["samples_to"][target], cell["pairs_per_s"]
        if needed is None:
            return "none"
        return f"{needed / 1000:.1f} ({needed / speed:.1f} s)"

    return _by_batch(
        f"thousand pairs seen until rsum {target} on val, seed 0",
        cells,
        batches,
        text,
        "Straight lines between the evaluations. In brackets: seconds of one process with one "
        "thread, at the speed of the fastest run at that batch, since the machine was shared.",
    )


def _rates(cells: list[dict[str, Any]]) -> Table:
    used = [
        rate
        for rate in RATES
        if any(rate in c["rates"] or rate in c["failed_rates"] for c in cells)
    ]
    table = Table("rsum on val by rate, seed 0", ("loss", "batch", *used))
    for cell in cells:
        texts = {rate: f"{value:.0f}" for rate, value in cell["rates"].items()}
        texts |= dict.fromkeys(cell["failed_rates"], "failed")
        values = (texts.get(rate, "") for rate in used)
        table.add_row(cell["loss"], f"{cell['batch']:,}", *values)
    return table


def _predictions(folder: Path, cells: list[dict[str, Any]], target: str) -> list[Table]:
    """Compare the samples that the batch report predicts for other batches with the trainings.

    The prediction is that of McCandlish et al. (2018): n + B pairs at a batch of n, for a noise
    scale of B, up to a factor that is the same for all n.
    """
    known = {(cell["loss"], cell["batch"]): cell for cell in cells}
    table = Table(
        f"pairs until rsum {target}, as a multiple of those of the run with the batch report",
        ("loss, batch of the report", "noise scale", "to batch", "predicted", "trained", "error"),
        note="Error: predicted over trained, less 1. The bounds are two standard errors. The noise "
        "scale is that of the steps until the same rsum; not known: the report can't distinguish "
        "the gradient from zero.",
    )
    for (loss, batch), cell in known.items():
        here = cell["samples_to"][target]
        if here is None or not has_report(folder, loss, batch, cell["best"]):
            continue
        scale = read_noise_scale(folder, loss, batch, cell["best"], here)
        if scale is None:
            table.add_row(f"{loss}, {batch:,}", "not known", *[""] * 4)
            continue
        cell.setdefault("noise_scale", {})[target] = scale._asdict()
        for (other_loss, other), there in known.items():
            needed = there["samples_to"][target]
            if other_loss != loss or other == batch or needed is None:
                continue
            ratio = (other + scale.pairs) / (batch + scale.pairs)
            trained = needed / here
            table.add_row(
                f"{loss}, {batch:,}",
                f"{scale.pairs:,.0f} ({scale.low:,.0f} to {scale.high:,.0f})",
                f"{other:,}",
                f"{ratio:.2f}",
                f"{trained:.2f}",
                f"{ratio / trained - 1:+.0%}",
            )
    return [table] if table.rows else []
