"""Time sharding against tar, webdataset.ShardWriter and img2dataset.

Every way is a whole command (with its start) that reads the same photographs from the disk and
writes shards of 500; the ways take turns, and the file system is synced before each, untimed.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from benchmarks import import_path
from benchmarks.result import Result
from benchmarks.support.shard_peers import img2dataset_command, write_photographs
from dist_vse.common.errors import UserError
from dist_vse.tools.bench.table import Table

MAX_SIDE = 256
_ENVIRONMENT = {"NO_ALBUMENTATIONS_UPDATE": "1"}  # img2dataset's would ask the network
_OURS = "import sys; from dist_vse.cli import main; sys.exit(main())"


def run(args: argparse.Namespace) -> Result:
    """Time all ways.

    Raises UserError for a way that fails.
    """
    folder: Path = args.folder
    results: list[dict[str, object]] = []
    for images, max_side in ((args.images, 0), (args.resized, MAX_SIDE)):
        pairs = write_photographs(folder / f"photographs-{images}", images)
        ways = _ways(pairs, folder / "out", max_side, args.img2dataset)
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(args.repeats):
            for name, command in ways.items():
                seconds[name].append(_time(name, command, folder / "out"))
        results += _compare(
            seconds, f"{images:,} {f'to {max_side} px' if max_side else 'untouched'}"
        )
    return Result({"results": results}, [_table(results)])


def _compare(seconds: dict[str, list[float]], photographs: str) -> list[dict[str, object]]:
    return [
        {
            "photographs": photographs,
            "against": title,
            "seconds": [round(s, 4) for s in seconds[peer]],
            "our_seconds": [round(s, 4) for s in seconds[ours]],
            "theirs_by_ours": round(median(seconds[peer]) / median(seconds[ours]), 2),
        }
        for title, (peer, ours) in _PAIRS.items()
        if peer in seconds
    ]


def _table(results: list[dict[str, object]]) -> Table:
    columns = ("photographs", "against", "seconds", "our_seconds", "theirs_by_ours")
    table = Table("sharding", [column.replace("_", " ") for column in columns])
    for row in results:
        table.add_row(*(str(row[column]) for column in columns))
    return table


_PAIRS = {  # the peer and its command, and ours to set against it
    "tar cf, one process": ("tar", "ours, one process"),
    "webdataset.ShardWriter, ours with two processes": ("ShardWriter", "ours, two processes"),
    "img2dataset, two processes": ("img2dataset", "ours, two processes"),
}


def _ways(pairs: Path, out: Path, max_side: int, img2dataset: str | None) -> dict[str, list[str]]:
    """Return the commands by name; all write into `out`."""
    ours = [sys.executable, "-c", _OURS, "shard", "jsonl", str(pairs), str(out)]
    ours += [f"--max-side={max_side}"] if max_side else []
    peer = [
        sys.executable,
        "-m",
        "benchmarks.support.shard_peers",
        str(pairs),
        str(out),
        str(max_side),
    ]
    ways = {
        "ours, one process": [*ours, "--workers=1"],
        "ours, two processes": [*ours, "--workers=2"],
        "ShardWriter": peer,
    }
    if not max_side:
        ways["tar"] = ["tar", "cf", str(out), "-C", str(pairs.parent), "."]
    if img2dataset:
        ways["img2dataset"] = img2dataset_command(img2dataset, pairs, out, max_side)
    return ways


def _time(name: str, command: list[str], out: Path) -> float:
    """Run the command into an empty place; return its wall time in seconds."""
    if out.is_dir():
        shutil.rmtree(out)
    else:
        out.unlink(missing_ok=True)
    os.sync()
    start = time.monotonic()
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            env=os.environ | import_path() | _ENVIRONMENT,
        )
    except OSError as error:
        raise UserError(
            f"{command[0]}: cannot be run ({error.strerror}); check the path"
        ) from error
    seconds = time.monotonic() - start
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise UserError(f"{name} ended with code {done.returncode} ({last})")
    return seconds
