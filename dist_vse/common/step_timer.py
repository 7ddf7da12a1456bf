"""Measure a training step: seconds by part.

The train step announces each part (`begin("encode")`), and every collective is counted apart from
the part around it. A `Listener` receives these events. Without one, an event costs less than a
microsecond.
"""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Protocol

import torch

PARTS = ("data", "encode", "gather", "loss", "second_pass", "reduce", "step")
"""In the order of a step. `gather`: the loss's collectives, features and statistics, with the
wait for slower ranks; `reduce`: the engine's, gradients and parameters."""
_AT_ONCE_S = 1e-4  # of a GPU that has nothing else to do, to reach a mark
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
        self.device_share: float | None = None
        """Between the last two readings: the share of the time in which a GPU had work queued."""
        self._marks: list[tuple[str, float | torch.cuda.Event]] = []
        self._host: list[float] = []  # when the host made each mark

    def begin(self, part: str) -> None:
        """Record when the part begins."""
        now = time.perf_counter()
        self._host.append(now)
        self._marks.append((part, now if self.device.type != "cuda" else _event()))

    def read(self) -> dict[str, float]:
        """Return the seconds of every part since the last reading; synchronises a GPU."""
        if not self._marks:
            return dict.fromkeys((*PARTS, OTHER), 0.0)
        part = self._marks[-1][0]
        self.begin(part)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds = dict.fromkeys((*PARTS, OTHER), 0.0)
        for (part, start), (_, end) in pairwise(self._marks):
            seconds[part] += _between(start, end)
        if self.device.type == "cuda":
            first = self._marks[0][1]
            passed = [_between(first, mark) for _, mark in self._marks]
            self.device_share = queued_share(self._host, passed)
            self._marks.clear()
            self.begin(part)  # the GPU has nothing to do here, so both clocks start together
        del self._marks[:-1], self._host[:-1]
        return seconds


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def queued_share(host: Sequence[float], device: Sequence[float]) -> float | None:
    """Return for which share of the time a GPU had work queued, at the least.

    `host` says when the host made each mark, and `device` how long after the first one the GPU
    reached it, in seconds. A GPU that reaches a mark at once had caught up before: of the time
    since the mark before, only what was queued at that one counts. None if no time has passed.
    """
    start, queued = host[0], 0.0
    for (begun, ended), (reached, after) in zip(pairwise(host), pairwise(device), strict=True):
        behind = after - (ended - start) > _AT_ONCE_S
        left = max(0.0, reached - (begun - start))
        queued += ended - begun if behind else min(ended - begun, left)
    return queued / (host[-1] - start) if host[-1] > start else None


def _between(start: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    if isinstance(start, float) and isinstance(end, float):
        return end - start
    assert isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event)
    return float(start.elapsed_time(end)) / 1000
