"""`dist-vse verify --peer NAME`: the conformance table."""

import logging
import multiprocessing
import os
from collections.abc import Callable, Sequence
from typing import Any

import rich.console
from torch.multiprocessing.spawn import ProcessException

from dist_vse.common.errors import UserError
from dist_vse.common.terminal import say
from dist_vse.distributed.spawn import RankGroup, run_rank_groups
from dist_vse.engine.deepspeed_start import IMPORTS
from dist_vse.tools.bench.table import Table
from dist_vse.tools.verify.conformance.measure import (
    COLUMNS,
    Measured,
    completed,
    failed,
    measure,
    measure_uneven,
)
from dist_vse.tools.verify.conformance.peers import OURS, PACKAGES, settings, version
from dist_vse.tools.verify.conformance.zero import measure_zero

ALL = "all"
PEERS = (*(name for name in PACKAGES if name != OURS), ALL)
HANG_S = "30"
ABORTS = "aborts"
NOTE = (
    "Under DDP, but for the last column. Gradient of the towers: its projection on the exact one "
    "(factor), relative error, cosine; of the temperature: factor, error. Reductions: messages of "
    "gradients a step. Uneven ranks: 14 and 10 pairs. ZeRO: the towers' update under DeepSpeed, by "
    "stage where stages differ."
)


def run(peer: str, processes: int) -> int:
    """Print the table of a peer and ours; return 1 if ours is off. A peer's fault is no failure."""
    if processes < 2:
        raise UserError(f"--processes {processes}: peers are compared on 2 or more")
    found, absent = collect(PEERS[:-1] if peer == ALL else [peer], processes, skip=peer == ALL)
    console = rich.console.Console()
    if not console.is_terminal:
        console = rich.console.Console(width=160)
    console.print(table(found, processes).as_rich())
    for line in absent:
        say(f"SKIPPED {line}")
    return int(failed(found))


def collect(
    peers: Sequence[str], processes: int, *, skip: bool
) -> tuple[list[Measured], list[str]]:
    """Measure ours and the peers; return also why some were skipped.

    Without `skip`, raises UserError for one that is not installed.
    """
    present, absent = [OURS], []
    for peer in peers:
        try:
            version(peer)
            present.append(peer)
        except UserError as error:
            if not skip:
                raise
            absent.append(str(error))
    os.environ.setdefault("DIST_VSE_HANG_S", HANG_S)  # a peer may wait for ever
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    multiprocessing.set_forkserver_preload([measure_zero.__module__, *IMPORTS])
    found: list[Measured] = _on_ranks(measure, processes, present)
    numbers = [(peer, number) for peer in present for number in range(len(settings(peer)))]
    uneven = [_apart(measure_uneven, processes, *each) for each in numbers]
    zero = [_apart(measure_zero, processes, *each) for each in numbers]
    return [completed(*each) for each in zip(found, uneven, zero, strict=True)], absent


def table(found: Sequence[Measured], processes: int) -> Table:
    """Return the table."""
    title = f"Losses on {processes} processes, against one process in float64"
    made = Table(title, COLUMNS, note=NOTE)
    for measured in found:
        made.add_row(*measured.cells())
    return made


def _apart(fn: Callable[[str, int], Any], processes: int, peer: str, number: int) -> Any:
    """Measure in a process group of its own, which a peer may end or keep waiting."""
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    try:
        return _on_ranks(_quietly, processes, fn, peer, number)
    except ProcessException:  # gloo ends a process that gets more rows than it expects
        return ABORTS if fn is measure_uneven else [ABORTS]


def _quietly(fn: Callable[[str, int], Any], peer: str, number: int) -> Any:
    """Measure on a rank whose last words, if it aborts, would only stand in the way."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    return fn(peer, number)


def _on_ranks(fn: Callable[..., Any], processes: int, *args: object) -> Any:
    (value,) = run_rank_groups([RankGroup(fn, processes, args)], start_method="forkserver")
    return value
