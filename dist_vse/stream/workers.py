"""Items made by several processes, in the order of one: `torch.utils.data.DataLoader` underneath.

Workers are spawned, not forked: a training process has threads (gloo, CUDA), and locks that a
fork would copy in a locked state. They ignore the signals that Slurm sends to every process of
a job: it is the training process that decides when to stop. They end when a pipe from it closes,
which it does by itself even if that process is killed.
"""

import atexit
import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from dist_vse.errors import UserError

T = TypeVar("T")
Items = Callable[[int, int], Iterator[T]]  # (worker, num_workers) -> that worker's items
IGNORED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def run_workers(items: Items[T], *, num_workers: int, prefetch: int) -> Iterator[T]:
    """Yield the workers' items in turn: the first of each, then the second of each, and so on.

    `items` must be picklable. Each worker runs ahead by `prefetch` items. With 0 workers they
    are made here. Raises the UserError of a worker as it is, and one for a worker that died.
    """
    if num_workers == 0:
        yield from items(0, 1)
        return
    ended, end = multiprocessing.get_context("spawn").Pipe(duplex=False)
    atexit.register(end.close)  # before multiprocessing waits for its children
    loader = DataLoader(
        _Items(items, ended),
        batch_size=None,
        num_workers=num_workers,
        prefetch_factor=prefetch,
        multiprocessing_context="spawn",
        generator=torch.Generator(),  # else the loader draws from the global random state
    )
    try:
        with _without_our_main():
            iterator = iter(loader)
        ended.close()  # ours; the workers have their own
        for item in iterator:
            if isinstance(item, _Failure):
                raise UserError(item.message)
            yield item
    except RuntimeError as error:
        if "DataLoader worker (pid" not in str(error):
            raise
        raise UserError(
            f"a data worker died ({str(error).splitlines()[0]}); if memory or /dev/shm ran out, "
            "lower data.num_workers (0 needs no shared memory)"
        ) from error
    finally:
        end.close()
        atexit.unregister(end.close)


@dataclass(frozen=True)
class _Failure:
    """A UserError on its way to the training process; DataLoader would wrap its traceback."""

    message: str


class _Items(IterableDataset[Any]):
    def __init__(self, items: Items[Any], ended: Connection) -> None:
        self._items, self._ended = items, ended

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        assert worker is not None
        for number in IGNORED_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        threading.Thread(target=self._exit_at_the_end, daemon=True).start()
        try:
            yield from self._items(worker.id, worker.num_workers)
        except UserError as error:
            yield _Failure(str(error))

    def _exit_at_the_end(self) -> None:
        self._ended.poll(None)  # nothing is ever sent: it returns when the other end is closed
        os._exit(0)


@contextlib.contextmanager
def _without_our_main() -> Iterator[None]:
    """Hide a `__main__` of this package while processes are spawned.

    A spawned process imports the main module again; under `python -m dist_vse.train` every worker
    would import DeepSpeed, for nothing. Other people's `__main__` may define their tokenizer.
    """
    main = sys.modules["__main__"]
    if not (main.__spec__ and main.__spec__.name.startswith("dist_vse.")):
        yield
        return
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
