"""Killed at any moment and gone on with another number of ranks, the stream is the same."""

import json
import multiprocessing
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_vse.data.index import Index, read_index
from dist_vse.data.samples import Placement
from dist_vse.data.streams import TrainSet
from tests.support.datasets import write_dataset
from tests.support.streams import open_rank, rows_of

pytestmark = pytest.mark.slow

SHARDS = [11, 17, 8, 14, 23]
BATCH, STREAMS, STEPS, KILLS = 16, 4, 40, 30
LONGEST = 8  # steps until a kill
SPAWN = multiprocessing.get_context("forkserver")


@dataclass(frozen=True)
class Life:
    """Some ranks that read the stream on after `start` steps, up to and with step `stop`."""

    world_size: int
    start: int
    stop: int = STEPS
    with_worker: int = -1  # the rank that has a worker: to start one takes longer than all steps


def _read(folder: Path, log: Path, rank: int, life: Life, tell: Callable[[int], None]) -> None:
    """Write each step's rows and state."""
    start, world_size = life.start, life.world_size
    state = _state(log, start) if start else None
    batches = open_rank(
        [TrainSet(read_index(folder), "train"), TrainSet(read_index(folder), "other", 0.5)],
        Placement(rank, world_size),
        num_workers=int(rank == life.with_worker),
        global_batch_size=BATCH,
        num_streams=STREAMS,
        shuffle_window=16,
        state=state,
    )
    for step in range(start + 1, life.stop + 1):
        batch = next(batches)
        content = {"rows": rows_of(batch), "state": batch.state.tolist()}
        temporary = log / f"{step}-{world_size}-{rank}.tmp"
        temporary.write_text(json.dumps(content))
        os.replace(temporary, temporary.with_suffix(".json"))
        tell(step)


def _whole_steps(log: Path) -> dict[int, list[dict[str, Any]]]:
    """Return what all ranks of some life wrote, by step; a step that a rank lacks isn't whole."""
    found: dict[int, list[dict[str, Any]]] = {}
    for path in log.glob("*-0.json"):
        step, world_size, _ = path.stem.split("-")
        ranks = [log / f"{step}-{world_size}-{rank}.json" for rank in range(int(world_size))]
        if all(path.exists() for path in ranks):
            found[int(step)] = [json.loads(path.read_text()) for path in ranks]
    return found


def _state(log: Path, step: int) -> Any:
    return np.concatenate([rank["state"] for rank in _whole_steps(log)[step]])


def _start(folder: Path, log: Path, life: Life) -> tuple[list[BaseProcess], list[Connection]]:
    processes: list[BaseProcess] = []
    pipes = []
    for rank in range(life.world_size):
        receive, send = SPAWN.Pipe(duplex=False)
        process = SPAWN.Process(target=_read, args=(folder, log, rank, life, send.send))
        process.start()
        send.close()
        processes.append(process)
        pipes.append(receive)
    return processes, pipes


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return write_dataset(
        tmp_path_factory.mktemp("data"), {"train": SHARDS, "other": [13, 9]}, size=16
    )


def _go_on(index: Index, log: Path, life: Life) -> None:
    """Read on to the life's end, with all ranks in this process."""
    for rank in range(life.world_size):
        _read(index.root, log, rank, life, lambda step: None)


def test_thirty_kills_leave_the_stream_as_it_was(index: Index, tmp_path: Path) -> None:
    """Two ranks, killed at a random moment; then 1, 2 or 4 go on, then two again, and so forth.

    Every other time one of the ranks that are killed has a worker.
    """
    (tmp_path / "whole").mkdir()
    _go_on(index, tmp_path / "whole", Life(1, 0))
    expected = {s: ranks[0]["rows"] for s, ranks in _whole_steps(tmp_path / "whole").items()}
    assert len(expected) == STEPS
    rng = random.Random(0)
    resumed, kills, runs = set(), 0, 0
    while kills < KILLS:
        log = tmp_path / f"run{runs}"
        log.mkdir()
        runs, done = runs + 1, 0
        while done < STEPS - 1:
            life = Life(2, done, with_worker=(-1, 0, -1, 1)[kills % 4])
            kills += _kill_after(
                *_start(index.root, log, life), rng.randint(1, min(LONGEST, STEPS - 1 - done)), rng
            )
            done = _check(log, expected)
            life = Life(rng.choice((1, 2, 4)), done, min(STEPS, done + rng.randint(1, 3)))
            _go_on(index, log, life)
            resumed.add(life.world_size)
            done = _check(log, expected)
            assert done == life.stop
    assert resumed == {1, 2, 4}


def _check(log: Path, expected: dict[int, list[str]]) -> int:
    """Return the last whole step, once all whole steps are as in the run that nobody touched."""
    whole = _whole_steps(log)
    for step, ranks in whole.items():  # of all lives so far
        assert [row for rank in ranks for row in rank["rows"]] == expected[step]
    done = max(whole, default=0)
    assert sorted(whole) == list(range(1, done + 1))
    return done


def _kill_after(
    processes: list[BaseProcess], pipes: list[Connection], steps: int, rng: random.Random
) -> bool:
    """Kill all ranks within the step after `steps`; return False if they ended before."""
    seen, open_pipes = 0, list(pipes)
    while open_pipes and seen < steps:
        for pipe in wait(open_pipes, timeout=30):
            assert isinstance(pipe, Connection)
            try:
                pipe.recv()
                seen += pipe is pipes[0]
            except EOFError:
                open_pipes.remove(pipe)
    time.sleep(rng.uniform(0, 0.004))  # anywhere within a step: they take a millisecond or two
    alive = any(process.is_alive() for process in processes)
    for process in processes:
        process.kill()
    for process in processes:
        process.join()
    return alive
