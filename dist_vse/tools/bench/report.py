"""The report of a measurement: printed as tables, and written as one JSON file."""

import datetime
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from dist_vse.common.files import output_json
from dist_vse.runs.environment import describe_environment
from dist_vse.tools.bench.table import Table

WIDTH = 160  # columns, where the output is no terminal


def describe_measurement(benchmark: str, words: Sequence[str]) -> dict[str, Any]:
    """Return what a report begins with: its command, given as words, its date and its machine."""
    return {
        "benchmark": benchmark,
        **describe_environment(),
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["dist-vse", "bench", benchmark, *words]),
    }


def print_tables(tables: Sequence[Table]) -> None:
    """Print tables as wide as the terminal."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    for table in tables:
        console.print(table.as_rich())


def write_report(
    path: Path, report: dict[str, Any], tables: Sequence[Table], *, more_follows: bool = False
) -> None:
    """Write a report with its tables by `output_json`."""
    content = report | {"tables": [asdict(table) for table in tables]}
    output_json(path, content, more_follows=more_follows)


def _commit() -> str | None:
    """Return the commit of this code, with a + where it was changed; None outside of git."""
    try:
        asked = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+"],
            capture_output=True,
            text=True,
        )
    except FileNotFoundError:
        return None
    return asked.stdout.strip() or None
