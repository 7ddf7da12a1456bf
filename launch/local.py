"""Jobs on this machine: submitit's controller starts the ranks, and all of them end together."""

import atexit
import ctypes
import os
import signal
import sys
from collections.abc import Mapping
from typing import Any

from dist_vse.common.errors import UserError
from launch.cluster import ClusterConfig

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_NO_LIMIT_MIN = 60 * 24 * 365 * 10
"""submitit wants a time limit; nothing would queue a local job again after it."""

SLURMS_OWN = (
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
"""Settings that say nothing to a machine without a scheduler."""


def parameters(cluster: ClusterConfig) -> dict[str, Any]:
    """Return the parameters of submitit's LocalExecutor.

    Raises UserError for what one machine without a scheduler can't do.
    """
    if cluster.nodes > 1:
        raise UserError(
            f"nodes ({cluster.nodes}) must be 1 for local processes; set nodes to 1, or submit "
            "where sbatch is found with scheduler: slurm"
        )
    if cluster.setup:
        raise UserError(
            f"setup ({cluster.setup[0]!r} ...) is run by Slurm only; run these lines in this shell "
            "and remove them from the cluster's file"
        )
    for name in ("container", "srun"):
        value = getattr(cluster, name)
        if value:
            raise UserError(
                f"{name} ({value!r}) is for Slurm only; remove it from the cluster's file, and run "
                "dist-vse itself in the container"
            )
    if cluster.failures:
        raise UserError(
            f"failures ({cluster.failures}): only Slurm queues a job again; set it to 0 for local "
            "processes"
        )
    return {
        "tasks_per_node": cluster.processes_per_node,
        "gpus_per_node": cluster.gpus_per_node,
        "timeout_min": _NO_LIMIT_MIN,
    }


def ignored(cluster: ClusterConfig) -> list[str]:
    """List the settings, as the cluster's file gives them, that local processes don't heed."""
    default = ClusterConfig()
    given = {name: getattr(cluster, name) for name in SLURMS_OWN}
    return [f"{name}={v}" for name, v in given.items() if v != getattr(default, name)]


def environment(cluster: ClusterConfig, inherited: Mapping[str, str]) -> dict[str, str]:
    """Return variables for local ranks: the loopback, and GPUs out of those visible here.

    Raises UserError if fewer GPUs are visible than the cluster's file asks for.
    """
    variables = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    if cluster.gpus_per_node and "CUDA_VISIBLE_DEVICES" in inherited:
        visible = _visible(inherited["CUDA_VISIBLE_DEVICES"])
        if len(visible) < cluster.gpus_per_node:
            raise UserError(
                f"gpus_per_node ({cluster.gpus_per_node}) is more than the {len(visible)} of "
                f"CUDA_VISIBLE_DEVICES={inherited['CUDA_VISIBLE_DEVICES']!r} in this shell; lower "
                "it, or show more GPUs"
            )
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(visible[: cluster.gpus_per_node])
    return variables


def _visible(devices: str) -> list[str]:
    """Return the GPUs that CUDA sees: those before the first number that is none, such as -1."""
    names = [name.strip() for name in devices.split(",")]
    none = (number for number, name in enumerate(names) if name in ("", "-1", "NoDevFiles"))
    return names[: next(none, len(names))]


def end_with_controller(controller: int) -> None:
    """Have the kernel end this rank when the controller ends, however that happens."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != controller:  # it ended before we asked
        sys.exit(f"the job's controller (process {controller}) is gone")


def end_controller_at_exit() -> None:
    """End the whole job once this failed rank has written its error down.

    Without this the other ranks wait for it until their time limit.
    """
    atexit.register(os.kill, os.getppid(), signal.SIGKILL)
