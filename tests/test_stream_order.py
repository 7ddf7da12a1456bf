"""The epoch's order: each sample once, lanes in step, local, and the same for ever."""

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_vse.stream.order import Order

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=8)


def lane(order: Order, epoch: int, number: int) -> list[tuple[int, int]]:
    whole = order.epoch(epoch)
    return [whole.lane_sample(number, position) for position in range(whole.lane_length(number))]


def epoch_samples(order: Order, epoch: int) -> list[tuple[int, int]]:
    return [sample for number in range(order.lanes) for sample in lane(order, epoch, number)]


@settings(max_examples=60, deadline=None)
@given(SIZES, st.integers(1, 9), st.integers(1, 50), st.integers(-5, 5), st.integers(0, 4))
def test_every_sample_stands_once_in_an_epoch(
    sizes: list[int], lanes: int, window: int, seed: int, epoch: int
) -> None:
    lanes = min(lanes, sum(sizes))
    samples = epoch_samples(Order(tuple(sizes), seed, lanes, window), epoch)
    assert Counter(samples) == Counter((s, row) for s, n in enumerate(sizes) for row in range(n))


@settings(max_examples=60, deadline=None)
@given(SIZES, st.integers(1, 9), st.integers(1, 12))
def test_lanes_stay_in_step_to_one_sample(sizes: list[int], lanes: int, epochs: int) -> None:
    order = Order(tuple(sizes), 0, min(lanes, sum(sizes)), 7)
    lengths = np.array(
        [[order.epoch(e).lane_length(n) for n in range(order.lanes)] for e in range(epochs)]
    )
    assert np.ptp(lengths, axis=1).max() <= 1
    assert np.ptp(lengths.sum(axis=0)) <= 1
    assert (lengths.sum(axis=1) == sum(sizes)).all()


def test_positions_are_random_access() -> None:
    order = Order((30, 11, 54), 3, 4, 8)
    straight = lane(order, 1, 2)
    shuffled = order.epoch(1)
    for position in np.random.default_rng(0).permutation(len(straight)).tolist():
        assert shuffled.lane_sample(2, position) == straight[position]


def test_epochs_and_seeds_differ() -> None:
    order, other = Order((40, 40), 0, 2, 16), Order((40, 40), 1, 2, 16)
    first = epoch_samples(order, 0)
    assert first == epoch_samples(order, 0)
    for different in (epoch_samples(order, 1), epoch_samples(other, 0)):
        equal = sum(a == b for a, b in zip(first, different, strict=True))
        assert equal < 10  # of 80; chance is 1


def test_a_single_shard_is_cut_at_new_places_in_every_epoch() -> None:
    order = Order((64,), 0, 4, 16)
    assert len({frozenset(lane(order, epoch, 0)) for epoch in range(8)}) > 4


def test_a_lane_reads_few_shards_at_a_time() -> None:
    order = Order((50,) * 40, 0, 4, 100)
    samples = lane(order, 0, 1)
    assert len(samples) == 500
    for start in range(0, 500, 100):  # a block of 100 on a line of shards of 50 touches at most 3
        assert len({shard for shard, _ in samples[start : start + 100]}) <= 3


def test_the_window_shuffles() -> None:
    rows = [row for _, row in lane(Order((1000,), 0, 1, 1000), 0, 0)]
    assert abs(np.corrcoef(rows, range(1000))[0, 1]) < 0.15
    unshuffled = lane(Order((1000,), 0, 1, 1), 0, 0)
    steps = np.diff([row for _, row in unshuffled]) % 1000
    assert (steps == 1).all()


def test_the_order_never_changes() -> None:
    """A checkpoint of an earlier version must go on where it stood: these numbers are frozen."""
    order = Order((3, 5, 4), 7, 2, 4)
    assert lane(order, 0, 0) == [(0, 0), (1, 4), (1, 3), (1, 2), (0, 2), (0, 1)]
    assert lane(order, 5, 1) == [(1, 4), (0, 0), (1, 3), (0, 1), (2, 0), (0, 2)]
