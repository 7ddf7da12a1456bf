"""Captions drawn by weight, and long ones begun at a sentence: the same for all readers."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_vse.common.errors import UserError
from dist_vse.config import DataConfig
from dist_vse.data.choose_text import TextChoice, begun_at_a_sentence
from dist_vse.data.decode import BadSampleError
from dist_vse.data.index import Index, image_id
from dist_vse.data.reader import Meta, parse_meta
from tests.shards.test_urls import _skipped
from tests.support.datasets import make_sample, write_shards
from tests.support.shards import run_shard, write_pairs
from tests.support.streams import PLAIN, start, take

META = Meta("k", ("one", "two", "three"))


def _counts(choice: TextChoice, meta: Meta, draws: int = 1500) -> Counter[str]:
    rng = np.random.default_rng(0)
    return Counter(choice.choose(meta, turn, lambda: rng)[1] for turn in range(draws))


@pytest.mark.parametrize(
    ("weights", "meta", "expected"),
    [
        ({}, META, (1 / 3, 1 / 3, 1 / 3)),  # in turn
        ({}, replace(META, weights=(1.0, 0.0, 3.0)), (0.25, 0, 0.75)),
        ({"alt": 1, "new": 1}, replace(META, labels=("alt", "new", "new")), (0.5, 0.25, 0.25)),
        ({"new": 9}, replace(META, labels=("alt", "new", "old")), (0, 1, 0)),
        (
            {"alt": 1, "new": 3},
            replace(META, labels=("alt", "new", "new"), weights=(7.0, 1.0, 2.0)),
            (0.25, 0.25, 0.5),
        ),
    ],
)
def test_captions_are_drawn_by_weight(
    weights: dict[str, float], meta: Meta, expected: tuple[float, ...]
) -> None:
    counts = _counts(TextChoice(weights), meta)
    shares = [counts[caption] / 1500 for caption in meta.captions]
    np.testing.assert_allclose(shares, expected, atol=0.06)
    assert [share == 0 for share in shares] == [share == 0 for share in expected]


def test_a_sample_without_a_weight_is_bad() -> None:
    with pytest.raises(BadSampleError, match=r"no caption has a weight \(labels: alt, new\)"):
        _counts(TextChoice({"other": 1}), replace(META, labels=("alt", "new", "new")))
    with pytest.raises(UserError, match="caption_weights: one of them must be above 0"):
        DataConfig(caption_weights={"alt": 0.0})
    with pytest.raises(UserError, match=r"data\.caption_weights\.alt \(-1\) must be"):
        DataConfig(caption_weights={"alt": -1})


def test_labels_and_weights_stay_with_their_captions() -> None:
    fields: dict[str, Any] = {"key": "k", "captions": ["a", " ", "b"]}
    fields |= {"languages": ["en", "de", "fr"], "caption_weights": [1, 2, 3.5]}
    assert parse_meta(json.dumps(fields).encode()) == Meta("k", ("a", "b"), ("en", "fr"), (1, 3.5))
    for wrong in ([1, 2], [1, 2, -3], [1, 2, "3"], 7, [1, 2, float("inf")]):
        with pytest.raises(BadSampleError, match="caption_weights must be 3 numbers: 0, or 1e-12"):
            parse_meta(json.dumps({**fields, "caption_weights": wrong}).encode())


def test_wrong_weights_are_found_by_sharding(tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "in", 3)
    lines = [json.loads(line) for line in source.read_text().splitlines()]
    lines[0]["caption_weights"], lines[1]["caption_weights"] = [1, 2], [1]
    source.write_text("\n".join(map(json.dumps, lines)))
    run_shard("jsonl", source, tmp_path / "out", "--max-bad", "1", "--workers", "1")
    assert _skipped(tmp_path / "out") == {
        "1.png": "caption_weights must be 2 numbers: 0, or 1e-12 to 1e+12"
    }
    run_shard("index", tmp_path / "out" / "train-00000.tar", "--out", tmp_path / "index")
    side = "".join(p.read_text() for p in (tmp_path / "index").glob("*.jsonl"))
    assert '"caption_weights": [1, 2]' in side


def test_long_captions_begin_at_a_sentence() -> None:
    long = "A dog runs. It is brown! Is the sky blue? Yes,\nthe end."
    found = {begun_at_a_sentence(long, draw / 100) for draw in range(100)}
    assert found == {
        long,
        "It is brown! Is the sky blue? Yes,\nthe end.",
        "Is the sky blue? Yes,\nthe end.",
        "Yes,\nthe end.",
        "the end.",
    }
    assert begun_at_a_sentence("no end", 0.99) == "no end"
    choice = TextChoice(sentences_above=5)
    meta = Meta("k", (long, "A dog. A cat."))
    assert set(_counts(choice, meta, 200)) == found | {"A dog. A cat."}
    assert set(_counts(TextChoice(), meta, 20)) == {long, "A dog. A cat."}


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    samples = []
    for number in range(60):
        sample = make_sample(number, size=16)
        captions = [f"{sample.captions[0]}. It is {number}. That is all.", sample.captions[1]]
        fields = {"key": sample.key, "captions": captions, "languages": ["long", "short"]}
        samples.append(replace(sample, meta=json.dumps(fields).encode()))
    return write_shards(tmp_path_factory.mktemp("data"), {"train": [samples[:25], samples[25:]]})


def test_draws_are_the_same_for_all_readers_and_when_resumed(
    index: Index,
) -> None:
    options: dict[str, Any] = {
        **PLAIN,
        "global_batch_size": 24,
        "caption_weights": {"long": 2, "short": 1},
        "sentences_above": 6,
    }

    def texts(steps: list[list[Any]]) -> list[list[list[int]]]:
        return [[row for b in ranks for row in b.tokens[:, :9].tolist()] for ranks in steps]

    one = take(start(index, **options), 6)
    two = take(start(index, world_size=2, **options), 6)
    assert _padded(texts(one)) == _padded(texts(two))
    state = np.concatenate([batch.state for batch in two[2]])
    resumed = take(start(index, world_size=3, state=state, **options), 3)
    assert _padded(texts(resumed)) == _padded(texts(one)[3:])
    # An id is of the whole caption, whichever part of it was read.
    wholes = {image_id(c) for m in _metas(index) for c in m.captions}
    assert {number for (batch,) in one for number in batch.text_ids.tolist()} <= wholes
    lengths = [len(row) for step in _padded(texts(one)) for row in step]
    assert min(lengths) == 6 and max(lengths) > 7  # <start> that is all . <end>


def _padded(steps: list[list[list[int]]]) -> list[list[list[int]]]:
    return [[[token for token in row if token] for row in step] for step in steps]


def _metas(index: Index) -> list[Meta]:
    from dist_vse.data.reader import ShardReader

    reader = ShardReader(index, "train", max_open=2)
    return [reader.meta(*reader.place(number)) for number in range(60)]
