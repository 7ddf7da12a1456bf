"""Submitting a run: plan it, check it, show it, and hand it to submitit."""

import contextlib
import hashlib
import io
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_vse.common.errors import UserError
from dist_vse.common.files import write_text
from dist_vse.config import dump_config, load_config
from dist_vse.runs.files import SCALE_NAME
from dist_vse.runs.trackers import check_tracker_names
from launch import control, local, slurm
from launch.cluster import ClusterConfig, load_cluster
from launch.code import code_folder, pin
from launch.environment import free_port, nested_slurm_names
from launch.job import Job, Scale, Train


def python_command(scheduler: str, code: Path, python: str, container: str | None = None) -> str:
    """Return the shell command that starts a rank's Python on the pinned code.

    It is deaf, until the job listens, to the signals that ask for a save: before that they would
    end Python. Under Slurm so it is to SIGTERM, which comes before a requeue: a job whose ranks
    die of it has failed and is not queued again. (`env --ignore-signal` says the same, but not in
    coreutils before 8.31; `python -m` looks into the current folder first.)
    """
    signals = "USR1 USR2 TERM" if scheduler == "slurm" else "USR1 USR2"
    script = f'trap "" {signals}; cd {shlex.quote(str(code))} && exec "$0" "$@"'
    command = [*shlex.split(container or ""), python]
    return f"sh -c {shlex.quote(script)} {shlex.join(command)}"


@dataclass(frozen=True)
class Plan:
    """All that a submission will do, known before anything is written or started."""

    scheduler: str
    cluster: ClusterConfig
    folder: Path
    """The run's folder for submissions."""
    jobs: Path
    """Where every job gets a folder, by its id; the runs of a sweep share it."""
    config_text: str
    """The resolved config; a later edit of the YAML changes nothing."""
    parameters: dict[str, Any]
    """For submitit's executor."""
    env: dict[str, str]
    """The variables that are the same on all ranks."""
    code: Path
    """Where the code of now is kept for the job."""
    scale: tuple[str, ...] | None = None
    """Settings to vary, where steps are measured and nothing is trained."""

    @property
    def python(self) -> str:
        """The command that starts a rank's Python."""
        python = self.cluster.python or sys.executable
        return python_command(self.scheduler, self.code, python, self.cluster.container)

    @property
    def config_path(self) -> Path:
        """Where the resolved config is kept; another content has another name."""
        digest = hashlib.sha256(self.config_text.encode()).hexdigest()[:12]
        return self.folder / f"config-{digest}.yaml"

    @property
    def job_folder(self) -> Path:
        """The job's folder, with submitit's `%j` for its id."""
        return self.jobs / "%j"


def plan_submission(
    config_path: str | Path,
    overrides: Sequence[str] = (),
    cluster: str | Path | ClusterConfig | None = None,
    *,
    jobs: Path | None = None,
    scale: Sequence[str] | None = None,
    inherited: Mapping[str, str] = os.environ,
) -> Plan:
    """Read and check the run's and the cluster's config; write and start nothing.

    `jobs` is the folder for jobs that a sweep's runs share; else each run has its own. With `scale`
    the job measures steps, also with the settings that it varies, and trains nothing. Raises
    UserError for all that can be known to fail: keys, values, a batch that the processes can't
    share.
    """
    config = load_config(config_path, overrides)
    if not isinstance(cluster, ClusterConfig):
        cluster = load_cluster(cluster)
    config.check_world_size(cluster.world_size)
    check_tracker_names(config.trackers)
    scheduler = cluster.scheduler
    if scheduler == "auto":
        scheduler = "slurm" if shutil.which("sbatch") else "local"
    output_dir = Path(config.output_dir).absolute()
    folder = output_dir / "submit"
    jobs = folder if jobs is None else jobs
    code = code_folder(jobs)
    paths = [str(code), inherited.get("PYTHONPATH", "")]
    env = {
        "OMP_NUM_THREADS": inherited.get("OMP_NUM_THREADS", str(cluster.cpus_per_process)),
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "DIST_VSE_HANG_S": str(cluster.hang_s),
        "DS_ACCELERATOR": "cuda" if cluster.gpus_per_node else "cpu",
    }
    if scheduler == "local":
        parameters = local.parameters(cluster)
        env |= local.environment(cluster, inherited) | cluster.env
    else:
        env |= cluster.env
        # Not PYTHONPATH: a module that `setup` loads may add to it.
        early = {name: value for name, value in env.items() if name != "PYTHONPATH"}
        parameters = slurm.parameters(cluster, output_dir.name, jobs, early)
    return Plan(
        scheduler=scheduler,
        cluster=cluster,
        folder=folder,
        jobs=jobs,
        code=code,
        config_text=dump_config(config),
        parameters=parameters,
        env=env,
        scale=None if scale is None else tuple(scale),
    )


def submit(plan: Plan) -> Any:
    """Save the resolved config, start the job, and return it as submitit's Job.

    Raises UserError if Slurm is asked for but not here, or refuses the job.
    """
    if plan.scheduler == "slurm" and not (shutil.which("sbatch") and shutil.which("srun")):
        raise UserError(
            "scheduler: slurm, but sbatch and srun are not on PATH; submit from a login node, or "
            "give a cluster with scheduler: local"
        )
    return start(plan, prepare(plan))


def prepare(plan: Plan) -> Job:
    """Save the resolved config, and return the job that will train by it, or measure it.

    Raises UserError if a job of this run is still under way: the two would take turns.
    """
    control.check_free(plan.folder.parent)
    plan.folder.mkdir(parents=True, exist_ok=True)
    write_text(plan.config_path, plan.config_text, shared=True)
    port = free_port() if plan.scheduler == "local" else None
    config = str(plan.config_path)
    work: Train | Scale = Train(config)
    if plan.scale is not None:
        work = Scale(config, plan.scale, str(plan.folder.parent / SCALE_NAME))
    return Job(work, plan.env, os.getcwd(), port)


def start(plan: Plan, job: Job) -> Any:
    """Start `job` as planned, with submitit's executor for the scheduler; return its Job."""
    import submitit

    pin(plan.code)
    if plan.scheduler == "local":
        executor = submitit.LocalExecutor(plan.job_folder, python=plan.python)
        executor.update_parameters(**plan.parameters)
        with _detached(), _environment(plan.env):
            started = executor.submit(job)
    else:
        started = _slurm_submit(_slurm_executor(plan, plan.parameters), [job])[0]
    control.note(plan.folder, started, plan.scheduler)
    return started


def start_array(plans: Sequence[Plan], jobs: Sequence[Job], parallel: int) -> list[Any]:
    """Start one Slurm array of jobs that differ in their configs only; return their Jobs."""
    first = plans[0]
    pin(first.code)
    parameters = first.parameters | {"array_parallelism": parallel}
    started = _slurm_submit(_slurm_executor(first, parameters), jobs)
    for plan, job in zip(plans, started, strict=True):
        control.note(plan.folder, job, first.scheduler)
    return started


def _slurm_executor(plan: Plan, parameters: Mapping[str, Any]) -> Any:
    import submitit

    executor = submitit.SlurmExecutor(
        plan.job_folder, python=plan.python, max_num_timeout=slurm.MAX_LIVES
    )
    executor.update_parameters(**parameters)
    return executor


def _slurm_submit(executor: Any, jobs: Sequence[Job]) -> list[Any]:
    """Send one job, or several as an array. Raises UserError if Slurm refuses them."""
    from submitit.core.utils import FailedJobError

    try:
        # submitit prints what it also raises.
        with _hidden(executor.parameters), contextlib.redirect_stderr(io.StringIO()):
            if len(jobs) == 1:
                return [executor.submit(jobs[0])]
            with executor.batch():
                sent = [executor.submit(job) for job in jobs]
            return sent
    except FailedJobError as error:
        raise UserError(f"sbatch refused the job: {' '.join(str(error).split())}") from error


@contextlib.contextmanager
def _detached() -> Iterator[None]:
    """Start processes that don't hold our output open, and ignore Ctrl-C until they listen to it.

    `submit | tee log` would wait for the job otherwise. Ctrl-C asks the ranks for a save;
    submitit's controller would end at once instead, and leave a traceback.
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


@contextlib.contextmanager
def _hidden(parameters: Mapping[str, Any]) -> Iterator[None]:
    """Hide from sbatch the Slurm job around us, and what would override the cluster's file."""
    names = nested_slurm_names(os.environ) + slurm.overriding(os.environ, parameters)
    hidden = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ.update(hidden)
