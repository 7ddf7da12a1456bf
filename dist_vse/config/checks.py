"""What the settings of a run are checked with; each raises UserError with what would do."""

from collections.abc import Sequence

from dist_vse.common.errors import UserError, unknown_name

AUTO = "auto"


def check(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def at_least(minimum: float, **values: float) -> None:
    """Check numbers; a name's double underscore stands for the dot of its key."""
    for name, value in values.items():
        key = name.replace("__", ".")
        check(value >= minimum, f"{key} ({value}) must be at least {minimum}")


def number_or_auto(minimum: int, **values: int | str) -> None:
    for name, value in values.items():
        if isinstance(value, int):
            at_least(minimum, **{name: value})
        elif value != AUTO:
            key = name.replace("__", ".")
            raise UserError(f"{key}={value!r} must be a number or {AUTO}")


def share(**values: float) -> None:
    for name, value in values.items():
        key = name.replace("__", ".")
        check(0 <= value < 1, f"{key} ({value}) must be at least 0 and below 1")


def one_of(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise unknown_name(name, value, choices)
