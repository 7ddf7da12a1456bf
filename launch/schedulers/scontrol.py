"""What Slurm says of a job, and a job's return to the queue."""

import re
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence

from dist_vse.common.log import logger
from dist_vse.launch.schedulers.base import JobState

RETRY_FOR_S = 600
"""How long Slurm is asked again: its controller may be restarting, or busy."""
RETRY_EVERY_S = 5
_KILL_WAIT_S = 600  # Slurm ends a requeued job well within this

_ENDED_STATES = (
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
_NO_ANSWER = {"JobState": "UNKNOWN", "Requeue": "1"}


def is_here() -> bool:
    """Return whether Slurm's commands are on this machine."""
    return shutil.which("scontrol") is not None


def job_state(job_id: str) -> JobState:
    """Return the job's state in Slurm's words, or FORGOTTEN.

    Asks the controller, not the accounting: that may be absent, and lags.
    """
    return _state(_read_job(job_id))


def job_states(job_ids: Sequence[str]) -> list[JobState]:
    """Return the states of several jobs, in one question to the controller."""
    if len(job_ids) <= 1:
        return [job_state(job_id) for job_id in job_ids]
    asked = _show_job()
    if asked.returncode != 0:
        return [_state(_NO_ANSWER) for _ in job_ids]
    known = {job_id: line for line in asked.stdout.splitlines() for job_id in _ids(line)}
    return [_state(_fields(known[job_id]) if job_id in known else {}) for job_id in job_ids]


def _ids(line: str) -> list[str]:
    """Return the ids that a line of `show job` is about: waiting tasks of an array share one."""
    named = dict(re.findall(r"\b(JobId|ArrayJobId|ArrayTaskId)=(\S+)", line))
    tasks: list[int] = []
    for part in named.get("ArrayTaskId", "").split("%")[0].split(","):  # such as 0,3-9:2%4
        if place := re.fullmatch(r"(\d+)(?:-(\d+)(?::(\d+))?)?", part):
            first, last, step = (int(number or 0) for number in place.groups())
            tasks += range(first, max(first, last) + 1, step or 1)
    return [named.get("JobId", ""), *(f"{named.get('ArrayJobId')}_{task}" for task in tasks)]


def _state(job: dict[str, str]) -> JobState:
    if not job:
        return JobState("FORGOTTEN", ended=True)
    name = job["JobState"]
    ended = name in _ENDED_STATES or (name in _LOST_STATES and job["Requeue"] == "0")
    return JobState(name, ended)


def _read_job(job_id: str) -> dict[str, str]:
    """Return what the controller says of a job; nothing if it has forgotten it."""
    asked = _show_job(job_id)
    if asked.returncode != 0 and "Invalid job id" in asked.stderr:
        return {}
    return _fields(asked.stdout)


def _show_job(*job_id: str) -> subprocess.CompletedProcess[str]:
    command = ["scontrol", "--oneliner", "show", "job", *job_id]
    return subprocess.run(command, capture_output=True, text=True)


def _fields(line: str) -> dict[str, str]:
    return _NO_ANSWER | dict(re.findall(r"\b(JobState|Requeue)=(\w+)", line))


def requeue(job_id: str) -> None:
    """Queue this job again after it has saved, unless Slurm is ending it for another reason.

    Called in the job by rank 0; the job is over where it returns. A job that was cancelled stays
    so. One that Slurm itself has put back (preempted, or by `scontrol requeue`) needs no second
    request. Asks again for some minutes where Slurm does not answer, or refuses.
    """
    end = time.monotonic() + RETRY_FOR_S
    refusal = _ask_for_requeue(job_id)
    while refusal and time.monotonic() < end:
        logger.warning("Slurm did not queue the job again, will ask again: %s", refusal)
        time.sleep(RETRY_EVERY_S)
        refusal = _ask_for_requeue(job_id)
    if refusal:
        logger.error(
            "error: saved, but Slurm did not queue the job again within %d s (%s); submit the run "
            "again to continue it",
            RETRY_FOR_S,
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
        logger.info("saved; the cluster file says requeue: false, so the job ends here")
        return ""
    asked = subprocess.run(["scontrol", "requeue", job_id], capture_output=True, text=True)
    if asked.returncode != 0:
        return " ".join(asked.stderr.split())
    logger.info("saved and queued again")
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(_KILL_WAIT_S)  # an exit now would look like the end of the job
    return ""
