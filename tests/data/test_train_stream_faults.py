"""What the training stream can't read: bad samples are named, the rest ends it in one line."""

import itertools
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from dist_vse.common.errors import UserError
from dist_vse.data.index import Index
from tests.support.datasets import Sample, make_sample, write_dataset, write_shards
from tests.support.streams import STREAMS, start, take


@pytest.fixture
def index(tmp_path: Path) -> Index:
    return write_dataset(tmp_path, {"train": [30, 43]}, size=16)


BAD = {
    "undecodable": Sample("undecodable", b"GIF89a nonsense", ("a cat",)),
    "mute": Sample("mute", make_sample(900).image, ("  ", "")),
    "row 3": Sample("x", make_sample(901).image, ("a",), meta=b'{"captions": "oops'),
}


@pytest.fixture
def flawed(tmp_path: Path) -> Index:
    good = [make_sample(n, size=16) for n in range(21)]
    shards = [[*good[:5], BAD["undecodable"]], [BAD["mute"], *good[5:12]]]
    return write_shards(tmp_path, {"train": [*shards, [*good[12:15], BAD["row 3"], *good[15:]]]})


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 1])
def test_bad_samples_are_skipped_and_named(flawed: Index, num_workers: int) -> None:
    (stream,) = start(flawed, global_batch_size=4, num_streams=2, num_workers=num_workers)
    batches = list(itertools.islice(stream, 24))
    seen = Counter(tuple(row) for batch in batches for row in batch.origin.tolist())
    assert set(seen.values()) == {1}
    good = set(range(24)) - {5, 6, 17}
    for epoch in (0, 1, 2):
        assert {number for e, number in seen if e == epoch} == good
    named = Counter((s.key, s.shard, s.reason) for batch in batches for s in batch.skipped)
    assert {(key, shard) for key, shard, _ in named} == {
        ("undecodable", "train-00000.tar"),
        ("mute", "train-00001.tar"),
        ("row 3", "train-00002.tar"),
    }
    assert all(3 <= count <= 5 for count in named.values())  # 24 batches are four epochs and more
    reasons = " ".join(reason for _, _, reason in named)
    assert re.search("not an image file", reasons)
    assert re.search("no caption", reasons)
    assert re.search("broken metadata", reasons)


def test_bad_samples_of_many_epochs_end_nothing(flawed: Index) -> None:
    (stream,) = start(flawed, global_batch_size=4, num_streams=1)
    skipped = [s for batch in itertools.islice(stream, 60) for s in batch.skipped]
    assert len(skipped) > 24  # more than the stream is long, but never as many in a row


def test_a_stream_without_a_good_sample_ends_the_run(tmp_path: Path) -> None:
    bad = [Sample(f"bad{n}", b"nothing", ("a",)) for n in range(8)]
    index = write_shards(tmp_path, {"train": [bad]})
    (stream,) = start(index, global_batch_size=2, num_streams=2)
    with pytest.raises(UserError, match=r"split 'train': 4 samples in a row .*bad\d"):
        next(stream)


def test_too_few_samples(tmp_path: Path) -> None:
    index = write_dataset(tmp_path, {"train": 10}, size=16)
    with pytest.raises(
        UserError, match=r"an epoch has 10 samples, fewer than data\.num_streams \(12\)"
    ):
        start(index)
    with pytest.raises(
        UserError, match=r"an epoch has 10 samples, fewer than global_batch_size \(16\)"
    ):
        start(index, num_streams=2, global_batch_size=16)
    (stream,) = start(index, num_streams=2, global_batch_size=10)
    assert len(set(next(stream).origin[:, 1].tolist())) == 10


def test_a_state_that_does_not_fit(index: Index) -> None:
    with pytest.raises(
        UserError, match=r"4 streams, but data\.num_streams is 12.*data\.num_streams=4"
    ):
        start(index, state=np.zeros((4, 2), np.int64))
    beyond = np.zeros((STREAMS, 2), np.int64)
    beyond[7] = 3, 73
    with pytest.raises(UserError, match=r"stream 7 has \d+ samples.*stands at 73"):
        start(index, state=beyond)


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_missing_shard_is_named(tmp_path: Path, num_workers: int) -> None:
    index = write_dataset(tmp_path, {"train": [9, 9]}, size=16)
    (stream,) = start(index, num_streams=2, global_batch_size=18, num_workers=num_workers)
    (tmp_path / "train-00001.tar").unlink()
    with pytest.raises(UserError, match=r"^\S*train-00001\.tar: the shard is missing; copy it"):
        next(stream)


def test_too_little_shared_memory_is_reported_with_the_first_batch(index: Index) -> None:
    """Not before: there the ranks do not wait for each other, and one alone may lack it."""
    (stream,) = start(index, num_workers=1, size=1_000_000)
    with pytest.raises(UserError, match=r"^no [\d,]+ bytes of shared memory for batches"):
        next(stream)


def test_a_short_shard_is_named(tmp_path: Path) -> None:
    index = write_dataset(tmp_path, {"train": [9]}, size=16)
    path = tmp_path / "train-00000.tar"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(
        UserError, match=r"train-00000\.tar: the shard has \d+ bytes, but the index"
    ):
        take(start(index, num_streams=1, global_batch_size=9), 1)
