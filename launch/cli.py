"""The commands `dist-vse submit`, `status`, `logs`, `cancel`, `runs` and `doctor`."""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dist_vse.common.errors import UserError

if TYPE_CHECKING:
    from launch.submit import Plan

_POLL_S = {"slurm": 5.0, "local": 0.5}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("config", help="the run's YAML")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the config")
    parser.add_argument(
        "--cluster",
        metavar="YAML",
        help="where to run (configs/clusters/*.yaml); default: one process, on Slurm if it is here",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="show the job and its environment; start nothing"
    )
    parser.add_argument(
        "--wait", action="store_true", help="follow the job; exit with its exit code"
    )
    parser.add_argument(
        "--sweep",
        nargs="+",
        metavar="key=value,value",
        help="one run for each combination, as one job array; see them with `dist-vse runs`",
    )
    parser.add_argument(
        "--scale",
        nargs="*",
        metavar="key=value,value",
        help="measure steps as `dist-vse bench scale` does, also with these settings varied, and "
        "train nothing; writes RUN/scale.json",
    )
    parser.add_argument(
        "--parallel", type=int, metavar="N", help="a sweep's runs at a time (default: 4)"
    )


def run(args: argparse.Namespace) -> int:
    """Submit as asked and return the exit code. Raises UserError for what can't be submitted."""
    from launch.describe import describe
    from launch.follow import follow
    from launch.submit import plan_submission, submit

    if args.sweep:
        return _sweep(args)
    if args.parallel is not None:
        raise UserError("--parallel is for --sweep: a single run is one job")
    plan = plan_submission(args.config, args.overrides, args.cluster, scale=args.scale)
    if args.dry_run:
        print(describe(plan))
        return 0
    _warn(plan)
    job = submit(plan)
    print(f"job {job.job_id} ({plan.scheduler}), {plan.cluster.world_size} processes")
    print(f"log of rank 0: {job.task(0).paths.stderr}", flush=True)
    return follow(job, poll_s=_POLL_S[plan.scheduler]) if args.wait else 0


def _sweep(args: argparse.Namespace) -> int:
    from launch.describe import describe
    from launch.follow import follow
    from launch.sweep import plan_sweep, submit_sweep

    parallel = 4 if args.parallel is None else args.parallel
    if parallel < 1:
        raise UserError(f"--parallel ({parallel}) must be at least 1")
    plans = plan_sweep(args.config, args.overrides, args.sweep, args.cluster, scale=args.scale)
    if args.dry_run:
        print(describe(plans[0], runs=len(plans), parallel=parallel))
        print(f"\n{len(plans)} runs, {parallel} at a time:")
        print("\n".join(f"  {plan.folder.parent}" for plan in plans))
        return 0
    _warn(plans[0])
    jobs = []
    for plan, job in zip(plans, submit_sweep(plans, parallel=parallel), strict=True):
        print(f"job {job.job_id}: {plan.folder.parent}", flush=True)
        jobs.append(job)
    print(f"dist-vse runs {plans[0].jobs.parent}")
    poll_s = _POLL_S[plans[0].scheduler]
    return max(follow(job, poll_s=poll_s) for job in jobs) if args.wait else 0


def _warn(plan: "Plan") -> None:
    from launch.describe import find_conflicts, ignored

    for conflict in find_conflicts(plan, os.environ):
        print(f"in this shell: {conflict}", file=sys.stderr)
    if vain := ignored(plan):
        print(vain, file=sys.stderr)


def add_run(parser: argparse.ArgumentParser) -> None:
    """Declare the folder of a submitted run."""
    parser.add_argument("run_dir", metavar="RUN", type=Path, help="the run's folder (output_dir)")


def add_logs(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `logs`."""
    add_run(parser)
    parser.add_argument("--rank", type=int, default=0, help="whose log (default: 0)")
    parser.add_argument("--follow", action="store_true", help="go on until the job has ended")


def add_runs(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `runs`."""
    parser.add_argument("folders", metavar="FOLDER", nargs="+", type=Path, help="runs, or of runs")


def status(args: argparse.Namespace) -> int:
    """Say where a submitted run stands."""
    from launch import control

    print(control.status(args.run_dir))
    return 0


def logs(args: argparse.Namespace) -> int:
    """Print a rank's log."""
    from launch import control

    control.show_log(args.run_dir, rank=args.rank, follow=args.follow)
    return 0


def cancel(args: argparse.Namespace) -> int:
    """End a submitted run."""
    from launch import control

    print(control.cancel(args.run_dir))
    return 0


def runs(args: argparse.Namespace) -> int:
    """Print the table of several runs."""
    from launch.runs import find_runs, table

    print(table(find_runs(args.folders)))
    return 0


def add_doctor(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `doctor`."""
    parser.add_argument("config", help="the run's YAML")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the config")
    parser.add_argument("--cluster", metavar="YAML", help="where to run (configs/clusters/*.yaml)")
    parser.add_argument(
        "--timeout",
        type=float,
        default=120.0,
        metavar="S",
        help="for the ranks' job (default: 120)",
    )


def doctor(args: argparse.Namespace) -> int:
    """Check a run before it is started."""
    from launch.doctor import doctor as check

    return check(args.config, args.overrides, args.cluster, args.timeout)
