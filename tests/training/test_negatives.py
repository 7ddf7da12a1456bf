"""Texts without an image, from the samples' JSON to the weights: the same for any world size."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dist_vse.common.errors import UserError
from dist_vse.config import load_config
from dist_vse.data.choose_text import TextChoice
from dist_vse.data.decode import BadSampleError
from dist_vse.data.index import Index, image_id
from dist_vse.data.reader import Meta, parse_meta
from dist_vse.losses.registry import LOSSES, find_loss
from dist_vse.tools.verify.case import make_batch, shrink, small_model
from dist_vse.tools.verify.checks import check, describe
from dist_vse.training.chunks import make_chunks
from tests.support.datasets import Sample, make_sample, write_shards
from tests.support.distributed import run_distributed
from tests.support.runs import read_losses, run, settings
from tests.support.streams import PLAIN, start, take, words


def _with_negatives(number: int) -> Sample:
    """Return a sample with 0 to 3 negatives; the first is a caption of the next sample.

    They bring no new word: the vocabulary is the same where they are not read.
    """
    sample = make_sample(number, size=16)
    false = [make_sample(number + 1).captions[0], f"a {sample.captions[0]}", " ", "on a red a"]
    fields = {"key": sample.key, "captions": sample.captions, "negatives": false[: number % 5]}
    return replace(sample, meta=json.dumps(fields).encode())


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    folder = tmp_path_factory.mktemp("data")
    samples = [_with_negatives(number) for number in range(96)]
    return write_shards(folder, {"train": [samples[:50], samples[50:]], "val": [samples[:32]]})


def test_the_stream_brings_the_negatives_of_its_rows(index: Index) -> None:
    options: dict[str, Any] = {**PLAIN, "negatives": 2}
    one = take(start(index, **options), 4)
    two = take(start(index, world_size=2, **options), 4)
    tokenizer = words(index)
    for (whole,), parts in zip(one, two, strict=True):
        ids = [x for b in parts if b.negative_ids is not None for x in b.negative_ids.tolist()]
        assert whole.negatives is not None and whole.negative_ids is not None
        assert ids == whole.negative_ids.tolist()
        texts = [set(_negatives(number)) for _, number in whole.origin.tolist()]
        assert len(ids) == sum(min(2, len(of_row)) for of_row in texts)
        known = {image_id(text): text for of_row in texts for text in of_row}
        for number, row in zip(ids, whole.negatives, strict=True):
            expected = tokenizer([known[number]])[0]
            assert torch.equal(row[: len(expected)], expected) and not row[len(expected) :].any()
    state = np.concatenate([batch.state for batch in two[1]])
    (again, *_) = take(start(index, world_size=3, state=state, **options), 1)
    assert [x for b in again for x in b.negative_ids.tolist()] == one[2][0].negative_ids.tolist()  # type: ignore[union-attr]
    ((plain,),) = take(start(index, **PLAIN), 1)
    assert plain.negatives is None and torch.equal(plain.text_ids, one[0][0].text_ids)


def _negatives(number: int) -> tuple[str, ...]:
    meta = _with_negatives(number).meta
    assert meta is not None
    return parse_meta(meta).negatives


def test_more_negatives_than_wanted_are_drawn() -> None:
    meta = Meta("k", ("a",), negatives=("b", "c", "d"))
    rng = np.random.default_rng(0)
    drawn = {TextChoice(num_negatives=2).negatives(meta, lambda: rng) for _ in range(60)}
    assert len(drawn) == 6 and all(len(set(pair)) == 2 for pair in drawn)
    assert TextChoice(num_negatives=3).negatives(meta, lambda: rng) == ("b", "c", "d")
    assert TextChoice().negatives(meta, lambda: rng) == ()
    with pytest.raises(BadSampleError, match="negatives must be a list of texts"):
        parse_meta(json.dumps({"key": "k", "captions": ["a"], "negatives": "b"}).encode())


@pytest.mark.parametrize("frozen", [False, True])
def test_negatives_are_encoded_with_the_captions(frozen: bool) -> None:
    config = shrink(load_config(None), 1)
    model = small_model(config, frozen=(False, frozen)).eval()
    batch = make_batch(4, negatives=2)
    assert batch.negatives is not None
    more = replace(batch, negatives=batch.negatives[:5])
    chunks = make_chunks(model, more, replace(config, chunk_size=2))
    parts = [model(**chunk) for chunk in chunks]
    images, texts, _, _, negatives = (torch.cat(x) for x in zip(*parts, strict=True))
    whole = model(**model.prepare(images=batch.images, tokens=batch.tokens))
    torch.testing.assert_close(images, whole[0])
    torch.testing.assert_close(texts, whole[1])
    torch.testing.assert_close(negatives, model.encode_texts(batch.negatives[:5]))
    assert [len(part[4]) for part in parts] == [3, 2] and len(whole) == 4


def _verify() -> list[tuple[int, str]]:
    cases = [["data.negatives=2", "engine.zero_stage=0"]]
    results = [check(load_config(None, case)) for case in cases]
    return [(result.code, describe(result)) for result in results]


@pytest.mark.slow
def test_a_step_with_negatives_is_that_of_one_process() -> None:
    for found in run_distributed(_verify, 2, timeout=110):
        for code, text in found:
            assert code == 0 and "gradient of negatives" in text, text


def _refused() -> str:
    LOSSES["convse"] = replace(LOSSES["convse"], takes_negatives=False)
    find_loss.cache_clear()
    with pytest.raises(UserError) as caught:
        check(load_config(None, ["data.negatives=2"]))
    return str(caught.value)


@pytest.mark.slow
def test_a_loss_without_negatives_is_refused_on_all_ranks() -> None:
    messages = run_distributed(_refused, 2, timeout=60)
    assert messages[0] == messages[1] and "loss.name=convse takes no negatives" in messages[0]


def _run(overrides: list[str]) -> int | str:
    return run(overrides)


@pytest.mark.slow
def test_a_run_does_not_depend_on_the_world_size(index: Index, tmp_path: Path) -> None:
    curves = []
    sgd = ("optim.name=sgd", "optim.lr=0.05", "data.negatives=2", "cache.keep_graphs=1")
    for world_size, transport in ((1, "gather"), (2, "ring")):
        run_dir = tmp_path / f"w{world_size}"
        more = ("total_steps=3", "log_every=1", *sgd, f"loss.transport={transport}")
        overrides = settings(index.root, run_dir, *more)
        assert run_distributed(_run, world_size, overrides) == [0] * world_size
        curves.append(read_losses(run_dir))
    assert curves[1] == pytest.approx(curves[0], abs=1e-4)
    plain = settings(index.root, tmp_path / "plain", "total_steps=3", "log_every=1", *sgd[:2])
    assert run_distributed(_run, 1, plain) == [0]
    assert read_losses(tmp_path / "plain")[0] < curves[0][0] - 0.05  # fewer negatives
