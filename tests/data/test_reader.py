"""Reading shards by row: few of them are open, and odd metadata is a bad sample."""

import os
from pathlib import Path

import pytest

from dist_vse.data.decode import BadSampleError
from dist_vse.data.index import Index
from dist_vse.data.reader import ShardReader, parse_meta
from tests.support.datasets import write_dataset


def test_few_shards_are_open(tmp_path: Path) -> None:
    index = write_dataset(tmp_path, {"train": [2] * 20}, size=16)
    reader = ShardReader(index, "train", max_open=3)
    for shard in range(20):
        reader.image(shard, 0)
    assert _open_shards(index) == 3
    reader.close()
    assert _open_shards(index) == 0


def _open_shards(index: Index) -> int:
    """Return how many files of the data set this process holds open."""
    links = [Path(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
    paths = [os.readlink(link) for link in links if link.is_symlink()]
    return sum(path.startswith(f"{index.root.resolve()}/") for path in paths)


@pytest.mark.parametrize(
    "meta",
    [
        b'{"key": "k", "captions": ["\\ud800 x"]}',
        b'{"key": "\\ud800", "captions": ["x"]}',
        b'{"key": "k", "captions": ["x"], "negatives": ["\\ud800"]}',
        b'{"key": "k", "captions": ' + b"[" * 100_000,
        b'{"key": "k", "captions": "letters"}',
        b"[]",
    ],
)
def test_odd_metadata_is_a_bad_sample(meta: bytes) -> None:
    with pytest.raises(BadSampleError, match="broken metadata"):
        parse_meta(meta)
