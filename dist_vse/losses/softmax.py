"""Softmax over the candidates of each row and each column: ConVSE and InfoNCE.

A row's term is the log-sum-exp of its candidates' logits less its positive's logit; so too a
column's. Rows are whole on their rank; columns are joined over the ranks by one all-reduce.

Logits, and terms, are in bits (to base 2): a power of 2 costs less than half of one of e.
"""

import torch
from torch import Tensor
from torch.nn.functional import softplus

from dist_vse import distributed
from dist_vse.losses.log_sum_exp import RunningSums, normalized_powers
from dist_vse.losses.positives import Positives
from dist_vse.losses.registry import LN2
from dist_vse.losses.tiled import TermInputs, TermResult, Terms
from dist_vse.losses.tiles import EXACT, Tile

SAFE = 86.0  # 2^86 times any number of columns is within float32's range


def softmax_terms(inputs: TermInputs) -> Terms:
    """Return the softmax in the cheaper of two ways that is exact for these similarities."""
    shift = shared_shift(inputs.largest, inputs.smallest_own)
    if shift is None:
        return Terms(dense=RunningSoftmax(inputs.positives))
    return Terms(dense=SharedSoftmax(inputs.positives, shift))


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
        self.column_sums = self.row_sums.new_zeros(positives.num_columns)
        self.largest = torch.zeros_like(self.row_sums)

    def prepare(self, tile: Tile) -> None:
        if self.shift:
            tile.values.sub_(self.shift)
        tile.values.exp2_()

    def accumulate(self, tile: Tile) -> None:
        self.row_sums[tile.rows] += tile.values.sum(1)
        self.column_sums[tile.columns] += tile.values.sum(0)
        largest = self.largest[tile.rows]
        torch.maximum(largest, tile.negative_maxima(0.0), out=largest)

    def finalize(self) -> TermResult:
        layout, own = self.positives.layout, self.positives.own.similarities
        column_sums = distributed.all_reduce_sum(self.column_sums[: layout.total])
        result = _result(
            self.positives,
            self.row_sums.log2() + self.shift,
            column_sums[layout.own].log2() + self.shift,
        )
        # What a power weighs in the gradient, in the memory of the sums.
        self.row_weights = self.row_sums.add_((own - self.shift).exp2_()).reciprocal_()
        own_powers = (layout.gather(own) - self.shift).exp2_()
        column_weights = column_sums.add_(own_powers).reciprocal_()
        self.column_weights = self.positives.with_negatives(column_weights, 0)
        return result

    def grad_logits(self, tile: Tile) -> Tensor:
        rows, columns = self.row_weights[tile.rows], self.column_weights[tile.columns]
        torch.add(rows.unsqueeze(1), columns, out=tile.workspace)
        return tile.values.mul_(tile.workspace)

    def hardest(self) -> Tensor:
        return self.largest.log2() + self.shift


class RunningSoftmax:
    """A running maximum for every row and every column: for very low temperatures."""

    def __init__(self, positives: Positives) -> None:
        self.positives = positives
        self.sums = RunningSums(positives)

    def prepare(self, tile: Tile) -> None:
        """The logits themselves are what it works on."""

    def accumulate(self, tile: Tile) -> None:
        self.sums.accumulate(tile)

    def finalize(self) -> TermResult:
        layout, own = self.positives.layout, self.positives.own.similarities
        row_logs, column_logs = self.sums.join()
        column_logs = column_logs[: layout.total]
        result = _result(self.positives, row_logs, column_logs[layout.own])
        # The log-sum-exps with the own pair: what grad_logits normalizes by.
        self.row_logs = torch.logaddexp2(row_logs, own)
        column_logs = torch.logaddexp2(column_logs, layout.gather(own))
        self.column_logs = self.positives.with_negatives(column_logs, torch.inf)
        return result

    def grad_logits(self, tile: Tile) -> Tensor:
        return normalized_powers(tile, self.row_logs, self.column_logs)

    def hardest(self) -> Tensor:
        return self.sums.largest


def _result(positives: Positives, rows: Tensor, columns: Tensor) -> TermResult:
    """Return the sum of the terms of rows and own columns, and the weights of positives.

    `rows` and `columns` (b,) are log-sum-exps without the own pair. Kept apart, it costs no
    digits where the softmax is nearly certain: both results are then as small as they should be.
    """
    own = positives.own.similarities
    total, own_weight = own.new_zeros(()), torch.zeros_like(own)
    for others, mean in ((rows, positives.rows), (columns, positives.own_columns)):
        gap = (others - own) * LN2
        total = total + (softplus(gap, threshold=EXACT) / LN2 + (own - mean)).sum()
        own_weight += gap.sigmoid() + (positives.row_share - 1)
    return TermResult(total, own_weight, positives.row_share, positives.column_share)
