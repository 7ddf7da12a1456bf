"""Worker processes: signals meant for the trainer, death, and the end of the trainer."""

import multiprocessing
import os
import resource
import select
import signal
import subprocess
import sys
from collections.abc import Generator, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from dist_vse.common.errors import UserError
from dist_vse.data.workers import run_workers
from tests.support.paths import ROOT
from tests.support.waiting import is_running, wait_until


def numbers(worker: int, num_workers: int) -> Generator[int, None, None]:
    """Count for ever: worker w of n has w, w + n, ..."""
    while True:
        yield worker
        worker += num_workers


def one_worker() -> tuple[Iterator[int], BaseProcess]:
    before = set(multiprocessing.active_children())
    items = run_workers(numbers, num_workers=1, prefetch=1)
    assert next(items) == 0
    (worker,) = set(multiprocessing.active_children()) - before
    return items, worker


def test_signals_of_the_scheduler_are_left_to_the_trainer() -> None:
    items, worker = one_worker()
    assert worker.pid is not None
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        os.kill(worker.pid, number)
    assert [next(items) for _ in range(5)] == [1, 2, 3, 4, 5]
    items.close()  # type: ignore[attr-defined]
    worker.join(10)
    assert not worker.is_alive()


def test_a_dead_worker_is_told_in_one_line() -> None:
    items, worker = one_worker()
    with pytest.raises(UserError, match=r"^a data worker died .*data\.num_workers \(0 needs"):
        worker.kill()
        for _ in range(100):
            next(items)


def large(worker: int, num_workers: int) -> Generator[torch.Tensor, None, None]:
    """Yield what a process may not put into shared memory."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # as a full /dev/shm
    yield torch.zeros(10)
    yield torch.zeros(100_000)


@pytest.mark.timeout(60)
def test_a_worker_without_shared_memory_is_told() -> None:
    items = run_workers(large, num_workers=1, prefetch=1)
    assert len(next(items)) == 10
    message = r"^a data worker has no memory for a batch .*; if memory or /dev/shm ran out, lower"
    with pytest.raises(UserError, match=message):
        next(items)


def end_the_trainer(note: Path) -> Iterator[None]:
    """End this process before it has sent its worker a task; note the worker's number."""
    (worker,) = multiprocessing.active_children()
    note.write_text(str(worker.pid))
    os._exit(0)
    yield


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_worker_ends_whose_trainer_ended_before_the_first_task(tmp_path: Path) -> None:
    note = tmp_path / "worker"
    command = [sys.executable, "-m", __name__, str(note)]
    subprocess.run(command, stderr=subprocess.DEVNULL, timeout=60, check=True)
    worker = int(note.read_text())
    wait_until(lambda: not is_running(worker), "the worker's end", 30)


ABANDON = """
import multiprocessing, sys
from dist_vse.data.workers import run_workers
from tests.data.test_workers import numbers
if __name__ == "__main__":
    items = run_workers(numbers, num_workers=1, prefetch=1)
    next(items)
    print(multiprocessing.active_children()[0].pid, flush=True)
    sys.stdin.read()
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ends", "is killed"])
def test_workers_end_with_a_trainer_that(how: str, tmp_path: Path) -> None:
    script = tmp_path / "trainer.py"
    script.write_text(ABANDON)
    command = [sys.executable, str(script)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    trainer = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # a killed trainer's resource tracker reports what it cleans up
        text=True,
        env=environment,
    )
    assert trainer.stdin is not None and trainer.stdout is not None
    worker = os.pidfd_open(int(trainer.stdout.readline()))
    if how == "is killed":
        trainer.kill()
    trainer.stdin.close()
    trainer.wait(30)
    ready, _, _ = select.select([worker], [], [], 30)  # readable once the process is gone
    trainer.stdout.close()
    os.close(worker)
    assert ready


if __name__ == "__main__":
    next(run_workers(numbers, num_workers=1, prefetch=1, tasks=end_the_trainer(Path(sys.argv[1]))))
