"""What sbatch is asked for: the batch script, and the variables that would change it."""

import contextlib
import os
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dist_vse.launch.cluster import ClusterConfig
from dist_vse.launch.schedulers.base import JobSpec
from dist_vse.launch.schedulers.scontrol import RETRY_EVERY_S, RETRY_FOR_S

_VARIABLES = {
    "SBATCH_ACCOUNT": "account",
    "SBATCH_ARRAY_INX": "array",
    "SBATCH_CONSTRAINT": "constraint",
    "SBATCH_CPUS_PER_TASK": "cpus_per_task",
    "SBATCH_EXCLUSIVE": "exclusive",
    "SBATCH_GPUS": "gpus_per_node",
    "SBATCH_GPUS_PER_NODE": "gpus_per_node",
    "SBATCH_GPUS_PER_TASK": "gpus_per_node",
    "SBATCH_JOB_NAME": "job_name",
    "SBATCH_MEM_PER_CPU": "mem",
    "SBATCH_MEM_PER_GPU": "mem",
    "SBATCH_MEM_PER_NODE": "mem",
    "SBATCH_NO_REQUEUE": "requeue",
    "SBATCH_OPEN_MODE": "open_mode",
    "SBATCH_PARTITION": "partition",
    "SBATCH_QOS": "qos",
    "SBATCH_REQUEUE": "requeue",
    "SBATCH_SIGNAL": "signal",
    "SBATCH_TIMELIMIT": "time",
}
"""sbatch prefers these to the lines of its script: what each of them would change."""
_ALWAYS_SET = ("array", "open_mode", "requeue", "signal")


def parameters(
    cluster: ClusterConfig, name: str, folder: Path, env: Mapping[str, str]
) -> dict[str, Any]:
    """Return the parameters of submitit's SlurmExecutor, in Slurm's own words.

    `folder` holds the jobs' folders. `env` is set before Python starts: the dynamic loader, a
    container and numpy read variables too early for Python to set them.
    """
    exports = [f"export {key}={shlex.quote(value)}" for key, value in sorted(env.items())]
    setup = [*cluster.setup, *exports, *try_again(folder, cluster.failures)]
    srun_cpus = f"--cpus-per-task={cluster.cpus_per_process}"  # since 22.05 not sbatch's
    wanted = {
        "job_name": name,
        "nodes": cluster.nodes,
        "ntasks_per_node": cluster.processes_per_node,
        "cpus_per_task": cluster.cpus_per_process,
        "gpus_per_node": cluster.gpus_per_node or None,
        "mem": None if cluster.mem_gib is None else f"{cluster.mem_gib}G",
        "time": cluster.time_min,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "exclusive": cluster.exclusive or None,
        "setup": setup or None,
        "signal_delay_s": cluster.signal_before_end_s,
        "additional_parameters": {"requeue" if cluster.requeue else "no-requeue": True},
        # A dead rank ends all ranks.
        "srun_args": ["--kill-on-bad-exit=1", srun_cpus, *cluster.srun],
    }
    return {key: value for key, value in wanted.items() if value is not None}


def try_again(folder: Path, failures: int) -> list[str]:
    """Return shell lines that queue a failed job again, at most `failures` times.

    A job that was cancelled is left alone, and one that failed by an error of the user. So is a
    later attempt of this job, if this one's node was lost and has come back.
    """
    if not failures:
        return []
    count = f"{shlex.quote(str(folder))}/failures-$SLURM_JOB_ID"
    final = f"{shlex.quote(str(folder))}/final-$SLURM_JOB_ID"
    tries = RETRY_FOR_S // RETRY_EVERY_S
    mine = "JobState=RUNNING .* Restarts=${SLURM_RESTART_COUNT:-0} "
    return [
        f'patiently() {{ for _ in {{1..{tries}}}; do "$@" && return; '
        f"sleep {RETRY_EVERY_S}; done; }}",
        "try_again() {",
        "    [ $? -ne 0 ] || return",
        f"    [ ! -e {final} ] || return",
        f'    patiently scontrol -o show job $SLURM_JOB_ID | grep -q "{mine}" || return',
        f"    echo failed >>{count}",
        f"    [ $(wc -l <{count}) -gt {failures} ] || patiently scontrol requeue $SLURM_JOB_ID",
        "}",
        "trap try_again EXIT",
    ]


def forbid_another_try(folder: Path) -> None:
    """Leave a file that stops this job's `try_again`: the user must fix something first."""
    (folder / f"final-{os.environ['SLURM_JOB_ID']}").touch()


def script(spec: JobSpec, parameters: Mapping[str, Any]) -> str:
    """Return the batch script that submitit would send; needs no Slurm."""
    from submitit.slurm.slurm import _make_sbatch_string

    command = f"{spec.python} -u -m submitit.core._submit {shlex.quote(str(spec.folder))}"
    text: str = _make_sbatch_string(command=command, folder=spec.folder, **parameters)
    return text


def conflicts(
    cluster: ClusterConfig, inherited: Mapping[str, str], parameters: Mapping[str, Any]
) -> list[str]:
    """List the variables of the shell that Slurm reads or replaces, and what is done about each."""
    nested = nested_names(inherited)
    lines = [f"{n}={inherited[n]}: removed, set by the Slurm job around this shell" for n in nested]
    overriding = overriding_names(inherited, parameters)
    for name in sorted(name for name in inherited if name.startswith("SBATCH_")):
        action = "removed, the cluster file sets it" if name in overriding else "kept for sbatch"
        lines.append(f"{name}={inherited[name]}: {action}")
    gpus, visible = cluster.gpus_per_node, inherited.get("CUDA_VISIBLE_DEVICES")
    if gpus and visible is not None:
        lines.append(f"CUDA_VISIBLE_DEVICES={visible}: Slurm sets the {gpus} GPUs of each node")
    return lines


def overriding_names(inherited: Mapping[str, str], parameters: Mapping[str, Any]) -> list[str]:
    """List the variables by which sbatch would override what the cluster file says."""
    asked = {*parameters, *_ALWAYS_SET}
    return sorted(name for name in inherited if _VARIABLES.get(name) in asked)


def nested_names(inherited: Mapping[str, str]) -> list[str]:
    """List the variables of the Slurm job around us, which would change a job sent from inside it.

    SLURM_CONF stays: it says where Slurm is.
    """
    if "SLURM_JOB_ID" not in inherited:
        return []
    return sorted(n for n in inherited if n.startswith(("SLURM_", "SRUN_")) and n != "SLURM_CONF")


@contextlib.contextmanager
def hidden_variables(parameters: Mapping[str, Any]) -> Iterator[None]:
    """Hide from sbatch the Slurm job around us, and what would override the cluster file."""
    names = nested_names(os.environ) + overriding_names(os.environ, parameters)
    hidden = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ.update(hidden)
