"""A worker's streams: each reads its own samples in its own order, and skips the bad ones.

The caption and the crop of a sample are drawn from (seed, turn, sample), never from the worker or
the rank. So a stream yields the same samples wherever it is read.
"""

import struct
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from dist_vse.common.errors import UserError
from dist_vse.common.log import logger
from dist_vse.config import DataConfig
from dist_vse.data.choose_text import TextChoice
from dist_vse.data.decode import BadSampleError, Transform, decode_image
from dist_vse.data.index import Index, image_id, may_run_code, read_index
from dist_vse.data.order import EpochOrder, Order, Place
from dist_vse.data.prefetch import Prefetcher
from dist_vse.data.reader import ShardReader
from dist_vse.data.samples import Part, Skipped, Tokenizer

MAX_OPEN_SHARDS = 256  # a process may usually have 1,024 files open
READ_TOGETHER = 32  # samples read, then decoded together: code and data stay in the CPU's caches


@dataclass(frozen=True)
class TrainSet:
    """A data set to train on."""

    index: Index
    split: str
    weight: float = 1.0
    """How often an epoch holds each sample; 0.5 means every other epoch."""
    captions: int = 0
    """Captions of an image that are items of their own; 0 gives each image one a turn."""

    @property
    def num_samples(self) -> int:
        """Images in the split."""
        return self.index.split(self.split).num_samples

    @property
    def per_epoch(self) -> int:
        """Samples that an epoch takes from it: images, or their captions."""
        return max(1, round(self.weight * self.num_samples * (self.captions or 1)))

    def __str__(self) -> str:
        return f"{self.index.root}, split {self.split!r}"


def open_train_sets(data: DataConfig) -> list[TrainSet]:
    """Read the indexes of the data sets to train on.

    Raises UserError for a missing one, or one without the split.
    """
    sets = [
        TrainSet(
            read_index(s.index, allow_pipe=data.allow_pipe),
            s.split,
            s.weight,
            data.captions_per_image,
        )
        for s in data.train_sets()
    ]
    for a_set in sets:
        for shard in a_set.index.split(a_set.split).shards:
            if may_run_code(shard.path):
                logger.info("%s: shards are read by commands, such as %s", a_set, shard.path)
                break
    return sets


class _Sample(NamedTuple):
    """A sample before its image is decoded."""

    text: str
    text_id: int  # of the whole caption
    image_id: int
    origin: tuple[int, int]  # turn, sample number
    image: bytes  # the file's
    epoch: int
    place: Place
    negatives: tuple[str, ...] = ()


class _Bad(NamedTuple):
    """A sample that cannot be used."""

    reason: str
    epoch: int
    place: Place


class _Draws:
    """One random generator, seeded for each sample: a new one would take 5 % of a decoding."""

    def __init__(self, seed: int) -> None:
        self._seed = seed % 2**64
        self._bits = np.random.PCG64(0)
        self._state: Any = self._bits.state
        self._generator = np.random.Generator(self._bits)

    def of(self, turn: int, number: int, what: bytes = b"") -> np.random.Generator:
        """Return the generator of a sample in a turn, for one purpose, until the next call."""
        seed = struct.pack("<3Q", self._seed, turn, number) + what
        self._state["state"]["state"] = xxhash.xxh3_128_intdigest(seed)
        self._bits.state = self._state
        return self._generator


@dataclass(frozen=True)
class RankStreams:
    """The streams of one rank; called in a worker, it yields the parts of that worker's streams."""

    sets: Sequence[TrainSet]
    order: Order
    first: int  # this rank's first stream
    state: NDArray[np.int64]  # (L/W, 2): the positions of this rank's streams
    part_size: int  # samples that a stream gives to a batch
    transform: Transform
    tokenizer: Tokenizer
    buffers: torch.Tensor | None = None
    """Shared memory for batches of this rank, uint8 (number, b, h, w, 3), if there are workers."""
    texts: TextChoice = field(default_factory=TextChoice)
    read_images: bool = True  # if not, batches hold none: their features are precomputed

    def __call__(
        self, worker: int, num_workers: int
    ) -> Generator[tuple[Part, ...], int | None, None]:
        """Yield the parts of this worker's streams, batch by batch, for ever.

        The caller sends the number of the buffer for the next batch's images. Without one, the
        parts hold the images.
        """
        numbers = range(worker, len(self.state), num_workers)
        readers = self._readers(len(numbers))
        prefetcher = Prefetcher(readers)
        # Streams are in one epoch or two neighbouring ones; in more only with many bad samples.
        epochs = lru_cache(maxsize=4)(self.order.epoch)
        streams = [_Stream(self, readers, prefetcher, epochs, number) for number in numbers]
        buffer = None
        try:
            while True:
                outputs = self._outputs(buffer, numbers)
                parts = [stream.part(out) for stream, out in zip(streams, outputs, strict=True)]
                if buffer is not None:
                    parts = [replace(part, images=None) for part in parts]
                buffer = yield tuple(parts)
        finally:
            for reader in readers:
                reader.close()

    def _outputs(self, buffer: int | None, streams: range) -> Iterator[torch.Tensor]:
        """Yield the memory for each stream's images, uint8 (k, h, w, 3), or vectors (k, n)."""
        for stream in streams:
            if buffer is None or self.buffers is None:
                rows = self.transform.empty(self.part_size, without=not self.read_images)
                yield torch.from_numpy(rows)
            else:
                yield self.buffers[buffer, stream * self.part_size : (stream + 1) * self.part_size]

    def _readers(self, streams: int) -> list[ShardReader]:
        """Open nothing yet; shuffling reads from all the shards of a stream's block at once."""
        readers = []
        for a_set, source in zip(self.sets, self.order.sources, strict=True):
            in_block = self.order.block_size * source.per_epoch // self.order.per_epoch
            shards_per_block = 2 + in_block * len(source.shard_sizes) // source.num_items
            if self.order.shuffle_window == 0:
                shards_per_block = len(source.shard_sizes)
            limit = max(2, MAX_OPEN_SHARDS // len(self.sets))
            max_open = min(limit, streams * shards_per_block)
            readers.append(ShardReader(a_set.index, a_set.split, max_open=max_open))
        return readers


class _Stream:
    """One reading position."""

    def __init__(
        self,
        plan: RankStreams,
        readers: Sequence[ShardReader],
        prefetcher: Prefetcher,
        epochs: Callable[[int], EpochOrder],
        number: int,
    ) -> None:
        self._plan, self._readers, self._epochs = plan, readers, epochs
        self._prefetcher = prefetcher
        self._stream = plan.first + number
        self._epoch, self._position = plan.state[number].tolist()
        self._skipped: list[Skipped] = []
        self._bad_in_a_row = 0
        self._draws = _Draws(plan.order.seed)
        sizes = [source.num_samples for source in plan.order.sources]
        self._first = np.cumsum([0, *sizes[:-1]]).tolist()  # number of each set's first sample

    def part(self, images: torch.Tensor) -> Part:
        """Return this stream's share of the next batch; its pixels are written to `images`."""
        samples = self._good_samples(images.numpy())
        ids = np.array([(sample.image_id, sample.text_id) for sample in samples], np.int64)
        origin = np.array([sample.origin for sample in samples], np.int64)  # turn, sample number
        texts = [sample.text for sample in samples]
        negatives = [text for sample in samples for text in sample.negatives]
        tokens = self._plan.tokenizer([*texts, *negatives]).numpy()
        wanted = self._plan.texts.num_negatives > 0
        skipped, self._skipped = tuple(self._skipped), []
        return Part(
            images=images if images.ndim == 2 else images.permute(0, 3, 1, 2),
            tokens=tokens[: len(texts)],
            image_ids=ids[:, 0],
            text_ids=ids[:, 1],
            origin=origin,
            state=np.array([self._epoch, self._position]),
            skipped=skipped,
            negatives=tokens[len(texts) :] if wanted else None,
            negative_ids=np.array([image_id(text) for text in negatives], np.int64),
        )

    def _good_samples(self, out: NDArray[Any]) -> list[_Sample]:
        """Return the next samples that can be used; their pixels go to `out`."""
        good: list[_Sample] = []
        while len(good) < len(out):
            together = min(READ_TOGETHER, len(out) - len(good))
            for read in [self._read() for _ in range(together)]:
                sample = self._decode(read, out[len(good)]) if isinstance(read, _Sample) else read
                if isinstance(sample, _Sample):
                    good.append(sample)
                    self._bad_in_a_row = 0
                else:
                    self._skip(sample)
        return good

    def _read(self) -> _Sample | _Bad:
        """Read the next sample: its captions and the bytes of its image file."""
        epoch, place = self._advance()
        reader, (source, turn, shard, row, item) = self._readers[place.source], place
        items = self._plan.sets[source].captions
        try:
            meta = reader.meta(shard, row)
        except BadSampleError as error:
            return _Bad(str(error), epoch, place)
        # What is drawn for an image depends on the origin: it must differ between its captions.
        origin = turn * max(1, items) + item, self._first[source] + reader.number(shard, row)
        try:
            draws = partial(self._draws.of, *origin, b"text")
            which = item if items else None
            caption, text = self._plan.texts.choose(meta, turn, draws, which)
        except BadSampleError as error:
            return _Bad(str(error), epoch, place)
        image = reader.image(shard, row) if self._plan.read_images else b""
        number = reader.image_id(shard, row)
        false = self._plan.texts.negatives(meta, partial(self._draws.of, *origin, b"negatives"))
        return _Sample(text, image_id(caption), number, origin, image, epoch, place, false)

    def _decode(self, sample: _Sample, out: NDArray[Any]) -> _Sample | _Bad:
        """Decode the image into `out`."""
        if self._plan.read_images:
            rng = self._draws.of(*sample.origin)
            try:
                decode_image(sample.image, self._plan.transform, rng, out=out)
            except BadSampleError as error:
                return _Bad(str(error), sample.epoch, sample.place)
        return sample._replace(image=b"")  # its memory is free for the next one

    def _skip(self, bad: _Bad) -> None:
        """Record a bad sample.

        Raises UserError if a whole stream has only bad ones.
        """
        (_, _, shard, row, _), reader = bad.place, self._readers[bad.place.source]
        name = reader.shard_name(shard)
        self._skipped.append(Skipped(reader.key(shard, row), name, bad.reason, bad.epoch))
        self._bad_in_a_row += 1
        if self._bad_in_a_row >= self._epochs(bad.epoch).stream_length(self._stream):
            sets = "; ".join(str(a_set) for a_set in self._plan.sets)
            raise UserError(
                f"{sets}: {self._bad_in_a_row} samples in a row cannot be used (the last: "
                f"{self._skipped[-1]}); fix them and shard again"
            )

    def _advance(self) -> tuple[int, Place]:
        """Return the epoch and place of this position, and move to the next one."""
        while self._position >= self._epochs(self._epoch).stream_length(self._stream):
            self._epoch, self._position = self._epoch + 1, 0
        place = self._epochs(self._epoch).stream_sample(self._stream, self._position)
        if self._prefetcher.active:
            block = self._position // self._plan.order.block_size
            self._prefetcher.enter(self._stream, self._epochs, self._epoch, block)
        self._position += 1
        return self._epoch, place
