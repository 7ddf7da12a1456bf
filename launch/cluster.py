"""The cluster file: machines, processes and their limits. What is learned is in a run's config."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from dist_vse.common.errors import UserError
from dist_vse.config import load_yaml
from dist_vse.launch.environment import IDENTITY

SIGNAL_SLACK_S = 60
"""Slurm may send a signal up to this much earlier than asked."""


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


@dataclass(frozen=True)
class ClusterConfig:
    """The nodes and processes of a job, and what to ask the scheduler for."""

    scheduler: str = "auto"
    """`slurm`, `local` (processes of this machine), or `auto`: Slurm where sbatch is found."""
    nodes: int = 1
    """Machines; local processes run on one."""
    processes_per_node: int = 1
    """Ranks on each node; with GPUs, one for each GPU."""
    gpus_per_node: int = 0
    """The same number as processes; 0 runs on the CPU."""
    cpus_per_process: int = 1
    """Cores of a rank: one computes, the others decode samples (data.num_workers)."""
    mem_gib: int | None = None
    """Memory of a node, GiB; 0 asks for all of it, none for the partition's default. This and the
    settings up to `exclusive` are for Slurm; local processes ignore them."""
    partition: str | None = None
    """Slurm partition; none is the site's default."""
    account: str | None = None
    """Slurm account; none is your default."""
    qos: str | None = None
    """Quality of service; none is the site's default."""
    constraint: str | None = None
    """Features that the nodes must have, such as `a100`."""
    time_min: int = 60
    """Time limit of a Slurm job, minutes. A run that reaches it saves, is queued again, and
    continues. Local processes have no limit: nothing would start them again."""
    exclusive: bool = False
    """Whether no other job may run on the nodes."""
    setup: list[str] = field(default_factory=list)
    """Shell lines before the processes start (module load ...); for Slurm."""
    container: str | None = None
    """A command that runs each rank's Python in a container, such as `apptainer exec --nv
    vse.sif`; code and run must be visible inside under the same paths. For Slurm."""
    python: str | None = None
    """The ranks' interpreter; none is the one that submits (in a container: `python3`)."""
    srun: list[str] = field(default_factory=list)
    """More options of srun, such as `--container-image=...`; for Slurm."""
    env: dict[str, str] = field(default_factory=dict)
    """Environment variables of every process, such as NCCL's. They are set after `setup`, before
    the process (or its container) starts."""
    signal_before_end_s: int = 300
    """Seconds before the time limit when the run is asked to save."""
    requeue: bool = True
    """Queue the job again after a time limit, a preemption or a lost node. With false it ends
    there, and a later `submit` continues it."""
    failures: int = 0
    """How often a job that failed (a rank killed, a hang) is queued again. A lost node, a time
    limit and a preemption don't count. An error that you must fix is never tried again."""
    hang_s: int = 1800
    """Seconds without a step after which a rank counts as hung and the job fails. Must be more
    than the longest step and the longest save take."""

    def __post_init__(self) -> None:
        for name in ("nodes", "processes_per_node", "cpus_per_process", "time_min", "hang_s"):
            _check(getattr(self, name) >= 1, f"{name} ({getattr(self, name)}) must be at least 1")
        for name in ("gpus_per_node", "mem_gib", "failures"):
            value = getattr(self, name)
            _check(value is None or value >= 0, f"{name} ({value}) must not be negative")
        _check(
            self.gpus_per_node in (0, self.processes_per_node),
            f"processes_per_node ({self.processes_per_node}) must equal gpus_per_node "
            f"({self.gpus_per_node}): every process drives one GPU",
        )
        _check(
            self.requeue or not self.failures,
            f"failures ({self.failures}) needs requeue: true; set failures to 0 or remove requeue",
        )
        longest = 60 * self.time_min - SIGNAL_SLACK_S
        _check(
            0 < self.signal_before_end_s < max(longest, 2),
            f"signal_before_end_s ({self.signal_before_end_s}) must be above 0 and below {longest} "
            f"(time_min={self.time_min} minus a minute), or the job would end as it starts",
        )
        odd = [name for name in self.env if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII)]
        _check(not odd, f"env: {', '.join(odd)} is not a valid name for a variable")
        taken = sorted(set(self.env) & set(IDENTITY))
        _check(not taken, f"env: {', '.join(taken)} differ between processes; remove them")

    @property
    def world_size(self) -> int:
        """Processes on all nodes."""
        return self.nodes * self.processes_per_node


def load_cluster(path: str | Path | None) -> ClusterConfig:
    """Read a cluster file; none is one process, on Slurm if it is here.

    Raises UserError for a missing file, an unknown key (with the nearest one), or a wrong value.
    """
    return ClusterConfig() if path is None else load_yaml(path, ClusterConfig)
