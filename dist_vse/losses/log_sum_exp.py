"""Log-sum-exps of rows and columns over tiles, with a running maximum; to base 2.

b rows on this rank, N columns on all, and M negatives.
"""

import torch
from torch import Tensor

from dist_vse import distributed
from dist_vse.losses.positives import Positives
from dist_vse.losses.tiles import Tile

LOW = -1e30  # no logit is as low, and 2^(LOW - LOW) is 1


class RunningSums:
    """The log-sum-exps (to base 2) of each row's and each column's tiles."""

    def __init__(self, positives: Positives) -> None:
        self.row_max = torch.full_like(positives.rows, LOW)
        self.row_sums = torch.zeros_like(self.row_max)
        self.column_max = self.row_max.new_full((positives.num_columns,), LOW)
        self.column_sums = torch.zeros_like(self.column_max)
        self.largest = torch.full_like(self.row_max, float("-inf"))  # negatives of each row

    def accumulate(self, tile: Tile) -> None:
        """Take a tile in."""
        _add_powers(self.row_max[tile.rows], self.row_sums[tile.rows], tile, 1)
        _add_powers(self.column_max[tile.columns], self.column_sums[tile.columns], tile, 0)
        largest = self.largest[tile.rows]
        torch.maximum(largest, tile.negative_maxima(float("-inf")), out=largest)

    def join(self) -> tuple[Tensor, Tensor]:
        """Join the ranks' columns; return the log-sum-exps of rows (b,) and columns (N + M,)."""
        largest = distributed.all_reduce_max(self.column_max.clone())
        self.column_sums *= (self.column_max - largest).exp2()
        distributed.all_reduce_sum(self.column_sums)
        row_logs = self.row_sums.log2_().add_(self.row_max)
        return row_logs, self.column_sums.log2_().add_(largest)


def normalized_powers(tile: Tile, row_logs: Tensor, column_logs: Tensor) -> Tensor:
    """Return 2^(z - row) + 2^(z - column) of a tile's logits z; overwrites the tile."""
    torch.sub(tile.values, column_logs[tile.columns], out=tile.workspace)
    tile.values.sub_(row_logs[tile.rows].unsqueeze(1)).exp2_()
    return tile.values.add_(tile.workspace.exp2_())


def _add_powers(maximum: Tensor, sums: Tensor, tile: Tile, dim: int) -> None:
    """Update running maxima and sums of powers, in place, along a tile's dimension."""
    raised = torch.maximum(maximum, tile.values.amax(dim))
    torch.sub(tile.values, raised.unsqueeze(dim), out=tile.workspace)
    sums.mul_((maximum - raised).exp2_()).add_(tile.workspace.exp2_().sum(dim))
    maximum.copy_(raised)
