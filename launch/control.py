"""A submitted run, seen from outside: its state, its logs, its end."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dist_vse.common.errors import UserError
from dist_vse.common.files import write_json
from dist_vse.runs.files import CHECKPOINTS, CONFIG_NAME, METRICS_NAME
from launch import slurm
from launch.follow import log_pattern, rank_log, verdict

_NOTE = "job.json"


@dataclass(frozen=True)
class Submitted:
    """What is noted of a run's last submission."""

    job_id: str
    scheduler: str
    logs: str
    """Path of a rank's log, with RANK for its number."""
    num_ranks: int
    host: str
    """From where it was submitted; there a local job runs."""


def note(folder: Path, job: Any, scheduler: str) -> None:
    """Note a job in its run's folder for submissions."""
    host = socket.gethostname()
    noted = Submitted(job.job_id, scheduler, log_pattern(job), job.num_tasks, host)
    write_json(folder / _NOTE, asdict(noted), shared=True)


def read_note(run_dir: Path) -> Submitted:
    """Return a run's last submission. Raises UserError if there is none, or it can't be read."""
    path = run_dir / "submit" / _NOTE
    if not path.is_file():
        what = "was not started by dist-vse submit" if run_dir.is_dir() else "no such folder"
        raise UserError(f"{run_dir}: {what}; give the output_dir of a submitted run")
    try:
        return Submitted(**json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: written by another version; remove it") from error


def job_state(job: Submitted) -> str:
    """Return the job's state in one word, such as RUNNING; UNKNOWN if nobody here can tell."""
    if job.scheduler == "slurm":
        return slurm.job_state(job.job_id) or "FORGOTTEN"
    if _is_elsewhere(job):
        return "UNKNOWN"
    return "RUNNING" if _is_controller(int(job.job_id)) else "ENDED"


def _has_ended(job: Submitted) -> bool:
    if job.scheduler == "slurm":
        return slurm.has_ended(job.job_id)
    return job_state(job) == "ENDED"


def _is_elsewhere(job: Submitted) -> bool:
    return job.scheduler == "local" and job.host != socket.gethostname()


def state(run_dir: Path) -> str:
    """Return in one word the state of a run's last job; nothing if it was never submitted."""
    try:
        return job_state(read_note(run_dir))
    except UserError:
        return ""


def causes(run_dir: Path) -> list[str]:
    """Say, a line each, why a run's last job ended early; nothing if it did not, or lives on."""
    try:
        job = read_note(run_dir)
        ended = _has_ended(job)
    except UserError:
        return []
    if not ended:
        return []
    code, lines = verdict(job.logs, job.num_ranks, job_state(job))
    return ["saved and stopped; submit the run again to continue it"] if code == 130 else lines


def check_free(run_dir: Path) -> None:
    """Raise UserError if the run's last job has not ended yet."""
    if not (run_dir / "submit" / _NOTE).is_file():
        return
    job = read_note(run_dir)
    if job.scheduler == "slurm" and not slurm.is_here():  # then nobody can tell
        return
    state = job_state(job)
    if state != "UNKNOWN" and not _has_ended(job):
        raise UserError(
            f"{run_dir}: job {job.job_id} of this run is {state}; follow it with `dist-vse logs "
            f"{run_dir} --follow`, or end it with `dist-vse cancel {run_dir}`"
        )


def status(run_dir: Path) -> str:
    """Say in a few lines where a submitted run stands."""
    job = read_note(run_dir)
    state, last, total = job_state(job), last_metrics(run_dir, "train"), total_steps(run_dir)
    reasons = causes(run_dir)
    if state in ("ENDED", "FORGOTTEN"):  # nobody keeps the exit code
        whole = last is not None and last["step"] == total
        state += " after its last step" if whole else " before its last step"
        state += "" if whole or reasons else "; its log says why"
    if _is_elsewhere(job):
        state += f" here; ask on {job.host}"
    lines = [f"job {job.job_id} ({job.scheduler}): {state}"]
    if last:
        lines.append(f"step {last['step']}/{total}, loss {last['loss']:.4f}")
    else:
        lines.append(f"no step yet of {total}" if total else "not started yet")
    names = [path.name for path in sorted((run_dir / CHECKPOINTS).glob("step-*"))]
    finished = [name for name in names if "." not in name]
    lines.append(f"last checkpoint: {finished[-1] if finished else 'none'}")
    lines += [f"ended: {cause}" for cause in reasons]
    lines.append(f"log: {rank_log(job.logs, 0)}")
    return "\n".join(lines)


def show_log(run_dir: Path, *, rank: int, follow: bool) -> None:
    """Print a rank's log; `follow` goes on until the job has ended."""
    job = read_note(run_dir)
    path, offset = rank_log(job.logs, rank), 0
    if not path.exists() and not follow:
        raise UserError(f"{path}: no log; the job is {job_state(job)}, or has no rank {rank}")
    while True:
        ended = _has_ended(job) or _is_elsewhere(job)
        if path.exists():
            with path.open("rb") as file:
                file.seek(offset)
                new = file.read()
            offset += len(new)
            sys.stdout.write(new.decode(errors="replace"))
            sys.stdout.flush()
        if ended or not follow:
            return
        time.sleep(1)


def cancel(run_dir: Path) -> str:
    """Ask a run's job to save and end for good; say what was done."""
    job = read_note(run_dir)
    if _is_elsewhere(job):
        raise UserError(f"job {job.job_id} is processes of {job.host}; cancel it there")
    if _has_ended(job):
        return f"job {job.job_id} has ended already ({job_state(job)})"
    if job.scheduler == "slurm":
        asked = subprocess.run(["scancel", job.job_id], capture_output=True, text=True)
        if asked.returncode != 0:
            raise UserError(f"scancel {job.job_id}: {' '.join(asked.stderr.split())}")
    else:
        os.kill(int(job.job_id), signal.SIGTERM)
    return f"asked job {job.job_id} to save and end; `dist-vse status {run_dir}` shows when it has"


def last_metrics(run_dir: Path, kind: str) -> dict[str, Any] | None:
    """Return the last line of metrics of a kind (train, eval); None if there is none."""
    path, last = run_dir / METRICS_NAME, None
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            record: dict[str, Any] = json.loads(line)
        except json.JSONDecodeError:
            continue  # is being written just now
        if record["kind"] == kind:
            last = record
    return last


def total_steps(run_dir: Path) -> int:
    """Return the steps that a run shall take; 0 if it has not started."""
    from dist_vse.config import load_config

    path = run_dir / CONFIG_NAME
    return load_config(path).total_steps if path.is_file() else 0


def _is_controller(pid: int) -> bool:
    """Tell whether this process is submitit's controller, and not one that got its number."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return b"submitit.local._local" in words
