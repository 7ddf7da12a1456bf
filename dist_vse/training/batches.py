"""The batches that a run trains on."""

from collections.abc import Iterator, Sequence

import numpy as np

from dist_vse import distributed
from dist_vse.config import TrainConfig
from dist_vse.data.samples import Batch, Placement, Tokenizer
from dist_vse.data.streams import TrainSet
from dist_vse.data.train_stream import train_batches
from dist_vse.runs.checkpoint import Progress


def build_train_batches(
    config: TrainConfig, sets: Sequence[TrainSet], tokenizer: Tokenizer, progress: Progress
) -> Iterator[Batch]:
    """Stream this rank's share of the global batches, from where `progress` stands."""
    return train_batches(
        sets,
        tokenizer,
        config.data,
        config.model.image,
        seed=config.seed,
        global_batch_size=config.global_batch_size,
        placement=Placement(distributed.rank(), distributed.world_size()),
        state=np.array(progress.streams, dtype=np.int64) if progress.streams else None,
    )
