"""Decoupled contrastive learning: InfoNCE without the positive in the denominator.

https://arxiv.org/abs/2110.06848. With z the logits, a row's term is the log-sum-exp of its
negatives' logits less its positive's logit; so too a column's. A row (or column) without a
negative gives nothing. b rows on this rank, N columns on all.
"""

import torch
from torch import Tensor

from dist_vse.losses.log_sum_exp import RunningSums, normalized_powers
from dist_vse.losses.positives import Positives
from dist_vse.losses.tiled import TermInputs, TermResult, Terms
from dist_vse.losses.tiles import Tile


def decoupled_terms(inputs: TermInputs) -> Terms:
    """Return the decoupled softmax."""
    return Terms(dense=Decoupled(inputs.positives))


class Decoupled:
    """A log-sum-exp of the negatives alone, with a running maximum.

    Without the positive in the sum, a shift common to all rows could make it underflow; so each
    row and each column has its own maximum.
    """

    def __init__(self, positives: Positives) -> None:
        self.positives = positives
        self.sums = RunningSums(positives)

    def prepare(self, tile: Tile) -> None:
        """The logits themselves are what it works on."""

    def accumulate(self, tile: Tile) -> None:
        self.sums.accumulate(tile)

    def finalize(self) -> TermResult:
        layout, own = self.positives.layout, self.positives.layout.own
        row_logs, column_logs = self.sums.join()
        column_logs = column_logs[: layout.total]
        has_rows, has_columns = row_logs != -torch.inf, column_logs != -torch.inf
        row_losses = row_logs - self.positives.rows
        column_losses = column_logs[own] - self.positives.own_columns
        total = row_losses.masked_fill(~has_rows, 0).sum()
        total += column_losses.masked_fill(~has_columns[own], 0).sum()
        # Nothing is normalized by the sum of no powers: 2^(z - inf) is 0.
        self.row_logs = row_logs.masked_fill(~has_rows, torch.inf)
        column_logs = column_logs.masked_fill(~has_columns, torch.inf)
        self.column_logs = self.positives.with_negatives(column_logs, torch.inf)
        row_weight = self.positives.row_share * has_rows
        column_weight = self.positives.column_share * has_columns
        return TermResult(total, row_weight + column_weight[own], row_weight, column_weight)

    def grad_logits(self, tile: Tile) -> Tensor:
        return normalized_powers(tile, self.row_logs, self.column_logs)

    def hardest(self) -> Tensor:
        return self.sums.largest
