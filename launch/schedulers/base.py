"""What a scheduler does for `dist-vse submit`: start a job, report on it, end it.

To add one, write a class with the members of `Scheduler` and add it to the table in
launch/schedulers/__init__.py. Nothing else compares schedulers by name.
"""

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from dist_vse.common.errors import UserError, first_line
from dist_vse.common.files import write_json
from dist_vse.common.reading import BadFileError, is_count, read_json
from dist_vse.common.terminal import one_line
from dist_vse.launch.cluster import ClusterConfig

Work = Callable[[], Any]
"""What every rank of a job calls; it is pickled."""

NO_EXIT_CODE = ("ENDED", "FORGOTTEN")
"""States of a job that has ended, and whose scheduler kept no exit code."""

_JOB_FILE = "job.json"
_TURN_S = 0.2
_MAX_RANKS = 1 << 16


@dataclass(frozen=True)
class JobSpec:
    """What a scheduler needs to start a job."""

    folder: Path
    """For its logs and results; submitit's `%j` stands for the job's id."""
    python: str
    """The shell command that starts a rank's Python."""
    parameters: Mapping[str, Any]
    """What `Scheduler.parameters` returned."""
    env: Mapping[str, str]
    """Variables that are the same on all ranks."""


@dataclass(frozen=True)
class SubmittedJob:
    """A job that was started; `dist-vse status` and others read it from the run's folder."""

    job_id: str
    scheduler: str
    logs: str
    """Path of a rank's log, with RANK for its number."""
    num_ranks: int
    host: str
    """Where `submit` ran."""

    def log(self, rank: int) -> Path:
        """Return the path of a rank's log (stderr)."""
        path = Path(self.logs)
        return path.with_name(path.name.replace("RANK", str(rank)))

    def save(self, run_dir: Path) -> None:
        """Write it into the run's folder, as its last job."""
        write_json(run_dir / "submit" / _JOB_FILE, asdict(self), shared=True)


def was_submitted(run_dir: Path) -> bool:
    """Return whether `dist-vse submit` has started this run."""
    return (run_dir / "submit" / _JOB_FILE).is_file()


def load_job(run_dir: Path) -> SubmittedJob:
    """Return a run's last job. Raises UserError if there is none, or the file can't be read."""
    if not was_submitted(run_dir):
        what = "was not started by dist-vse submit" if run_dir.is_dir() else "no such folder"
        raise UserError(f"{run_dir}: {what}; give the output_dir of a submitted run")
    path = run_dir / "submit" / _JOB_FILE
    try:
        return _checked(SubmittedJob(**read_json(path)))
    except (BadFileError, TypeError) as error:
        reason = one_line(first_line(error))
        raise UserError(
            f"{path}: damaged, or written by another version ({reason}); remove it"
        ) from error


def _checked(job: SubmittedJob) -> SubmittedJob:
    """Return a job read from a file. Raises BadFileError for values that `start` never writes.

    The id becomes an argument of scancel and scontrol, which would take another one for an option.
    """
    if not all(isinstance(value, str) for name, value in vars(job).items() if name != "num_ranks"):
        raise BadFileError("job_id, scheduler, logs and host must be text")
    if not re.fullmatch(r"\d+(_\d+)?", job.job_id, re.ASCII):
        raise BadFileError(f"job_id is {job.job_id[:40]!r}")
    if not is_count(job.num_ranks) or not 1 <= job.num_ranks <= _MAX_RANKS:
        raise BadFileError(f"num_ranks is {str(job.num_ranks)[:40]}")
    return job


@dataclass(frozen=True)
class JobState:
    """Where a job stands."""

    name: str
    """One word, such as RUNNING; one of NO_EXIT_CODE if that is all that is known."""
    ended: bool
    """The job is over, and will not be queued again."""


class Scheduler(Protocol):
    """One way to run the ranks of a job.

    Every rank must run `python -m submitit.core._submit FOLDER`, which calls the pickled work; the
    work stores its result beside the rank's log. submitit's executors do so.
    """

    name: str
    """What `scheduler:` in a cluster file says."""
    poll_s: float
    """Seconds between two looks at a job."""
    results_delay_s: int
    """Seconds by which a shared file system may show results late."""
    ctrl_c_cancels: bool
    """Whether Ctrl-C in `submit --wait` cancels the job; otherwise the job goes on."""
    ignored_signals: tuple[str, ...]
    """Signals that would kill Python during its imports, and that this scheduler may send then."""
    rendezvous_hint: tuple[str, str]
    """What a dry run prints for MASTER_ADDR and MASTER_PORT."""

    # Before the start.

    def is_available(self) -> bool:
        """Return whether `scheduler: auto` may choose this one here."""

    def check_available(self) -> None:
        """Raise UserError if this machine can't submit jobs."""

    def check_cluster(self, cluster: ClusterConfig) -> None:
        """Raise UserError for settings that this scheduler can't obey."""

    def ignored_settings(self, cluster: ClusterConfig) -> list[str]:
        """List the settings in the cluster file that this scheduler ignores."""

    def rank_environment(
        self, cluster: ClusterConfig, inherited: Mapping[str, str]
    ) -> dict[str, str]:
        """Return variables that the ranks need; the cluster file's `env` replaces them."""

    def parameters(
        self, cluster: ClusterConfig, *, name: str, folder: Path, env: Mapping[str, str]
    ) -> dict[str, Any]:
        """Return what `start` needs; `folder` holds the jobs' folders."""

    def conflicts(
        self,
        cluster: ClusterConfig,
        inherited: Mapping[str, str],
        parameters: Mapping[str, Any],
    ) -> list[str]:
        """List variables of the shell that contradict the job, and what is done about each."""

    def script(self, spec: JobSpec, *, runs: int, parallel: int) -> str:
        """Return what would be started, as text; more than one run are a sweep."""

    # Start.

    def start(self, spec: JobSpec, work: Work) -> SubmittedJob:
        """Start one job. Raises UserError if the scheduler refuses it."""

    def start_sweep(
        self, jobs: Iterable[tuple[JobSpec, Work]], parallel: int
    ) -> Iterator[SubmittedJob]:
        """Start several jobs, at most `parallel` at a time; `take_turns` does it one by one."""

    # From outside: `status`, `logs`, `cancel`.

    def unreachable(self, job: SubmittedJob) -> str:
        """Say why this machine can't ask about the job, and where to ask; empty if it can."""

    def state(self, job: SubmittedJob) -> JobState:
        """Return the job's state; only called where the job is reachable."""

    def states(self, jobs: Sequence[SubmittedJob]) -> list[JobState]:
        """Return the states of many reachable jobs, with few questions."""

    def cancel(self, job: SubmittedJob) -> None:
        """Ask the job to save and exit."""

    def kill(self, job: SubmittedJob) -> None:
        """End the job at once."""

    # In every rank. `environment` is submitit's JobEnvironment.

    def enter_rank(self, environment: Any) -> None:
        """Prepare the process, before the work."""

    def rendezvous(self, environment: Any, port: int | None) -> tuple[str, int]:
        """Return the address and the port where the ranks meet; `port` is free on this machine."""

    def on_error(self, environment: Any, error: Exception) -> None:
        """React to an error of the work; it is raised again afterwards."""

    def on_result(self, environment: Any, code: Any) -> None:
        """React to the work's result, such as an exit code that asks for another attempt."""


def take_turns(
    scheduler: Scheduler, jobs: Iterable[tuple[JobSpec, Work]], parallel: int
) -> Iterator[SubmittedJob]:
    """Start a job whenever fewer than `parallel` run; return after the last one has ended."""
    running: list[SubmittedJob] = []
    for spec, work in jobs:
        while len(running := _still_running(scheduler, running)) >= parallel:
            time.sleep(_TURN_S)
        running.append(scheduler.start(spec, work))
        yield running[-1]
    while _still_running(scheduler, running):
        time.sleep(_TURN_S)


def _still_running(scheduler: Scheduler, jobs: Sequence[SubmittedJob]) -> list[SubmittedJob]:
    return [job for job in jobs if not scheduler.state(job).ended]
