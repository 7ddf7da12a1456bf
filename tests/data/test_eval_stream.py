"""Evaluation reads each sample once, with all captions, in the order of the index."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dist_vse.common.errors import UserError
from dist_vse.config import ImageConfig
from dist_vse.data.decode import Transform, decode_image
from dist_vse.data.eval_stream import EvalBatch, captions, eval_batches
from dist_vse.data.index import Index, image_id
from dist_vse.data.samples import Placement
from dist_vse.models.tokenizer import WordTokenizer, build_vocabulary
from tests.support.datasets import Sample, make_sample, write_dataset, write_shards


def tokenizer(index: Index) -> WordTokenizer:
    return WordTokenizer(build_vocabulary(captions(index, "val"), 1), 16)


def read(index: Index, world_size: int, num_workers: int = 0) -> list[list[EvalBatch]]:
    words = tokenizer(index)
    return [
        list(
            eval_batches(
                index,
                "val",
                words,
                ImageConfig(size=16),
                batch_size=4,
                placement=Placement(rank, world_size),
                num_workers=num_workers,
            )
        )
        for rank in range(world_size)
    ]


@pytest.mark.parametrize("world_size", [1, 2, 3, 30])
def test_each_sample_comes_once_in_order(tmp_path: Path, world_size: int) -> None:
    samples = [make_sample(n, captions=1 + n % 7) for n in range(23)]
    index = write_shards(tmp_path, {"val": [samples[:9], samples[9:10], samples[10:]]})
    words = tokenizer(index)
    batches = [batch for rank in read(index, world_size) for batch in rank]
    assert [key for batch in batches for key in batch.keys] == [s.key for s in samples]
    assert [text for batch in batches for text in batch.captions] == [
        text for sample in samples for text in sample.captions
    ]
    by_key = {sample.key: sample for sample in samples}
    for batch in batches:
        own = [by_key[key] for key in batch.keys]
        assert len(own) <= 4
        assert batch.image_ids.tolist() == [image_id(sample.image) for sample in own]
        assert batch.image_of_text.tolist() == [
            row for row, sample in enumerate(own) for _ in sample.captions
        ]
        assert torch.equal(batch.tokens, words(batch.captions))
        pixels = np.stack([decode_image(sample.image, Transform(16)) for sample in own])
        np.testing.assert_array_equal(batch.images.numpy(), pixels)


def test_workers_give_the_same_batches(tmp_path: Path) -> None:
    index = write_dataset(tmp_path, {"val": [9, 5, 8]})
    (alone,), (helped,) = read(index, 1), read(index, 1, num_workers=2)
    assert len(alone) == len(helped) == 6
    for one, other in zip(alone, helped, strict=True):
        assert one.keys == other.keys
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.tokens, other.tokens)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (Sample("odd", b"no image", ("a cat",)), r"odd in val-00000\.tar .*not an image file"),
        (replace(make_sample(2), key="odd", captions=(" ",)), r"odd in .* \(no caption\)"),
        (replace(make_sample(2), meta=b"{"), r"row 1 in .*broken metadata"),
    ],
)
def test_a_bad_sample_stops_the_evaluation(tmp_path: Path, bad: Sample, reason: str) -> None:
    index = write_shards(tmp_path, {"val": [[make_sample(0), bad]]})
    with pytest.raises(UserError, match=reason + ".*--max-bad"):
        read(index, 1)


def test_captions_come_from_metadata_alone(tmp_path: Path) -> None:
    samples = [
        Sample("a", b"no image", ("one", " ", "two")),
        Sample("b", b"", ("three",), meta=b"not json"),
        Sample("c", b"", (), meta=json.dumps({"key": "c", "captions": [3]}).encode()),
        Sample("d", b"", ("four",)),
    ]
    index = write_shards(tmp_path, {"val": [samples[:3], samples[3:]]})
    assert list(captions(index, "val")) == ["one", "two", "four"]


def test_negatives_are_read_with_the_captions_where_they_are_trained_on(tmp_path: Path) -> None:
    meta = json.dumps({"key": "a", "captions": ["one"], "negatives": ["no one", " "]}).encode()
    index = write_shards(tmp_path, {"val": [[Sample("a", b"", (), meta=meta)]]})
    assert list(captions(index, "val")) == ["one"]
    assert list(captions(index, "val", negatives=True)) == ["one", "no one"]
