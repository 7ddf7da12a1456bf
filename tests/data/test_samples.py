"""What a row of a batch holds: the sample's pixels and caption, other ones in each epoch."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from dist_vse.data.decode import BadSampleError, Transform, decode_image
from dist_vse.data.index import image_id
from dist_vse.data.reader import ShardReader, parse_meta
from tests.support.datasets import Sample, draw, encode, write_dataset, write_shards
from tests.support.streams import PLAIN, start, words


def test_rows_hold_what_the_shards_hold(tmp_path: Path) -> None:
    index = write_dataset(tmp_path, {"train": [30, 43, 56, 28, 41]}, size=16, captions=3)
    (stream,) = start(index, **PLAIN)
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
    (stream,) = start(index, num_streams=2, global_batch_size=12, crop="center", flip=False)
    (plain,) = start(index, num_streams=2, global_batch_size=12, **PLAIN)
    batch = next(plain)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    for pixels, (_, number) in zip(batch.images, batch.origin.tolist(), strict=True):
        expected = decode_image(images[number], Transform(8, scaled=True))
        np.testing.assert_array_equal(pixels.numpy(), expected)
    assert not torch.equal(next(stream).images, batch.images)


def test_captions_take_turns(tmp_path: Path) -> None:
    index = write_dataset(tmp_path, {"train": 24}, size=16, captions=3)
    (stream,) = start(index, global_batch_size=24, num_streams=2)
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
        (stream,) = start(index, global_batch_size=16, num_streams=1, seed=seed, min_crop_area=0.2)
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

    def pixels(streams: int, window: int) -> dict[tuple[int, ...], bytes]:
        (stream,) = start(index, global_batch_size=16, num_streams=streams, shuffle_window=window)
        return {
            tuple(origin): image.numpy().tobytes()
            for batch in itertools.islice(stream, 2)
            for origin, image in zip(batch.origin.tolist(), batch.images, strict=True)
        }

    reference = pixels(1, 100)
    assert len(reference) == 32
    assert pixels(4, 2) == reference


@pytest.mark.parametrize("captions", ['"a red apple"', '{"a": "b"}', "5", "[5]", "[" * 100_000])
def test_captions_that_are_no_list_of_texts_are_bad(captions: str) -> None:
    with pytest.raises(BadSampleError, match="broken metadata"):
        parse_meta(f'{{"key": "k", "captions": {captions}}}'.encode())


@pytest.mark.parametrize(
    "weights", ["[1%s, 1]" % ("0" * 400), "[1e308, 1e308]", "[5e-324, 0]", "[-1, 2]", "[true, 1]"]
)
def test_weights_that_cannot_be_summed_or_drawn_by_are_bad(weights: str) -> None:
    meta = f'{{"key": "k", "captions": ["a", "b"], "caption_weights": {weights}}}'
    with pytest.raises(BadSampleError, match="caption_weights must be 2 numbers"):
        parse_meta(meta.encode())
    assert parse_meta(meta.replace(weights, "[1e-12, 1e12]").encode()).weights == (1e-12, 1e12)
