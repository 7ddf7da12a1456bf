"""The table of schedulers."""

from dist_vse.common.errors import unknown_name
from dist_vse.launch.schedulers.base import Scheduler
from dist_vse.launch.schedulers.local import Local
from dist_vse.launch.schedulers.slurm import Slurm

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
    raise unknown_name("scheduler", name, ["auto", *SCHEDULERS])
