"""Jobs of a Slurm cluster: what sbatch is asked for, a job's state, and its return to the queue."""

import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from dist_vse.log import logger
from launch.cluster import ClusterConfig

MAX_LIVES = 10_000
"""submitit's own bound on time-outs; ours is the run's last step."""
_KILL_WAIT_S = 600  # Slurm ends a requeued job well within this

ENDED_STATES = (
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "OUT_OF_MEMORY",
    "TIMEOUT",
)
"""NODE_FAIL and PREEMPTED are missing: such jobs are queued again."""


def parameters(cluster: ClusterConfig, name: str, folder: Path) -> dict[str, Any]:
    """Return the parameters of submitit's SlurmExecutor, in Slurm's own words.

    `folder` holds the jobs' folders.
    """
    setup = [*cluster.setup, *_try_again(folder, cluster.failures)]
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
        "additional_parameters": {"requeue": True},
        # A dead rank ends all ranks. Since Slurm 22.05 srun takes no --cpus-per-task from sbatch.
        "srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={cluster.cpus_per_process}"],
    }
    return {key: value for key, value in wanted.items() if value is not None}


def _try_again(folder: Path, failures: int) -> list[str]:
    """Return shell lines that queue a failed job again, so often at most.

    A job that was cancelled, or that the user must mend, is left alone.
    """
    if not failures:
        return []
    count = f"{shlex.quote(str(folder))}/failures-$SLURM_JOB_ID"
    final = f"{shlex.quote(str(folder))}/final-$SLURM_JOB_ID"
    return [
        "try_again() {",
        "    [ $? -ne 0 ] || return",
        f"    [ ! -e {final} ] || return",
        "    scontrol -o show job $SLURM_JOB_ID | grep -q JobState=RUNNING || return",
        f"    echo failed >>{count}",
        f"    [ $(wc -l <{count}) -gt {failures} ] || scontrol requeue $SLURM_JOB_ID",
        "}",
        "trap try_again EXIT",
    ]


def mark_final(folder: Path) -> None:
    """Note that this job need not be tried again: the user must mend something first."""
    (folder / f"final-{os.environ['SLURM_JOB_ID']}").touch()


def sbatch_text(folder: Path, python: str, wanted: dict[str, Any]) -> str:
    """Return the batch script that submitit would send; needs no Slurm."""
    from submitit.slurm.slurm import _make_sbatch_string

    command = f"{python} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    text: str = _make_sbatch_string(command=command, folder=folder, **wanted)
    return text


def job_state(job_id: str) -> str | None:
    """Return the job's state in Slurm's words; None if Slurm has forgotten the job.

    Asks the controller, not the accounting: that may be absent, and lags.
    """
    asked = subprocess.run(
        ["scontrol", "--oneliner", "show", "job", job_id], capture_output=True, text=True
    )
    if asked.returncode != 0 and "Invalid job id" in asked.stderr:
        return None
    found = re.search(r"JobState=(\w+)", asked.stdout)
    return found.group(1) if found else "UNKNOWN"  # a controller that doesn't answer just now


def requeue(job_id: str) -> None:
    """Queue this job again after it has saved, unless Slurm is ending it for another reason.

    Called in the job by rank 0. A job that was cancelled stays so, and one that Slurm itself has
    put back (preempted, or by `scontrol requeue`) needs no second request.
    """
    state = job_state(job_id)
    if state != "RUNNING":
        logger.info("not queued again: the job is %s", state)
        return
    asked = subprocess.run(["scontrol", "requeue", job_id], capture_output=True, text=True)
    if asked.returncode != 0:
        logger.warning("Slurm did not queue the job again: %s", asked.stderr.strip())
        return
    logger.info("saved and queued again")
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(_KILL_WAIT_S)  # leaving now would look like the end of the job
