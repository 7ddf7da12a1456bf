"""Sweeps: the same run with several settings, as one job array."""

import hashlib
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from dist_vse.common.errors import UserError
from dist_vse.config import load_config
from dist_vse.launch.code import pin
from dist_vse.launch.schedulers.base import SubmittedJob
from dist_vse.launch.submit import Plan, plan_submission, prepare

_COMMA = re.compile(r",(?![^\[]*\])")
_MAX_RUNS = 1000
"""Slurm's usual bound on an array (MaxArraySize)."""
_MAX_NAME = 200  # bytes; file systems take 255


def settings(sweep: Sequence[str]) -> list[list[str]]:
    """Return the overrides of every run: all combinations of `key=value,value,...`.

    A comma inside brackets is part of a value, as in `data.mix=[...],[...]`. Raises
    UserError for what is no `key=values`, for a key given twice, and for the runs' folder.
    """
    axes: dict[str, list[str]] = {}
    for axis in sweep:
        key, equals, values = axis.partition("=")
        if not equals or not values:
            raise UserError(f"--sweep {axis!r}: write key=value,value, such as optim.lr=1e-4,3e-4")
        if key == "output_dir":
            raise UserError("--sweep output_dir: every run gets a folder of its own inside it")
        if key in axes:
            raise UserError(f"--sweep gives {key} twice; join its values by commas")
        axes[key] = [f"{key}={value}" for value in _COMMA.split(values)]
    runs = [list(run) for run in itertools.product(*axes.values())]
    if len(runs) > _MAX_RUNS:
        raise UserError(f"--sweep makes {len(runs)} runs, more than {_MAX_RUNS}; split it")
    return runs


def plan_sweep(
    config_path: str | Path,
    overrides: Sequence[str],
    sweep: Sequence[str],
    cluster_path: str | Path | None,
    *,
    scale: Sequence[str] | None = None,
) -> list[Plan]:
    """Plan every run of a sweep, each in a folder of its own inside the config's output_dir.

    Raises UserError as `plan_submission` does, before anything is started.
    """
    base = Path(load_config(config_path, overrides).output_dir)
    plans = []
    for run in settings(sweep):
        name = _folder_name(run)
        more = [*overrides, *run, f"output_dir={base / name}"]
        jobs = (base / "submit").absolute()
        plans.append(plan_submission(config_path, more, cluster_path, jobs=jobs, scale=scale))
    return plans


def _folder_name(run: Sequence[str]) -> str:
    """Return the settings as a folder's name, shortened where the system would refuse it."""
    name = ",".join(run).replace("/", "_")
    if len(name.encode()) <= _MAX_NAME:
        return name
    return f"{name[:100]}...{hashlib.sha256(name.encode()).hexdigest()[:12]}"


def submit_sweep(plans: Sequence[Plan], *, parallel: int) -> Iterator[SubmittedJob]:
    """Start the runs, `parallel` at a time at most; yield their jobs as they start.

    Slurm gets one array at once. Local processes start when earlier ones end; then this returns
    after the last one has ended.
    """
    scheduler = plans[0].scheduler
    scheduler.check_available()
    pin(plans[0].code)
    jobs = ((plan.spec, prepare(plan)) for plan in plans)
    for plan, job in zip(plans, scheduler.start_sweep(jobs, parallel), strict=True):
        job.save(plan.run_dir)
        yield job
