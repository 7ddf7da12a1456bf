"""The batches that a run is evaluated on."""

from collections.abc import Iterator

from dist_vse import distributed
from dist_vse.config import TrainConfig
from dist_vse.data.eval_stream import EvalBatch, eval_batches
from dist_vse.data.index import Index
from dist_vse.data.samples import Placement, Tokenizer

EVAL_SAMPLES_A_WORKER = 1000  # starting a process takes as long as decoding about so many


def build_eval_batches(
    config: TrainConfig, index: Index, tokenizer: Tokenizer, split: str
) -> Iterator[EvalBatch]:
    """Stream this rank's share of a split, each image once with all of its captions."""
    share = index.split(split).num_samples // distributed.world_size()
    return eval_batches(
        index,
        split,
        tokenizer,
        config.model.image,
        batch_size=config.fixed_chunk_size,
        placement=Placement(distributed.rank(), distributed.world_size()),
        num_workers=min(config.data.num_workers, share // EVAL_SAMPLES_A_WORKER),
    )
