"""Killed at any moment and gone on with another number of ranks, the stream is the same."""

import json
import multiprocessing
import os
import random
import time
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_vse.index import Index, read_index
from dist_vse.models.tokenizer import WordTokenizer
from dist_vse.stream import TrainSet, train_batches
from tests.datasets import write_dataset
from tests.test_stream_train import rows_of

SHARDS = [11, 17, 8, 14, 23]
BATCH, LANES, STEPS, KILLS = 16, 4, 40, 30
SPAWN = multiprocessing.get_context("forkserver")


def _rank(folder: Path, log: Path, rank: int, world_size: int, start: int, running: Any) -> None:
    """Read the stream from the state after `start` steps; write each step's rows and state."""
    state = _state(log, start) if start else None
    batches = train_batches(
        [TrainSet(read_index(folder), "train"), TrainSet(read_index(folder), "other", 0.5)],
        seed=3,
        global_batch_size=BATCH,
        lanes=LANES,
        shuffle_window=16,
        size=8,
        crop="random",
        min_crop_area=0.5,
        flip=True,
        color_jitter=0.2,
        tokenizer=WordTokenizer(["a", "red", "square", "on"], 8),
        rank=rank,
        world_size=world_size,
        num_workers=0,
        state=state,
    )
    for step in range(start + 1, STEPS + 1):
        batch = next(batches)
        content = {"rows": rows_of(batch), "state": batch.state.tolist()}
        temporary = log / f"{step}-{world_size}-{rank}.tmp"
        temporary.write_text(json.dumps(content))
        os.replace(temporary, temporary.with_suffix(".json"))
        running.send(step)


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


def _start(
    folder: Path, log: Path, world_size: int, start: int
) -> tuple[list[BaseProcess], list[Connection]]:
    processes: list[BaseProcess] = []
    pipes = []
    for rank in range(world_size):
        receive, send = SPAWN.Pipe(duplex=False)
        process = SPAWN.Process(target=_rank, args=(folder, log, rank, world_size, start, send))
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


def _whole_run(index: Index, log: Path) -> dict[int, list[str]]:
    log.mkdir()
    (process,), (pipe,) = _start(index.root, log, 1, 0)
    while not pipe.closed:  # a full pipe would stop it
        try:
            pipe.recv()
        except EOFError:
            break
    process.join()
    return {step: ranks[0]["rows"] for step, ranks in _whole_steps(log).items()}


def test_thirty_kills_leave_the_stream_as_it_was(index: Index, tmp_path: Path) -> None:
    """A run of two ranks, killed at a random moment; then 1, 2 or 4 ranks go on, and so forth."""
    expected = _whole_run(index, tmp_path / "whole")
    assert len(expected) == STEPS
    rng = random.Random(0)
    world_sizes, kills, runs = set(), 0, 0
    while kills < KILLS:
        log = tmp_path / f"run{runs}"
        log.mkdir()
        runs, done, world_size = runs + 1, 0, 2
        while done < STEPS:
            processes, pipes = _start(index.root, log, world_size, done)
            world_sizes.add(world_size)
            lives_for = rng.randint(1, STEPS // 2) if kills < KILLS else STEPS
            if _kill_after(processes, pipes, lives_for, rng):
                kills += 1
            whole = _whole_steps(log)
            for step, ranks in whole.items():  # of all lives so far
                assert [row for rank in ranks for row in rank["rows"]] == expected[step]
            done, world_size = max(whole, default=0), rng.choice((1, 2, 4))
        assert sorted(_whole_steps(log)) == list(range(1, STEPS + 1))
    assert world_sizes == {1, 2, 4}


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
