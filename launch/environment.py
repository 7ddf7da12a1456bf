"""The environment variables that tell a process who it is, and those that would contradict."""

import contextlib
import random
import socket
from collections.abc import Mapping
from dataclasses import dataclass

IDENTITY = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
FOREIGN_PREFIX = "TORCHELASTIC_"
"""Left by a torchrun around us: its TORCHELASTIC_USE_AGENT_STORE makes ranks wait for ever."""

# Ports of the system's own choice for outgoing connections start at 32768 (Linux).
FIRST_PORT, NUM_PORTS = 20000, 12000
_RESTART_STRIDE = 997  # a restarted job keeps off the ports of jobs with nearby ids


@dataclass(frozen=True)
class Place:
    """One process of a job."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    master_addr: str
    master_port: int

    def variables(self) -> dict[str, str]:
        """Return what torch, DeepSpeed and accelerate read, under the names in `IDENTITY`."""
        values = (
            self.rank,
            self.local_rank,
            self.world_size,
            self.local_world_size,
            self.master_addr,
            self.master_port,
        )
        return dict(zip(IDENTITY, map(str, values), strict=True))


def job_port(job_id: int, restarts: int) -> int:
    """Return the port on which a Slurm job's ranks meet: the same on all of them, unasked."""
    return FIRST_PORT + (job_id + _RESTART_STRIDE * restarts) % NUM_PORTS


def free_port() -> int:
    """Return a port of this machine that nobody listens on."""
    while True:
        port = random.SystemRandom().randrange(FIRST_PORT, FIRST_PORT + NUM_PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):  # taken: try another
            probe.bind(("", port))
            return port


def conflicts(
    inherited: Mapping[str, str], wanted: Mapping[str, str]
) -> list[tuple[str, str, str | None]]:
    """List (name, inherited value, our value or None for removed) of what contradicts us."""
    changed = [
        (name, inherited[name], value)
        for name, value in wanted.items()
        if name in inherited and inherited[name] != value
    ]
    removed = [
        (name, value, None)
        for name, value in inherited.items()
        if name.startswith(FOREIGN_PREFIX) and name not in wanted
    ]
    return sorted([*changed, *removed])


def nested_slurm_names(inherited: Mapping[str, str]) -> list[str]:
    """List the variables of the Slurm job around us, which would shape a job sent from inside it.

    SLURM_CONF stays: it says where Slurm is.
    """
    if "SLURM_JOB_ID" not in inherited:
        return []
    return sorted(n for n in inherited if n.startswith(("SLURM_", "SRUN_")) and n != "SLURM_CONF")
