"""The table of schedulers."""

import difflib

from dist_vse.common.errors import UserError
from launch.schedulers.base import Scheduler
from launch.schedulers.local import Local
from launch.schedulers.slurm import Slurm

SCHEDULERS: dict[str, Scheduler] = {"slurm": Slurm(), "local": Local()}
"""By the name in a cluster file; `auto` takes the first one that is available."""


def find_scheduler(name: str) -> Scheduler:
    """Return the scheduler of this name, or the first available one for `auto`.

    Raises UserError for an unknown name, with the nearest one.
    """
    if name == "auto":
        return next(scheduler for scheduler in SCHEDULERS.values() if scheduler.is_available())
    if name in SCHEDULERS:
        return SCHEDULERS[name]
    names = ["auto", *SCHEDULERS]
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(names)}"
    raise UserError(f"scheduler={name!r} is unknown; {hint}")
