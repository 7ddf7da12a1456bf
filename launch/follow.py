"""Following a job to its end: its log as it grows, then the cause of a failure."""

import os
import re
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch import slurm

# What a rank says when another one is gone: an effect, to be shown after the cause.
_LOST_PEER = re.compile(
    r"Connection (closed|reset) by peer|DistBackendError|DistNetworkError|Broken pipe"
)
_USER_ERROR = "dist_vse.errors.UserError: "
_LONGEST_MESSAGE = 400
_RESULTS_WAIT_S = 10


@dataclass(frozen=True)
class Outcome:
    """How one rank ended."""

    rank: int
    log: Path
    code: int = 1
    error: str = ""
    ended: float | None = None
    """Unix time of the result; none if the rank left none."""


def follow(job: Any, *, poll_s: float) -> int:
    """Echo rank 0's log until the job has ended, report failures, and return the exit code.

    0 is success, 2 a UserError of the run, 130 a run that saved and stopped early, 1 the rest.
    """
    echoes = [_Echo(job.task(0).paths.stdout), _Echo(job.task(0).paths.stderr)]
    interrupts = 0
    while True:
        try:
            ended = has_ended(job)
            for echo in echoes:
                echo.update()
            if ended:
                break
            time.sleep(poll_s)
        except KeyboardInterrupt:
            interrupts += 1
            if not _interrupt(job, interrupts):
                return 130
    return report(job)


def has_ended(job: Any) -> bool:
    """Tell whether the job is over for good.

    For Slurm its state decides: a job that is queued again may have left results behind.
    """
    if _is_slurm(job):
        return slurm.has_ended(job.job_id)
    return bool(job.done())


def _state(job: Any) -> str:
    """Return the job's state in words; submitit's own for Slurm would need its accounting."""
    return str((slurm.job_state(job.job_id) if _is_slurm(job) else job.state) or "forgotten")


def report(job: Any) -> int:
    """Print why an ended job failed, one line a cause; return its exit code."""
    outcomes = _outcomes(job)
    failed = sorted((o for o in outcomes if o.error), key=_likeliness)
    if not failed:
        return max(outcome.code for outcome in outcomes)
    causes = [outcome for outcome in failed if _likeliness(outcome)[0] == 0] or failed
    for error in dict.fromkeys(outcome.error for outcome in causes):
        same = [outcome for outcome in causes if outcome.error == error]
        ranks = f"rank {same[0].rank}" if len(same) == 1 else f"{len(same)} ranks"
        message = error.removeprefix(_USER_ERROR)
        print(f"error: job {job.job_id}, {ranks}: {message} (log: {same[0].log})", file=sys.stderr)
    return 2 if causes[0].error.startswith(_USER_ERROR) else 1


def _likeliness(outcome: Outcome) -> tuple[int, float, int]:
    """Order causes before effects: errors, ranks that were killed, ranks that lost another."""
    effect = 2 if _LOST_PEER.search(outcome.error) else int(outcome.ended is None)
    return effect, outcome.ended or 0.0, outcome.rank


class _Echo:
    """Prints what is new in a file that grows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offset = 0

    def update(self) -> None:
        if not self.path.exists():  # the job is still in the queue
            return
        with self.path.open("rb") as file:
            file.seek(self.offset)
            new = file.read()
        self.offset += len(new)
        sys.stdout.write(new.decode(errors="replace"))
        sys.stdout.flush()


def _is_slurm(job: Any) -> bool:
    import submitit

    return isinstance(job, submitit.SlurmJob)


def _interrupt(job: Any, times: int) -> bool:
    """Pass Ctrl-C on; tell whether to go on following."""
    if _is_slurm(job):
        print(f"job {job.job_id} goes on; end it with: scancel {job.job_id}", file=sys.stderr)
        return False
    controller = int(job.job_id)
    if times > 1:
        os.kill(controller, signal.SIGKILL)
        return False
    print("asked the job to save and stop; Ctrl-C again ends it at once", file=sys.stderr)
    os.kill(controller, signal.SIGTERM)
    return True


def _outcomes(job: Any) -> list[Outcome]:
    """Read all ranks' results; a shared file system may show them some seconds late."""
    patience_s = _RESULTS_WAIT_S if _is_slurm(job) else 0
    while True:
        outcomes = [_outcome(job.task(rank)) for rank in range(job.num_tasks)]
        failed = any(outcome.error and outcome.ended is not None for outcome in outcomes)
        if failed or patience_s <= 0 or all(o.ended is not None for o in outcomes):
            return outcomes
        time.sleep(1)
        patience_s -= 1


def _outcome(task: Any) -> Outcome:
    """Read how a rank ended from the result that submitit wrote for it."""
    from submitit.core.utils import pickle_load

    rank, log, path = task.paths.task_id, task.paths.stderr, task.paths.result_pickle
    if not path.exists():
        return Outcome(rank, log, error=f"killed, or ended without a result ({_state(task)})")
    ended = path.stat().st_mtime
    kind, result = pickle_load(path)
    if kind == "success":
        return Outcome(rank, log, code=result, ended=ended)
    return Outcome(rank, log, error=last_words(result), ended=ended)


def last_words(trace: str) -> str:
    """Return the message at the end of a traceback, on one line."""
    lines = trace.rstrip().splitlines()
    frames = [number for number, line in enumerate(lines) if line.startswith("  ")]
    message = " ".join(lines[frames[-1] + 1 if frames else 0 :]) or lines[-1].strip()
    return message if len(message) <= _LONGEST_MESSAGE else message[:_LONGEST_MESSAGE] + " ..."
