"""The order in which an epoch's samples are read: a pure function of (seed, epoch).

Shards are permuted and laid end to end on a ring, the ring is cut by samples into lanes of equal
length (to one sample), and each lane is shuffled within blocks of `shuffle_window` samples. So a
lane reads few shards, one after the other, needs memory for one block only, and can start at any
position at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Order:
    """All that an epoch's order depends on, beside its number."""

    shard_sizes: tuple[int, ...]  # samples in each shard
    seed: int
    lanes: int
    shuffle_window: int

    def epoch(self, epoch: int) -> "EpochOrder":
        """Return the order of one epoch."""
        return EpochOrder(self, epoch)


class EpochOrder:
    """One epoch's order; every sample of the shards stands at exactly one (lane, position)."""

    def __init__(self, order: Order, epoch: int) -> None:
        """Permute the shards and cut the lanes."""
        sizes = np.array(order.shard_sizes, np.int64)
        self._total = int(sizes.sum())
        assert self._total >= order.lanes >= 1, order
        self._seed = (order.seed % 2**64, epoch)
        self._window = order.shuffle_window
        self._shards = _permutation((*self._seed, 0), len(sizes))
        self._starts = np.cumsum(sizes[self._shards]) - sizes[self._shards]
        # A random turn of the ring: the lanes cut even a single shard at new places.
        self._turn = int(_raw((*self._seed, 1), 1)[0]) % self._total
        self._cuts = _cuts(self._total, order.lanes, epoch)  # (lanes + 1,)
        self._blocks: dict[int, tuple[int, NDArray[np.intp]]] = {}  # lane -> its current block

    def lane_length(self, lane: int) -> int:
        """Return the number of samples that the lane reads in this epoch."""
        return int(self._cuts[lane + 1] - self._cuts[lane])

    def lane_sample(self, lane: int, position: int) -> tuple[int, int]:
        """Return the (shard number, row) at a position of the lane, 0 <= position < its length."""
        block, place = divmod(position, self._window)
        if lane not in self._blocks or self._blocks[lane][0] != block:
            size = min(self._window, self.lane_length(lane) - block * self._window)
            self._blocks[lane] = block, _permutation((*self._seed, 2, lane, block), size)
        on_lane = block * self._window + int(self._blocks[lane][1][place])
        on_ring = (self._turn + int(self._cuts[lane]) + on_lane) % self._total
        slot = int(np.searchsorted(self._starts, on_ring, side="right")) - 1
        return int(self._shards[slot]), on_ring - int(self._starts[slot])


def _cuts(total: int, lanes: int, epoch: int) -> NDArray[np.int64]:
    """Cut `total` samples into lanes; the longer ones take turns, so that lanes stay in step."""
    length, longer = divmod(total, lanes)
    lengths = length + ((np.arange(lanes) - epoch * longer) % lanes < longer)
    return np.concatenate([[0], np.cumsum(lengths)])


def _permutation(seed: Sequence[int], size: int) -> NDArray[np.intp]:
    return np.argsort(_raw(seed, size), kind="stable")


def _raw(seed: Sequence[int], size: int) -> NDArray[np.uint64]:
    # Raw bits: NumPy promises them for all versions, which it does not for Generator.permutation.
    # A resumed run must find the order that it left.
    raw: NDArray[np.uint64] = np.random.PCG64(np.random.SeedSequence(seed)).random_raw(size)
    return raw
