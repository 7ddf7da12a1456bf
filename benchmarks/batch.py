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
    next_rate,
    read_curve,
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
        cell["samples_to"] = samples_to(cell, args.target)
    figures = {"samples": SAMPLES, "target": args.target, "cells": cells}
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
        _by_batch(
            f"pairs seen until rsum {args.target:g} on test, in thousands", cells, batches, _pairs,
            "Between two evaluations, a straight line; mean of the curves of the further seeds. "
            "none: not reached.",
        ),
        _by_batch(
            f"seconds of training until rsum {args.target:g}, one process of one thread", cells,
            batches, _seconds,
            "By the pairs a second of the fastest run of the cell: the machine was shared.",
        ),
        _rates(cells),
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
        "curve_samples": curves[0].samples if curves else [],
        "curve_rsum": [statistics.fmean(at) for at in zip(*(c.rsum for c in curves), strict=True)],
        "pairs_per_s": max(speeds, default=None),
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


def _pairs(cell: dict[str, Any]) -> str:
    needed = cell["samples_to"]
    return "none" if needed is None else f"{needed / 1000:.1f}"


def _seconds(cell: dict[str, Any]) -> str:
    needed, speed = cell["samples_to"], cell["pairs_per_s"]
    return "none" if needed is None or speed is None else f"{needed / speed:.1f}"


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
