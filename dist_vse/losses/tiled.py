"""The tiled pass: all similarities of this rank's images, a tile at a time, never all at once.

Forward, each tile goes into a term's statistics. Backward, each tile is computed again (or was
kept) and its gradient goes into the features. b rows (images) on this rank, N columns (captions)
on all ranks, d embedding; behind the captions M negatives, m of this rank, if there are any.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dist_vse.losses.matmul import Matmul
from dist_vse.losses.positives import Positives
from dist_vse.losses.tiles import Tile, ranges, tile_shape
from dist_vse.losses.transport import Block, Transport


class TermInputs(NamedTuple):
    """What a loss may make its terms of."""

    positives: Positives
    largest: float  # no |similarity| of the global batch is larger
    smallest_own: float  # of all own pairs
    bias: Tensor  # (1,)
    margin: float
    hard_negative_weight: float


class TermResult(NamedTuple):
    """What a term found: its sum, and the weight of each positive in it.

    A weight is minus the gradient in the positive's similarity: own_weight[i] that of own pair i,
    row_weight[i] + column_weight[j] that of a duplicate (i, j) that counts as positive.
    """

    total: Tensor
    own_weight: Tensor  # (b,)
    row_weight: Tensor  # (b,)
    column_weight: Tensor  # (N,)


class Term(Protocol):
    """A part of a loss: a sum over rows and columns of what their candidates give."""

    def accumulate(self, tile: Tile) -> None:
        """Take a tile into the statistics."""

    def finalize(self) -> TermResult:
        """Join the ranks' statistics; return this rank's part."""

    def hardest(self) -> Tensor:
        """Return each row's largest similarity with a negative (b,); -inf without any."""


class Dense(Term, Protocol):
    """A term whose gradient touches every pair."""

    def prepare(self, tile: Tile) -> None:
        """Turn a tile of similarities, in place, into what the term works on."""

    def grad_logits(self, tile: Tile) -> Tensor:
        """Return the gradient in a prepared tile's similarities; may overwrite the tile."""


class Sparse(Term, Protocol):
    """A term whose gradient touches one pair a row and one a column."""

    def gradients(self, block: Block, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradient of a block's pairs in the rows (b, d) and its columns (c, d)."""


class Terms(NamedTuple):
    """The terms of a loss: one of a kind, or one of each."""

    dense: Dense | None = None
    sparse: Sparse | None = None
    take_bias_grad: Callable[[], Tensor] | None = None
    """Returns this rank's gradient in a learned bias (1,), after a backward pass."""


class Kernels(Protocol):
    """Does for a block of columns, without tiles in memory, what is done tile by tile."""

    def accumulate(self, block: Block) -> None:
        """Take a block into the terms' statistics."""

    def dense_gradients(self, block: Block) -> tuple[Tensor, Tensor]:
        """Return the dense term's gradient in the rows (b, d) and the block's columns (c, d)."""


class TiledLoss:
    """Runs a loss's terms over all pairs of this rank's rows with the global batch's columns.

    Own pairs are -inf in the tiles: what they give is a matter of b numbers, not of b x N.
    Duplicates are -inf as well, unless they are `candidates`. Up to `budget` bytes of prepared
    tiles are kept from forward to backward. With `kernels` no tile is made.
    """

    def __init__(
        self,
        matmul: Matmul,
        transport: Transport,
        positives: Positives,
        terms: Terms,
        kernels: Kernels | None,
        *,
        candidates: bool,
        tile: int,
        budget: int,
    ) -> None:
        self.matmul = matmul
        self.rows = matmul.features  # (b, d)
        self.transport = transport
        self.positives = positives
        self.dense, self.sparse, self._take_bias_grad = terms
        self.terms: list[Term] = [x for x in (self.dense, self.sparse) if x is not None]
        self.kernels = kernels
        self.candidates = candidates
        self.height, self.width = tile_shape(tile, dense=self.dense is not None)
        self.budget = budget
        self._results: list[TermResult] = []
        self._kept: dict[tuple[int, int], Tensor] = {}

    def forward(self, *, keep: bool) -> Tensor:
        """Return the sum of this rank's terms; `keep` tiles if a backward will follow."""
        self._accumulate(self.budget if keep and self.dense is not None else 0)
        self._results = [term.finalize() for term in self.terms]
        return torch.stack([result.total for result in self._results]).sum()

    def _accumulate(self, budget: int) -> None:
        """Take every tile into the terms' statistics; keep as many as fit in `budget` bytes."""
        if self.kernels is not None:
            for block in self.transport.blocks():
                self.kernels.accumulate(block)
            return
        workspace = self._workspace()
        for block in self.transport.blocks():
            operand = self.matmul.operand(block.features)
            for rows, columns in self._tiles(block):
                tile = self._compute(rows, columns, operand, block, workspace)
                for term in self.terms:
                    term.accumulate(tile)
                if tile.values.nbytes <= budget:
                    budget -= tile.values.nbytes
                    self._kept[rows.start, columns.start] = tile.values
                del tile  # the next one may have its memory

    def backward(self) -> tuple[Tensor, Tensor]:
        """Return the gradient of the sum over all ranks in the rows and in own columns.

        These are (b, d), and (b, d) or, with negatives, (b + m, d).
        """
        row_grad = None

        def contribute(block: Block) -> Tensor:
            nonlocal row_grad
            of_rows, of_columns = self._gradients(block)
            row_grad = of_rows if row_grad is None else row_grad.add_(of_rows)
            return of_columns

        column_grad = self.transport.collect(contribute)
        assert row_grad is not None
        for result in self._results:
            of_captions = column_grad[: len(row_grad)]
            self.positives.add_own_gradient(result.own_weight, row_grad, of_captions)
        return row_grad, column_grad

    def take_bias_grad(self) -> Tensor | None:
        """Return this rank's gradient in the bias (1,) after `backward`, if the loss has one."""
        return None if self._take_bias_grad is None else self._take_bias_grad()

    def _gradients(self, block: Block) -> tuple[Tensor, Tensor]:
        """Return the gradient of a block's pairs in the rows (b, d) and its columns (c, d)."""
        parts = []
        if self.dense is not None and self.kernels is not None:
            parts.append(self.kernels.dense_gradients(block))
        elif self.dense is not None:
            parts.append(self._dense_gradients(self.dense, block))
        if self.sparse is not None:
            parts.append(self.sparse.gradients(block, self.rows))
        (row_grad, column_grad), *others = parts
        for of_rows, of_columns in others:
            row_grad += of_rows
            column_grad += of_columns
        for result in self._results:
            self.positives.add_duplicates_gradient(
                block, result.row_weight, result.column_weight, row_grad, column_grad
            )
        return row_grad, column_grad

    def _dense_gradients(self, term: Dense, block: Block) -> tuple[Tensor, Tensor]:
        """Return a dense term's; kept tiles go as they are used up."""
        operand = self.matmul.operand(block.features)
        sums = self.matmul.gradient_sums(operand, strip=self.width)
        workspace = self._workspace()
        for rows in ranges(0, len(self.rows), self.height):
            for columns in ranges(block.columns.start, block.columns.stop, self.width):
                kept = self._kept.pop((rows.start, columns.start), None)
                if kept is None:
                    tile = self._compute(rows, columns, operand, block, workspace)
                else:
                    tile = self._tile(rows, columns, kept, workspace)
                sums.add(rows, block.within(columns), term.grad_logits(tile))
                del tile, kept
        return sums.finish()

    def _compute(
        self, rows: slice, columns: slice, operand: Tensor, block: Block, workspace: Tensor
    ) -> Tile:
        """Return a tile of what the terms work on."""
        values = self.matmul.similarities(rows, operand[block.within(columns)])
        tile = self._tile(rows, columns, values, workspace)
        self._hide_own_entries(tile)
        self._hide_true_negatives(tile)
        if tile.duplicates is not None and not self.candidates:
            tile.values[tile.duplicates] = float("-inf")
            tile.duplicates = None
        if self.positives.near is not None:
            self.positives.near.hide(tile, block)
        if self.dense is not None:
            self.dense.prepare(tile)
        return tile

    def _hide_own_entries(self, tile: Tile) -> None:
        """Make the similarities of own pairs -inf; most tiles have none."""
        offset = self.positives.layout.own.start
        first = max(tile.rows.start, tile.columns.start - offset)
        last = min(tile.rows.stop, tile.columns.stop - offset)
        if first < last:
            entries = tile.values[first - tile.rows.start : last - tile.rows.start]
            shift = offset - tile.columns.start
            entries[:, first + shift : last + shift].diagonal().fill_(float("-inf"))

    def _hide_true_negatives(self, tile: Tile) -> None:
        """Make the similarities of rows with negatives that are their own caption -inf."""
        if self.positives.negatives is not None:
            pairs = self.positives.negatives.true_pairs(tile.rows, tile.columns)
            if pairs is not None:
                tile.values[pairs] = float("-inf")

    def _tiles(self, block: Block) -> Iterator[tuple[slice, slice]]:
        for columns in ranges(block.columns.start, block.columns.stop, self.width):
            for rows in ranges(0, len(self.rows), self.height):
                yield rows, columns

    def _workspace(self) -> Tensor:
        """Return memory for the intermediate results of a dense term, as large as a tile."""
        height = min(self.height, len(self.rows)) if self.dense is not None else 0
        return self.rows.new_empty(height * min(self.width, self.positives.num_columns))

    def _tile(self, rows: slice, columns: slice, values: Tensor, workspace: Tensor) -> Tile:
        duplicates = self.positives.duplicates
        return Tile(
            values,
            workspace[: values.numel()].view(values.shape) if self.dense is not None else workspace,
            rows,
            columns,
            duplicates.pairs(rows, columns) if duplicates is not None else None,
        )
