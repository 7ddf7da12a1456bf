"""Training streams of small images, and what a test compares of their batches."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

from dist_vse.data.eval_stream import captions
from dist_vse.data.index import Index
from dist_vse.data.samples import Batch
from dist_vse.data.streams import TrainSet
from dist_vse.data.train_stream import train_batches
from dist_vse.models.tokenizer import WordTokenizer, build_vocabulary

BATCH, STREAMS = 48, 12
PLAIN = {"crop": "center", "min_crop_area": 1.0, "flip": False, "color_jitter": 0.0}


def open_rank(
    sets: Sequence[TrainSet], *, rank: int = 0, world_size: int = 1, **changes: Any
) -> Iterator[Batch]:
    """Return one rank's stream; `changes` are other arguments of `train_batches`."""
    settings: dict[str, Any] = {
        "seed": 0,
        "global_batch_size": BATCH,
        "streams": STREAMS,
        "shuffle_window": 64,
        "size": 8,
        "crop": "random",
        "min_crop_area": 0.5,
        "flip": True,
        "color_jitter": 0.4,
        "tokenizer": WordTokenizer(["a", "red", "square", "on"], 8),
        "num_workers": 0,
    }
    return train_batches(sets, rank=rank, world_size=world_size, **settings | changes)


def start(index: Index, *, world_size: int = 1, **changes: Any) -> list[Iterator[Batch]]:
    """Return every rank's stream of split `train`, with all of its words."""
    options: dict[str, Any] = {"sets": [TrainSet(index, "train")], "tokenizer": words(index)}
    options |= changes
    return [open_rank(rank=rank, world_size=world_size, **options) for rank in range(world_size)]


def words(index: Index) -> WordTokenizer:
    return WordTokenizer(build_vocabulary(captions(index, "train"), 1), 16)


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
