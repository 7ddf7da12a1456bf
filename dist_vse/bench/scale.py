"""`dist-vse bench scale`: how a step's speed, memory and traffic change with the number of
processes and with the settings; under a launcher, on its processes."""

import argparse
import datetime
import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from dist_vse import distributed
from dist_vse.bench.scale_cases import BASE, INDEPENDENT, WEAK, Case, plan_cases, share
from dist_vse.bench.scale_run import Effort, Turns, measure
from dist_vse.environment import describe_environment
from dist_vse.local_ranks import Team, run_teams

Row = dict[str, Any]


def run(args: argparse.Namespace) -> int:
    """Measure what `args` ask for, print a table, and write the numbers and a plot."""
    effort = Effort(args.rounds, args.steps, args.stream)
    launched = "RANK" in os.environ
    processes = [int(os.environ["WORLD_SIZE"])] if launched else args.processes
    cases = plan_cases(args.settings, processes, args.vary, independent=args.independent)
    cases = share(cases, args.task)
    if not launched:
        return _finish(args, _on_this_machine(cases, effort))
    with distributed.process_group():
        rows = measure(cases, effort)
        code = _finish(args, rows) if distributed.is_main_process() else 0
        distributed.barrier()
    return code


def _on_this_machine(cases: Sequence[Case], effort: Effort) -> list[Row]:
    """Start the processes of all cases; those of each number of processes, and each set of
    independent runs, take turns."""
    from torch.multiprocessing import get_context

    groups: dict[tuple[int, int], list[Case]] = {}
    for case in cases:
        groups.setdefault((case.world_size, case.runs), []).append(case)
    barrier = get_context("spawn").Barrier(sum(size * runs for size, runs in groups))
    teams = []
    for turn, ((size, runs), members) in enumerate(groups.items()):
        turns = Turns(barrier, turn, len(groups))
        teams += [Team(measure, size, (members, effort, turns))] * runs
    results = iter(run_teams(teams))
    found: dict[int, Row] = {}
    for (_, runs), members in groups.items():
        several = [next(results) for _ in range(runs)]
        for number, case in enumerate(members):
            found[id(case)] = _together([rows[number] for rows in several])
    return [found[id(case)] for case in cases]


def _together(rows: Sequence[Row]) -> Row:
    """Join runs at the same time: their rates add up."""
    return {**rows[0], "pairs_per_s": sum(row["pairs_per_s"] for row in rows)}


def compare(rows: Sequence[Row]) -> None:
    """Note in every row how well it uses its processes, beside the first row of its series.

    efficiency: pairs a second and process over the first row's. of_independent: a weak row's
    pairs a second over those of as many independent runs at once.
    """
    first = next(row for row in rows if row["series"] == BASE)
    alone = {row["runs"]: row for row in rows if row["series"] == INDEPENDENT}
    largest = max((row for row in rows if row["series"] in (BASE, "strong")), key=_processes)
    for row in rows:
        varied = row["series"] not in (BASE, "strong", WEAK, INDEPENDENT)
        reference = largest if varied else first
        row["efficiency"] = _rate(row) / _rate(reference)
        if row["series"] == WEAK and row["world_size"] in alone:
            reference = alone[row["world_size"]]
            row["of_independent"] = row["pairs_per_s"] / reference["pairs_per_s"]


def _processes(row: Row) -> int:
    return int(row["world_size"] * row["runs"])


def _rate(row: Row) -> float:
    return float(row["pairs_per_s"] / _processes(row))


def _finish(args: argparse.Namespace, rows: list[Row]) -> int:
    compare(rows)
    report = {
        "benchmark": "scale",
        **describe_environment(),
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
        "settings": list(args.settings),
        "stream": args.stream,
        "rows": rows,
    }
    console = Console()
    console.print_json(json.dumps(rows))
    if args.out is not None:
        Path(args.out).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        console.print(f"wrote {args.out}")
    return 0


def _commit() -> str | None:
    """Return the commit of this code, with a + where it was changed; None outside of git."""
    asked = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+"],
        capture_output=True,
        text=True,
    )
    return asked.stdout.strip() or None
