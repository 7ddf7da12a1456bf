"""Captions' features that travel while the next chunk is encoded.

b rows on this rank, N on all ranks, W ranks, d embedding, c rows of a chunk.
"""

import torch
from torch import Tensor

from dist_vse import distributed


class PrefetchedGather:
    """What a loss would gather, gathered a chunk at a time before the loss is called.

    Every rank sends equally many rows, in bfloat16 if `bf16`. Nothing is sent where nothing would
    be gathered: for a ring, and in one process.
    """

    def __init__(self, transport: str, *, bf16: bool) -> None:
        self.bf16 = bf16
        self.rows = 0  # sent, or that would have been
        self._gathers = transport == "gather" and distributed.world_size() > 1
        self._pending: list[distributed.AsyncAllGather] = []

    def send(self, text_features: Tensor) -> None:
        """Start to gather a chunk's features (c, d); chunks come in the order of their rows."""
        self.rows += len(text_features)
        if self._gathers:
            features = text_features.detach()
            rows = features.bfloat16() if self.bf16 else features
            self._pending.append(distributed.AsyncAllGather(rows))

    def take(self) -> Tensor | None:
        """Wait for all that was sent and return it in the order of ranks (N, d), if any was."""
        parts = [gathering.wait() for gathering in self._pending]  # (W, c, d) each
        self._pending.clear()
        self.rows = 0
        return torch.cat(parts, 1).flatten(0, 1) if parts else None
