"""Where a submitted run stands: its job, its last step, and why it ended."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dist_vse.common.errors import UserError, first_line
from dist_vse.common.reading import BadFileError, is_count, is_number, json_lines
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
_TAIL_BYTES = 1 << 20


def job_state(job: SubmittedJob) -> JobState:
    """Return the job's state; UNKNOWN if this machine can't ask about it."""
    scheduler = find_scheduler(job.scheduler)
    if scheduler.unreachable(job):
        return JobState("UNKNOWN", ended=False)
    return scheduler.state(job)


def state_name(run_dir: Path) -> str:
    """Return in one word the state of a run's last job; empty if it was never submitted."""
    try:
        return job_state(load_job(run_dir)).name
    except UserError:
        return ""


def causes(run_dir: Path) -> list[str]:
    """Return one line for each cause of a run's early end; none if it completed, or still runs."""
    try:
        job = load_job(run_dir)
        state = job_state(job)
    except UserError:
        return []
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
    state, last, total = job_state(job), last_metrics(run_dir, "train"), total_steps(run_dir)
    reasons = causes(run_dir)
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


def last_metrics(run_dir: Path, kind: str) -> dict[str, Any] | None:
    """Return the last line of metrics of a kind (train, eval); None if there is none.

    A line that is damaged, or being written, is left out. Raises UserError if the file can't be
    read.
    """
    path = run_dir / METRICS_NAME
    try:
        size = path.stat().st_size if path.is_file() else 0
        for start in (max(0, size - _TAIL_BYTES), 0):  # a long run's file may have a GiB
            found = [line for line in _metrics(path, start) if line["kind"] == kind]
            if found or start == 0:
                break
    except (BadFileError, OSError) as error:
        raise UserError(f"{path}: can't be read ({first_line(error)})") from error
    return found[-1] if found else None


def _metrics(path: Path, start: int) -> Iterator[dict[str, Any]]:
    """Yield the whole lines behind byte `start` whose values have the types that we write."""
    for _, line in json_lines(path, start=start):
        if not is_count(line.get("step")):
            continue
        numbers = _NUMBERS.get(str(line.get("kind")))
        if numbers and all(is_number(line.get(name)) for name in numbers):
            yield line


def total_steps(run_dir: Path) -> int:
    """Return the steps that a run will take; 0 if it has not started."""
    from dist_vse.config import load_config

    path = run_dir / CONFIG_NAME
    return load_config(path).total_steps if path.is_file() else 0
