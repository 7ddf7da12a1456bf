"""Submitting a run: plan it, check it, and hand it to the scheduler."""

import hashlib
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_vse.common.errors import UserError
from dist_vse.common.files import write_text
from dist_vse.config import dump_config, load_config
from dist_vse.launch.cluster import ClusterConfig, load_cluster
from dist_vse.launch.code import code_folder, pin
from dist_vse.launch.environment import free_port
from dist_vse.launch.job import Job, Scale, Train
from dist_vse.launch.schedulers import find_scheduler
from dist_vse.launch.schedulers.base import JobSpec, Scheduler, SubmittedJob
from dist_vse.launch.status import ensure_not_running
from dist_vse.runs.files import SCALE_NAME
from dist_vse.runs.trackers import check_tracker_names


def python_command(
    ignored_signals: Sequence[str], code: Path, python: str, container: str | None = None
) -> str:
    """Return the shell command that starts a rank's Python on the pinned code.

    Python ignores these signals until the job installs its handlers: their default action would
    kill it. (`env --ignore-signal` does the same, but not in coreutils before 8.31. `python -m`
    looks into the current folder first.)
    """
    signals = " ".join(ignored_signals)
    script = f'trap "" {signals}; cd {shlex.quote(str(code))} && exec "$0" "$@"'
    command = [*shlex.split(container or ""), python]
    return f"sh -c {shlex.quote(script)} {shlex.join(command)}"


@dataclass(frozen=True)
class Plan:
    """All that a submission will do, known before anything is written or started."""

    scheduler: Scheduler
    cluster: ClusterConfig
    folder: Path
    """The run's folder for submissions."""
    jobs: Path
    """Where every job gets a folder, by its id; the runs of a sweep share it."""
    config_text: str
    """The resolved config; a later edit of the YAML changes nothing."""
    parameters: dict[str, Any]
    """For the scheduler."""
    env: dict[str, str]
    """The variables that are the same on all ranks."""
    code: Path
    """Where a copy of the code is kept for the job."""
    scale: tuple[str, ...] | None = None
    """Settings to vary, where steps are measured and nothing is trained."""

    @property
    def run_dir(self) -> Path:
        """The run's folder."""
        return self.folder.parent

    @property
    def python(self) -> str:
        """The command that starts a rank's Python."""
        python = self.cluster.python or sys.executable
        signals = self.scheduler.ignored_signals
        return python_command(signals, self.code, python, self.cluster.container)

    @property
    def config_path(self) -> Path:
        """Where the resolved config is kept; another content has another name."""
        digest = hashlib.sha256(self.config_text.encode()).hexdigest()[:12]
        return self.folder / f"config-{digest}.yaml"

    @property
    def job_folder(self) -> Path:
        """The job's folder, with submitit's `%j` for its id."""
        return self.jobs / "%j"

    @property
    def spec(self) -> JobSpec:
        """What the scheduler needs to start the job."""
        return JobSpec(self.job_folder, self.python, self.parameters, self.env)


def plan_submission(
    config_path: str | Path,
    overrides: Sequence[str] = (),
    cluster: str | Path | ClusterConfig | None = None,
    *,
    jobs: Path | None = None,
    scale: Sequence[str] | None = None,
    inherited: Mapping[str, str] = os.environ,
) -> Plan:
    """Read and check the run's config and the cluster file; write and start nothing.

    `jobs` is the folder for jobs that a sweep's runs share; else each run has its own. With `scale`
    the job measures steps, also with the settings that it varies, and trains nothing. Raises
    UserError for all that can be known to fail: keys, values, a batch that the processes can't
    share.
    """
    config = load_config(config_path, overrides)
    if not isinstance(cluster, ClusterConfig):
        cluster = load_cluster(cluster)
    scheduler = find_scheduler(cluster.scheduler)
    config.check_world_size(cluster.world_size, on_gpu=cluster.gpus_per_node > 0)
    check_tracker_names(config.trackers)
    scheduler.check_cluster(cluster)
    run_dir = Path(config.output_dir).absolute()
    if "%" in str(run_dir):
        raise UserError(f"output_dir={run_dir}: schedulers replace %; give a name without it")
    folder = run_dir / "submit"
    jobs = folder if jobs is None else jobs
    code = code_folder(jobs)
    paths = [str(code), inherited.get("PYTHONPATH", "")]
    env = {
        "OMP_NUM_THREADS": inherited.get("OMP_NUM_THREADS", str(cluster.cpus_per_process)),
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "DIST_VSE_HANG_S": str(cluster.hang_s),
        "DS_ACCELERATOR": "cuda" if cluster.gpus_per_node else "cpu",
    }
    env |= scheduler.rank_environment(cluster, inherited) | cluster.env
    return Plan(
        scheduler=scheduler,
        cluster=cluster,
        folder=folder,
        jobs=jobs,
        code=code,
        config_text=dump_config(config),
        parameters=scheduler.parameters(cluster, name=run_dir.name, folder=jobs, env=env),
        env=env,
        scale=None if scale is None else tuple(scale),
    )


def submit(plan: Plan) -> SubmittedJob:
    """Save the resolved config and start the job.

    Raises UserError if the scheduler is not on this machine, or refuses the job.
    """
    plan.scheduler.check_available()
    return start(plan, prepare(plan))


def prepare(plan: Plan) -> Job:
    """Save the resolved config, and return the job that will train by it, or measure it.

    Raises UserError if a job of this run has not ended: two jobs must not share a folder.
    """
    ensure_not_running(plan.run_dir)
    plan.folder.mkdir(parents=True, exist_ok=True)
    write_text(plan.config_path, plan.config_text, shared=True)
    config = str(plan.config_path)
    work: Train | Scale = Train(config)
    if plan.scale is not None:
        work = Scale(config, plan.scale, str(plan.run_dir / SCALE_NAME))
    return Job(work, plan.scheduler, plan.env, os.getcwd(), free_port())


def start(plan: Plan, job: Job) -> SubmittedJob:
    """Start `job` as planned, on a copy of the code as it is now."""
    pin(plan.code)
    started = plan.scheduler.start(plan.spec, job)
    started.save(plan.run_dir)
    return started
