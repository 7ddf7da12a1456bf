"""The short job of all ranks that `dist-vse doctor` starts, and ends after the check."""

import time
from dataclasses import replace

from dist_vse.common.errors import UserError
from dist_vse.launch.cluster import ClusterConfig
from dist_vse.launch.rank_check import RankCheck
from dist_vse.launch.schedulers.base import SubmittedJob
from dist_vse.launch.status import job_state
from dist_vse.launch.submit import Plan, prepare, start
from dist_vse.launch.tail_log import report

_MAX_MINUTES = 10
_POLL_S = 0.2


def short_cluster(cluster: ClusterConfig) -> ClusterConfig:
    """Return the cluster for a job of a few minutes, which starts soon, and once."""
    minutes = min(_MAX_MINUTES, cluster.time_min)
    return replace(cluster, time_min=minutes, signal_before_end_s=1, requeue=False, failures=0)


def run_check_job(plan: Plan, check: RankCheck, timeout_s: float) -> float:
    """Run the check on all ranks of the planned job; return the seconds it took.

    Raises UserError if it fails, or has not ended after `timeout_s` seconds in queue and job.
    """
    work = replace(prepare(plan), work=check)
    began = time.monotonic()
    job = start(plan, work)
    try:
        while not (state := job_state(job)).ended:
            if time.monotonic() - began > timeout_s:
                raise UserError(
                    f"the ranks' job is still {state.name} after {timeout_s:.0f} s; raise --timeout"
                )
            time.sleep(_POLL_S)
    finally:  # Ctrl-C too
        _end(plan, job)
    if report(job):
        raise UserError(f"the ranks can't work together on {plan.scheduler.name} (see above)")
    return time.monotonic() - began


def _end(plan: Plan, job: SubmittedJob) -> None:
    if not plan.scheduler.state(job).ended:
        plan.scheduler.kill(job)
