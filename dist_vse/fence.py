"""One life of a run at a time: an older start that still lives somewhere can't write any more.

A lost node may come back after its job was started again elsewhere: both lives would write into
the same folder. Each start notes itself in `life.json`, and who isn't noted there stops.
"""

import json
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_vse.errors import UserError
from dist_vse.run_files import LIFE_NAME


@dataclass(frozen=True)
class Fence:
    """The right of one start of a run to write into its folder."""

    path: Path
    life: int

    def check(self) -> None:
        """Raise UserError if a later start has taken the run over."""
        noted = _read(self.path)
        if noted.get("life") != self.life:
            raise UserError(
                f"{self.path.parent}: a later start of this run has taken it over "
                f"({_describe(noted)}); this one ends without saving"
            )


def claim(run_dir: Path) -> Fence:
    """Make this start the only one that may write; rank 0 calls this.

    Raises UserError if the Slurm job has been queued again since this life of it began.
    """
    path = run_dir / LIFE_NAME
    noted = _read(path)
    job, restarts = os.environ.get("SLURM_JOB_ID"), int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    if job is not None and noted.get("job") == job and noted["restarts"] > restarts:
        raise UserError(
            f"{run_dir}: this job has been started again since ({_describe(noted)}); this life of "
            "it, a former one, ends"
        )
    mine = {
        "life": noted.get("life", 0) + 1,
        "job": job,
        "restarts": restarts,
        "host": socket.gethostname(),
        "process": os.getpid(),
    }
    temporary = path.with_suffix(f".{socket.gethostname()}-{os.getpid()}.tmp")
    temporary.write_text(json.dumps(mine), encoding="utf-8")
    os.replace(temporary, path)
    return Fence(path, mine["life"])


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    noted: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return noted


def _describe(noted: dict[str, Any]) -> str:
    job = f"job {noted['job']}, " if noted.get("job") else ""
    return f"{job}process {noted.get('process')} on {noted.get('host')}"
