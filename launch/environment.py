"""The environment variables that give a process its place, and those that contradict them."""

import contextlib
import random
import socket
from collections.abc import Mapping
from dataclasses import dataclass

IDENTITY = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

# Left by another launcher that started us; TORCHELASTIC_USE_AGENT_STORE makes ranks wait forever.
_PREFIXES = {"TORCHELASTIC_": "torchrun", "ACCELERATE_": "accelerate"}
_NAMES = {
    **dict.fromkeys(("GROUP_RANK", "GROUP_WORLD_SIZE"), "torchrun"),
    **dict.fromkeys(("ROLE_RANK", "ROLE_NAME", "ROLE_WORLD_SIZE"), "torchrun"),
    **dict.fromkeys(("CROSS_RANK", "CROSS_SIZE", "LOCAL_SIZE"), "deepspeed"),
}
_NETWORK_CARDS = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")

# The system's own ports for outgoing connections start at 32768 (Linux).
FIRST_PORT, NUM_PORTS = 20000, 12000
_RESTART_STRIDE = 997  # a restarted job avoids the ports of jobs with nearby ids


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


@dataclass(frozen=True)
class Conflict:
    """A variable of the shell that contradicts the job, and what is done about it."""

    name: str
    value: str
    action: str
    removed: bool = False

    def __str__(self) -> str:
        return f"{self.name}={self.value}: {self.action}"


def job_port(job_id: int, restarts: int) -> int:
    """Return the port where a Slurm job's ranks meet; every rank computes the same one."""
    return FIRST_PORT + (job_id + _RESTART_STRIDE * restarts) % NUM_PORTS


def free_port() -> int:
    """Return a port of this machine on which nobody listens."""
    while True:
        port = random.SystemRandom().randrange(FIRST_PORT, FIRST_PORT + NUM_PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):  # taken: try another
            probe.bind(("", port))
            return port


def conflicts(
    inherited: Mapping[str, str], wanted: Mapping[str, str], *, several_nodes: bool
) -> list[Conflict]:
    """List the variables that contradict those that a rank must have, by name.

    PYTHONPATH is no contradiction: the job's own comes first in it.
    """
    found = [
        Conflict(name, inherited[name], f"set to {value}")
        for name, value in wanted.items()
        if inherited.get(name, value) != value and name != "PYTHONPATH"
    ]
    for name, value in inherited.items():
        launcher = launcher_of(name)
        if name in wanted:
            continue
        if launcher is not None:
            found.append(Conflict(name, value, f"removed, left by {launcher}", removed=True))
        elif name in _NETWORK_CARDS and value == "lo" and several_nodes:
            found.append(Conflict(name, value, "removed, it reaches no other node", removed=True))
    return sorted(found, key=lambda conflict: conflict.name)


def launcher_of(name: str) -> str | None:
    """Return the launcher that leaves such a variable behind, None if none does."""
    by_prefix = (who for prefix, who in _PREFIXES.items() if name.startswith(prefix))
    return _NAMES.get(name) or next(by_prefix, None)
