"""Jobs on this machine: submitit's controller starts the ranks, and all of them end together."""

import atexit
import contextlib
import ctypes
import os
import signal
import socket
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dist_vse.common.errors import UserError
from dist_vse.launch.cluster import ClusterConfig
from dist_vse.launch.schedulers.base import JobSpec, JobState, SubmittedJob, Work, take_turns

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_NO_LIMIT_MIN = 60 * 24 * 365 * 10
"""submitit wants a time limit; nothing would queue a local job again after it."""

_SLURM_ONLY = (
    "mem_gib",
    "partition",
    "account",
    "qos",
    "constraint",
    "time_min",
    "exclusive",
    "signal_before_end_s",
    "requeue",
)
"""Settings that mean nothing without a queue."""


class Local:
    """Processes of this machine."""

    name = "local"
    poll_s = 0.5
    results_delay_s = 0
    ctrl_c_cancels = True
    ignored_signals: tuple[str, ...] = ("USR1", "USR2")
    rendezvous_hint = ("127.0.0.1", "<a free port>")

    def is_available(self) -> bool:
        """Return True."""
        return True

    def check_available(self) -> None:
        """Do nothing: every machine can start processes."""

    def check_cluster(self, cluster: ClusterConfig) -> None:
        """Raise UserError for what one machine without a scheduler can't do."""
        if cluster.nodes > 1:
            raise UserError(
                f"nodes ({cluster.nodes}) must be 1 for local processes; set nodes to 1, or use "
                "scheduler: slurm on a machine that has sbatch"
            )
        if cluster.setup:
            raise UserError(
                f"setup ({cluster.setup[0]!r} ...) is for Slurm only; run these lines in this "
                "shell, and remove them from the cluster file"
            )
        for name in ("container", "srun"):
            value = getattr(cluster, name)
            if value:
                raise UserError(
                    f"{name} ({value!r}) is for Slurm only; remove it from the cluster file, and "
                    "run dist-vse itself in the container"
                )
        if cluster.failures:
            raise UserError(
                f"failures ({cluster.failures}) is for Slurm only, which can queue a job again; "
                "set it to 0 for local processes"
            )

    def ignored_settings(self, cluster: ClusterConfig) -> list[str]:
        """List the settings that only Slurm can obey, where they differ from the default."""
        default = ClusterConfig()
        given = {name: getattr(cluster, name) for name in _SLURM_ONLY}
        return [f"{name}={v}" for name, v in given.items() if v != getattr(default, name)]

    def rank_environment(
        self, cluster: ClusterConfig, inherited: Mapping[str, str]
    ) -> dict[str, str]:
        """Return the loopback as network card, and GPUs out of those visible here.

        Raises UserError if fewer GPUs are visible than the cluster file asks for.
        """
        variables = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
        if cluster.gpus_per_node and "CUDA_VISIBLE_DEVICES" in inherited:
            visible = _visible(inherited["CUDA_VISIBLE_DEVICES"])
            if len(visible) < cluster.gpus_per_node:
                raise UserError(
                    f"gpus_per_node ({cluster.gpus_per_node}) is more than the {len(visible)} of "
                    f"CUDA_VISIBLE_DEVICES={inherited['CUDA_VISIBLE_DEVICES']!r} in this shell; "
                    "lower it, or make more GPUs visible"
                )
            variables["CUDA_VISIBLE_DEVICES"] = ",".join(visible[: cluster.gpus_per_node])
        return variables

    def parameters(
        self, cluster: ClusterConfig, *, name: str, folder: Path, env: Mapping[str, str]
    ) -> dict[str, Any]:
        """Return the parameters of submitit's LocalExecutor."""
        return {
            "tasks_per_node": cluster.processes_per_node,
            "gpus_per_node": cluster.gpus_per_node,
            "timeout_min": _NO_LIMIT_MIN,
        }

    def conflicts(
        self,
        cluster: ClusterConfig,
        inherited: Mapping[str, str],
        parameters: Mapping[str, Any],
    ) -> list[str]:
        """Return nothing: the ranks' own variables are all that counts."""
        return []

    def script(self, spec: JobSpec, *, runs: int, parallel: int) -> str:
        """Return the command that the ranks run."""
        size = spec.parameters["tasks_per_node"]
        return f"{size} processes on this machine: {spec.python} -u -m submitit ..."

    def start(self, spec: JobSpec, work: Work) -> SubmittedJob:
        """Start the controller, which starts the ranks."""
        import submitit

        executor = submitit.LocalExecutor(spec.folder, python=spec.python)
        executor.update_parameters(**spec.parameters)
        with _detached(), _environment(spec.env):
            started = executor.submit(work)
        logs = str(started.task(0).paths.stderr).replace("_0_log.err", "_RANK_log.err")
        return SubmittedJob(
            started.job_id, self.name, logs, started.num_tasks, socket.gethostname()
        )

    def start_sweep(
        self, jobs: Iterable[tuple[JobSpec, Work]], parallel: int
    ) -> Iterator[SubmittedJob]:
        """Start a job whenever one has ended. This process must live until the last one starts."""
        return take_turns(self, jobs, parallel)

    def unreachable(self, job: SubmittedJob) -> str:
        """Name the machine whose processes they are, if it is another one."""
        if job.host == socket.gethostname():
            return ""
        return f"its processes run on {job.host}; ask there"

    def state(self, job: SubmittedJob) -> JobState:
        """Return whether the controller runs; nobody keeps its exit code."""
        running = _is_controller(int(job.job_id))
        return JobState("RUNNING" if running else "ENDED", not running)

    def states(self, jobs: Sequence[SubmittedJob]) -> list[JobState]:
        """Return the state of each: the kernel answers at once."""
        return [self.state(job) for job in jobs]

    def cancel(self, job: SubmittedJob) -> None:
        """Have the controller pass the request on to the ranks."""
        os.kill(int(job.job_id), signal.SIGTERM)

    def kill(self, job: SubmittedJob) -> None:
        """Kill the controller; the kernel ends its ranks."""
        os.kill(int(job.job_id), signal.SIGKILL)

    def enter_rank(self, environment: Any) -> None:
        """Have the kernel end this rank when the controller ends, whatever the reason."""
        controller = int(environment.job_id)
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != controller:  # it ended before we asked
            sys.exit(f"the job's controller (process {controller}) is gone")

    def rendezvous(self, environment: Any, port: int | None) -> tuple[str, int]:
        """Return the port that was free at the start."""
        assert port is not None, "a local job needs a port"
        return "127.0.0.1", port

    def on_error(self, environment: Any, error: Exception) -> None:
        """End the whole job once this rank has stored its error, as srun --kill-on-bad-exit does.

        Without this the other ranks wait for it until their time limit.
        """
        atexit.register(os.kill, os.getppid(), signal.SIGKILL)

    def on_result(self, environment: Any, code: Any) -> None:
        """Do nothing: nobody would start the job again."""


def _visible(devices: str) -> list[str]:
    """Return the GPUs that CUDA sees: those before the first invalid number, such as -1."""
    names = [name.strip() for name in devices.split(",")]
    none = (number for number, name in enumerate(names) if name in ("", "-1", "NoDevFiles"))
    return names[: next(none, len(names))]


def _is_controller(pid: int) -> bool:
    """Return whether this process is submitit's controller, and not one that got its number."""
    import psutil

    try:
        return "submitit.local._local" in psutil.Process(pid).cmdline()
    except psutil.Error:  # gone, or a zombie
        return False


@contextlib.contextmanager
def _detached() -> Iterator[None]:
    """Start processes that neither hold our output open nor react to Ctrl-C during their start.

    Otherwise `submit | tee log` would wait for the job. And Ctrl-C, which asks the ranks to save,
    would end submitit's controller at once with a traceback.
    """
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.stdout.flush()
    kept = [(number, os.dup(number)) for number in (1, 2)]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for number, _ in kept:
            os.dup2(nowhere, number)
        yield
    finally:
        for number, own in kept:
            os.dup2(own, number)
            os.close(own)
        os.close(nowhere)
        signal.signal(signal.SIGINT, handler)


@contextlib.contextmanager
def _environment(env: Mapping[str, str]) -> Iterator[None]:
    """Start processes with these variables: some are read before a rank could set them."""
    own = dict(os.environ)
    os.environ.update(env)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(own)
