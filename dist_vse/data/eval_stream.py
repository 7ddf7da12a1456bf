"""Every sample of a split once, with all of its captions, in the order of the index.

Shapes: b images, m captions (of all b images), l tokens, h = w pixels.
"""

from collections.abc import Generator, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dist_vse.common.errors import UserError
from dist_vse.config import ImageConfig
from dist_vse.data.decode import BadSampleError, Transform, decode_image
from dist_vse.data.index import Index
from dist_vse.data.prefetch import Prefetcher
from dist_vse.data.reader import ShardReader
from dist_vse.data.samples import ONE_PROCESS, Placement, Tokenizer
from dist_vse.data.workers import run_workers

BATCHES_AHEAD = 2


@dataclass(frozen=True)
class EvalBatch:
    """Some images with all of their captions."""

    images: Tensor
    """uint8 (b, 3, h, w), RGB; or float32 (b, n), stored vectors."""
    tokens: Tensor
    """int64 (m, l), padded to the longest row."""
    image_of_text: Tensor
    """int64 (m,): row of each caption's image in this batch."""
    image_ids: Tensor
    """int64 (b,): equal for equal image files."""
    keys: list[str]
    captions: list[str]


def eval_batches(
    index: Index,
    split: str,
    tokenizer: Tokenizer,
    image: ImageConfig,
    *,
    batch_size: int,
    placement: Placement = ONE_PROCESS,
    num_workers: int = 0,
    scaled: bool = False,
) -> Iterator[EvalBatch]:
    """Yield this rank's contiguous share of a split, `batch_size` images at a time.

    Over the ranks each sample comes exactly once, in the order of the index; images are cropped
    in the middle (`image.squash`: not cropped), and decoded in full, or as for training
    (`scaled`). A rank without a share yields nothing.

    Raises UserError for a sample that cannot be used: leaving it out would change the metrics.
    """
    start, stop = eval_share(index.split(split).num_samples, batch_size, placement)
    transform = Transform(
        image.size,
        scaled=scaled,
        squash=image.squash,
        crop_share=image.crop_share,
        resampling=image.resampling,
        vector=image.reads_vectors,
    )
    share = _Share(index, split, start, stop, batch_size, transform, tokenizer)
    return run_workers(share, num_workers=num_workers, prefetch=BATCHES_AHEAD)


def eval_share(num_samples: int, batch_size: int, placement: Placement) -> tuple[int, int]:
    """Return the first sample of a rank's share, and the one after its last."""
    # Shares of whole batches: a batch holds the same rows for any number of ranks, so its features
    # are the same to the last bit.
    num_batches = -(-num_samples // batch_size)
    rank, world_size = placement
    start, stop = (
        min(num_samples, num_batches * r // world_size * batch_size) for r in (rank, rank + 1)
    )
    return start, stop


def captions(index: Index, split: str, *, negatives: bool = False) -> Iterator[str]:
    """Yield all captions of a split in the order of the index, reading no image.

    With `negatives`, a sample's own follow its captions. Samples with broken metadata or no caption
    are skipped, as in training.
    """
    reader = ShardReader(index, split, max_open=1)
    try:
        for shard, entry in enumerate(index.split(split).shards):
            for row in range(entry.num_samples):
                try:
                    meta = reader.meta(shard, row)
                    yield from meta.captions
                    yield from meta.negatives if negatives else ()
                except BadSampleError:
                    continue  # training counts and names it
    finally:
        reader.close()


@dataclass(frozen=True)
class _Share:
    """Samples [start, stop) of a split; worker w of n makes the batches w, w + n, ..."""

    index: Index
    split: str
    start: int
    stop: int
    batch_size: int
    transform: Transform
    tokenizer: Tokenizer

    def __call__(self, worker: int, num_workers: int) -> Generator[EvalBatch, None, None]:
        reader = ShardReader(self.index, self.split, max_open=2)
        prefetcher = Prefetcher([reader])
        step = self.batch_size * num_workers
        present, last = -1, reader.place(self.stop - 1)[0]
        try:
            for start in range(self.start + worker * self.batch_size, self.stop, step):
                shard, _ = reader.place(start)
                if prefetcher.active and present < shard < last:
                    prefetcher.want(0, shard + 1)
                present = shard
                yield self._batch(reader, range(start, min(start + self.batch_size, self.stop)))
        finally:
            reader.close()

    def _batch(self, reader: ShardReader, numbers: range) -> EvalBatch:
        images, image_ids, image_of_text = [], [], []
        keys: list[str] = []
        captions: list[str] = []
        for image_row, number in enumerate(numbers):
            shard, row = reader.place(number)
            try:
                meta = reader.meta(shard, row)
                images.append(decode_image(reader.image(shard, row), self.transform))
            except BadSampleError as error:
                name = f"{reader.key(shard, row)} in {reader.shard_name(shard)}"
                raise UserError(
                    f"{name} cannot be evaluated ({error}); fix it, or leave it out by running "
                    "`dist-vse shard` with --max-bad"
                ) from error
            keys.append(meta.key)
            captions += meta.captions
            image_ids.append(reader.image_id(shard, row))
            image_of_text += [image_row] * len(meta.captions)
        return EvalBatch(
            images=torch.from_numpy(np.stack(images)),
            tokens=self.tokenizer(captions),
            image_of_text=torch.tensor(image_of_text),
            image_ids=torch.tensor(image_ids),
            keys=keys,
            captions=captions,
        )
