"""The matrix products of the losses over the global batch, in the precision that is asked for.

b rows (images) on this rank, c columns (captions) of a block, d embedding.
"""

import torch
from torch import Tensor

from dist_vse.common import cpu


class Matmul:
    """The products of a rank's rows with columns, in the rows' own precision or in bfloat16.

    In bfloat16 the factors are rounded and the sums are float32. CUDA returns them as they are;
    a CPU has no such product, there the result is rounded to bfloat16 as well.
    """

    def __init__(self, rows: Tensor, *, bf16: bool) -> None:
        self.bf16 = bf16
        self.features = rows  # (b, d)
        self.rows = self.operand(rows)  # as products take them
        self.precision = rows.dtype

    def operand(self, features: Tensor) -> Tensor:
        """Return features in the precision of the products, contiguous."""
        return (features.bfloat16() if self.bf16 else features).contiguous()

    def similarities(self, rows: slice, columns: Tensor) -> Tensor:
        """Return the similarities (rows, c) of rows with columns (c, d)."""
        return _inner(self.rows[rows], columns).to(self.precision)

    def gradient_sums(self, columns: Tensor, *, strip: int) -> "GradientSums":
        """Return empty sums for a block's columns (c, d), which are an operand.

        They are added in strips of at most so many columns, always the same ones.
        """
        return GradientSums(self, columns, strip)


class GradientSums:
    """The gradients of all rows (b, d) and a block's columns (c, d), summed up tile by tile."""

    def __init__(self, matmul: Matmul, columns: Tensor, strip: int) -> None:
        self._matmul, self._columns, self._strip = matmul, columns, strip
        self._row_grad = torch.zeros_like(matmul.rows, dtype=matmul.precision)
        # A strip's memory holds its gradient transposed (d, strip) until the end: products are
        # faster with rows of weights than with their columns.
        self._column_grad = torch.zeros_like(columns, dtype=matmul.precision)
        self._transposed_rows: tuple[slice, Tensor] = (slice(0, 0), matmul.rows[:0])

    def add(self, rows: slice, columns: slice, grad: Tensor) -> None:
        """Add what a tile's gradient in the similarities (rows, strip) makes of its features."""
        grad = self._matmul.operand(grad)
        _add_inner(self._row_grad[rows], grad, self._columns[columns].T)
        if rows != self._transposed_rows[0]:
            self._transposed_rows = rows, self._matmul.rows[rows].T.contiguous()
        _add_inner(_transposed(self._column_grad[columns]), self._transposed_rows[1], grad.T)

    def finish(self) -> tuple[Tensor, Tensor]:
        """Return the gradients of rows (b, d) and columns (c, d)."""
        for part in self._column_grad.split(self._strip):
            part.copy_(_transposed(part).clone().T)
        return self._row_grad, self._column_grad


def _transposed(columns: Tensor) -> Tensor:
    """Return the memory of columns (c, d) as that of (d, c)."""
    return columns.view(columns.shape[1], columns.shape[0])


def _inner(left: Tensor, right: Tensor) -> Tensor:
    """Return left (n, k) times right.T (k, m)."""
    if left.dtype == torch.bfloat16 and left.device.type == "cuda":
        return torch.mm(left, right.T, out_dtype=torch.float32)
    if cpu.has_inner_product(left):
        return cpu.inner_product(left, right)
    return left @ right.T


def _add_inner(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left (n, k) times right.T (k, m) to `total` (n, m)."""
    if left.dtype != total.dtype or cpu.has_inner_product(left):
        total += _inner(left, right)
    else:
        total.addmm_(left, right.T)
