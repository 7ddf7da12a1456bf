"""One attempt of a run writes at a time; an older one that is still alive is locked out.

A lost node may come back after its job was started again elsewhere. Both attempts would then write
into the same folder. So each attempt takes a lease by writing a random token to `lease.json`, and
exits without writing once it finds another token there. The number of the attempt does not decide:
two attempts that start at once may take the same one.
"""

import os
import secrets
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_vse.common.errors import UserError
from dist_vse.common.files import write_json
from dist_vse.common.log import logger
from dist_vse.common.reading import BadFileError, is_count, read_json
from dist_vse.runs.files import LEASE_NAME


class LostLease(UserError):  # noqa: N818  # not a user's error to mend
    """Another attempt holds the run: this one must exit, and the run goes on."""


@dataclass(frozen=True)
class Lease:
    """The right of one attempt to write into the run's folder."""

    path: Path
    attempt: int
    token: str

    def check(self) -> None:
        """Raise LostLease if another attempt holds the run, UserError if the file is missing."""
        found = _read(self.path)
        if not found:
            raise UserError(
                f"{self.path}: missing or cut short, so this attempt can't know whether it may "
                "write; it exits without saving; start the run again"
            )
        if found.get("token") != self.token:
            raise LostLease(
                f"{self.path.parent}: a later attempt of this run has taken it over "
                f"({_describe(found)}); this one exits without saving"
            )


def acquire(run_dir: Path) -> Lease:
    """Make this attempt the only one that may write; rank 0 calls this.

    A file that is cut short counts as none: no other attempt's token equals the new one. Raises
    LostLease if the Slurm job was queued again after this attempt began, or if another attempt
    takes the lease at the same moment.
    """
    path = run_dir / LEASE_NAME
    found = _read(path)
    if not found and path.exists():
        logger.warning("%s is cut short: replaced", path)
    job, restarts = os.environ.get("SLURM_JOB_ID"), int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    if job is not None and found.get("job") == job and found.get("restarts", 0) > restarts:
        raise LostLease(
            f"{run_dir}: this job was started again ({_describe(found)}); this earlier attempt "
            "exits without writing"
        )
    lease = Lease(path, found.get("attempt", 0) + 1, secrets.token_hex(8))
    mine = {
        "attempt": lease.attempt,
        "token": lease.token,
        "job": job,
        "restarts": restarts,
        "host": socket.gethostname(),
        "process": os.getpid(),
    }
    write_json(path, mine, shared=True, fsync=True)
    lease.check()
    return lease


def _read(path: Path) -> dict[str, Any]:
    """Return what the file says; nothing where it is missing or cut short."""
    try:
        found = read_json(path)
    except BadFileError:
        return {}
    numbers = ("attempt", "restarts")
    return found if all(is_count(found.get(name, 0)) for name in numbers) else {}


def _describe(holder: dict[str, Any]) -> str:
    job = f"job {holder['job']}, " if holder.get("job") else ""
    return f"{job}process {holder.get('process')} on {holder.get('host')}"
