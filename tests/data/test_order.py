"""The epoch's order: each sample once, streams in step, local, and the same for ever."""

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_vse.data.order import Order, Place, Source, shares

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=8)


def plain(sizes: tuple[int, ...], seed: int, streams: int, window: int) -> Order:
    """The order of one data set, read once an epoch."""
    return Order((Source(sizes, sum(sizes)),), seed, streams, window)


def places(order: Order, epoch: int, number: int) -> list[Place]:
    whole = order.epoch(epoch)
    return [
        whole.stream_sample(number, position) for position in range(whole.stream_length(number))
    ]


def stream(order: Order, epoch: int, number: int) -> list[tuple[int, int]]:
    return [(place.shard, place.row) for place in places(order, epoch, number)]


def epoch_samples(order: Order, epoch: int) -> list[tuple[int, int]]:
    return [sample for number in range(order.streams) for sample in stream(order, epoch, number)]


@settings(max_examples=60, deadline=None)
@given(SIZES, st.integers(1, 9), st.integers(1, 50), st.integers(-5, 5), st.integers(0, 4))
def test_every_sample_stands_once_in_an_epoch(
    sizes: list[int], streams: int, window: int, seed: int, epoch: int
) -> None:
    streams = min(streams, sum(sizes))
    samples = epoch_samples(plain(tuple(sizes), seed, streams, window), epoch)
    assert Counter(samples) == Counter((s, row) for s, n in enumerate(sizes) for row in range(n))


@settings(max_examples=60, deadline=None)
@given(SIZES, st.integers(1, 9), st.integers(1, 12))
def test_streams_stay_in_step_to_one_sample(sizes: list[int], streams: int, epochs: int) -> None:
    order = plain(tuple(sizes), 0, min(streams, sum(sizes)), 7)
    lengths = np.array(
        [[order.epoch(e).stream_length(n) for n in range(order.streams)] for e in range(epochs)]
    )
    assert np.ptp(lengths, axis=1).max() <= 1
    assert np.ptp(lengths.sum(axis=0)) <= 1
    assert (lengths.sum(axis=1) == sum(sizes)).all()


def test_a_mixtures_longer_streams_take_turns() -> None:
    ten, three = Source((10,), 10), Source((3,), 3)
    mixtures = [
        ((ten, ten, ten), [5, 5, 5, 5, 5, 5]),
        ((three, three), [1, 1, 1, 1, 1, 1]),
        ((ten, three), [3, 2, 2, 2, 2, 2]),
    ]
    for sources, lengths in mixtures:
        whole = Order(sources, 0, 6, 4).epoch(0)
        assert [whole.stream_length(n) for n in range(6)] == lengths


MIXTURES = st.lists(st.tuples(SIZES, st.integers(1, 30)), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(MIXTURES, st.integers(1, 9), st.integers(1, 6))
def test_streams_of_a_mixture_stay_in_step_too(
    mixture: list[tuple[list[int], int]], streams: int, epochs: int
) -> None:
    """So no stream is empty, and no more batches than needed cross an epoch's end."""
    sources = tuple(Source(tuple(sizes), taken) for sizes, taken in mixture)
    total = sum(source.per_epoch for source in sources)
    order = Order(sources, 0, min(streams, total), 7)
    lengths = np.array(
        [[order.epoch(e).stream_length(n) for n in range(order.streams)] for e in range(epochs)]
    )
    assert (lengths.sum(axis=1) == total).all()
    assert lengths.min() >= 1
    assert np.ptp(lengths, axis=1).max() <= 1
    assert np.ptp(lengths.cumsum(axis=0), axis=1).max() <= 1


def test_positions_are_random_access() -> None:
    order = plain((30, 11, 54), 3, 4, 8)
    straight = stream(order, 1, 2)
    shuffled = order.epoch(1)
    for position in np.random.default_rng(0).permutation(len(straight)).tolist():
        assert shuffled.stream_sample(2, position)[2:4] == straight[position]


def test_epochs_and_seeds_differ() -> None:
    order, other = plain((40, 40), 0, 2, 16), plain((40, 40), 1, 2, 16)
    first = epoch_samples(order, 0)
    assert first == epoch_samples(order, 0)
    for different in (epoch_samples(order, 1), epoch_samples(other, 0)):
        equal = sum(a == b for a, b in zip(first, different, strict=True))
        assert equal < 10  # of 80; chance is 1


def test_a_single_shard_is_cut_at_new_places_in_every_epoch() -> None:
    order = plain((64,), 0, 4, 16)
    assert len({frozenset(stream(order, epoch, 0)) for epoch in range(8)}) > 4


def test_a_stream_reads_few_shards_at_a_time() -> None:
    order = plain((50,) * 40, 0, 4, 100)
    samples = stream(order, 0, 1)
    assert len(samples) == 500
    for start in range(0, 500, 100):  # a block of 100 on a line of shards of 50 touches at most 3
        assert len({shard for shard, _ in samples[start : start + 100]}) <= 3


def test_the_window_shuffles() -> None:
    rows = [row for _, row in stream(plain((1000,), 0, 1, 1000), 0, 0)]
    assert abs(np.corrcoef(rows, range(1000))[0, 1]) < 0.15
    unshuffled = stream(plain((1000,), 0, 1, 1), 0, 0)
    steps = np.diff([row for _, row in unshuffled]) % 1000
    assert (steps == 1).all()


def test_the_order_never_changes() -> None:
    """A checkpoint of an earlier version must go on where it stood: these numbers are frozen."""
    order = plain((3, 5, 4), 7, 2, 4)
    assert stream(order, 0, 0) == [(0, 0), (1, 4), (1, 3), (1, 2), (0, 2), (0, 1)]
    assert stream(order, 5, 1) == [(1, 4), (0, 0), (1, 3), (0, 1), (2, 0), (0, 2)]
    odd = plain((3, 5, 4), 7, 5, 4)
    assert [stream(odd, 3, number) for number in range(5)] == [
        [(0, 0), (0, 1)],
        [(2, 0), (0, 2), (2, 1)],
        [(2, 2), (1, 0), (2, 3)],
        [(1, 1), (1, 2)],
        [(1, 3), (1, 4)],
    ]
    mixed = Order((Source((3, 2), 5), Source((4,), 4)), 7, 3, 4)
    assert [place[:4] for place in places(mixed, 2, 1)] == [
        (0, 2, 1, 1),
        (1, 2, 0, 3),
        (0, 2, 0, 0),
    ]


def test_a_mixture_reads_each_data_set_by_its_weight() -> None:
    """Weights 1, 2 and a half: each turn of each data set holds every sample once."""
    sizes = (17, 14, 12), (9, 4), (20, 21)
    sources = tuple(Source(size, taken) for size, taken in zip(sizes, (43, 26, 21), strict=True))
    order = Order(sources, 3, 5, 16)
    seen = Counter(
        place for epoch in range(4) for number in range(5) for place in places(order, epoch, number)
    )
    assert set(seen.values()) == {1}
    for source, (size, turns) in enumerate(zip(sizes, (4, 8, 2), strict=True)):
        for turn in range(turns):
            of_turn = {(p.shard, p.row) for p in seen if (p.source, p.turn) == (source, turn)}
            assert of_turn == {(s, row) for s, n in enumerate(size) for row in range(n)}
    last = {p for p in seen if p.source == 2 and p.turn == 2}
    assert len(last) == 4 * 21 - 2 * 41


def test_a_mixture_is_spread_evenly() -> None:
    order = Order((Source((800,), 800), Source((200,), 200), Source((24,), 24)), 0, 2, 64)
    for number in range(2):
        sources = np.array([place.source for place in places(order, 1, number)])
        for start in range(0, 512, 64):  # every window has its share, but for rounding
            counts = np.bincount(sources[start : start + 64], minlength=3)
            assert np.abs(counts - np.array([50, 12.5, 1.5])).max() <= 1.5


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=5))
def test_shares_grow_one_by_one_to_all(counts: list[int]) -> None:
    taken = [shares(counts, position) for position in range(sum(counts) + 1)]
    assert taken[0] == [0] * len(counts) and taken[-1] == counts
    steps = np.diff(np.array(taken), axis=0)
    assert ((steps == 0) | (steps == 1)).all() and (steps.sum(axis=1) == 1).all()


def test_a_blocks_shards_are_those_that_its_samples_lie_in() -> None:
    for seed in range(6):
        # A stream reads the second data set through the ends of its turns, within shards.
        order = Order((Source((30, 11, 54), 95), Source((9, 3, 2, 9), 230)), seed, 4, 16)
        whole = order.epoch(seed)
        for number in range(4):
            of_stream = places(order, seed, number)
            for block in range(-(-len(of_stream) // 16)):
                own = {(p.source, p.shard) for p in of_stream[block * 16 : block * 16 + 16]}
                assert own == set(whole.block_shards(number, block))
            assert whole.block_shards(number, -(-len(of_stream) // 16)) == []


def test_captions_of_an_image_are_items_of_their_own() -> None:
    for window in (4, 0):
        order = Order((Source((5, 3), 16, captions=2),), 3, 4, window)
        for epoch in range(3):
            seen = [p for n in range(4) for p in places(order, epoch, n)]
            items = Counter((p.shard, p.row, p.caption) for p in seen)
            rows = [(0, row) for row in range(5)] + [(1, row) for row in range(3)]
            assert items == Counter((*place, caption) for place in rows for caption in range(2))


def test_a_whole_shuffle_is_even_and_changes_with_the_epoch() -> None:
    order = plain((300, 200), 5, 2, 0)
    first, second = (epoch_samples(order, epoch) for epoch in range(2))
    assert Counter(first) == Counter(second) and first != second
    number = np.array([300 * shard + row for shard, row in first])
    # Of neighbours in an even shuffle, |difference| is n / 3 on average; in a window it is small.
    assert 140 < np.abs(np.diff(number)).mean() < 195
    assert {shard for n in range(2) for _, shard in order.epoch(0).block_shards(n, 0)} == {0, 1}
