"""The commands `dist-vse submit`, `doctor`, `status`, `logs`, `cancel` and `runs`."""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dist_vse.common.errors import UserError
from dist_vse.common.terminal import say

if TYPE_CHECKING:
    from dist_vse.launch.submit import Plan

_PARALLEL = 4
AUTOTUNE_LIMIT_S = 1800.0


def _add_config(
    parser: argparse.ArgumentParser, cluster_help: str, *, optional: bool = False
) -> None:
    config_help = "the run's YAML file, or a name of `dist-vse config list`"
    nargs = "?" if optional else None
    parser.add_argument("config", nargs=nargs, metavar="CONFIG", help=config_help)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes to the config")
    parser.add_argument("--cluster", metavar="YAML", help=cluster_help)


def add_submit(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `submit`."""
    default = "one process, on Slurm if it is here"
    _add_config(parser, f"cluster file, or a name of `dist-vse config list` (default: {default})")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the job and its environment; start nothing"
    )
    parser.add_argument(
        "--wait", action="store_true", help="follow the job's log; exit with its exit code"
    )
    parser.add_argument(
        "--sweep",
        nargs="+",
        metavar="key=value,value",
        help="start one run for each combination, as one job array; list them with `dist-vse runs`",
    )
    parser.add_argument(
        "--scale",
        nargs="*",
        metavar="key=value,value",
        help="measure steps as `dist-vse bench scale` does, also with these settings varied, and "
        "train nothing; writes RUN/scale.json",
    )
    parser.add_argument(
        "--parallel",
        type=int,
        metavar="N",
        help=f"how many runs of a sweep run at a time (default: {_PARALLEL})",
    )


def submit(args: argparse.Namespace) -> int:
    """Submit a run, or a sweep; return the exit code. Raises UserError if that is impossible."""
    from dist_vse.launch import dry_run
    from dist_vse.launch.submit import plan_submission
    from dist_vse.launch.submit import submit as start
    from dist_vse.launch.tail_log import follow

    if args.sweep:
        return _sweep(args)
    if args.parallel is not None:
        raise UserError("--parallel needs --sweep: a single run is one job")
    plan = plan_submission(args.config, args.overrides, args.cluster, scale=args.scale)
    if args.dry_run:
        say(dry_run.dry_run(plan))
        return 0
    _warn(plan)
    job = start(plan)
    say(f"job {job.job_id} ({job.scheduler}), {plan.cluster.world_size} processes")
    say(f"log of rank 0: {job.log(0)}", flush=True)
    return follow(job) if args.wait else 0


def _sweep(args: argparse.Namespace) -> int:
    from dist_vse.launch import dry_run
    from dist_vse.launch.sweep import plan_sweep, submit_sweep
    from dist_vse.launch.tail_log import follow

    parallel = _PARALLEL if args.parallel is None else args.parallel
    if parallel < 1:
        raise UserError(f"--parallel ({parallel}) must be at least 1")
    plans = plan_sweep(args.config, args.overrides, args.sweep, args.cluster, scale=args.scale)
    if args.dry_run:
        say(dry_run.dry_run(plans[0], runs=len(plans), parallel=parallel))
        say(f"\n{len(plans)} runs, {parallel} at a time:")
        say("\n".join(f"  {plan.run_dir}" for plan in plans))
        return 0
    _warn(plans[0])
    jobs = []
    for plan, job in zip(plans, submit_sweep(plans, parallel=parallel), strict=True):
        say(f"job {job.job_id}: {plan.run_dir}", flush=True)
        jobs.append(job)
    say(f"dist-vse runs {plans[0].jobs.parent}")
    return max(follow(job) for job in jobs) if args.wait else 0


def _warn(plan: "Plan") -> None:
    from dist_vse.launch.dry_run import find_conflicts, report_ignored

    for conflict in find_conflicts(plan, os.environ):
        say(f"in this shell: {conflict}", file=sys.stderr)
    if ignored := report_ignored(plan):
        say(ignored, file=sys.stderr)


def add_doctor(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `doctor`."""
    parser.description = (
        "Check a run before it is started: its batch, data, memory, disk, and all of its ranks. "
        "With --gpu: check this machine's GPUs instead (docs/guides/gpu.md)."
    )
    _add_config(parser, "cluster file, or a name of `dist-vse config list`", optional=True)
    parser.add_argument(
        "--timeout",
        type=float,
        default=120.0,
        metavar="S",
        help="seconds for the ranks' job, with its time in the queue (default: 120)",
    )
    gpu = parser.add_argument_group("the checks of --gpu")
    gpu.add_argument(
        "--gpu", action="store_true", help="check this machine's GPUs; without one, what needs none"
    )
    gpu.add_argument("--json", metavar="FILE", type=Path, help="write all figures there")
    gpu.add_argument("--checks", metavar="1,5,7", help="only these (default: all)")
    gpu.add_argument(
        "--ranks", type=int, metavar="N", help="processes, 1 to 8 (default: the GPUs, at least 2)"
    )
    gpu.add_argument(
        "--device",
        choices=("auto", "cuda", "cpu"),
        default="auto",
        help="cpu: as if there were no GPU (default: %(default)s)",
    )
    gpu.add_argument(
        "--limit", type=float, metavar="S", help="seconds that a check may take (default: 60)"
    )
    gpu.add_argument(
        "--autotune",
        action="store_true",
        help="instead of the checks: time shapes of the fused kernels' tiles, for minutes, and "
        "keep the fastest in your cache, where runs find them",
    )


def doctor(args: argparse.Namespace) -> int:
    """Check a run before it is started, or this machine's GPUs."""
    if args.gpu:
        return _check_gpus(args)
    if args.config is None:
        raise UserError("no config given: dist-vse doctor CONFIG [key=value ...], or --gpu")
    from dist_vse.launch.doctor import doctor as check

    return check(args.config, args.overrides, args.cluster, args.timeout)


def _check_gpus(args: argparse.Namespace) -> int:
    from dist_vse.launch.gpu_checks.catalog import AUTOTUNE
    from dist_vse.launch.gpu_checks.command import Options, check_gpus, read_numbers

    defaults = Options()
    if args.autotune:
        if args.checks is not None:
            raise UserError("--autotune makes no checks; leave --checks out")
        defaults = Options(checks=[AUTOTUNE], limit_s=AUTOTUNE_LIMIT_S)
    options = Options(
        config=args.config,
        overrides=args.overrides,
        json=args.json,
        ranks=args.ranks,
        checks=defaults.checks if args.checks is None else read_numbers(args.checks),
        device=args.device,
        limit_s=defaults.limit_s if args.limit is None else args.limit,
    )
    return check_gpus(options)


def add_run(parser: argparse.ArgumentParser) -> None:
    """Declare the folder of a submitted run."""
    parser.add_argument("run_dir", metavar="RUN", type=Path, help="the run's folder (output_dir)")


def status(args: argparse.Namespace) -> int:
    """Print where a submitted run stands."""
    from dist_vse.launch.status import status as find_status

    say(find_status(args.run_dir))
    return 0


def add_logs(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `logs`."""
    add_run(parser)
    parser.add_argument("--rank", type=int, default=0, help="whose log (default: 0)")
    parser.add_argument("--follow", action="store_true", help="continue until the job has ended")


def logs(args: argparse.Namespace) -> int:
    """Print a rank's log."""
    from dist_vse.launch.tail_log import show_log

    show_log(args.run_dir, rank=args.rank, follow=args.follow)
    return 0


def cancel(args: argparse.Namespace) -> int:
    """Ask a submitted run to save and exit."""
    from dist_vse.launch.cancel import cancel as ask

    say(ask(args.run_dir))
    return 0


def add_runs(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `runs`."""
    parser.add_argument(
        "folders", metavar="FOLDER", nargs="+", type=Path, help="runs, or folders of runs"
    )


def runs(args: argparse.Namespace) -> int:
    """Print the table of several runs."""
    from dist_vse.launch.runs import find_runs, table

    say(table(find_runs(args.folders)))
    return 0
