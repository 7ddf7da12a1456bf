"""`dist-vse bench scale`: speed, memory and traffic of a step over processes and settings."""

import argparse
import multiprocessing
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dist_vse import distributed
from dist_vse.common.errors import UserError
from dist_vse.common.files import check_output
from dist_vse.common.log import setup_logging
from dist_vse.common.reading import read_json
from dist_vse.common.terminal import say
from dist_vse.distributed.spawn import RankGroup, run_rank_groups
from dist_vse.engine.deepspeed_start import IMPORTS
from dist_vse.tools.bench.checks import at_least_one
from dist_vse.tools.bench.report import describe_measurement, print_tables, write_report
from dist_vse.tools.bench.scale_cases import Case, plan_cases, read_settings, share
from dist_vse.tools.bench.scale_page import write_page
from dist_vse.tools.bench.scale_rows import Row, compare, compare_with_baseline, join, together
from dist_vse.tools.bench.scale_run import Budget, RoundRobin, measure
from dist_vse.tools.bench.scale_tables import tables

START = "forkserver"


def run(args: argparse.Namespace) -> int:
    """Measure what `args` ask for (or read it), print tables, and write numbers and a plot.

    Under a launcher every rank calls this, and the launcher's processes are measured.
    """
    if args.read:
        reports = [_read(path) for path in args.read]
        _finish(args, {**reports[0], "rows": join([report["rows"] for report in reports])})
        return 0
    if "RANK" not in os.environ:
        _finish(args, _report(args, measure_here(_plan(args, args.processes), _budget(args))))
        return 0
    setup_logging()
    with distributed.process_group():
        try:
            cases = _plan(args, [distributed.world_size()])
            rows = measure(cases, _budget(args))
            if distributed.is_main_process():
                _finish(args, _report(args, rows))
            code = 0
        except UserError as error:  # alike on every rank
            if distributed.is_main_process():
                say(f"error: {error}", file=sys.stderr)
            code = 2
        distributed.barrier()  # a launcher ends all ranks when the first one ends
    return code


def _plan(args: argparse.Namespace, processes: Sequence[int]) -> list[Case]:
    at_least_one(rounds=args.rounds, steps=args.steps)
    if sorted(set(processes)) != list(processes) or processes[0] < 1:
        raise UserError(f"--processes {processes} must be rising numbers from 1 on")
    cases = plan_cases(args.settings, processes, args.vary, independent=args.independent)
    cases = share(cases, args.task)
    for path in filter(None, (args.out, args.page)):
        check_output(path)
    return cases


def _budget(args: argparse.Namespace) -> Budget:
    return Budget(args.rounds, args.steps, args.stream)


def measure_here(cases: Sequence[Case], budget: Budget) -> list[Row]:
    """Start the processes of all cases; cases of one size, and independent runs, take turns."""
    # All are forked from one server, which has paid for the imports.
    os.environ["DS_ACCELERATOR"] = "cpu"
    multiprocessing.set_forkserver_preload([*IMPORTS, "dist_vse.tools.bench.scale_run"])
    groups: dict[tuple[int, int], list[Case]] = {}
    for case in cases:
        groups.setdefault((case.world_size, case.runs), []).append(case)
    barrier = multiprocessing.get_context(START).Barrier(sum(size * runs for size, runs in groups))
    rank_groups = []
    for index, ((size, runs), members) in enumerate(groups.items()):
        schedule = RoundRobin(barrier, index, len(groups))
        rank_groups += [RankGroup(measure, size, (members, budget, schedule))] * runs
    results = iter(run_rank_groups(rank_groups, start_method=START))
    rows: dict[int, Row] = {}
    for (_, runs), members in groups.items():
        several = [next(results) for _ in range(runs)]
        for number, case in enumerate(members):
            rows[id(case)] = together([rows_of_run[number] for rows_of_run in several])
    return [rows[id(case)] for case in cases]


def _report(args: argparse.Namespace, rows: list[Row]) -> dict[str, Any]:
    path, overrides = read_settings(args.settings)
    return {
        **describe_measurement("scale", _words(args)),
        "settings": list(args.settings),
        "config": path,
        "overrides": overrides,
        "rounds": args.rounds,
        "steps": args.steps,
        "rows": rows,
    }


def _words(args: argparse.Namespace) -> list[str]:
    words = [*args.settings, "--processes", *map(str, args.processes)]
    words += ["--vary", *args.vary] * bool(args.vary) + ["--stream"] * args.stream
    return [*words, "--rounds", str(args.rounds), "--steps", str(args.steps)]


def _finish(args: argparse.Namespace, report: dict[str, Any]) -> None:
    rows = report["rows"]
    compare(rows)
    if args.baseline is not None:
        compare_with_baseline(rows, _read(args.baseline)["rows"])
    shown = tables(rows)
    print_tables(shown)
    if args.out is not None:
        write_report(args.out, report, shown)
        say(f"wrote {args.out}")
    if args.page is not None:
        write_page(report, args.page)
        say(f"wrote {args.page}")


def _read(path: str) -> dict[str, Any]:
    """Read what `--out` wrote. Raises UserError if it is something else."""
    try:
        report = read_json(Path(path))
        if report.get("benchmark") == "scale":
            return report
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: can't be read ({error})") from None
    raise UserError(f"{path}: no numbers of `dist-vse bench scale --out`")
