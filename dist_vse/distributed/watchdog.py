"""End a process that hangs where no other rank waits for it and would notice.

Training reports each step as progress, and an evaluation each batch. The scoring after the last
batch has no limit: it reads no files, and its collectives have limits of their own.
"""

import os
import socket
import sys
import threading
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

_Item = TypeVar("_Item")
_LOOKS = 20  # per limit
_steps = 0
_paused = False


def limit_s() -> float:
    """Return how many seconds a rank may wait for another one, or go without progress."""
    return float(os.environ.get("DIST_VSE_HANG_S", "1800"))


def progress() -> None:
    """Report progress."""
    global _steps, _paused
    _steps, _paused = _steps + 1, False


def each(items: Iterable[_Item]) -> Iterator[_Item]:
    """Count every item as progress; after the last one the watch pauses until more progress."""
    global _paused
    for item in items:
        progress()
        yield item
    _paused = True


@contextmanager
def watching(seconds: float) -> Iterator[None]:
    """Exit with one line and code 1 if the block makes no progress for so many seconds."""
    left = threading.Event()
    threading.Thread(target=_watch, args=(seconds, left), daemon=True).start()
    try:
        yield
    finally:
        left.set()


def _watch(seconds: float, left: threading.Event) -> None:
    seen, still = _steps, 0
    # Looks are counted, not seconds: none happen while Slurm suspends the process.
    while not left.wait(seconds / _LOOKS):
        still = 0 if _paused or _steps != seen else still + 1
        seen = _steps
        if still >= _LOOKS:
            # Not by a logger: the process may hang while it holds the logger's lock.
            os.write(2, _message(seconds).encode())
            os._exit(1)


def _message(seconds: float) -> str:
    stack = traceback.extract_stack(sys._current_frames()[threading.main_thread().ident or 0])
    ours = [f for f in stack if f.filename.startswith(str(Path(__file__).parents[1]))]
    place = f"{ours[-1].filename}:{ours[-1].lineno}" if ours else "none of our lines"
    who = f"rank {os.environ.get('RANK', '0')} on {socket.gethostname()}"
    return f"error: {who}: no step for {seconds:g} s (DIST_VSE_HANG_S); it hangs at {place}\n"
