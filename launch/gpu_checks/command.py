"""Runs the checks one after another, each in processes of its own; reports lines and a JSON."""

import datetime
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dist_vse.common.errors import UserError
from dist_vse.common.files import check_output, output_json
from dist_vse.common.terminal import say
from dist_vse.launch.gpu_checks.catalog import ALL, CHECKS, NO_GROUP, find_check
from dist_vse.launch.gpu_checks.child import RESULT
from dist_vse.launch.gpu_checks.finding import Finding, Task
from dist_vse.launch.gpu_checks.processes import Ended, Place, run_ranks

FORMAT = 1  # of the JSON
LIMIT_S = 60.0
WARM_UP = 4  # times the limit of a check, for compilers at their first time
GRACE_S = 10.0  # for the other ranks, after one has failed
OK, FAIL, SKIPPED = "ok", "FAIL", "skipped"


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    config: str | None = None
    overrides: Sequence[str] = ()
    json: Path | None = None
    ranks: int | None = None
    checks: Sequence[int] = tuple(CHECKS)
    device: str = "auto"
    limit_s: float = LIMIT_S


@dataclass(frozen=True)
class Row:
    """A line of the report."""

    number: int
    name: str
    status: str
    words: str
    seconds: float
    figures: dict[str, Any]


def read_numbers(text: str) -> list[int]:
    """Return the checks of `--checks 1,5,7`. Raises UserError for what is no check."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    wrong = [word for word in words if not word.isdecimal() or int(word) not in CHECKS]
    if wrong or not words:
        raise UserError(f"--checks {text}: give numbers from 1 to {len(CHECKS)}, such as 1,5,7")
    return sorted({int(word) for word in words})


def check_gpus(options: Options) -> int:
    """Run the checks, print a line for each; return 2 if any failed."""
    place = find_place(options.device, options.ranks)
    if options.json is not None:
        check_output(options.json)  # now, not after minutes
    say(_heading(place), flush=True)
    rows: list[Row] = []
    began = time.monotonic()
    for number in options.checks:
        rows.append(run_check(number, place, options, earlier=rows))
        say(_line(rows[-1]), flush=True)
        if options.json is not None:
            more = len(rows) < len(options.checks)
            _write(options.json, place, rows, more_follows=more)
    counts = {status: sum(row.status == status for row in rows) for status in (OK, FAIL, SKIPPED)}
    words = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    say(f"{len(rows)} checks in {time.monotonic() - began:.0f} s: {words}")
    if options.json is not None:
        say(f"wrote {options.json}")
    return 2 if counts[FAIL] else 0


def find_place(device: str, ranks: int | None) -> Place:
    """Return the devices to use. Raises UserError if a GPU was asked for and none is here."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() and device != "cpu" else 0
    if device == "cuda" and not gpus:
        raise UserError("--device cuda: PyTorch sees no GPU here; check nvidia-smi")
    if ranks is not None and not 1 <= ranks <= 8:
        raise UserError(f"--ranks ({ranks}) must be from 1 to 8")
    return Place(gpus, max(2, min(8, gpus)) if ranks is None else ranks)


def run_check(number: int, place: Place, options: Options, earlier: Sequence[Row] = ()) -> Row:
    """Run one check in processes of its own; what goes wrong with it is its row."""
    check = find_check(number)
    began = time.monotonic()
    figures: dict[str, Any] = {}

    def row(status: str, words: str, more: dict[str, Any] | None = None) -> Row:
        seconds = round(time.monotonic() - began, 1)
        return Row(number, check.name, status, words, seconds, {**figures, **(more or {})})

    if check.gpus > place.gpus:
        return row(SKIPPED, "needs a GPU" if check.gpus == 1 else f"needs {check.gpus} GPUs")
    if check.gpus > 1 and place.ranks > place.gpus:
        return row(SKIPPED, "needs a GPU a rank: of a shared one its times mean nothing")
    task = Task(
        number,
        on_gpu=place.gpus > 0,
        folder="",
        ends=0.0,
        config=options.config,
        overrides=list(options.overrides),
        earlier={str(row.number): row.figures for row in earlier},
    )
    if check.warm_up and place.gpus:
        found = _run(replace(task, warm_up=True), place, WARM_UP * options.limit_s)
        if not found.ok:
            return row(FAIL, f"while compiling, before the check: {found.words}", found.figures)
        figures["warm_up_s"] = round(time.monotonic() - began, 1)
        task = replace(task, warmed=found.figures)
        began = time.monotonic()
    found = _run(task, place, options.limit_s)
    return row(OK if found.ok else FAIL, found.words, found.figures)


def _run(task: Task, place: Place, limit_s: float) -> Finding:
    """Run a check, or what compiles before it, in processes of its own."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        path = folder / "task.json"
        task = replace(task, folder=name, ends=time.monotonic() + limit_s)
        path.write_text(json.dumps(asdict(task)), encoding="utf-8")
        ranks = {NO_GROUP: None, ALL: place.ranks}.get(find_check(task.number).group, 1)
        arguments = ["-m", "dist_vse.launch.gpu_checks.child", str(path)]
        ended = run_ranks(arguments, ranks, place, folder, limit_s=limit_s, grace_s=GRACE_S)
        result = folder / RESULT
        if result.is_file() and not any(one.code for one in ended):
            return Finding(**json.loads(result.read_text(encoding="utf-8")))
    return Finding(False, explain(ended, limit_s), {"logs": [one.log[-4000:] for one in ended]})


def explain(ended: Sequence[Ended], limit_s: float) -> str:
    """Say in a line how processes failed: by the first that ended with an error."""
    failed = sorted((one.seconds, rank) for rank, one in enumerate(ended) if one.code)
    if not failed:
        hanging = [str(rank) for rank, one in enumerate(ended) if one.code is None]
        return f"no end after {limit_s:g} s (ranks {', '.join(hanging)}); --limit gives it longer"
    _, rank = failed[0]
    lines = [line.strip() for line in ended[rank].log.splitlines() if line.strip()]
    return f"rank {rank} ended with code {ended[rank].code}: {lines[-1] if lines else 'no word'}"


def _heading(place: Place) -> str:
    if not place.gpus:
        return f"no GPU: what needs none runs on the CPU ({place.ranks} ranks over gloo)"
    shared = "" if place.ranks <= place.gpus else "; they share it: their times mean little"
    return f"{place.gpus} GPU{'s' * (place.gpus > 1)}, {place.ranks} ranks over NCCL{shared}"


def _line(row: Row) -> str:
    return f"{row.status:8}{row.number:2}  {row.name:12} {row.seconds:4.0f} s  {row.words}"


def _write(path: Path, place: Place, rows: Sequence[Row], *, more_follows: bool) -> None:
    content = {
        "doctor_gpu": FORMAT,
        "command": shlex.join(["dist-vse", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "gpus": place.gpus,
        "ranks": place.ranks,
        "checks": [asdict(row) for row in rows],
    }
    output_json(path, content, more_follows=more_follows)
