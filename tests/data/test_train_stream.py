"""The training stream: exactly once an epoch, one global order, resumable on any world size."""

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from dist_vse.data.index import Index, read_index
from dist_vse.data.samples import Batch
from dist_vse.data.streams import TrainSet
from tests.support.datasets import write_dataset
from tests.support.streams import BATCH, rows_of, start, take

SHARDS = [30 + 13 * n % 41 for n in range(20)]  # 20 shards of 30 to 70 samples
TOTAL = sum(SHARDS)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder, {"train": SHARDS}, size=16, captions=3)
    return read_index(folder)


def digest(ranks: list[Batch]) -> str:
    """Hash one global batch in row order."""
    rows = [row for batch in ranks for row in rows_of(batch)]
    return hashlib.sha256("".join(rows).encode()).hexdigest()


def state(ranks: list[Batch]) -> NDArray[np.int64]:
    return np.concatenate([batch.state for batch in ranks])


@pytest.fixture(scope="module")
def reference(index: Index) -> list[tuple[str, NDArray[np.int64]]]:
    """One process, no worker: the digest of each global batch, and the state after it."""
    steps = take(start(index), 3 * TOTAL // BATCH)
    return [(digest(ranks), state(ranks)) for ranks in steps]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_an_epoch_holds_every_sample_once(index: Index, world_size: int) -> None:
    steps = take(start(index, world_size=world_size), 2 * TOTAL // BATCH + 2)
    seen = Counter(tuple(row) for step in steps for batch in step for row in batch.origin.tolist())
    assert set(seen.values()) == {1}
    for epoch in (0, 1):  # unseen 0, repeated 0
        assert {number for e, number in seen if e == epoch} == set(range(TOTAL))


@pytest.mark.parametrize(
    ("world_size", "num_workers", "steps"),
    [
        (2, 0, 40),
        (3, 0, 25),
        (4, 0, 25),
        (12, 0, 25),
        pytest.param(2, 1, 25, marks=pytest.mark.slow),
        pytest.param(1, 2, 40, marks=pytest.mark.slow),
    ],
)
def test_global_batches_are_the_same_for_all_readers(
    index: Index,
    reference: list[tuple[str, NDArray[np.int64]]],
    world_size: int,
    num_workers: int,
    steps: int,
) -> None:
    streams = start(index, world_size=world_size, num_workers=num_workers)
    for ranks, (expected, position) in zip(take(streams, steps), reference, strict=False):
        assert digest(ranks) == expected
        np.testing.assert_array_equal(state(ranks), position)


@pytest.mark.parametrize(("step", "world_size"), [(1, 2), (17, 4), (21, 3), (20, 1), (22, 12)])
def test_the_stream_resumes_on_another_world_size(
    index: Index,
    reference: list[tuple[str, NDArray[np.int64]]],
    step: int,
    world_size: int,
) -> None:
    """Steps 20 to 22 lie around the end of the first epoch."""
    streams = start(index, world_size=world_size, state=reference[step - 1][1])
    resumed = [digest(ranks) for ranks in take(streams, 8)]
    assert resumed == [expected for expected, _ in reference[step : step + 8]]


@pytest.mark.slow
def test_workers_resume_too(index: Index, reference: list[tuple[str, NDArray[np.int64]]]) -> None:
    (stream,) = start(index, num_workers=1, state=reference[6][1])
    assert digest([next(stream)]) == reference[7][0]


def test_a_mixture_is_read_by_weight(tmp_path: Path) -> None:
    """Weights 1 and a half, for any number of readers; numbers go through both sets."""
    first = write_dataset(tmp_path / "a", {"train": [20, 12]}, size=16)
    second = write_dataset(tmp_path / "b", {"train": [9, 8, 7]}, size=16)
    sets = [TrainSet(first, "train"), TrainSet(second, "train", 0.5)]
    options: dict[str, Any] = {"sets": sets, "num_streams": 4, "global_batch_size": 11 * 4}
    steps = take(start(first, **options), 8)  # eight epochs of 32 + 12
    seen = Counter(tuple(row) for (batch,) in steps for row in batch.origin.tolist())
    assert seen == Counter(
        [(turn, n) for turn in range(8) for n in range(32)]
        + [(turn, n) for turn in range(4) for n in range(32, 56)]
    )
    ranks = take(start(first, world_size=2, **options), 8)
    assert [digest(step) for step in ranks] == [digest(step) for step in steps]
    resumed = take(start(first, world_size=4, state=state(ranks[4]), **options), 3)
    assert [digest(step) for step in resumed] == [digest(step) for step in steps[5:]]


def test_small_sets_of_a_mixture_fill_all_streams(tmp_path: Path) -> None:
    """Each alone has fewer samples than there are streams."""
    sets = [
        TrainSet(write_dataset(tmp_path / name, {"train": 3}, size=16), "train") for name in "ab"
    ]
    (stream,) = start(sets[0].index, sets=sets, num_streams=6, global_batch_size=6)
    for _ in range(3):
        assert sorted(next(stream).origin[:, 1].tolist()) == list(range(6))


def test_the_global_random_state_is_left_alone(index: Index) -> None:
    torch.manual_seed(0)
    before, legacy = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index]
    streams = start(index, num_workers=1)
    take(streams, 1)
    take(start(index), 1)
    assert torch.equal(torch.get_rng_state(), before)
    np.testing.assert_array_equal(np.random.get_state()[1], legacy)  # type: ignore[index]


@pytest.mark.parametrize("window", [32, 0])
def test_captions_are_samples_of_their_own(index: Index, window: int) -> None:
    """Each of an image's captions comes once a turn, on any number of ranks in one order."""
    options: dict[str, Any] = {
        "sets": [TrainSet(index, "train", captions=3)],
        "captions_per_image": 3,
        "shuffle_window": window,
    }
    count = 3 * TOTAL // BATCH
    steps = take(start(index, **options), count)
    seen = Counter((*row,) for (batch,) in steps for row in batch.origin.tolist())
    assert set(seen.values()) == {1}
    assert {turn for turn, _ in seen} == {0, 1, 2}
    texts = {
        (int(i), int(t))
        for (batch,) in steps
        for i, t in zip(batch.image_ids, batch.text_ids, strict=True)
    }
    assert len(texts) > 2.5 * TOTAL  # a caption of its own for each item
    two = take(start(index, world_size=2, **options), count)
    assert [digest(ranks) for ranks in two] == [digest(ranks) for ranks in steps]
    resumed = start(index, state=state(steps[4]), **options)
    assert digest(take(resumed, 1)[0]) == digest(steps[5])
    if window == 0:  # as in the authors' code, one image can stand in a batch twice
        assert any(len(set(batch.image_ids.tolist())) < BATCH for (batch,) in steps)
