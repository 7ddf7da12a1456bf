"""Jobs of a Slurm cluster: what sbatch is asked for, a job's state, and its return to the queue."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_vse.common.errors import UserError
from dist_vse.common.log import logger
from launch.cluster import ClusterConfig

MAX_LIVES = 10_000
"""submitit's own bound on time-outs; ours is the run's last step."""
_KILL_WAIT_S = 600  # Slurm ends a requeued job well within this
_PATIENCE_S = 600
"""How long Slurm is asked again: its controller may just be restarted, or busy."""
_POLL_S = 5

ENDED_STATES = (
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "OUT_OF_MEMORY",
    "TIMEOUT",
)
_LOST_STATES = ("NODE_FAIL", "PREEMPTED")
"""The end of a job only if it may not be queued again."""

SBATCH_VARIABLES = {
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

    `folder` holds the jobs' folders. `env` is set before Python starts: what the loader, a
    container or numpy reads would be too late in it.
    """
    exports = [f"export {key}={shlex.quote(value)}" for key, value in sorted(env.items())]
    setup = [*cluster.setup, *exports, *_try_again(folder, cluster.failures)]
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


def overriding(inherited: Mapping[str, str], parameters: Mapping[str, Any]) -> list[str]:
    """List the variables by which sbatch would override what the cluster's file says."""
    asked = {*parameters, *_ALWAYS_SET}
    return sorted(name for name in inherited if SBATCH_VARIABLES.get(name) in asked)


def _try_again(folder: Path, failures: int) -> list[str]:
    """Return shell lines that queue a failed job again, so often at most.

    A job that was cancelled, or that the user must mend, is left alone; so is a later life of this
    job, if this one's node was lost and has come back.
    """
    if not failures:
        return []
    count = f"{shlex.quote(str(folder))}/failures-$SLURM_JOB_ID"
    final = f"{shlex.quote(str(folder))}/final-$SLURM_JOB_ID"
    tries = _PATIENCE_S // _POLL_S
    mine = "JobState=RUNNING .* Restarts=${SLURM_RESTART_COUNT:-0} "
    return [
        f'patiently() {{ for _ in {{1..{tries}}}; do "$@" && return; sleep {_POLL_S}; done; }}',
        "try_again() {",
        "    [ $? -ne 0 ] || return",
        f"    [ ! -e {final} ] || return",
        f'    patiently scontrol -o show job $SLURM_JOB_ID | grep -q "{mine}" || return',
        f"    echo failed >>{count}",
        f"    [ $(wc -l <{count}) -gt {failures} ] || patiently scontrol requeue $SLURM_JOB_ID",
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


def is_here() -> bool:
    """Tell whether Slurm's commands are on this machine."""
    return shutil.which("scontrol") is not None


def job_state(job_id: str) -> str | None:
    """Return the job's state in Slurm's words; None if Slurm has forgotten the job.

    Asks the controller, not the accounting: that may be absent, and lags.
    """
    return _read_job(job_id).get("JobState")


def has_ended(job_id: str) -> bool:
    """Tell whether the job is over for good: it won't be queued again, or is forgotten."""
    job = _read_job(job_id)
    state = job.get("JobState")
    return state in (None, *ENDED_STATES) or (state in _LOST_STATES and job["Requeue"] == "0")


def _read_job(job_id: str) -> dict[str, str]:
    """Return what the controller says of a job; nothing if it has forgotten it.

    Raises UserError where there is no Slurm.
    """
    if not is_here():
        raise UserError(f"job {job_id} is Slurm's, but scontrol is not on PATH; use a login node")
    asked = subprocess.run(
        ["scontrol", "--oneliner", "show", "job", job_id], capture_output=True, text=True
    )
    if asked.returncode != 0 and "Invalid job id" in asked.stderr:
        return {}
    found = dict(re.findall(r"\b(JobState|Requeue)=(\w+)", asked.stdout))
    return {"JobState": "UNKNOWN", "Requeue": "1"} | found  # it may not answer just now


def requeue(job_id: str) -> None:
    """Queue this job again after it has saved, unless Slurm is ending it for another reason.

    Called in the job by rank 0; the job is over where it returns. A job that was cancelled stays
    so, and one that Slurm itself has put back (preempted, or by `scontrol requeue`) needs no second
    request. Asks again for some minutes where Slurm does not answer, or refuses.
    """
    end = time.monotonic() + _PATIENCE_S
    refusal = _ask_for_requeue(job_id)
    while refusal and time.monotonic() < end:
        logger.warning("Slurm did not queue the job again, will ask again: %s", refusal)
        time.sleep(_POLL_S)
        refusal = _ask_for_requeue(job_id)
    if refusal:
        logger.error(
            "error: saved, but not queued again in %d s (%s); submit the run again to continue it",
            _PATIENCE_S,
            refusal,
        )


def _ask_for_requeue(job_id: str) -> str:
    """Queue this job again and wait for its end, or log why it must not be; return a refusal."""
    job = _read_job(job_id)
    state = job.get("JobState")
    if state == "UNKNOWN":
        return "its controller does not answer"
    if state != "RUNNING":
        logger.info("not queued again: the job is %s", state)
        return ""
    if job["Requeue"] == "0":
        logger.info("saved; the cluster's file says requeue: false, so the job ends here")
        return ""
    asked = subprocess.run(["scontrol", "requeue", job_id], capture_output=True, text=True)
    if asked.returncode != 0:
        return " ".join(asked.stderr.split())
    logger.info("saved and queued again")
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(_KILL_WAIT_S)  # leaving now would look like the end of the job
    return ""
