"""Checks of a benchmark's options, before anything is measured."""

from dist_vse.common.errors import UserError


def at_least_one(**numbers: int) -> None:
    """Raise UserError for an option's number below 1."""
    for name, number in numbers.items():
        if number < 1:
            raise UserError(f"--{name.replace('_', '-')} ({number}) must be at least 1")
