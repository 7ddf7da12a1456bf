"""The order in which an epoch's samples are read: a pure function of (seed, epoch).

Each data set is an endless sequence of turns. A turn holds every sample once: its shards are
permuted and laid end to end on a ring. An epoch takes the next `per_epoch` samples of each data set
and cuts them into streams. Within a stream the data sets are interleaved evenly, and the samples
are shuffled within blocks of `shuffle_window`.

When a data set does not divide evenly, the leftover samples are dealt out round-robin, continuing
from the previous data set. So stream lengths differ by at most one. A stream reads few shards at a
time, needs memory for one block only, and can start at any position without reading what is before.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

WHOLE_BLOCK = 1024  # items of a block where a turn is shuffled as a whole


@dataclass(frozen=True)
class Source:
    """A data set's part in the mixture."""

    shard_sizes: tuple[int, ...]  # samples in each shard
    per_epoch: int  # items that an epoch takes; all of them where the weight is 1
    captions: int = 1  # items of a sample: each is a caption of its own with the sample's image

    @property
    def num_samples(self) -> int:
        """Samples in all shards."""
        return sum(self.shard_sizes)

    @property
    def num_items(self) -> int:
        """Items in all shards."""
        return self.num_samples * self.captions


@dataclass(frozen=True)
class Order:
    """All that an epoch's order depends on, apart from its number."""

    sources: tuple[Source, ...]
    seed: int
    streams: int
    shuffle_window: int  # 0 shuffles each turn as a whole, evenly

    @property
    def block_size(self) -> int:
        """Items that a stream orders at a time."""
        return self.shuffle_window or WHOLE_BLOCK

    def epoch(self, epoch: int) -> "EpochOrder":
        """Return the order of one epoch."""
        return EpochOrder(self, epoch)

    @property
    def per_epoch(self) -> int:
        """Samples that an epoch takes from all data sets."""
        return sum(source.per_epoch for source in self.sources)


class Place(NamedTuple):
    """The position of a sample."""

    source: int
    turn: int  # how often the data set was read before
    shard: int
    row: int
    caption: int = 0  # where a sample's captions are items of their own


class _Ring(NamedTuple):
    """One turn of a data set. Lists, because NumPy takes longer for single look-ups."""

    shards: list[int]
    starts: list[int]  # where each of these begins
    offset: int  # where the turn begins
    order: NDArray[np.intp] | None = None  # of all items, where they are shuffled as a whole


class _Block(NamedTuple):
    """A window of a stream."""

    number: int
    starts: list[int]  # of each source, in its endless sequence
    counts: list[int]  # samples up to and with each source
    order: list[int]


class EpochOrder:
    """One epoch's order; each of its samples has exactly one (stream, position)."""

    def __init__(self, order: Order, epoch: int) -> None:
        """Cut the streams."""
        assert order.per_epoch >= order.streams >= 1, order
        self._order, self._epoch = order, epoch
        self._seed = order.seed % 2**64
        self._cuts = []  # for each source (streams + 1,), in its endless sequence
        taken = epoch * order.per_epoch
        for source in order.sources:
            cuts = _cuts(source.per_epoch, order.streams, taken)
            self._cuts.append(epoch * source.per_epoch + cuts)
            taken += source.per_epoch
        self._rings: dict[tuple[int, int], _Ring] = {}  # of (source, turn)
        self._blocks: dict[int, _Block] = {}  # stream -> its current block

    def stream_length(self, stream: int) -> int:
        """Return the number of samples that the stream reads in this epoch."""
        return sum(self._counts(stream))

    def stream_sample(self, stream: int, position: int) -> Place:
        """Return the sample at a position of the stream, 0 <= position < its length."""
        number, place = divmod(position, self._order.block_size)
        if stream not in self._blocks or self._blocks[stream].number != number:
            self._blocks[stream] = self._block(stream, number)
        block = self._blocks[stream]
        chosen = block.order[place]
        source = bisect_right(block.counts, chosen)
        before = block.counts[source - 1] if source else 0
        return self._place(source, block.starts[source] + chosen - before)

    def block_shards(self, stream: int, number: int) -> list[tuple[int, int]]:
        """Return the (source, shard)s that a block of the stream reads; none beyond its end."""
        if number * self._order.block_size >= self.stream_length(stream):
            return []
        block = self._block(stream, number)
        counts = np.diff(block.counts, prepend=0).tolist()  # of each source
        found: list[tuple[int, int]] = []
        for source, (start, count) in enumerate(zip(block.starts, counts, strict=True)):
            at, stop = start, start + count
            while at < stop:
                place = self._place(source, at)
                found.append((source, place.shard))
                if self._order.shuffle_window == 0:  # the next item may lie in any shard
                    at += 1
                    continue
                of_source = self._order.sources[source]
                end_of_turn = (place.turn + 1) * of_source.num_items  # may be within the shard
                items = of_source.shard_sizes[place.shard] * of_source.captions
                at = min(at + items - place.row * of_source.captions - place.caption, end_of_turn)
        return list(dict.fromkeys(found)) if self._order.shuffle_window == 0 else found

    def _counts(self, stream: int) -> list[int]:
        """Return how many samples the stream reads of each source."""
        return [int(cuts[stream + 1] - cuts[stream]) for cuts in self._cuts]

    def _block(self, stream: int, number: int) -> _Block:
        window, counts = self._order.block_size, self._counts(stream)
        start = number * window
        size = min(window, sum(counts) - start)
        before, after = shares(counts, start), shares(counts, start + size)
        starts = [int(cuts[stream]) + b for cuts, b in zip(self._cuts, before, strict=True)]
        sizes = np.array(after) - np.array(before)
        seed = (self._seed, self._epoch, 2, stream, number)
        return _Block(number, starts, np.cumsum(sizes).tolist(), _permutation(seed, size).tolist())

    def _place(self, source: int, at: int) -> Place:
        """Find the sample at an index of the source's endless sequence."""
        items = self._order.sources[source].num_items
        turn, place = divmod(at, items)
        if (source, turn) not in self._rings:
            self._rings[source, turn] = self._ring(source, turn)
        ring = self._rings[source, turn]
        on_ring = (ring.offset + place) % items if ring.order is None else int(ring.order[place])
        slot = bisect_right(ring.starts, on_ring) - 1
        item = on_ring - ring.starts[slot]
        row, caption = divmod(item, self._order.sources[source].captions)
        return Place(source, turn, ring.shards[slot], row, caption)

    def _ring(self, source: int, turn: int) -> _Ring:
        sizes = np.array(self._order.sources[source].shard_sizes, np.int64)
        sizes *= self._order.sources[source].captions
        shards = _permutation((self._seed, turn, 0, source), len(sizes))
        starts = np.cumsum(sizes[shards]) - sizes[shards]
        # Starts anywhere, so that the streams cut even a single shard at new positions.
        offset = int(_raw((self._seed, turn, 1, source), 1)[0]) % int(sizes.sum())
        order = None
        if self._order.shuffle_window == 0:
            order = _permutation((self._seed, turn, 3, source), int(sizes.sum()))
        return _Ring(shards.tolist(), starts.tolist(), offset, order)


def shares(counts: Sequence[int], position: int) -> list[int]:
    """Return how many of the first `position` samples of a stream come from each source.

    Spread evenly: each source gets its share of what the sources before it left, rounded down. So
    no share shrinks as the position grows, and at the end each source has given all its samples.
    """
    left, total = position, sum(counts)
    result = []
    for count in counts:
        share = left * count // total if total else 0
        result.append(share)
        left, total = left - share, total - count
    return result


def _cuts(total: int, streams: int, taken: int) -> NDArray[np.int64]:
    """Cut `total` samples into streams whose lengths differ by at most one.

    `taken` samples of any data set were dealt before; the leftovers continue round-robin.
    """
    length, longer = divmod(total, streams)
    lengths = length + ((np.arange(streams) - taken) % streams < longer)
    return np.concatenate([[0], np.cumsum(lengths)])


def _permutation(seed: Sequence[int], size: int) -> NDArray[np.intp]:
    return np.argsort(_raw(seed, size), kind="stable")


def _raw(seed: Sequence[int], size: int) -> NDArray[np.uint64]:
    # Raw bits: NumPy guarantees them over versions, but not Generator.permutation. A resumed run
    # must find the same order.
    raw: NDArray[np.uint64] = np.random.PCG64(np.random.SeedSequence(seed)).random_raw(size)
    return raw
