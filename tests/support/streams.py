"""Training streams of small images, and what a test compares of their batches."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist_vse.config import DataConfig, ImageConfig
from dist_vse.data.eval_stream import captions
from dist_vse.data.index import Index
from dist_vse.data.samples import ONE_PROCESS, Batch, Placement, Tokenizer
from dist_vse.data.streams import TrainSet
from dist_vse.data.train_stream import train_batches
from dist_vse.models.tokenizer import WordTokenizer, build_vocabulary

BATCH, STREAMS = 48, 12
AUGMENTED = DataConfig(
    num_streams=STREAMS,
    shuffle_window=64,
    num_workers=0,
    crop="random",
    min_crop_area=0.5,
    flip=True,
    color_jitter=0.4,
)
PLAIN = {"crop": "center", "min_crop_area": 1.0, "flip": False, "color_jitter": 0.0}


def open_rank(
    sets: Sequence[TrainSet],
    placement: Placement = ONE_PROCESS,
    *,
    tokenizer: Tokenizer | None = None,
    size: int = 8,
    seed: int = 0,
    global_batch_size: int = BATCH,
    state: NDArray[np.int64] | None = None,
    **data: Any,
) -> Iterator[Batch]:
    """Return one rank's stream; `data` are other settings of a DataConfig."""
    return train_batches(
        sets,
        tokenizer or WordTokenizer(["a", "red", "square", "on"], 8),
        replace(AUGMENTED, **data),
        ImageConfig(size=size),
        seed=seed,
        global_batch_size=global_batch_size,
        placement=placement,
        state=state,
    )


def start(index: Index, *, world_size: int = 1, **changes: Any) -> list[Iterator[Batch]]:
    """Return every rank's stream of split `train`, with all of its words."""
    options: dict[str, Any] = {"sets": [TrainSet(index, "train")], "tokenizer": words(index)}
    options |= changes
    ranks = [Placement(rank, world_size) for rank in range(world_size)]
    return [open_rank(placement=placement, **options) for placement in ranks]


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
