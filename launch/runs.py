"""The table of several runs: the settings that differ, and how far each run is."""

from collections.abc import Sequence
from pathlib import Path

from dist_vse.common.errors import UserError
from dist_vse.common.terminal import printable
from dist_vse.config.flat import read_settings
from dist_vse.launch import status
from dist_vse.launch.schedulers import find_scheduler
from dist_vse.launch.schedulers.base import JobState, SubmittedJob, load_job, was_submitted
from dist_vse.runs.files import CONFIG_NAME

_NUMBERS = ("loss", "i2t_r1", "t2i_r1", "rsum")
_Settings = dict[str, str]
_Numbers = dict[str, float]


def find_runs(folders: Sequence[Path]) -> list[Path]:
    """Return the runs in these folders, and those that they hold, by name.

    A run that waits in the queue has no config yet, only its submission.
    """
    found = set()
    for folder in folders:
        for path in (folder, *folder.glob("*"), *folder.glob("*/*")):
            if (path / CONFIG_NAME).is_file() or was_submitted(path):
                found.add(path)
    if not found:
        raise UserError(f"{', '.join(map(str, folders))}: no runs here")
    return sorted(found)


def table(runs: Sequence[Path]) -> str:
    """Return one line for each run, best rsum first, then one for each cause of a failure.

    A run whose folder can't be read is a line that says so.
    """
    jobs = {run: job for run in runs if (job := _job(run)) is not None}
    states = dict(zip(jobs, status.job_states([*jobs.values()]), strict=True))
    found: list[tuple[Path, _Settings, _Numbers]] = []
    unreadable = {}
    for run in runs:
        try:
            found.append((run, _settings(run), _numbers(run)))
        except UserError as error:
            unreadable[run] = str(error)
    keys = _differing([settings for _, settings, _ in found])
    rows = [_row(run, keys, settings, numbers, states.get(run)) for run, settings, numbers in found]
    rows.sort(key=lambda row: -float(row[-1]) if row[-1] else float("inf"))
    rows += [[run.name, *[""] * len(keys), "unreadable", *[""] * 5] for run in unreadable]
    head = ["run", *keys, "state", "step", *_NUMBERS]
    ends = [f"{run.name}: {c}" for run in states for c in status.causes(jobs[run], states[run])]
    ends += [f"{run.name}: {reason}" for run, reason in unreadable.items()]
    return "\n".join(printable(line) for line in [*_aligned([head, *rows]), *ends])


def _job(run: Path) -> SubmittedJob | None:
    """Return a run's last job; None if it was never submitted, or its notes are damaged."""
    try:
        job = load_job(run)
        find_scheduler(job.scheduler)
    except UserError:
        return None
    return job


def _numbers(run: Path) -> _Numbers:
    """Return the last step, and the last values of `_NUMBERS`, as far as they are there."""
    last = status.last_metrics(run)
    train, evaluation = last.get("train"), last.get("eval")
    loss = {"step": train["step"], "loss": train["loss"]} if train else {}
    return {name: (evaluation or {})[name] for name in status.RECALLS if evaluation} | loss


def _row(
    run: Path,
    keys: Sequence[str],
    settings: _Settings,
    numbers: _Numbers,
    state: JobState | None,
) -> list[str]:
    step = f"{numbers.get('step', 0)}/{settings.get('total_steps', 0)}"
    shown = {"loss": "{:.4g}"}
    cells = [
        shown.get(name, "{:.1f}").format(numbers[name]) if name in numbers else ""
        for name in _NUMBERS
    ]
    own = [settings.get(key, "") for key in keys]
    return [run.name, *own, state.name.lower() if state else "", step, *cells]


def _settings(run: Path) -> _Settings:
    path = run / CONFIG_NAME
    if not path.is_file():  # it waits in the queue
        submitted = (run / "submit").glob("config-*.yaml")
        newest = max(submitted, key=lambda path: path.stat().st_mtime, default=None)
        if newest is None:
            return {}
        path = newest
    return read_settings(path)


def _differing(configs: Sequence[_Settings]) -> list[str]:
    """Return the settings that not all runs share."""
    keys = dict.fromkeys(key for config in configs for key in config)
    known = [config for config in configs if config]
    return [k for k in keys if k != "output_dir" and len({c.get(k) for c in known}) > 1]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
