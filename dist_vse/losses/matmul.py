"""The matrix products of the losses over the global batch, in the precision that is asked for.

b rows (images) on this rank, d embedding.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# The product that torch.compile uses on CPUs, if this torch was built with oneDNN. In float32
# torch.mm is MKL's, which is slower on AMD's processors.
_onednn: Callable[..., Any] | None = (
    getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if torch.backends.mkldnn.is_available()
    else None
)


class Products:
    """The products of a rank's rows with columns, in the rows' own precision or in bfloat16.

    In bfloat16 the factors are rounded and the sums are float32. CUDA returns them as they are;
    a CPU has no such product, there the result is rounded to bfloat16 as well.
    """

    def __init__(self, rows: Tensor, *, bf16: bool) -> None:
        self.bf16 = bf16
        self.rows = self.operand(rows)  # (b, d)
        self.precision = rows.dtype

    def operand(self, features: Tensor) -> Tensor:
        """Return features in the precision of the products, and without gaps, which oneDNN's
        take a hundred times as long with."""
        return (features.bfloat16() if self.bf16 else features).contiguous()

    def similarities(self, rows: slice, columns: Tensor) -> Tensor:
        """Return the similarities (rows, c) of rows with columns (c, d)."""
        return _inner(self.rows[rows], columns).to(self.precision)

    def turned(self, rows: slice) -> Tensor:
        """Return rows of this rank the other way round (d, rows)."""
        return self.rows[rows].T.contiguous()

    def add_gradients(
        self,
        weights: Tensor,
        turned: Tensor,
        columns: Tensor,
        row_grad: Tensor,
        turned_grad: Tensor,
    ) -> None:
        """Add what a tile's weights (rows, c) make of its `turned` rows (d, rows) and its columns
        (c, d) to the gradients of its rows (rows, d) and, `turned`, of its columns (d, c).

        Turned, because oneDNN is fast with rows of weights, not with their columns.
        """
        weights = self.operand(weights)
        _add_inner(row_grad, weights, columns.T)
        _add_inner(turned_grad, turned, weights.T)


def _inner(left: Tensor, right: Tensor) -> Tensor:
    """Return left (n, k) times right.T (k, m)."""
    if left.dtype == torch.bfloat16 and left.device.type == "cuda":
        return torch.mm(left, right.T, out_dtype=torch.float32)
    if _is_onednns(left):
        product: Tensor = _onednn(left, right, None, "none", [], "")  # type: ignore[misc]
        return product
    return left @ right.T


def _add_inner(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left (n, k) times right.T (k, m) to `total` (n, m)."""
    if left.dtype != total.dtype or _is_onednns(left):
        total += _inner(left, right)
    else:
        total.addmm_(left, right.T)


def _is_onednns(left: Tensor) -> bool:
    return _onednn is not None and left.device.type == "cpu" and left.dtype == torch.float32
