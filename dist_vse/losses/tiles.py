"""Similarities a tile at a time: what a tile is.

b rows (images) on this rank, N columns (captions) on all ranks.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

CPU_TILE = 1024  # tiles stay in the cores' shared cache
_CUDA_SHARE = 1 / 16  # of the device's memory, for a tile and its workspace
_CUDA_TILES = 1024, 16384  # larger ones are no faster
EXACT = 40.0  # from here on softplus(z) is z, even to a float64


def default_tile(device: torch.device) -> int:
    """Return the size of tiles that suits the device: a GPU's memory sets it, not its caches."""
    if device.type == "cpu":
        return CPU_TILE
    return cuda_tile(torch.cuda.get_device_properties(device).total_memory)


def cuda_tile(memory: int) -> int:
    """Return the size of tiles for a GPU of so many bytes."""
    height, width = tile_shape(1024, dense=True)
    fits = math.isqrt(int(_CUDA_SHARE * memory / (2 * 4 * height * width)))  # in multiples of 1024
    smallest, largest = _CUDA_TILES
    return min(largest, max(smallest, 1024 * fits))


def tile_shape(size: int, *, dense: bool) -> tuple[int, int]:
    """Return the largest height and width of the tiles of some size.

    The width of the default size is no power of two: so a column's entries do not all meet in the
    same lines of a cache. Without a dense term there are no intermediate results,
    and it may be twice as tall.
    """
    return (2 if dense else 4) * size, max(1, 3 * size // 4)


def ranges(start: int, stop: int, step: int) -> Iterator[slice]:
    """Cut [start, stop) into slices of at most `step`."""
    for first in range(start, stop, step):
        yield slice(first, min(first + step, stop))


@dataclass
class Tile:
    """Some of this rank's rows times some columns of the global batch."""

    values: Tensor  # (rows, columns): similarities, or what a term made of them
    workspace: Tensor  # as large, for intermediate results
    rows: slice
    columns: slice
    duplicates: (
        tuple[Tensor, Tensor] | None
    )  # indices of duplicates that are candidates, if any are here

    def negative_maxima(self, value: float) -> Tensor:
        """Return each row's maximum (rows,), with `value` in place of duplicates."""
        if self.duplicates is None:
            return self.values.amax(1)
        negatives = self.values.clone()
        negatives[self.duplicates] = value
        return negatives.amax(1)
