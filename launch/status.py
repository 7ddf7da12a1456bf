"""Where a submitted run stands: its job, its last step, and why it ended."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dist_vse.common.errors import UserError, first_line
from dist_vse.common.reading import BadFileError, is_count, is_number, lines_from_end, parse_json
from dist_vse.common.terminal import printable
from dist_vse.launch.outcome import find_outcome
from dist_vse.launch.schedulers import find_scheduler
from dist_vse.launch.schedulers.base import (
    NO_EXIT_CODE,
    JobState,
    SubmittedJob,
    load_job,
    was_submitted,
)
from dist_vse.runs.files import CHECKPOINTS, CONFIG_NAME, METRICS_NAME

RECALLS = ("i2t_r1", "t2i_r1", "rsum")
_NUMBERS = {"train": ("loss",), "eval": RECALLS}
"""What a line of metrics must hold, by its kind."""


def job_state(job: SubmittedJob) -> JobState:
    """Return the job's state; UNKNOWN if this machine can't ask about it."""
    scheduler = find_scheduler(job.scheduler)
    if scheduler.unreachable(job):
        return JobState("UNKNOWN", ended=False)
    return scheduler.state(job)


def job_states(jobs: Sequence[SubmittedJob]) -> list[JobState]:
    """Return what `job_state` does of each job, with few questions to the schedulers."""
    found: dict[SubmittedJob, JobState] = {}
    for name in dict.fromkeys(job.scheduler for job in jobs):
        scheduler = find_scheduler(name)
        own = [job for job in jobs if job.scheduler == name]
        reachable = [job for job in own if not scheduler.unreachable(job)]
        found |= dict.fromkeys(own, JobState("UNKNOWN", ended=False))
        found |= zip(reachable, scheduler.states(reachable), strict=True)
    return [found[job] for job in jobs]


def causes(job: SubmittedJob, state: JobState) -> list[str]:
    """Return one line for each cause of a job's early end; none if it completed, or still runs."""
    if not state.ended:
        return []
    code, lines = find_outcome(job, state.name)
    return ["saved and stopped; submit the run again to continue it"] if code == 130 else lines


def ensure_not_running(run_dir: Path) -> None:
    """Raise UserError if the run's last job has not ended yet."""
    if not was_submitted(run_dir):
        return
    job = load_job(run_dir)
    if find_scheduler(job.scheduler).unreachable(job):
        return  # a second attempt takes the lease from the first
    state = job_state(job)
    if not state.ended:
        raise UserError(
            f"{run_dir}: job {job.job_id} of this run is {state.name}; follow it with `dist-vse "
            f"logs {run_dir} --follow`, or end it with `dist-vse cancel {run_dir}`"
        )


def status(run_dir: Path) -> str:
    """Return a few lines that say where a submitted run stands."""
    job = load_job(run_dir)
    state, total = job_state(job), total_steps(run_dir)
    last, reasons = last_metrics(run_dir).get("train"), causes(job, state)
    words = state.name
    if state.name in NO_EXIT_CODE:
        completed = last is not None and last["step"] == total
        words += " after its last step" if completed else " before its last step"
        words += "" if completed or reasons else "; see its log"
    if why := find_scheduler(job.scheduler).unreachable(job):
        words += f" here: {why}"
    lines = [f"job {job.job_id} ({job.scheduler}): {words}"]
    if last:
        lines.append(f"step {last['step']}/{total}, loss {last['loss']:.4f}")
    else:
        lines.append(f"no step yet of {total}" if total else "not started yet")
    names = [path.name for path in sorted((run_dir / CHECKPOINTS).glob("step-*"))]
    finished = [name for name in names if "." not in name]
    lines.append(f"last checkpoint: {finished[-1] if finished else 'none'}")
    lines += [f"ended: {cause}" for cause in reasons]
    lines.append(f"log: {job.log(0)}")
    return printable("\n".join(lines))


def last_metrics(run_dir: Path) -> dict[str, dict[str, Any]]:
    """Return the last line of metrics of each kind (train, eval) that there is.

    A line that is damaged, or being written, is left out. Raises UserError if the file can't be
    read.
    """
    path = run_dir / METRICS_NAME
    found: dict[str, dict[str, Any]] = {}
    wanted = {kind: f'"{kind}"'.encode() for kind in _NUMBERS}
    try:
        for text in lines_from_end(path):  # a long run's file may have a GiB
            for kind in [kind for kind, word in wanted.items() if word in text]:
                line = _metrics(text, kind)
                if line is not None:
                    found[kind] = line
                    del wanted[kind]
            if not wanted:
                break
    except BadFileError as error:
        raise UserError(f"{path}: can't be read ({first_line(error)})") from error
    return found


def _metrics(text: bytes, kind: str) -> dict[str, Any] | None:
    """Return a line of a kind whose values have the types that we write; None for any other."""
    try:
        line = parse_json(text, dict)
    except BadFileError:
        return None
    numbers = all(is_number(line.get(name)) for name in _NUMBERS[kind])
    return line if line.get("kind") == kind and is_count(line.get("step")) and numbers else None


def total_steps(run_dir: Path) -> int:
    """Return the steps that a run will take; 0 if it has not started."""
    from dist_vse.config import load_config

    path = run_dir / CONFIG_NAME
    return load_config(path).total_steps if path.is_file() else 0
