"""Jobs of a Slurm cluster, sent by submitit."""

import contextlib
import io
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dist_vse.common.errors import UserError
from dist_vse.launch.cluster import ClusterConfig
from dist_vse.launch.environment import job_port
from dist_vse.launch.result import result_path
from dist_vse.launch.schedulers import sbatch, scontrol
from dist_vse.launch.schedulers.base import JobSpec, JobState, SubmittedJob, Work
from dist_vse.runs.lease import LostLease

_MAX_TIMEOUTS = 10_000
"""submitit's own bound on attempts; ours is the run's last step."""
_USER_ERROR, _INTERRUPTED = 2, 130  # exit codes of a run
_RESULTS_WAIT_S = 20


class Slurm:
    """A Slurm cluster."""

    name = "slurm"
    poll_s = 5.0
    results_delay_s = 10
    ctrl_c_cancels = False
    # SIGTERM comes before a requeue. A job whose ranks die of it has failed: it is not requeued.
    ignored_signals: tuple[str, ...] = ("USR1", "USR2", "TERM")
    rendezvous_hint = ("<first node>", "<from the job's id and its restarts>")

    def is_available(self) -> bool:
        """Return whether sbatch is found."""
        return shutil.which("sbatch") is not None

    def check_available(self) -> None:
        """Raise UserError if sbatch or srun is missing."""
        if not (shutil.which("sbatch") and shutil.which("srun")):
            raise UserError(
                "scheduler: slurm, but sbatch and srun are not on PATH; submit from a login node, "
                "or use a cluster file with scheduler: local"
            )

    def check_cluster(self, cluster: ClusterConfig) -> None:
        """Do nothing: every setting has its meaning for Slurm."""

    def ignored_settings(self, cluster: ClusterConfig) -> list[str]:
        """Return nothing: every setting has its meaning for Slurm."""
        return []

    def rank_environment(
        self, cluster: ClusterConfig, inherited: Mapping[str, str]
    ) -> dict[str, str]:
        """Return nothing: Slurm sets what the ranks need."""
        return {}

    def parameters(
        self, cluster: ClusterConfig, *, name: str, folder: Path, env: Mapping[str, str]
    ) -> dict[str, Any]:
        """Return the parameters of submitit's SlurmExecutor."""
        # Not PYTHONPATH: a module that `setup` loads may add to it.
        early = {key: value for key, value in env.items() if key != "PYTHONPATH"}
        return sbatch.parameters(cluster, name, folder, early)

    def conflicts(
        self,
        cluster: ClusterConfig,
        inherited: Mapping[str, str],
        parameters: Mapping[str, Any],
    ) -> list[str]:
        """List what sbatch reads, what would mislead it, and the GPUs, which Slurm sets."""
        return sbatch.conflicts(cluster, inherited, parameters)

    def script(self, spec: JobSpec, *, runs: int, parallel: int) -> str:
        """Return the batch script; a sweep is one array."""
        array = {"map_count": runs, "array_parallelism": parallel} if runs > 1 else {}
        return sbatch.script(spec, {**spec.parameters, **array}).rstrip()

    def start(self, spec: JobSpec, work: Work) -> SubmittedJob:
        """Send one job."""
        return _submit(spec, [work])[0]

    def start_sweep(
        self, jobs: Iterable[tuple[JobSpec, Work]], parallel: int
    ) -> Iterator[SubmittedJob]:
        """Send one array; its jobs differ in their work only."""
        specs, works = zip(*jobs, strict=True)
        yield from _submit(specs[0], works, array_parallelism=parallel)

    def unreachable(self, job: SubmittedJob) -> str:
        """Ask for a login node where scontrol is missing."""
        return "" if scontrol.is_here() else "scontrol is not on PATH; use a login node"

    def state(self, job: SubmittedJob) -> JobState:
        """Return what the controller says."""
        return scontrol.job_state(job.job_id)

    def states(self, jobs: Sequence[SubmittedJob]) -> list[JobState]:
        """Return what the controller says of all its jobs, in one answer."""
        return scontrol.job_states([job.job_id for job in jobs])

    def cancel(self, job: SubmittedJob) -> None:
        """Have Slurm send SIGTERM, and SIGKILL after the partition's grace."""
        asked = subprocess.run(["scancel", job.job_id], capture_output=True, text=True)
        if asked.returncode != 0:
            raise UserError(f"scancel {job.job_id}: {' '.join(asked.stderr.split())}")

    def kill(self, job: SubmittedJob) -> None:
        """Cancel it: a job that waits in the queue leaves it."""
        self.cancel(job)

    def enter_rank(self, environment: Any) -> None:
        """Do nothing: srun ends the ranks together."""

    def rendezvous(self, environment: Any, port: int | None) -> tuple[str, int]:
        """Return the first node, and a port that differs between jobs and between attempts."""
        restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        return environment.hostnames[0], job_port(int(environment.raw_job_id), restarts)

    def on_error(self, environment: Any, error: Exception) -> None:
        """Exit quietly if a later attempt runs the job; forbid another try after a UserError."""
        if isinstance(error, LostLease):  # results and marks are the later attempt's to write
            sys.exit(f"error: {error}")
        if isinstance(error, UserError):
            sbatch.forbid_another_try(environment.paths.folder.parent)

    def on_result(self, environment: Any, code: Any) -> None:
        """On rank 0, queue a run again that saved early; exit with the code of an incomplete one.

        A job that ended as a success would start what depends on it (`--dependency=afterok`).
        """
        if environment.global_rank != 0 or code == 0:
            return
        if code == _INTERRUPTED:
            scontrol.requeue(environment.job_id)
        if code == _USER_ERROR:
            sbatch.forbid_another_try(environment.paths.folder.parent)
        _exit_with(environment, code)


def _submit(spec: JobSpec, works: Iterable[Work], **more: Any) -> list[SubmittedJob]:
    """Send one job, or several as an array. Raises UserError if Slurm refuses them."""
    import submitit
    from submitit.core.utils import FailedJobError

    works = list(works)
    executor = submitit.SlurmExecutor(
        spec.folder, python=spec.python, max_num_timeout=_MAX_TIMEOUTS
    )
    executor.update_parameters(**{**spec.parameters, **more})
    try:
        # submitit prints what it also raises.
        with (
            sbatch.hidden_variables(executor.parameters),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            if len(works) == 1:
                return [_submitted(executor.submit(works[0]))]
            with executor.batch():
                sent = [executor.submit(work) for work in works]
            return [_submitted(job) for job in sent]
    except FailedJobError as error:
        raise UserError(f"sbatch refused the job: {' '.join(str(error).split())}") from error


def _submitted(job: Any) -> SubmittedJob:
    logs = str(job.task(0).paths.stderr).replace("_0_log.err", "_RANK_log.err")
    return SubmittedJob(job.job_id, Slurm.name, logs, job.num_tasks, socket.gethostname())


def _exit_with(environment: Any, code: Any) -> None:
    """Exit with rank 0's result as the process's code, once the other ranks have stored theirs."""
    from submitit.core.utils import JobPaths

    own = environment.paths
    others = [JobPaths(own.folder, own.job_id, rank) for rank in range(1, environment.num_tasks)]
    logs = [Path(other.stderr) for other in others]
    end = time.monotonic() + _RESULTS_WAIT_S  # srun ends the other ranks with this one
    while not all(result_path(log).exists() for log in logs) and time.monotonic() < end:
        time.sleep(0.1)
    sys.exit(code)
