"""The commands that made a data set, one line of JSON for each, so that it can be repaired.

`commands.jsonl` lies beside the shards. A split belongs to the command that made it last: a new
line takes its splits out of the earlier lines, and a line without splits is removed.
"""

import argparse
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dist_vse.common.errors import UserError
from dist_vse.common.files import write_json_lines
from dist_vse.common.reading import parse_json, read_text
from dist_vse.common.terminal import without_secrets
from dist_vse.data.index import check_consent, is_remote

COMMANDS_NAME = "commands.jsonl"
_NOT_KEPT = (
    "command",
    "run",
    "shard_run",
    "out",
    "workers",
    "only",
    "allow_pipe",
    "retry_failed",
)  # they do not change what is made; consent is given each time
_PATHS = ("input", "images", "tars")


def log_command(folder: Path, args: argparse.Namespace, splits: Iterable[str]) -> None:
    """Record the command that makes `splits`, with absolute paths."""
    options = {name: value for name, value in vars(args).items() if name not in _NOT_KEPT}
    for name in _PATHS:
        if options.get(name) is not None:
            options[name] = _absolute(options[name])
    lines = [{"splits": sorted(splits), "options": options}]
    for old in _read(folder):
        owned = sorted(set(old["splits"]) - set(splits))
        if owned:
            lines.append({"splits": owned, "options": old["options"]})
    lines.sort(key=lambda line: str(line["splits"]))
    write_json_lines(folder / COMMANDS_NAME, lines)


def read_commands(folder: Path) -> list[argparse.Namespace]:
    """Return the commands that made the folder, in the order of the splits' names.

    The attribute `only` of each names the splits that it still owns. Raises UserError if there is
    no log, or if two commands in it own the same split.
    """
    lines = _read(folder)
    owners = Counter(split for line in lines for split in line["splits"])
    for split, count in owners.items():
        if count > 1:
            raise UserError(
                f"{folder / COMMANDS_NAME}: names {count} commands for split {split!r}; run again "
                "the one that made it: it writes only what is broken"
            )
    commands = [
        argparse.Namespace(**line["options"], out=folder, only=line["splits"]) for line in lines
    ]
    if not commands:
        raise UserError(
            f"{folder / COMMANDS_NAME}: is missing; run the command that made the shards again: it "
            "writes only what is broken"
        )
    return commands


def check_inputs(command: argparse.Namespace) -> None:
    """Raise UserError if a command would read what may run code, without the user's consent.

    The log may be somebody else's: what it names was given by him, not by this user.
    """
    for name in _PATHS:
        given = getattr(command, name, None) or []
        for location in [given] if isinstance(given, str) else given:
            check_consent(location, allow_pipe=command.allow_pipe)
            if is_remote(location) and location.endswith("?..."):
                raise UserError(
                    f"{location}: queries of URLs are not kept in {COMMANDS_NAME}; run `dist-vse "
                    f"shard {command.shard_command}` again: it makes only what is broken"
                )


def _read(folder: Path) -> list[dict[str, Any]]:
    path = folder / COMMANDS_NAME
    if not path.is_file():
        return []
    try:
        lines = [parse_json(line, dict) for line in read_text(path).splitlines()]
        for line in lines:
            if not all(isinstance(split, str) for split in line["splits"]):
                raise TypeError("splits must be names")
            if not isinstance(line["options"]["shard_command"], str):
                raise TypeError("shard_command must be a name")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is broken ({error}); remove it and shard again") from error
    return lines


def _absolute(value: str | list[str]) -> str | list[str]:
    if isinstance(value, list):
        return [str(_absolute(entry)) for entry in value]
    return without_secrets(value) if is_remote(value) else os.path.abspath(value)
