"""Softmax over the candidates of each row and each column: ConVSE and InfoNCE.

A row's term is the log-sum-exp of its candidates' logits less its positive's logit; so too a
column's. Rows are whole on their rank; columns are joined over the ranks by one all-reduce.

Logits, and terms, are in bits (to base 2): a power of 2 costs less than half of one of e.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus

from dist_vse import distributed
from dist_vse.losses.positives import Positives
from dist_vse.losses.tiles import EXACT, Tile

SAFE = 86.0  # 2^86 times any number of columns is within float32's range
LN2 = math.log(2)
LOW = -1e30  # no logit is as low, and 2^(LOW - LOW) is 1


def shared_shift(largest: float, smallest_own: float) -> float | None:
    """Return a shift with which one power of 2 serves both the row and the column.

    `largest` bounds all logits. A softmax's sum holds at least its own pair's power, so it neither
    overflows nor vanishes if shifted logits are at most SAFE and those of own pairs at least
    -SAFE; None if no shift does that.
    """
    shift = max(0.0, largest - SAFE)
    return shift if smallest_own - shift >= -SAFE else None


class SharedSoftmax:
    """One power of 2 a pair, less a shift that all pairs share."""

    def __init__(self, positives: Positives, shift: float) -> None:
        self.positives = positives
        self.shift = shift
        self.row_sums = torch.zeros_like(positives.rows)
        self.column_sums = self.row_sums.new_zeros(positives.layout.total)
        self.largest = torch.zeros_like(self.row_sums)
        self.own_pull, self.row_pull = self.row_sums, positives.row_share
        self.column_pull = positives.column_share

    def prepare(self, tile: Tile) -> None:
        if self.shift:
            tile.values.sub_(self.shift)
        tile.values.exp2_()

    def see(self, tile: Tile) -> None:
        self.row_sums[tile.rows] += tile.values.sum(1)
        self.column_sums[tile.columns] += tile.values.sum(0)
        largest = self.largest[tile.rows]
        torch.maximum(largest, tile.negative_maxima(0.0), out=largest)

    def conclude(self) -> Tensor:
        layout, own = self.positives.layout, self.positives.own.similarities
        distributed.all_reduce_sum(self.column_sums)
        total, self.own_pull = _terms(
            self.positives,
            self.row_sums.log2() + self.shift,
            self.column_sums[layout.own].log2() + self.shift,
        )
        # From here on these are what a power weighs in the gradient.
        self.row_sums.add_((own - self.shift).exp2_()).reciprocal_()
        self.column_sums.add_((layout.gather(own) - self.shift).exp2_()).reciprocal_()
        return total

    def weigh(self, tile: Tile) -> Tensor:
        rows, columns = self.row_sums[tile.rows], self.column_sums[tile.columns]
        torch.add(rows.unsqueeze(1), columns, out=tile.spare)
        return tile.values.mul_(tile.spare)

    def hardest(self) -> Tensor:
        return self.largest.log2() + self.shift


class RunningSoftmax:
    """A running maximum for every row and every column: for very low temperatures."""

    def __init__(self, positives: Positives) -> None:
        self.positives = positives
        self.row_max = torch.full_like(positives.rows, LOW)
        self.row_sums = torch.zeros_like(self.row_max)
        self.column_max = self.row_max.new_full((positives.layout.total,), LOW)
        self.column_sums = torch.zeros_like(self.column_max)
        self.largest = torch.full_like(self.row_max, float("-inf"))
        self.own_pull, self.row_pull = self.row_sums, positives.row_share
        self.column_pull = positives.column_share

    def prepare(self, tile: Tile) -> None:
        """The logits themselves are what it works on."""

    def see(self, tile: Tile) -> None:
        _add_powers(self.row_max[tile.rows], self.row_sums[tile.rows], tile, 1)
        _add_powers(self.column_max[tile.columns], self.column_sums[tile.columns], tile, 0)
        largest = self.largest[tile.rows]
        torch.maximum(largest, tile.negative_maxima(float("-inf")), out=largest)

    def conclude(self) -> Tensor:
        layout, own = self.positives.layout, self.positives.own.similarities
        largest = distributed.all_reduce_max(self.column_max.clone())
        self.column_sums *= (self.column_max - largest).exp2()
        distributed.all_reduce_sum(self.column_sums)
        # From here on these are the logarithms of the sums.
        self.row_sums.log2_().add_(self.row_max)
        self.column_sums.log2_().add_(largest)
        total, self.own_pull = _terms(self.positives, self.row_sums, self.column_sums[layout.own])
        self.row_sums = torch.logaddexp2(self.row_sums, own)
        self.column_sums = torch.logaddexp2(self.column_sums, layout.gather(own))
        return total

    def weigh(self, tile: Tile) -> Tensor:
        torch.sub(tile.values, self.column_sums[tile.columns], out=tile.spare)
        tile.values.sub_(self.row_sums[tile.rows].unsqueeze(1)).exp2_()
        return tile.values.add_(tile.spare.exp2_())

    def hardest(self) -> Tensor:
        return self.largest


def _terms(positives: Positives, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of the terms of rows and own columns, and the pull of own pairs (b,).

    `rows` and `columns` (b,) are log-sum-exps without the own pair. Kept apart, it costs no
    digits where the softmax is nearly certain: both results are then as small as they should be.
    """
    own = positives.own.similarities
    total, pull = own.new_zeros(()), torch.zeros_like(own)
    for others, mean in ((rows, positives.rows), (columns, positives.own_columns)):
        gap = (others - own) * LN2
        total = total + (softplus(gap, threshold=EXACT) / LN2 + (own - mean)).sum()
        pull += gap.sigmoid() + (positives.row_share - 1)
    return total, pull


def _add_powers(maximum: Tensor, sums: Tensor, tile: Tile, dim: int) -> None:
    """Update running maxima and sums of powers, in place, along a tile's dimension."""
    raised = torch.maximum(maximum, tile.values.amax(dim))
    torch.sub(tile.values, raised.unsqueeze(dim), out=tile.spare)
    sums.mul_((maximum - raised).exp2_()).add_(tile.spare.exp2_().sum(dim))
    maximum.copy_(raised)
