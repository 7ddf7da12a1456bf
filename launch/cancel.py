"""`dist-vse cancel`: ask a submitted run to save and exit."""

from pathlib import Path

from dist_vse.common.errors import UserError
from dist_vse.launch.schedulers import find_scheduler
from dist_vse.launch.schedulers.base import load_job


def cancel(run_dir: Path) -> str:
    """Ask a run's job to save and exit for good; return what was done.

    Raises UserError if this machine can't reach the job.
    """
    job = load_job(run_dir)
    scheduler = find_scheduler(job.scheduler)
    if why := scheduler.unreachable(job):
        raise UserError(f"job {job.job_id} can't be cancelled here: {why}")
    state = scheduler.state(job)
    if state.ended:
        return f"job {job.job_id} has already ended ({state.name})"
    scheduler.cancel(job)
    return f"asked job {job.job_id} to save and exit; follow it with `dist-vse status {run_dir}`"
