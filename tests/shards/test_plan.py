"""Keys are safe and unique, and the plan is a pure function of the records."""

import random
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_vse.common.errors import UserError
from dist_vse.shards.build.keys import MAX_CHARS, safe_key, safe_keys
from dist_vse.shards.build.plan import Options, fingerprint, plan_shards
from dist_vse.shards.record import Member, Record


def _records(count: int, split: str = "train") -> list[Record]:
    return [Record(Path(f"/none/{i}.png"), (f"caption {i}",), split, f"k{i}") for i in range(count)]


def test_a_safe_name_is_its_own_key() -> None:
    assert safe_key("COCO_val2014_000000391895") == "COCO_val2014_000000391895"


def test_an_unsafe_name_stays_readable_and_distinct() -> None:
    assert safe_key("dir/a.b").startswith("dir_a_b-")
    assert safe_key("Café").startswith("Cafe-")
    assert len({safe_key(name) for name in ("a.b", "a/b", "a_b", "a b", "苹果", "桌子", "")}) == 7


def test_equal_names_are_numbered_in_order() -> None:
    assert list(safe_keys(["a", "a", "a-2", "a"])) == ["a", "a-2", "a-2-2", "a-3"]


@settings(deadline=None)  # a busy machine is no failure
@given(st.lists(st.text(max_size=120), max_size=30))
def test_keys_are_safe_unique_and_repeatable(names: list[str]) -> None:
    keys = list(safe_keys(names))
    assert len(set(keys)) == len(names)
    assert keys == list(safe_keys(names))
    for key in keys:
        assert re.fullmatch("[A-Za-z0-9_-]+", key)
        assert len(key) <= MAX_CHARS + 4


def test_the_plan_shuffles_training_splits_and_cuts_each() -> None:
    records = _records(25) + [replace(r, key="v" + r.key) for r in _records(3, "val")]
    tasks = plan_shards(records, Options(shard_size=10))
    assert [(t.name, len(t.records)) for t in tasks] == [
        ("train-00000.tar", 10),
        ("train-00001.tar", 10),
        ("train-00002.tar", 5),
        ("val-00000.tar", 3),
    ]
    keys = [r.key for t in tasks for r in t.records if t.split == "train"]
    assert sorted(keys) == sorted(r.key for r in records[:25])
    assert keys != [r.key for r in records[:25]]


@pytest.mark.parametrize(
    ("split", "kept"),
    [
        *(("val", True), ("test2017", True), ("karpathy_test", True), ("dev", True)),
        *(("train", False), ("restval", False), ("contest", False), ("all", False)),
    ],
)
def test_splits_for_evaluation_keep_the_order_of_the_source(split: str, kept: bool) -> None:
    for seed in (0, 1):
        tasks = plan_shards(_records(40, split), Options(shard_size=7, seed=seed))
        keys = [record.key for task in tasks for record in task.records]
        assert (keys == [f"k{i}" for i in range(40)]) == kept


def test_shards_are_cut_by_the_bytes_of_their_images(tmp_path: Path) -> None:
    sizes = [300, 400, 300, 5000, 10, 0, 600, 400]
    records = _records(len(sizes))
    for i, size in enumerate(sizes):
        path = tmp_path / str(i)
        path.write_bytes(b"x" * size)
        records[i] = replace(records[i], image=path)
    tasks = plan_shards(records, Options(shard_bytes=1000))
    cut = [sum(r.image.stat().st_size for r in t.records) for t in tasks]
    assert sum(cut) == sum(sizes) and sum(len(t.records) for t in tasks) == len(sizes)
    assert max(size for size in cut if size != 5000) <= 1000
    for one, other in pairwise(tasks):  # none could have taken the next image
        first = other.records[0].image.stat().st_size
        assert sum(r.image.stat().st_size for r in one.records) + first > 1000


def test_a_shard_may_have_exactly_the_bytes_that_are_allowed() -> None:
    image = Member(Path("a.tar"), 0, 500)
    records = [replace(record, image=image) for record in _records(6)]
    tasks = plan_shards(records, Options(shard_bytes=1000))
    assert [len(task.records) for task in tasks] == [2, 2, 2]
    for allowed in (999, 499):  # a larger image has a shard of its own, the first one too
        tasks = plan_shards(records, Options(shard_bytes=allowed))
        assert [len(task.records) for task in tasks] == [1] * 6


def test_the_plan_does_not_depend_on_the_order_given_but_on_the_seed() -> None:
    records = _records(40)
    shuffled = random.Random(1).sample(records, len(records))
    plan = plan_shards(records, Options(shard_size=7, seed=3))
    assert plan == plan_shards(shuffled, Options(shard_size=7, seed=3))
    assert plan != plan_shards(records, Options(shard_size=7, seed=4))


def test_a_split_must_be_a_file_name() -> None:
    with pytest.raises(UserError, match=r"split '\.\./x' of 'k0' is no file name"):
        plan_shards(_records(1, "../x"), Options())


def test_the_fingerprint_changes_with_captions_and_images(tmp_path: Path) -> None:
    image = tmp_path / "0.png"
    record = Record(image, ("caption",), "train", "k")

    def digest(record: Record) -> str:
        return fingerprint(plan_shards([record], Options())[0])

    missing = digest(record)
    image.write_bytes(b"one")
    present = digest(record)
    image.write_bytes(b"longer")
    assert len({missing, present, digest(record), digest(replace(record, captions=("x",)))}) == 4
    assert digest(record) == digest(record)
    copies = [Member(image, 0, 6, url) for url in ("http://a/1.tar", "http://b/1.tar")]
    assert len({digest(replace(record, image=copy)) for copy in copies}) == 2
