"""Measure a training step: seconds by part.

The train step announces each part (`begin("encode")`), and every collective is counted apart from
the part around it. A `Listener` receives these events. Without one, an event costs less than a
microsecond.
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
"""Time that belongs to no part: between two steps."""
_COLLECTIVES = {"loss": "gather", "encode": "reduce", "second_pass": "reduce", "step": "reduce"}


class Listener(Protocol):
    """Called when a part begins, which ends the part before."""

    def begin(self, part: str) -> None:
        """Handle the event."""


_listeners: list[Listener] = []
_part = OTHER


def begin(part: str) -> None:
    """Announce that a part begins here."""
    global _part
    _part = part
    for listener in _listeners:
        listener.begin(part)


def current() -> str:
    """Return the current part."""
    return _part


@contextmanager
def collective(part: str | None = None) -> Iterator[None]:
    """Count a collective in the block separately: as `part`, or by the part around it.

    Also a decorator. Collectives between the parts (outside of a step) are not counted separately,
    nor are those that another thread starts (autograd's, on a GPU).
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
    """Send the events in the block to the listener."""
    _listeners.append(listener)
    try:
        listener.begin(_part)
        yield
    finally:
        _listeners.remove(listener)


class Clock:
    """Adds up the seconds of each part; on a GPU with its events, without synchronising."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._marks: list[tuple[str, float | torch.cuda.Event]] = []

    def begin(self, part: str) -> None:
        """Record when the part begins."""
        self._marks.append((part, self._now()))

    def read(self) -> dict[str, float]:
        """Return the seconds of every part since the last reading; synchronises a GPU."""
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
