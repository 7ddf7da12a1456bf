"""The largest batch whose peak memory stays within a limit, found with few trainings."""

from collections.abc import Callable
from dataclasses import dataclass

CLOSE = 0.97  # of the limit: near enough, as a peak varies by some percent
MAX_TRIES = 6


@dataclass(frozen=True)
class Largest:
    """What a search has found."""

    batch: int  # the largest one tried that fits
    peak_bytes: int
    tries: dict[int, int]  # batch -> bytes
    by_line: int  # where the line through the last two tries meets the limit


def largest_batch(
    peak: Callable[[int], int], *, limit: int, first: int, unit: int, max_batch: int | None = None
) -> Largest | None:
    """Search the multiples of `unit`, from `first` and twice that, but none above `max_batch`.

    Memory grows with the batch along a line, nearly: two tries say where to look next. None if
    nothing that was tried fits in `limit` bytes.
    """
    tries: dict[int, int] = {}
    batch = first
    while batch not in tries and len(tries) < MAX_TRIES:
        tries[batch] = peak(batch)
        fitting = [size for size, found in tries.items() if found <= limit]
        if fitting and tries[max(fitting)] >= CLOSE * limit:
            break
        batch = _next(tries, limit, unit)
        if max_batch is not None:
            batch = min(batch, max_batch)
    if not fitting:
        return None
    return Largest(max(fitting), tries[max(fitting)], tries, _by_line(tries, limit, unit))


def _next(tries: dict[int, int], limit: int, unit: int) -> int:
    """Return the batch to try; one that was tried, if there is nothing left between the tries."""
    if len(tries) == 1:
        ((batch, found),) = tries.items()
        return 2 * batch if found <= limit else max(unit, batch // 2 // unit * unit)
    batch = _by_line(tries, limit, unit)
    fits = max((size for size, found in tries.items() if found <= limit), default=0)
    fails = min((size for size, found in tries.items() if found > limit), default=None)
    if fails is not None:
        batch = min(batch, fails - unit)
    return max(batch, fits + unit if fails is None else min(fits + unit, fails - unit), unit)


def _by_line(tries: dict[int, int], limit: int, unit: int) -> int:
    """Return where the line through the two tries nearest to the limit meets it, rounded down."""
    if len(tries) == 1:
        return next(iter(tries))
    near = sorted(tries, key=lambda size: abs(tries[size] - limit))[:2]
    low, high = sorted(near)
    slope = max(1.0, (tries[high] - tries[low]) / (high - low))
    return max(unit, int(high + (limit - tries[high]) / slope) // unit * unit)
