"""The training stream: exactly once an epoch, one global order, resumable on any world size."""

import hashlib
import itertools
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from dist_vse.errors import UserError
from dist_vse.index import Index, image_id, read_index
from dist_vse.models.tokenizer import WordTokenizer, build_vocabulary
from dist_vse.stream import Batch, TrainSet, captions, train_batches
from dist_vse.stream.decode import Transform, decode_image
from dist_vse.stream.reader import ShardReader
from tests.datasets import Sample, draw, encode, make_sample, write_dataset, write_shards

SHARDS = [30 + 13 * n % 41 for n in range(20)]  # 20 shards of 30 to 70 samples
TOTAL = sum(SHARDS)
BATCH, LANES = 48, 12


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder, {"train": SHARDS}, size=16, captions=3)
    return read_index(folder)


def words(index: Index) -> WordTokenizer:
    return WordTokenizer(build_vocabulary(captions(index, "train"), 1), 16)


def start(
    index: Index, *, world_size: int = 1, num_workers: int = 0, **changes: Any
) -> list[Iterator[Batch]]:
    """Return every rank's stream."""
    settings: dict[str, Any] = {
        "seed": 5,
        "global_batch_size": BATCH,
        "lanes": LANES,
        "shuffle_window": 64,
        "size": 8,
        "crop": "random",
        "min_crop_area": 0.5,
        "flip": True,
        "color_jitter": 0.4,
        "tokenizer": words(index),
        "num_workers": num_workers,
        "world_size": world_size,
    }
    settings |= {"sets": [TrainSet(index, "train")]} | changes
    return [train_batches(rank=rank, **settings) for rank in range(world_size)]


def take(streams: list[Iterator[Batch]], steps: int) -> list[list[Batch]]:
    """Return the ranks' batches of each step."""
    return [[next(stream) for stream in streams] for _ in range(steps)]


def rows_of(batch: Batch) -> list[str]:
    """Hash each row: pixels, words (without padding), ids and origin."""
    hashes = []
    for image, tokens, *numbers in zip(
        batch.images, batch.tokens, batch.image_ids, batch.text_ids, batch.origin, strict=True
    ):
        hasher = hashlib.sha256(image.numpy().tobytes())
        hasher.update(str(tokens[tokens != 0].tolist()).encode())
        hasher.update(str([number.tolist() for number in numbers]).encode())
        hashes.append(hasher.hexdigest())
    return hashes


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
    [(2, 0, 40), (3, 0, 25), (4, 0, 25), (12, 0, 25), (2, 1, 25), (1, 2, 40)],
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


def test_workers_resume_too(index: Index, reference: list[tuple[str, NDArray[np.int64]]]) -> None:
    (stream,) = start(index, num_workers=1, state=reference[6][1])
    assert digest([next(stream)]) == reference[7][0]


def test_rows_hold_what_the_shards_hold(index: Index) -> None:
    (stream,) = start(index, crop="center", flip=False, color_jitter=0.0)
    reader = ShardReader(index, "train", max_open=4)
    tokenizer = words(index)
    for batch in itertools.islice(stream, 3):
        for row, (epoch, number) in enumerate(batch.origin.tolist()):
            shard, place = reader.place(number)
            data, meta = reader.image(shard, place), reader.meta(shard, place)
            caption = meta.captions[(epoch + image_id(meta.key)) % 3]
            pixels = decode_image(data, Transform(8))
            np.testing.assert_array_equal(batch.images[row].numpy(), pixels)
            assert batch.image_ids[row] == image_id(data)
            assert batch.text_ids[row] == image_id(caption)
            tokens = tokenizer([caption])[0]
            assert torch.equal(batch.tokens[row, : len(tokens)], tokens)
            assert (batch.tokens[row, len(tokens) :] == tokenizer.pad_id).all()


def test_photographs_are_decoded_into_the_batch(tmp_path: Path) -> None:
    images = [encode(draw(n, size=64).resize((96, 80)), "JPEG") for n in range(12)]
    samples = [Sample(f"p{n}", data, ("a",), extension="jpg") for n, data in enumerate(images)]
    index = write_shards(tmp_path, {"train": [samples]})
    (stream,) = start(index, lanes=2, global_batch_size=12, crop="center", flip=False)
    (plain,) = start(
        index, lanes=2, global_batch_size=12, crop="center", flip=False, color_jitter=0.0
    )
    batch = next(plain)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    for pixels, (_, number) in zip(batch.images, batch.origin.tolist(), strict=True):
        expected = decode_image(images[number], Transform(8, scaled=True))
        np.testing.assert_array_equal(pixels.numpy(), expected)
    assert not torch.equal(next(stream).images, batch.images)


def test_a_mixture_is_read_by_weight(tmp_path: Path) -> None:
    """Weights 1 and a half, for any number of readers; numbers go through both sets."""
    first = write_dataset(tmp_path / "a", {"train": [20, 12]}, size=16)
    second = write_dataset(tmp_path / "b", {"train": [9, 8, 7]}, size=16)
    sets = [TrainSet(first, "train"), TrainSet(second, "train", 0.5)]
    options: dict[str, Any] = {"sets": sets, "lanes": 4, "global_batch_size": 11 * 4}
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
    with pytest.raises(UserError, match=r"a, split 'train'; .*in another order .*output_dir"):
        start(first, state=state(ranks[4]), state_format=1, **options)
    alone = options | {"sets": sets[:1], "global_batch_size": 32}
    start(first, state=np.zeros((4, 2), np.int64), state_format=1, **alone)  # as it ever was


def test_captions_take_turns(tmp_path: Path) -> None:
    index = write_dataset(tmp_path, {"train": 24}, size=16, captions=3)
    (stream,) = start(index, global_batch_size=24, lanes=2)
    first, *others = list(itertools.islice(stream, 6))
    by_image: dict[int, list[int]] = {}
    for batch in (first, *others):
        for image, text in zip(batch.image_ids.tolist(), batch.text_ids.tolist(), strict=True):
            by_image.setdefault(image, []).append(text)
    assert len(by_image) == 24
    for texts in by_image.values():
        assert len(set(texts[:3])) == 3  # three epochs, three captions
        assert texts[3:] == texts[:3]


def test_crops_differ_between_epochs_and_seeds(tmp_path: Path) -> None:
    index = write_dataset(tmp_path, {"train": 16}, size=16)

    def pixels(seed: int) -> list[dict[int, bytes]]:
        (stream,) = start(index, global_batch_size=16, lanes=1, seed=seed, min_crop_area=0.2)
        return [
            {
                number: image.numpy().tobytes()
                for number, image in zip(batch.image_ids.tolist(), batch.images, strict=True)
            }
            for batch in itertools.islice(stream, 2)
        ]

    (first, second), (other, _) = pixels(0), pixels(1)
    assert pixels(0) == [first, second]
    for different in (second, other):
        assert sum(first[image] == different[image] for image in first) <= 1


def test_a_crop_depends_on_nothing_but_seed_epoch_and_sample(tmp_path: Path) -> None:
    index = write_dataset(tmp_path, {"train": [9, 7]}, size=16)

    def pixels(lanes: int, window: int) -> dict[tuple[int, ...], bytes]:
        (stream,) = start(index, global_batch_size=16, lanes=lanes, shuffle_window=window)
        return {
            tuple(origin): image.numpy().tobytes()
            for batch in itertools.islice(stream, 2)
            for origin, image in zip(batch.origin.tolist(), batch.images, strict=True)
        }

    reference = pixels(1, 100)
    assert len(reference) == 32
    assert pixels(4, 2) == reference


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


@pytest.mark.parametrize("num_workers", [0, 1])
def test_bad_samples_are_skipped_and_named(flawed: Index, num_workers: int) -> None:
    (stream,) = start(flawed, global_batch_size=4, lanes=2, num_workers=num_workers)
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


def test_a_lane_without_a_good_sample_ends_the_stream(tmp_path: Path) -> None:
    bad = [Sample(f"bad{n}", b"nothing", ("a",)) for n in range(8)]
    index = write_shards(tmp_path, {"train": [bad]})
    (stream,) = start(index, global_batch_size=2, lanes=2)
    with pytest.raises(UserError, match=r"split 'train': 4 samples in a row .*bad\d"):
        next(stream)


def test_too_few_samples(tmp_path: Path) -> None:
    index = write_dataset(tmp_path, {"train": 10}, size=16)
    with pytest.raises(UserError, match=r"an epoch has 10 samples, fewer than data\.lanes \(12\)"):
        start(index)
    with pytest.raises(
        UserError, match=r"an epoch has 10 samples, fewer than global_batch_size \(16\)"
    ):
        start(index, lanes=2, global_batch_size=16)
    (stream,) = start(index, lanes=2, global_batch_size=10)
    assert len(set(next(stream).origin[:, 1].tolist())) == 10


def test_small_sets_of_a_mixture_fill_all_lanes(tmp_path: Path) -> None:
    """Each alone has fewer samples than there are lanes."""
    sets = [
        TrainSet(write_dataset(tmp_path / name, {"train": 3}, size=16), "train") for name in "ab"
    ]
    (stream,) = start(sets[0].index, sets=sets, lanes=6, global_batch_size=6)
    for _ in range(3):
        assert sorted(next(stream).origin[:, 1].tolist()) == list(range(6))


def test_a_state_that_does_not_fit(index: Index) -> None:
    with pytest.raises(UserError, match=r"4 lanes, but data\.lanes is 12.*data\.lanes=4"):
        start(index, state=np.zeros((4, 2), np.int64))
    beyond = np.zeros((LANES, 2), np.int64)
    beyond[7] = 3, TOTAL
    with pytest.raises(UserError, match=rf"lane 7 has \d+ samples.*stands at {TOTAL}"):
        start(index, state=beyond)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_missing_shard_is_named(tmp_path: Path, num_workers: int) -> None:
    index = write_dataset(tmp_path, {"train": [9, 9]}, size=16)
    (stream,) = start(index, lanes=2, global_batch_size=18, num_workers=num_workers)
    (tmp_path / "train-00001.tar").unlink()
    with pytest.raises(UserError, match=r"^\S*train-00001\.tar: the shard is missing; copy it"):
        next(stream)


def test_too_little_shared_memory_is_told_with_the_first_batch(index: Index) -> None:
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
        take(start(index, lanes=1, global_batch_size=9), 1)


def test_the_global_random_state_is_left_alone(index: Index) -> None:
    torch.manual_seed(0)
    before, legacy = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index]
    streams = start(index, num_workers=1)
    take(streams, 1)
    take(start(index), 1)
    assert torch.equal(torch.get_rng_state(), before)
    np.testing.assert_array_equal(np.random.get_state()[1], legacy)  # type: ignore[index]


def test_few_shards_are_open(index: Index, tmp_path: Path) -> None:
    # A copy of its own: other tests' streams may still hold shards of theirs.
    index = read_index(shutil.copytree(index.root, tmp_path / "own"))
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
