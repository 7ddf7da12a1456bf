"""Where a run runs: machines, processes and their limits; what is learned is in a run's config."""

import difflib
import re
from dataclasses import dataclass, field
from pathlib import Path

from dist_vse.common.errors import UserError
from dist_vse.config import load_yaml
from launch.environment import IDENTITY

SCHEDULERS = ("auto", "slurm", "local")
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
    """Ranks on each node: one for each of its GPUs."""
    gpus_per_node: int = 0
    """As many as processes; 0 runs on the CPU."""
    cpus_per_process: int = 1
    """Cores of a rank: one computes, the others decode (data.num_workers)."""
    mem_gib: int | None = None
    """Memory of a node, GiB; 0 asks for all of it, none for the partition's default. This and the
    other limits and wishes up to `exclusive` are Slurm's: local processes have none."""
    partition: str | None = None
    """The queue; none is the site's default."""
    account: str | None = None
    """Who pays; none is your default account."""
    qos: str | None = None
    """Quality of service, where the site has several."""
    constraint: str | None = None
    """Features that the nodes must have, such as `a100`."""
    time_min: int = 60
    """Time limit of a Slurm job, minutes. A run that reaches it saves, is queued again, and goes
    on. Local processes have no limit: nothing would start them again."""
    exclusive: bool = False
    """Share the nodes with no other job."""
    setup: list[str] = field(default_factory=list)
    """Shell lines before the processes start (module load ...); for Slurm."""
    container: str | None = None
    """A command that runs each rank's Python in a container, such as `apptainer exec --nv
    vse.sif`; code and run must be visible inside under the same paths. For Slurm."""
    python: str | None = None
    """The ranks' interpreter, if not the one that submits (in a container: `python3`)."""
    srun: list[str] = field(default_factory=list)
    """More options of srun, such as `--container-image=...`; for Slurm."""
    env: dict[str, str] = field(default_factory=dict)
    """Environment variables of every process, such as NCCL's; set before it (or its container)
    starts, after `setup`."""
    signal_before_end_s: int = 300
    """Seconds before the time limit at which a run is told to save."""
    requeue: bool = True
    """Queue the job again after a time limit, a preemption or a lost node; false ends it there,
    and a later `submit` goes on."""
    failures: int = 0
    """How often a job that failed (a rank killed, a hang) is queued again; a lost node, a time
    limit and a preemption don't count, and what the user must mend is never tried again."""
    hang_s: int = 1800
    """Seconds that ranks wait for one that hangs, or go without a step, before the job fails;
    more than the longest step, and the longest save, take."""

    def __post_init__(self) -> None:
        if self.scheduler not in SCHEDULERS:
            near = difflib.get_close_matches(self.scheduler, SCHEDULERS, n=1)
            hint = (
                f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(SCHEDULERS)}"
            )
            raise UserError(f"scheduler={self.scheduler!r} is unknown; {hint}")
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
            f"(time_min={self.time_min} less the scheduler's minute), or the job ends as it starts",
        )
        odd = [name for name in self.env if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII)]
        _check(not odd, f"env: {', '.join(odd)} can't be the name of a variable")
        taken = sorted(set(self.env) & set(IDENTITY))
        _check(not taken, f"env: {', '.join(taken)} differ between processes; remove them")

    @property
    def world_size(self) -> int:
        """Processes on all nodes."""
        return self.nodes * self.processes_per_node


def load_cluster(path: str | Path | None) -> ClusterConfig:
    """Read a cluster's YAML; none is one process, on Slurm where there is one.

    Raises UserError for a missing file, an unknown key (naming the nearest), or a wrong value.
    """
    return ClusterConfig() if path is None else load_yaml(path, ClusterConfig)
