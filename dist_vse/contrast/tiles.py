"""Similarities a tile at a time: what a tile is, and its matrix products.

b rows (images) on this rank, N columns (captions) on all ranks, d embedding.
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


class Products:
    """The matrix products of tiles, in the rows' own precision or in bfloat16.

    In bfloat16 the factors are rounded and the sums are float32. CUDA returns them as they are;
    a CPU has no such product, there the result is rounded to bfloat16 as well.
    """

    def __init__(self, rows: Tensor, *, bf16: bool) -> None:
        self.bf16 = bf16
        self.rows = self.operand(rows)  # (b, d)

    def operand(self, features: Tensor) -> Tensor:
        """Return features in the precision of the products."""
        return features.bfloat16() if self.bf16 else features

    def similarities(self, rows: slice, columns: Tensor, out: Tensor) -> None:
        """Write the similarities of rows with columns (c, d) to `out` (rows, c)."""
        if self.bf16:
            out.copy_(_bf16_product(self.rows[rows], columns.T))
        else:
            torch.mm(self.rows[rows], columns.T, out=out)

    def add_gradients(
        self, weights: Tensor, rows: slice, columns: Tensor, row_grad: Tensor, column_grad: Tensor
    ) -> None:
        """Add a tile's gradient (rows, c) to those of its rows (b, d) and its columns (c, d)."""
        if self.bf16:
            weights = weights.bfloat16()
            row_grad[rows] += _bf16_product(weights, columns)
            column_grad += _bf16_product(weights.T, self.rows[rows])
        else:
            row_grad[rows].addmm_(weights, columns)
            column_grad.addmm_(weights.T, self.rows[rows])


def _bf16_product(left: Tensor, right: Tensor) -> Tensor:
    if left.device.type == "cuda":
        return torch.mm(left, right, out_dtype=torch.float32)
    return left @ right
