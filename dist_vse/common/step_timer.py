"""What a step's time goes into: seconds by part.

The train step says where it is (`begin("encode")`), and every collective is cut out of the part
around it. Who wants to know listens; where nobody does, a word costs less than a microsecond.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Protocol

import torch

PARTS = ("data", "encode", "gather", "loss", "second_pass", "reduce", "step")
"""In the order of a step. `gather`: the loss's collectives, features and statistics, with the
wait for slower ranks; `reduce`: the engine's, gradients and parameters."""
OTHER = "other"
"""What belongs to no part: between two steps."""
_COLLECTIVES = {"loss": "gather", "encode": "reduce", "second_pass": "reduce", "step": "reduce"}


class Listener(Protocol):
    """Is told when a part begins; the one before ends with it."""

    def begin(self, part: str) -> None:
        """Take note."""


_listeners: list[Listener] = []
_part = OTHER


def begin(part: str) -> None:
    """Say that a part begins here."""
    global _part
    _part = part
    for listener in _listeners:
        listener.begin(part)


def current() -> str:
    """Return the part that this moment belongs to."""
    return _part


@contextmanager
def collective(part: str | None = None) -> Iterator[None]:
    """Count the block, a collective, for itself: as `part`, or by the part in which it stands.

    Also a decorator. What ranks say to each other between the parts (all that is no step) stays
    where it is; so does what another thread starts (autograd's, on a GPU) beside this one's work.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    around = _part
    begin(part or _COLLECTIVES.get(around, around))
    try:
        yield
    finally:
        begin(around)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Tell the listener of the parts in the block."""
    _listeners.append(listener)
    try:
        listener.begin(_part)
        yield
    finally:
        _listeners.remove(listener)


class Clock:
    """Adds up the seconds of each part; on a GPU by its own events, so that nothing waits."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._marks: list[tuple[str, float | torch.cuda.Event]] = []

    def begin(self, part: str) -> None:
        """Note when the part begins."""
        self._marks.append((part, self._now()))

    def read(self) -> dict[str, float]:
        """Return the seconds of every part since the last reading; waits for a GPU."""
        if not self._marks:
            return dict.fromkeys((*PARTS, OTHER), 0.0)
        self.begin(self._marks[-1][0])
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds = dict.fromkeys((*PARTS, OTHER), 0.0)
        for (part, start), (_, end) in pairwise(self._marks):
            seconds[part] += _between(start, end)
        del self._marks[:-1]
        return seconds

    def _now(self) -> float | torch.cuda.Event:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _between(start: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    if isinstance(start, float) and isinstance(end, float):
        return end - start
    assert isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event)
    return float(start.elapsed_time(end)) / 1000
