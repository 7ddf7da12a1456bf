"""The command `dist-vse submit`."""

import argparse

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


def run(args: argparse.Namespace) -> int:
    """Submit as asked and return the exit code. Raises UserError for what can't be submitted."""
    from launch.follow import follow
    from launch.submit import describe, plan_submission, submit

    plan = plan_submission(args.config, args.overrides, args.cluster)
    if args.dry_run:
        print(describe(plan))
        return 0
    job = submit(plan)
    print(f"job {job.job_id} ({plan.scheduler}), {plan.cluster.world_size} processes")
    print(f"log of rank 0: {job.task(0).paths.stderr}", flush=True)
    return follow(job, poll_s=_POLL_S[plan.scheduler]) if args.wait else 0
