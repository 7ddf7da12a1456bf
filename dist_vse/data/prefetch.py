"""Copies the remote shards that will be read next while the current ones are read."""

import queue
import threading
from collections.abc import Callable, Sequence

from dist_vse.common.errors import UserError
from dist_vse.data.order import EpochOrder
from dist_vse.data.reader import ShardReader


class Prefetcher:
    """One thread of a worker, started at the first use; it ends with the process."""

    def __init__(self, readers: Sequence[ShardReader]) -> None:
        """Start nothing yet; `active` is true if any shard is remote."""
        self.active = any(reader.is_remote for reader in readers)
        self._readers = readers
        self._at: dict[int, tuple[int, int]] = {}  # stream -> its epoch and block
        self._wanted: queue.SimpleQueue[tuple[int, int]] | None = None

    def enter(
        self, stream: int, epochs: Callable[[int], EpochOrder], epoch: int, block: int
    ) -> None:
        """Record that a stream reads this block; if it is a new one, copy the next one's shards."""
        if self._at.get(stream) == (epoch, block):
            return
        self._at[stream] = epoch, block
        order = epochs(epoch)
        following = order.block_shards(stream, block + 1) or epochs(epoch + 1).block_shards(
            stream, 0
        )
        for source, shard in order.block_shards(stream, block) + following:
            self.want(source, shard)

    def want(self, source: int, shard: int) -> None:
        """Queue a shard to be copied."""
        if self._wanted is None:
            self._wanted = queue.SimpleQueue()
            threading.Thread(target=self._copy, args=(self._wanted,), daemon=True).start()
        self._wanted.put((source, shard))

    def _copy(self, wanted: "queue.SimpleQueue[tuple[int, int]]") -> None:
        while True:
            source, shard = wanted.get()
            try:
                self._readers[source].prefetch(shard)
            except UserError:
                continue  # raised when the shard is read, if it still can't be copied then
