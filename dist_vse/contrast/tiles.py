"""Similarities a tile at a time: what a tile is.

b rows (images) on this rank, N columns (captions) on all ranks.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

CPU_TILE = 1024  # a tile (4 MiB) stays in the cores' shared cache; fewer small passes
CUDA_TILE = 4096  # large enough to fill the device with every product and every pass
EXACT = 40.0  # from here on softplus(z) is z, even to a float64


def default_tile(device: torch.device) -> int:
    """Return the side of a tile that suits the device."""
    return CPU_TILE if device.type == "cpu" else CUDA_TILE


def ranges(start: int, stop: int, step: int) -> Iterator[slice]:
    """Cut [start, stop) into slices of at most `step`."""
    for first in range(start, stop, step):
        yield slice(first, min(first + step, stop))


@dataclass
class Tile:
    """Some of this rank's rows times some columns of the global batch."""

    values: Tensor  # (rows, columns): similarities, or what a term made of them
    spare: Tensor  # as large, for intermediate results
    rows: slice
    columns: slice
    twins: tuple[Tensor, Tensor] | None  # indices of twins that are candidates, if any are here

    def negative_maxima(self, value: float) -> Tensor:
        """Return each row's maximum (rows,), with `value` in place of twins."""
        if self.twins is None:
            return self.values.amax(1)
        negatives = self.values.clone()
        negatives[self.twins] = value
        return negatives.amax(1)
