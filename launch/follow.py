"""Following a job to its end: its log as it grows, then the cause of a failure."""

import os
import re
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch import slurm

# What a rank says when another one is gone: an effect, to be shown after the cause.
_LOST_PEER = re.compile(
    r"Connection (closed|reset) by peer|DistBackendError|DistNetworkError|Broken pipe"
)
_USER_ERROR = "dist_vse.common.errors.UserError: "
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


def report(job: Any) -> int:
    """Print why an ended job failed, one line a cause; return its exit code."""
    patience_s = _RESULTS_WAIT_S if _is_slurm(job) else 0
    state = (slurm.job_state(job.job_id) or "forgotten") if _is_slurm(job) else job.state
    code, causes = verdict(log_pattern(job), job.num_tasks, state, patience_s=patience_s)
    for cause in causes:
        print(f"error: job {job.job_id}, {cause}", file=sys.stderr)
    return code


def log_pattern(job: Any) -> str:
    """Return the path of a rank's log, with RANK for its number."""
    return str(job.task(0).paths.stderr).replace("_0_log.err", "_RANK_log.err")


def rank_log(pattern: str, rank: int) -> Path:
    """Return the path of a rank's log."""
    path = Path(pattern)
    return path.with_name(path.name.replace("RANK", str(rank)))


def verdict(logs: str, num_ranks: int, state: str, *, patience_s: int = 0) -> tuple[int, list[str]]:
    """Return an ended job's exit code, and why it failed, one line a cause.

    `logs` is what `log_pattern` returned; `state` is told of ranks that left no result. A shared
    file system may show results some seconds late: `patience_s`.
    """
    paths = [rank_log(logs, rank) for rank in range(num_ranks)]
    outcomes = _outcomes(paths, state, patience_s)
    failed = sorted((o for o in outcomes if o.error), key=_likeliness)
    if not failed:
        return max(outcome.code for outcome in outcomes), []
    causes = [outcome for outcome in failed if _likeliness(outcome)[0] == 0] or failed
    lines = []
    for error in dict.fromkeys(outcome.error for outcome in causes):
        same = [outcome for outcome in causes if outcome.error == error]
        who = f"rank {same[0].rank}" if len(same) == 1 else f"{len(same)} ranks"
        lines.append(f"{who}: {error.removeprefix(_USER_ERROR)} (log: {same[0].log})")
    return (2 if causes[0].error.startswith(_USER_ERROR) else 1), lines


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


def _outcomes(logs: Sequence[Path], state: str, patience_s: int) -> list[Outcome]:
    """Read all ranks' results."""
    while True:
        outcomes = [_outcome(rank, log, state) for rank, log in enumerate(logs)]
        failed = any(outcome.error and outcome.ended is not None for outcome in outcomes)
        if failed or patience_s <= 0 or all(o.ended is not None for o in outcomes):
            return outcomes
        time.sleep(1)
        patience_s -= 1


def _outcome(rank: int, log: Path, state: str) -> Outcome:
    """Read how a rank ended from the result that submitit wrote for it beside its log."""
    from submitit.core.utils import pickle_load

    path = log.with_name(log.name.replace("_log.err", "_result.pkl"))
    if not path.exists():
        return Outcome(rank, log, error=f"killed, or ended without a result ({state})")
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
