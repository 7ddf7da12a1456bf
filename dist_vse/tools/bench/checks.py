"""Checks of a benchmark's options, before anything is measured."""

from pathlib import Path

from dist_vse.common.errors import UserError
from dist_vse.common.local_path import require_local


def at_least_one(**numbers: int) -> None:
    """Raise UserError for an option's number below 1."""
    for name, number in numbers.items():
        if number < 1:
            raise UserError(f"--{name.replace('_', '-')} ({number}) must be at least 1")


def writable(option: str, path: str | Path | None) -> None:
    """Raise UserError for a file that cannot be written."""
    if path is None:
        return
    require_local(path, f"{option} ")
    try:
        Path(path).open("a", encoding="utf-8").close()
    except OSError as error:
        raise UserError(f"{option} {path} cannot be written: {error.strerror}") from None
