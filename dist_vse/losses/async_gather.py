"""Captions' features that travel while the next chunk is encoded.

b rows on this rank, N on all ranks, W ranks, d embedding, c rows of a chunk.
"""

import torch
from torch import Tensor

from dist_vse import distributed


class Ahead:
    """What a loss would gather, gathered a chunk at a time before the loss is called.

    Every rank sends equally many rows, in bfloat16 if `rounded`. A ring gathers nothing and one
    process needs nothing: then nothing is sent.
    """

    def __init__(self, transport: str, *, rounded: bool = False) -> None:
        self.rounded = rounded
        self._wanted = transport == "gather" and distributed.world_size() > 1
        self._under_way: list[distributed.AsyncAllGather] = []

    def send(self, text_features: Tensor) -> None:
        """Start to gather a chunk's features (c, d); chunks come in the order of their rows."""
        if self._wanted:
            features = text_features.detach()
            self._under_way.append(
                distributed.AsyncAllGather(features.bfloat16() if self.rounded else features)
            )

    def take(self) -> Tensor | None:
        """Wait for all that was sent and return it in the order of ranks (N, d), if any was."""
        parts = [gathering.wait() for gathering in self._under_way]  # (W, c, d) each
        self._under_way.clear()
        return torch.cat(parts, 1).flatten(0, 1) if parts else None
