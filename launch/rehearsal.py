"""The job of all ranks that `dist-vse doctor` sends: short, once, and taken back."""

import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from dist_vse.common.errors import UserError
from launch import control
from launch.cluster import ClusterConfig
from launch.follow import has_ended, report
from launch.probe import Probe
from launch.submit import Plan, prepare, start

_LIMIT_MIN = 10
_POLL_S = 0.2


def for_minutes(cluster: ClusterConfig) -> ClusterConfig:
    """Return the cluster for a job of a few minutes, which starts soon, and once."""
    minutes = min(_LIMIT_MIN, cluster.time_min)
    return replace(cluster, time_min=minutes, signal_before_end_s=1, requeue=False, failures=0)


def rehearse(plan: Plan, probe: Probe, patience_s: float) -> float:
    """Run the probe on all ranks of the planned job; return the seconds it took.

    Raises UserError if it fails, or has not ended after `patience_s` seconds in queue and job.
    """
    job = replace(prepare(plan), work=probe)
    began = time.monotonic()
    started = start(plan, job)
    run_dir = plan.folder.parent
    try:
        while not has_ended(started):
            if time.monotonic() - began > patience_s:
                state = control.job_state(control.read_note(run_dir))
                raise UserError(
                    f"the ranks' job is still {state} after {patience_s:.0f} s; give --timeout"
                )
            time.sleep(_POLL_S)
    finally:  # Ctrl-C too
        _end(started, plan.scheduler, run_dir)
    if report(started):
        raise UserError(f"the ranks of {plan.scheduler} can't work together (see above)")
    return time.monotonic() - began


def _end(job: Any, scheduler: str, run_dir: Path) -> None:
    """End the job where it has not ended by itself: nothing is to be saved."""
    if scheduler == "slurm":
        control.cancel(run_dir)
    elif not has_ended(job):
        os.kill(int(job.job_id), signal.SIGKILL)
