"""The pairs that belong together: their similarities, and what they give to the gradient.

A row's positive is its own pair, or the mean over its own pair and its duplicates where those
count as positives; so too a column's. b rows on this rank, N on all.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from dist_vse import distributed
from dist_vse.losses.layout import DuplicatePairs, Layout
from dist_vse.losses.near_pairs import NearPairs
from dist_vse.losses.negatives import Negatives
from dist_vse.losses.tiles import ranges
from dist_vse.losses.transport import Block, Transport

CHUNK = 1024  # pairs (times d numbers) looked at together


class OwnPairs(NamedTuple):
    """This rank's own pairs: their similarities (b,), and scalars of the features' lengths."""

    similarities: Tensor
    longest_row: Tensor  # 0 without rows
    longest_column: Tensor
    row_squares: Tensor  # the sum of the squared lengths
    column_squares: Tensor

    @staticmethod
    def of(rows: Tensor, columns: Tensor, texts: Tensor) -> "OwnPairs":
        """Look at features (b, d) and (b, d), and those of all texts of this rank (b + m, d)."""
        norms = [torch.linalg.vector_norm(x, dim=1) for x in (rows, texts)]
        longest = [torch.cat([x, x.new_zeros(1)]).amax() for x in norms]
        squares = [x[: len(rows)].square().sum() for x in norms]
        return OwnPairs(torch.linalg.vecdot(rows, columns), *longest, *squares)


class Positives:
    """Mean similarities of the positives of this rank's rows and columns."""

    def __init__(
        self,
        rows: Tensor,
        columns: Tensor,
        own: OwnPairs,
        layout: Layout,
        duplicates: DuplicatePairs | None,
        *,
        average_duplicates: bool,
        negatives: Negatives | None = None,
        near: NearPairs | None = None,
    ) -> None:
        self.negatives = negatives
        self.near = near
        self._rows, self._columns = rows, columns  # (b, d) each
        self.layout = layout
        self.duplicates = duplicates
        self.own = own
        self.rows = self.own_columns = own.similarities  # (b,) means
        self.average_duplicates = average_duplicates and duplicates is not None and bool(duplicates)
        # What each of a row's (column's) positives weighs in its mean: (b,) and (N,).
        self.column_share = self.rows.new_ones(()).expand(layout.total)
        if self.average_duplicates and duplicates is not None:
            self.column_share = duplicates.shares(self.rows.dtype)
        self.row_share = self.column_share[layout.own]

    def include_duplicates(self, transport: Transport) -> None:
        """Take the duplicates into the means: a pass over the blocks, over duplicates alone."""
        if not self.average_duplicates:
            return
        rows = self.own.similarities.clone()
        columns = rows.new_zeros(self.layout.total)
        columns[self.layout.own] = rows
        for block in transport.blocks():
            for i, j in self._pairs(block):
                similarity = (self._rows[i] * block.features[j - block.columns.start]).sum(1)
                rows.index_add_(0, i, similarity)
                columns.index_add_(0, j, similarity)
        self.rows = rows * self.row_share
        columns = distributed.all_reduce_sum(columns) * self.column_share
        self.own_columns = columns[self.layout.own]

    @property
    def num_columns(self) -> int:
        """Captions, and negatives behind them (N + M)."""
        return self.layout.total + (0 if self.negatives is None else self.negatives.total)

    def with_negatives(self, values: Tensor, fill: float) -> Tensor:
        """Return values of the captions (N,), and `fill` for each negative: (N + M,)."""
        if self.negatives is None:
            return values
        return pad(values, (0, self.negatives.total), value=fill)

    def columns(self) -> Tensor:
        """Gather the means of all columns (N,)."""
        return self.layout.gather(self.own_columns)

    def add_own_gradient(self, weight: Tensor, row_grad: Tensor, column_grad: Tensor) -> None:
        """Add what own pairs weigh (b,) to the gradients of rows and own columns."""
        row_grad.addcmul_(self._columns, weight.unsqueeze(1), value=-1)
        column_grad.addcmul_(self._rows, weight.unsqueeze(1), value=-1)

    def add_duplicates_gradient(
        self,
        block: Block,
        row_weight: Tensor,
        column_weight: Tensor,
        row_grad: Tensor,
        column_grad: Tensor,
    ) -> None:
        """Add what duplicates weigh, (b,) and (N,), to the gradients of rows and columns."""
        if not self.average_duplicates:
            return
        for i, j in self._pairs(block):
            grad = -(row_weight[i] + column_weight[j]).unsqueeze(1)
            local = j - block.columns.start
            row_grad.index_add_(0, i, block.features[local] * grad)
            column_grad.index_add_(0, local, self._rows[i] * grad)

    def _pairs(self, block: Block) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the duplicates among a block's columns: rows here, columns of the global batch."""
        assert self.duplicates is not None
        for columns in ranges(block.columns.start, block.columns.stop, CHUNK):
            for rows in ranges(0, len(self._rows), CHUNK):
                pairs = self.duplicates.pairs(rows, columns)
                if pairs is not None:
                    for i, j in zip(*(index.split(CHUNK) for index in pairs), strict=True):
                        yield i + rows.start, j + columns.start
