"""The table of several runs: the settings that differ, and how far each run is."""

from collections.abc import Sequence
from pathlib import Path

from dist_vse.common.errors import UserError
from dist_vse.common.terminal import printable
from dist_vse.config import flat_config, load_config
from dist_vse.launch import status
from dist_vse.launch.schedulers.base import was_submitted
from dist_vse.runs.files import CONFIG_NAME

_NUMBERS = ("loss", "i2t_r1", "t2i_r1", "rsum")
_Config = dict[str, str]
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
    found: list[tuple[Path, _Config, _Numbers]] = []
    unreadable = {}
    for run in runs:
        try:
            found.append((run, _flat_config(run), _numbers(run)))
        except UserError as error:
            unreadable[run] = str(error)
    keys = _differing([config for _, config, _ in found])
    rows = [_row(run, keys, config, numbers) for run, config, numbers in found]
    rows.sort(key=lambda row: -float(row[-1]) if row[-1] else float("inf"))
    rows += [[run.name, *[""] * len(keys), "unreadable", *[""] * 5] for run in unreadable]
    head = ["run", *keys, "state", "step", *_NUMBERS]
    causes = [f"{run.name}: {cause}" for run, _, _ in found for cause in status.causes(run)]
    causes += [f"{run.name}: {reason}" for run, reason in unreadable.items()]
    return "\n".join(printable(line) for line in [*_aligned([head, *rows]), *causes])


def _numbers(run: Path) -> _Numbers:
    """Return the last step, and the last values of `_NUMBERS`, as far as they are there."""
    train, evaluation = (status.last_metrics(run, kind) for kind in ("train", "eval"))
    loss = {"step": train["step"], "loss": train["loss"]} if train else {}
    return {name: (evaluation or {})[name] for name in status.RECALLS if evaluation} | loss


def _row(run: Path, keys: Sequence[str], config: _Config, numbers: _Numbers) -> list[str]:
    step = f"{numbers.get('step', 0)}/{config.get('total_steps', 0)}"
    shown = {"loss": "{:.4g}"}
    cells = [
        shown.get(name, "{:.1f}").format(numbers[name]) if name in numbers else ""
        for name in _NUMBERS
    ]
    state = status.state_name(run).lower()
    return [run.name, *[config.get(key, "") for key in keys], state, step, *cells]


def _flat_config(run: Path) -> _Config:
    path = run / CONFIG_NAME
    if not path.is_file():  # it waits in the queue
        submitted = (run / "submit").glob("config-*.yaml")
        newest = max(submitted, key=lambda path: path.stat().st_mtime, default=None)
        if newest is None:
            return {}
        path = newest
    return {key: str(value) for key, value in flat_config(load_config(path)).items()}


def _differing(configs: Sequence[_Config]) -> list[str]:
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
