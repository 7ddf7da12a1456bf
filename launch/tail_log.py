"""Printing a job's log as it grows, and at its end the cause of a failure."""

import sys
import time
from pathlib import Path

from dist_vse.common.errors import UserError
from dist_vse.common.terminal import say
from dist_vse.launch.outcome import find_outcome
from dist_vse.launch.schedulers import find_scheduler
from dist_vse.launch.schedulers.base import SubmittedJob, load_job
from dist_vse.launch.status import job_state


class _Tail:
    """Prints what is new in a file that grows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offset = 0

    def print_new(self) -> None:
        if not self.path.exists():  # the job is still in the queue
            return
        with self.path.open("rb") as file:
            file.seek(self.offset)
            new = file.read()
        self.offset += len(new)
        sys.stdout.write(new.decode(errors="replace"))
        sys.stdout.flush()


def follow(job: SubmittedJob, *, poll_s: float | None = None) -> int:
    """Print rank 0's output until the job has ended, report failures, and return the exit code.

    `poll_s` is the scheduler's own where it is none. The codes are those of `find_outcome`.
    """
    scheduler, stderr = find_scheduler(job.scheduler), job.log(0)
    tails = [_Tail(stderr.with_suffix(".out")), _Tail(stderr)]
    interrupts = 0
    while True:
        try:
            ended = scheduler.state(job).ended
            for tail in tails:
                tail.print_new()
            if ended:
                return report(job)
            time.sleep(scheduler.poll_s if poll_s is None else poll_s)
        except KeyboardInterrupt:
            interrupts += 1
            if not _pass_on_ctrl_c(job, interrupts):
                return 130


def _pass_on_ctrl_c(job: SubmittedJob, times: int) -> bool:
    """Cancel or kill a job that Ctrl-C may cancel; return whether to go on following."""
    scheduler = find_scheduler(job.scheduler)
    if not scheduler.ctrl_c_cancels:
        say(f"job {job.job_id} goes on; end it with `dist-vse cancel`", file=sys.stderr)
        return False
    if times > 1:
        scheduler.kill(job)
        return False
    say("asked the job to save and exit; Ctrl-C again kills it", file=sys.stderr)
    scheduler.cancel(job)
    return True


def report(job: SubmittedJob) -> int:
    """Print why an ended job failed, one line for each cause; return its exit code."""
    delay_s = find_scheduler(job.scheduler).results_delay_s
    code, causes = find_outcome(job, job_state(job).name, results_delay_s=delay_s)
    for cause in causes:
        say(f"error: job {job.job_id}, {cause}", file=sys.stderr)
    return code


def show_log(run_dir: Path, *, rank: int, follow: bool) -> None:
    """Print the log of a run's rank; `follow` goes on until the job has ended."""
    job = load_job(run_dir)
    path = job.log(rank)
    if not path.exists() and not follow:
        raise UserError(f"{path}: no log; the job is {job_state(job).name}, or has no rank {rank}")
    tail, unreachable = _Tail(path), find_scheduler(job.scheduler).unreachable(job)
    while True:
        ended = unreachable or job_state(job).ended
        tail.print_new()
        if ended or not follow:
            return
        time.sleep(1)
