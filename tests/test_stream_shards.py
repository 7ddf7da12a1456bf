"""Twenty shards of 300 to 700 samples: every sample once, one order for all readers."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest

from dist_vse.index import Index
from dist_vse.models.tokenizer import WordTokenizer
from dist_vse.stream import TrainSet, train_batches
from tests.datasets import Sample, write_shards

SIZES = np.random.default_rng(0).integers(300, 701, 20).tolist()
TOTAL = sum(SIZES)
BATCH, LANES = 240, 24  # multiples of every number of ranks times workers


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """Real tars whose images are never opened: this is about the order."""
    samples = (Sample(f"{n:06d}", str(n).encode(), (f"number {n}",)) for n in range(TOTAL))
    shards = [list(islice(samples, size)) for size in SIZES]
    return write_shards(tmp_path_factory.mktemp("data"), {"train": shards})


def _count(index: Index, world_size: int, num_workers: int) -> tuple[int, int, str]:
    """Return the first epoch's unseen and repeated samples, and a hash of all global batches."""
    streams = [
        train_batches(
            [TrainSet(index, "train")],
            seed=0,
            global_batch_size=BATCH,
            lanes=LANES,
            shuffle_window=256,
            size=8,
            crop="center",
            min_crop_area=1.0,
            flip=False,
            color_jitter=0.0,
            tokenizer=WordTokenizer(["number"], 4),
            rank=rank,
            world_size=world_size,
            num_workers=num_workers,
            read_images=False,
        )
        for rank in range(world_size)
    ]
    seen: Counter[int] = Counter()
    digests = [hashlib.sha256() for _ in range(3)]
    for _ in range(TOTAL // BATCH + 2):
        for stream in streams:
            batch = next(stream)
            seen.update(number for turn, number in batch.origin.tolist() if turn == 0)
            of_rows = (batch.image_ids, batch.text_ids, batch.origin)
            for rows, digest in zip(of_rows, digests, strict=True):
                digest.update(rows.numpy().tobytes())
    whole = "".join(digest.hexdigest() for digest in digests)
    return TOTAL - len(seen), sum(seen.values()) - len(seen), whole


@pytest.fixture(scope="module")
def order(index: Index) -> str:
    return _count(index, 1, 0)[2]


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
    monkeypatch.setattr("dist_vse.stream.train.run_workers", _here)
    assert _count(index, world_size, num_workers) == (0, 0, order)
