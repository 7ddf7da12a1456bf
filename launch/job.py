"""What submitit runs in every process of a job: say who the process is, then do the work."""

import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import submitit

from dist_vse.common import signals
from dist_vse.common.errors import UserError
from dist_vse.common.log import logger, setup_logging
from dist_vse.runs.lease import LostLease
from launch import local, slurm
from launch.environment import Place, conflicts, job_port

_USER_ERROR = 2  # exit code
_RESULTS_WAIT_S = 20


@dataclass(frozen=True)
class Job:
    """A picklable callable: `work()` on every rank of the job, with its environment set."""

    work: Callable[[], Any]
    env: Mapping[str, str]
    """The same on all ranks."""
    folder: str
    """The directory to work in: paths in the config are relative to it."""
    port: int | None = None
    """Where the ranks of a local job meet; Slurm's derive theirs from the job's id."""

    def __call__(self) -> Any:
        """Do the work in the process that submitit started; return its result.

        Under Slurm that is the exit code, and rank 0's process ends with it: a job that ended as a
        success would start what depends on it (`--dependency=afterok`).
        """
        os.chdir(self.folder)  # Python was started in the folder of the pinned code
        environment = submitit.JobEnvironment()
        if environment.cluster == "local":
            local.end_with_controller(int(environment.job_id))
        environment.paths.result_pickle.unlink(missing_ok=True)  # an earlier life's
        enter(_place(environment, self.port), self.env)
        try:
            result = self.work()
        except Exception as error:
            if environment.cluster == "local":
                local.end_controller_at_exit()  # srun does this with --kill-on-bad-exit
                raise
            if isinstance(error, LostLease):  # the job lives elsewhere: its results, its marks
                sys.exit(f"error: {error}")
            if isinstance(error, UserError):
                slurm.mark_final(environment.paths.folder.parent)
            raise
        if environment.cluster == "slurm" and environment.global_rank == 0 and result != 0:
            _end_with(environment, result)
        return result


@dataclass(frozen=True)
class Train:
    """Train by the resolved config that was saved at submission."""

    config_path: str

    def __call__(self) -> int:
        """Join the process group and train; return the exit code."""
        signals.listen()  # before the slow imports: an early signal must not end the job
        from dist_vse import distributed, train
        from dist_vse.config import load_config

        with distributed.process_group():
            with distributed.raise_on_all_ranks():
                config = load_config(self.config_path)
            code = train.run(config)
        environment = submitit.JobEnvironment()
        if code == train.INTERRUPTED and (environment.cluster, environment.global_rank) == (
            "slurm",
            0,
        ):
            slurm.requeue(environment.job_id)
        return code


@dataclass(frozen=True)
class Scale:
    """Measure steps of the resolved config, as `dist-vse bench scale` does, and train nothing."""

    config_path: str
    vary: tuple[str, ...]
    """Settings to measure besides: `key=value,value`."""
    out: str
    """The file to write the numbers to."""

    def __call__(self) -> int:
        """Measure on all ranks of the job; return the exit code."""
        from dist_vse.cli import main

        varied = ["--vary", *self.vary] if self.vary else []
        return main(["bench", "scale", self.config_path, *varied, "--out", self.out])


def _end_with(environment: Any, code: int) -> None:
    """Store rank 0's result as submitit does, and end with it as the process's exit code."""
    from submitit.core.utils import JobPaths, cloudpickle_dump, temporary_save_path

    if code == _USER_ERROR:
        slurm.mark_final(environment.paths.folder.parent)
    own = environment.paths
    others = [JobPaths(own.folder, own.job_id, rank) for rank in range(1, environment.num_tasks)]
    end = time.monotonic() + _RESULTS_WAIT_S  # srun ends the other ranks with this one
    while not all(other.result_pickle.exists() for other in others) and time.monotonic() < end:
        time.sleep(0.1)
    with temporary_save_path(own.result_pickle) as path:
        cloudpickle_dump(("success", code), path)
    sys.exit(code)


def enter(place: Place, env: Mapping[str, str]) -> None:
    """Set this process's variables, remove what would contradict them, and log the changes."""
    wanted = {**env, **place.variables()}
    several_nodes = place.world_size > place.local_world_size
    found = conflicts(os.environ, wanted, several_nodes=several_nodes)
    for conflict in found:
        if conflict.removed:
            del os.environ[conflict.name]
    os.environ.update(wanted)
    setup_logging()
    for conflict in found:
        logger.info("inherited %s", conflict)


def _place(environment: Any, local_port: int | None) -> Place:
    """Read the process's place from submitit's JobEnvironment."""
    if local_port is None:
        restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        address, port = environment.hostnames[0], job_port(int(environment.raw_job_id), restarts)
    else:
        address, port = "127.0.0.1", local_port
    return Place(
        rank=environment.global_rank,
        local_rank=environment.local_rank,
        world_size=environment.num_tasks,
        local_world_size=environment.num_tasks // environment.num_nodes,
        master_addr=address,
        master_port=port,
    )
