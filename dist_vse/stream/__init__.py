"""From shards to batches: every sample once an epoch, in one order for any number of readers."""

from dist_vse.stream.evaluation import EvalBatch, captions, eval_batches, eval_share
from dist_vse.stream.lanes import TrainSet
from dist_vse.stream.samples import Batch, Skipped
from dist_vse.stream.train import train_batches

__all__ = [
    "Batch",
    "EvalBatch",
    "Skipped",
    "TrainSet",
    "captions",
    "eval_batches",
    "eval_share",
    "train_batches",
]
