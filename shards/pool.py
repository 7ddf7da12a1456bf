"""Map a function over tasks, in order, in this process or in several."""

import os
import signal
import threading
from collections.abc import Callable, Generator, Sequence
from typing import Any, TypeVar

from dist_vse.common.errors import UserError

T = TypeVar("T")
R = TypeVar("R")

_function: Callable[[Any], Any]
"""What this worker process does."""


def ordered_map(
    function: Callable[[T], R], tasks: Sequence[T], workers: int
) -> Generator[R, None, None]:
    """Yield `function(task)` for each task, in their order; `workers` processes run ahead.

    A process gets the function once, which may hold the whole index, and then one task at a time.
    Whatever ends the iteration early also drops the tasks that have not begun. Raises UserError
    if a process was killed.
    """
    if workers == 1 or len(tasks) <= 1:
        yield from map(function, tasks)
        return
    # Imported here: one process does without them.
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool

    # Spawn: a fork would copy the thread of the progress bar in an unknown state.
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(min(workers, len(tasks)), context, _start_worker, (function,))
    try:
        yield from executor.map(_call, tasks)
    except BrokenProcessPool as error:
        raise UserError(
            f"a worker process was killed, likely for want of memory; "
            f"run again with fewer --workers (now {workers})"
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)


def _start_worker(function: Callable[[Any], Any]) -> None:
    """Leave Ctrl-C to the parent, and end with it even where it is killed."""
    global _function
    _function = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _call(task: Any) -> Any:
    return _function(task)


def _end_with_parent() -> None:
    import multiprocessing
    from multiprocessing.connection import wait

    parent = multiprocessing.parent_process()
    assert parent is not None, "runs in a worker only"
    wait([parent.sentinel])
    os._exit(1)
