"""What a data set was made with: a line of JSON a run, so that it can be repaired.

`commands.jsonl` lies beside the shards. A run's line replaces those of earlier runs whose splits it
makes again.
"""

import argparse
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dist_vse.errors import UserError
from dist_vse.index import is_remote

COMMANDS_NAME = "commands.jsonl"
_NOT_KEPT = ("command", "run", "shard_run", "out", "workers")  # no part of what is made
_PATHS = ("input", "images", "tars")


def note_command(folder: Path, args: argparse.Namespace, splits: Iterable[str]) -> None:
    """Write down what makes `splits`, with absolute paths."""
    options = {name: value for name, value in vars(args).items() if name not in _NOT_KEPT}
    for name in _PATHS:
        if options.get(name) is not None:
            options[name] = _absolute(options[name])
    line = {"splits": sorted(splits), "options": options}
    others = [old for old in _read(folder) if not set(old["splits"]) <= set(splits)]
    lines = sorted((*others, line), key=lambda entry: str(entry["splits"]))
    path = folder / COMMANDS_NAME
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    os.replace(temporary, path)


def read_commands(folder: Path) -> list[argparse.Namespace]:
    """Return what made the folder, in the order of the splits' names.

    Raises UserError if it holds no such note.
    """
    commands = [argparse.Namespace(**line["options"], out=folder) for line in _read(folder)]
    if not commands:
        raise UserError(
            f"{folder / COMMANDS_NAME}: is missing; run the command that made the shards again: it "
            "writes only what is broken"
        )
    return commands


def _read(folder: Path) -> list[dict[str, Any]]:
    path = folder / COMMANDS_NAME
    if not path.is_file():
        return []
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if not all(isinstance(line["splits"] + [*line["options"]], list) for line in lines):
            raise TypeError("no list")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is broken ({error}); remove it and shard again") from error
    return lines


def _absolute(value: str | list[str]) -> str | list[str]:
    if isinstance(value, list):
        return [str(_absolute(entry)) for entry in value]
    return value if is_remote(value) else os.path.abspath(value)
