"""Twenty shards of 300 to 700 samples: every sample once, one order for all readers."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest

from benchmarks.order import BATCH, STREAMS, count
from dist_vse.data.index import Index
from dist_vse.data.samples import Placement
from dist_vse.data.streams import TrainSet
from tests.support.datasets import Sample, write_shards
from tests.support.streams import open_rank

SIZES = np.random.default_rng(0).integers(300, 701, 20).tolist()
TOTAL = sum(SIZES)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """Real tars whose images are never opened: this is about the order."""
    samples = (Sample(f"{n:06d}", str(n).encode(), (f"number {n}",)) for n in range(TOTAL))
    shards = [list(islice(samples, size)) for size in SIZES]
    return write_shards(tmp_path_factory.mktemp("data"), {"train": shards})


def _count(index: Index, world_size: int, num_workers: int) -> tuple[int, int, str]:
    """Return the first epoch's unseen and repeated samples, and a hash of all global batches."""
    streams = [
        open_rank(
            [TrainSet(index, "train")],
            Placement(rank, world_size),
            num_workers=num_workers,
            global_batch_size=BATCH,
            num_streams=STREAMS,
            shuffle_window=256,
            features="known",
        )
        for rank in range(world_size)
    ]
    return count(streams, TOTAL)


@pytest.fixture(scope="module")
def order(index: Index) -> str:
    return _count(index, 1, 0)[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "num_workers"), [(1, 0), (2, 0), (3, 0), (4, 0), (1, 1), (1, 2), (2, 1)]
)
def test_an_epoch_of_uneven_shards_holds_every_sample_once(
    index: Index, order: str, world_size: int, num_workers: int
) -> None:
    assert _count(index, world_size, num_workers) == (0, 0, order)


def _here(items: Any, *, num_workers: int, **options: Any) -> Iterator[Any]:
    """Run what workers run, one after the other in this process."""
    workers = [items(worker, num_workers) for worker in range(num_workers)]
    while True:
        yield from map(next, workers)


@pytest.mark.parametrize(("world_size", "num_workers"), [(2, 2), (3, 1), (3, 2), (4, 1), (4, 2)])
def test_more_workers_hold_every_sample_once_too(
    index: Index,
    order: str,
    monkeypatch: pytest.MonkeyPatch,
    world_size: int,
    num_workers: int,
) -> None:
    """The work of 25 processes without starting them, which would take half a minute."""
    monkeypatch.setattr("dist_vse.data.train_stream.run_workers", _here)
    assert _count(index, world_size, num_workers) == (0, 0, order)
