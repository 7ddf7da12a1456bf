"""Reading shards by row: few of them are open."""

import os
from pathlib import Path

from dist_vse.data.index import Index
from dist_vse.data.reader import ShardReader
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
