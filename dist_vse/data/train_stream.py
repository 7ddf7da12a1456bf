"""Endless training batches: the same global order for any number of ranks and workers."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import repeat

import numpy as np
from numpy.typing import NDArray

from dist_vse import distributed
from dist_vse.common import pinned
from dist_vse.common.errors import UserError
from dist_vse.config import DataConfig, ImageConfig
from dist_vse.data.choose_text import TextChoice
from dist_vse.data.decode import Transform
from dist_vse.data.order import Order, Source
from dist_vse.data.samples import ONE_PROCESS, Batch, Placement, Tokenizer, join_parts
from dist_vse.data.shared_buffers import BatchBuffers
from dist_vse.data.streams import RankStreams, TrainSet
from dist_vse.data.workers import run_workers

SAMPLES_AHEAD = 64


def train_batches(
    sets: Sequence[TrainSet],
    tokenizer: Tokenizer,
    data: DataConfig,
    image: ImageConfig,
    *,
    seed: int,
    global_batch_size: int,
    placement: Placement = ONE_PROCESS,
    state: NDArray[np.int64] | None = None,
) -> Iterator[Batch]:
    """Yield this rank's rows of one global batch after the other, for ever.

    Each of the L streams gives N/L samples to a batch, and rank r reads streams r L/W to (r+1) L/W:
    concatenated over the ranks, the batches are the same for every W that divides L and for any
    number of workers. An epoch holds each good sample once (or `weight` times, on average, where
    several sets are mixed); batches cross its end, stream by stream.
    `state` (L, 2) is all ranks' `Batch.state` in rank order, of any W: the stream goes on there.
    With `data.features` the batches' images have no pixels.

    Raises UserError: at once for too few samples or a state that does not fit; later for a
    missing shard, a stream without a single good sample, or too little shared memory.
    """
    streams, num_workers = data.num_streams, data.num_workers
    rank, world_size = placement
    assert global_batch_size % streams == 0, (global_batch_size, streams)
    assert streams % (world_size * max(1, num_workers)) == 0, (streams, world_size, num_workers)
    order = Order(tuple(map(_source, sets)), seed, streams, data.shuffle_window)
    where = "; ".join(map(str, sets))
    _check_samples(where, order.per_epoch, streams, global_batch_size)
    state = np.zeros((streams, 2), np.int64) if state is None else state
    _check_state(where, order, state)
    rank_streams = streams // world_size
    rows = global_batch_size // world_size
    # One batch is made while another waits; more if batches are small.
    prefetch = max(2, -(-SAMPLES_AHEAD * max(1, num_workers) // rows))
    plan = RankStreams(
        sets=sets,
        order=order,
        first=rank * rank_streams,
        state=state[rank * rank_streams : (rank + 1) * rank_streams],
        part_size=global_batch_size // streams,
        transform=_transform(data, image),
        tokenizer=tokenizer,
        texts=TextChoice(data.caption_weights, data.sentences_above, data.negatives),
        read_images=data.features is None,
    )
    return _batches(plan, rows, num_workers, prefetch)


def _transform(data: DataConfig, image: ImageConfig) -> Transform:
    if image.reads_vectors:
        return Transform(image.size, vector=True)
    return Transform(
        image.size,
        random_crop=data.crop == "random",
        min_crop_area=data.min_crop_area,
        flip=data.flip,
        color_jitter=data.color_jitter,
        scaled=True,
        squash=image.squash,
        crop_share=image.crop_share,
        resampling=image.resampling,
    )


def _source(a_set: TrainSet) -> Source:
    sizes = tuple(shard.num_samples for shard in a_set.index.split(a_set.split).shards)
    return Source(sizes, a_set.per_epoch, max(1, a_set.captions))


def _batches(plan: RankStreams, rows: int, num_workers: int, prefetch: int) -> Iterator[Batch]:
    buffers = None
    if num_workers and plan.read_images and not plan.transform.vector:
        # Besides those in flight, one batch is in use and one is still held. The buffers are
        # allocated with the first batch, where all ranks see if one has no memory for them.
        buffers = BatchBuffers(prefetch + 2, rows, plan.transform.size)
        if distributed.device().type == "cuda":
            pinned.register(buffers.images)
        plan = replace(plan, buffers=buffers.images)
    tasks = buffers.tasks(num_workers) if buffers else repeat(None)
    items = run_workers(plan, num_workers=num_workers, prefetch=prefetch, tasks=tasks)
    workers = max(1, num_workers)
    while True:
        of_workers = [next(items) for _ in range(workers)]
        # Workers take the streams in turn.
        parts = [
            of_workers[stream % workers][stream // workers] for stream in range(len(plan.state))
        ]
        yield join_parts(parts, buffers.take() if buffers else None, plan.tokenizer.pad_id)


def _check_samples(where: str, num_samples: int, streams: int, global_batch_size: int) -> None:
    for name, needed in (("data.num_streams", streams), ("global_batch_size", global_batch_size)):
        if num_samples < needed:
            raise UserError(
                f"{where}: an epoch has {num_samples} samples, fewer than {name} ({needed}); "
                f"lower {name}, or shard more samples"
            )


def _check_state(where: str, order: Order, state: NDArray[np.int64]) -> None:
    """Check that the positions are those of this data set and these streams."""
    if state.shape != (order.streams, 2):
        raise UserError(
            f"the checkpoint has {len(state)} streams, but data.num_streams is {order.streams}; "
            f"resume with data.num_streams={len(state)}"
        )
    for epoch in np.unique(state[:, 0]).tolist():
        epoch_order = order.epoch(epoch)
        for stream in np.flatnonzero(state[:, 0] == epoch).tolist():
            position, length = int(state[stream, 1]), epoch_order.stream_length(stream)
            if not 0 <= position <= length:
                raise UserError(
                    f"{where}: stream {stream} has {length} samples, but the checkpoint's stream "
                    f"stands at {position}; resume with the data set that the run began with"
                )
