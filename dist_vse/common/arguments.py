"""Command lines whose `key=value` settings may stand behind options."""

import argparse
from collections.abc import Sequence

SETTINGS = ("overrides", "settings")  # what commands call the list


def parse_arguments(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None
) -> argparse.Namespace:
    """Parse a command line; `key=value` behind options joins those before them.

    Before Python 3.12.7 argparse ends a list of positional arguments at the first option, and takes
    `submit CONFIG --cluster FILE key=value` for an error.
    """
    args, rest = parser.parse_known_args(arguments)
    taken = next((name for name in SETTINGS if hasattr(args, name)), None)
    if rest and (taken is None or not all(_is_override(word) for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest and taken is not None:
        setattr(args, taken, [*getattr(args, taken), *rest])
    return args


def _is_override(word: str) -> bool:
    return "=" in word and not word.startswith("-")
