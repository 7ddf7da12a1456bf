"""One life of a run at a time: an older start that still lives somewhere can't write any more.

A lost node may come back after its job was started again elsewhere: both lives would write into
the same folder. Each start notes itself in `lease.json`, and who isn't noted there stops. Two
starts at once may take the same number: a random token tells whose note it is.
"""

import json
import os
import secrets
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_vse.common.errors import UserError
from dist_vse.common.log import logger
from dist_vse.runs.files import LEASE_NAME


class LostLease(UserError):  # noqa: N818  # not a user's error to mend
    """Another start of the run holds it: this one must end, and the run goes on."""


@dataclass(frozen=True)
class Lease:
    """The right of one start of a run to write into its folder."""

    path: Path
    life: int
    token: str

    def check(self) -> None:
        """Raise LostLease if another start has taken the run over, UserError without a note."""
        noted = _read(self.path)
        if not noted:
            raise UserError(
                f"{self.path}: missing or cut, so nobody knows which start of the run may write; "
                "this one ends without saving: start it again"
            )
        if noted.get("token") != self.token:
            raise LostLease(
                f"{self.path.parent}: a later start of this run has taken it over "
                f"({_describe(noted)}); this one ends without saving"
            )


def acquire(run_dir: Path) -> Lease:
    """Make this start the only one that may write; rank 0 calls this.

    A note that is cut counts for none: no other start's token equals the new one. Raises LostLease
    if the Slurm job has been queued again since this life of it began, or if another start claims
    the run in the same moment.
    """
    path = run_dir / LEASE_NAME
    noted = _read(path)
    if not noted and path.exists():
        logger.warning("%s is cut: replaced", path)
    job, restarts = os.environ.get("SLURM_JOB_ID"), int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    if job is not None and noted.get("job") == job and noted.get("restarts", 0) > restarts:
        raise LostLease(
            f"{run_dir}: this job has been started again since ({_describe(noted)}); this life of "
            "it, a former one, ends"
        )
    lease = Lease(path, noted.get("life", 0) + 1, secrets.token_hex(8))
    mine = {
        "life": lease.life,
        "token": lease.token,
        "job": job,
        "restarts": restarts,
        "host": socket.gethostname(),
        "process": os.getpid(),
    }
    temporary = path.with_suffix(f".{lease.token}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(mine, file)
        file.flush()
        os.fsync(file.fileno())  # else a power cut may leave an empty note behind the rename
    os.replace(temporary, path)
    lease.check()
    return lease


def _read(path: Path) -> dict[str, Any]:
    """Return the note; an empty one where it is missing or cut."""
    try:
        noted = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return noted if isinstance(noted, dict) else {}


def _describe(noted: dict[str, Any]) -> str:
    job = f"job {noted['job']}, " if noted.get("job") else ""
    return f"{job}process {noted.get('process')} on {noted.get('host')}"
