"""A worker's lanes: each reads its own samples in its own order, and skips the bad ones.

Which caption and which crop a sample gets is drawn from (seed, epoch, sample), never from the
worker or the rank; so a lane yields the same wherever it is read.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from dist_vse.errors import UserError
from dist_vse.index import Index, image_id
from dist_vse.stream.decode import BadSampleError, Transform, decode_image
from dist_vse.stream.order import EpochOrder, Order
from dist_vse.stream.reader import ShardReader
from dist_vse.stream.samples import Part, Skipped, Tokenizer

MAX_OPEN_SHARDS = 256  # a process may have 1,024 files open, as a rule


@dataclass(frozen=True)
class _Sample:
    image: NDArray[np.uint8]  # (3, h, w)
    caption: str
    image_id: int
    origin: tuple[int, int]  # epoch, sample number


@dataclass(frozen=True)
class Lanes:
    """The lanes of one rank; called in a worker, it yields the parts of that worker's lanes."""

    index: Index
    split: str
    order: Order
    first: int  # this rank's first lane
    state: NDArray[np.int64]  # (L/W, 2): where this rank's lanes stand
    part_size: int  # samples that a lane gives to a batch
    transform: Transform
    tokenizer: Tokenizer

    def __call__(self, worker: int, num_workers: int) -> Iterator[Part]:
        """Yield parts for ever: lane by lane, batch by batch."""
        numbers = range(worker, len(self.state), num_workers)
        # Shuffling reads from all the shards of a lane's block at once.
        sizes = self.order.shard_sizes
        shards_a_block = 2 + self.order.shuffle_window * len(sizes) // sum(sizes)
        reader = ShardReader(
            self.index, self.split, max_open=min(MAX_OPEN_SHARDS, len(numbers) * shards_a_block)
        )
        # Lanes stand in one epoch or on both sides of its end; more only with many bad samples.
        epochs = lru_cache(maxsize=4)(self.order.epoch)
        lanes = [_Lane(self, reader, epochs, number) for number in numbers]
        try:
            while True:
                for lane in lanes:
                    yield lane.part()
        finally:
            reader.close()


class _Lane:
    """One reading position."""

    def __init__(
        self, plan: Lanes, reader: ShardReader, epochs: Callable[[int], EpochOrder], number: int
    ) -> None:
        self._plan, self._reader, self._epochs = plan, reader, epochs
        self._lane = plan.first + number
        self._epoch, self._position = plan.state[number].tolist()
        self._skipped: list[Skipped] = []

    def part(self) -> Part:
        """Read on, and return this lane's share of the next batch."""
        size, pixels = self._plan.part_size, self._plan.transform.size
        images = torch.empty((size, 3, pixels, pixels), dtype=torch.uint8)
        ids = np.empty((size, 2), np.int64)  # of image and caption
        origin = np.empty((size, 2), np.int64)  # epoch, sample number
        captions = []
        for row in range(size):
            sample = self._next_good()
            images[row] = torch.from_numpy(sample.image)
            ids[row] = sample.image_id, image_id(sample.caption)
            origin[row] = sample.origin
            captions.append(sample.caption)
        skipped, self._skipped = tuple(self._skipped), []
        return Part(
            images=images,
            tokens=self._plan.tokenizer(captions).numpy(),
            image_ids=ids[:, 0],
            text_ids=ids[:, 1],
            origin=origin,
            state=np.array([self._epoch, self._position]),
            skipped=skipped,
        )

    def _next_good(self) -> _Sample:
        length = self._epochs(self._epoch).lane_length(self._lane)
        for _ in range(length):
            epoch, shard, row = self._advance()
            try:
                return self._load(epoch, shard, row)
            except BadSampleError as error:
                key, name = self._reader.key(shard, row), self._reader.shard_name(shard)
                self._skipped.append(Skipped(key, name, str(error)))
        raise UserError(
            f"{self._plan.index.root}: {length} samples of split {self._plan.split!r} in a row "
            f"cannot be used (the last: {self._skipped[-1]}); mend them and shard again"
        )

    def _advance(self) -> tuple[int, int, int]:
        """Return the (epoch, shard, row) at this position, and step to the next one."""
        while self._position >= self._epochs(self._epoch).lane_length(self._lane):
            self._epoch, self._position = self._epoch + 1, 0
        shard, row = self._epochs(self._epoch).lane_sample(self._lane, self._position)
        self._position += 1
        return self._epoch, shard, row

    def _load(self, epoch: int, shard: int, row: int) -> _Sample:
        meta = self._reader.meta(shard, row)
        number = self._reader.number(shard, row)
        turn = epoch + image_id(meta.key)  # samples start at different captions
        rng = np.random.default_rng((self._plan.order.seed % 2**64, epoch, 3, number))
        return _Sample(
            image=decode_image(self._reader.image(shard, row), self._plan.transform, rng),
            caption=meta.captions[turn % len(meta.captions)],
            image_id=self._reader.image_id(shard, row),
            origin=(epoch, number),
        )
