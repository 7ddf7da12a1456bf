"""Items made by several processes, in the order of one, on `torch.utils.data.DataLoader`.

Workers are spawned, not forked: a training process has threads (gloo, CUDA), and a fork would copy
their locks in a locked state. Workers ignore the signals that Slurm sends to every process of a
job, because the training process decides when to stop. They exit when a pipe from it closes; the
system closes it even if that process is killed.
"""

import atexit
import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import types
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from itertools import repeat
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from dist_vse.common.errors import UserError, first_line

T = TypeVar("T")
Items = Callable[[int, int], Generator[T, Any, None]]
"""(worker, num_workers) -> that worker's items; a generator may be sent a task for its next one."""
IGNORED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def run_workers(
    items: Items[T], *, num_workers: int, prefetch: int, tasks: Iterable[object] = repeat(None)
) -> Iterator[T]:
    """Yield the workers' items in turn: the first of each, then the second of each, and so on.

    Ends when the worker whose turn it is has no more. `items` must be picklable. Each worker runs
    ahead by `prefetch` items. A task is sent for each item, in the same order, when it is to be
    made; the first of each worker must be None. With 0 workers the items are made here, without
    tasks. Raises the UserError of a worker as it is, and one for workers that can't start, die or
    have no shared memory for an item.
    """
    if num_workers == 0:
        yield from items(0, 1)
        return
    ended, end = multiprocessing.get_context("spawn").Pipe(duplex=False)
    atexit.register(end.close)  # before multiprocessing waits for its children
    made_by_workers = _Items(items, ended)
    loader = DataLoader(
        made_by_workers,
        batch_size=None,
        sampler=tasks,
        num_workers=num_workers,
        prefetch_factor=prefetch,
        multiprocessing_context="spawn",
        worker_init_fn=made_by_workers.start,
        generator=torch.Generator(),  # else the loader draws from the global random state
    )
    try:
        with _without_our_main():
            iterator = iter(loader)
        ended.close()  # ours; the workers have their own
        for pickled in iterator:
            item = pickle.loads(pickled)
            if isinstance(item, _End):
                return
            if isinstance(item, _Failure):
                raise UserError(item.message)
            yield item
    except RuntimeError as error:
        if "DataLoader worker (pid" not in str(error):
            raise
        raise _failed("a data worker died", error) from error
    except OSError as error:
        raise _failed("data workers failed", error) from error
    finally:
        end.close()
        atexit.unregister(end.close)


def _failed(what: str, error: Exception) -> UserError:
    return UserError(
        f"{what} ({first_line(error)}); if memory or /dev/shm ran out, lower data.num_workers "
        "(0 needs no shared memory)"
    )


@dataclass(frozen=True)
class _Failure:
    """A UserError on its way to the training process; DataLoader would add its traceback."""

    message: str


class _End:
    """Sent by a worker that has no more items."""


class _Items(Dataset[Any]):
    """A worker's generator, one item a task."""

    def __init__(self, items: Items[Any], ended: Connection) -> None:
        self._items, self._ended = items, ended
        self._generator: Generator[Any, Any, None] | None = None

    def start(self, worker: int) -> None:
        """Prepare a worker's process before its first task: the trainer may be gone by then.

        PyTorch's own look at the parent does not see one that died before the worker ran.
        """
        for number in IGNORED_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        threading.Thread(target=self._exit_with_the_trainer, daemon=True).start()

    def __getitem__(self, task: object) -> bytes:
        # Pickled here: if the queue's own thread can't pickle an item, the trainer waits forever.
        item = self._next(task)
        try:
            return bytes(ForkingPickler.dumps(item))
        except RuntimeError as error:  # no shared memory for a tensor
            failure = _failed("a data worker has no memory for a batch", error)
            return bytes(ForkingPickler.dumps(_Failure(str(failure))))

    def _next(self, task: object) -> Any:
        if self._generator is None:
            self._generator = self._begin()
        try:
            return self._generator.send(task)
        except StopIteration:
            return _End()
        except UserError as error:
            return _Failure(str(error))

    def _begin(self) -> Generator[Any, Any, None]:
        worker = get_worker_info()
        assert worker is not None
        return self._items(worker.id, worker.num_workers)

    def _exit_with_the_trainer(self) -> None:
        self._ended.poll(None)  # nothing is ever sent: it returns when the other end is closed
        os._exit(0)


@contextlib.contextmanager
def _without_our_main() -> Iterator[None]:
    """Hide a `__main__` of this package while processes are spawned.

    A spawned process imports the main module again; under `python -m dist_vse.train` every worker
    would import DeepSpeed for nothing. A user's `__main__` may define the tokenizer.
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
