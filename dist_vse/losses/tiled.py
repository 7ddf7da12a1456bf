"""The sweep over all tiles: once forward for a term's statistics, once more for its gradient.

b rows (images) on this rank, N columns (captions) on all ranks, d embedding.
"""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from dist_vse.losses.matmul import Products
from dist_vse.losses.positives import Positives
from dist_vse.losses.tiles import Tile, ranges, tile_shape
from dist_vse.losses.transport import Block, Transport


class Term(Protocol):
    """A part of a loss: a sum over rows and columns of what their candidates give."""

    own_pull: Tensor  # (b,) minus the gradient in the similarities of own pairs
    row_pull: Tensor  # (b,) and
    column_pull: Tensor  # (N,): their sum is the same for a pair of duplicates that are positives

    def see(self, tile: Tile) -> None:
        """Take a tile into the statistics."""

    def conclude(self) -> Tensor:
        """Join the ranks' statistics; return the sum of this rank's terms, and set the pulls."""

    def hardest(self) -> Tensor:
        """Return each row's largest similarity with a negative (b,); -inf without any."""


class Dense(Term, Protocol):
    """A term whose gradient touches every pair."""

    def prepare(self, tile: Tile) -> None:
        """Turn a tile of similarities, in place, into what `see` and `weigh` work on."""

    def weigh(self, tile: Tile) -> Tensor:
        """Return the gradient in the tile's similarities; may overwrite the tile."""


class Sparse(Term, Protocol):
    """A term whose gradient touches one pair a row and one a column."""

    def gradients(self, block: Block, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradient of a block's pairs in the rows (b, d) and its columns (c, d)."""


class Sweep:
    """Runs one or two terms over all pairs of this rank's rows with the global batch's columns.

    Own pairs are -inf in the tiles: what they give is a matter of b numbers, not of b x N.
    Duplicates are -inf as well, unless they are positives and the terms count those as
    candidates. Up to `budget` bytes of prepared tiles are kept from the forward sweep for the
    backward one.
    """

    def __init__(
        self,
        rows: Tensor,
        transport: Transport,
        positives: Positives,
        *,
        dense: Dense | None,
        sparse: Sparse | None,
        duplicates_are_candidates: bool,
        tile: int,
        budget: int,
        bf16: bool,
    ) -> None:
        self.rows = rows
        self.transport = transport
        self.positives = positives
        self.dense = dense
        self.sparse = sparse
        self.duplicates_are_candidates = duplicates_are_candidates
        self.height, self.width = tile_shape(tile, dense=dense is not None)
        self.budget = budget
        self.products = Products(rows, bf16=bf16)
        self.terms: list[Term] = [term for term in (dense, sparse) if term is not None]
        self._kept: dict[tuple[int, int], Tensor] = {}

    def forward(self, *, keep: bool) -> Tensor:
        """Return the sum of this rank's terms; `keep` tiles if a backward will follow."""
        self._see_all(self.budget if keep and self.dense is not None else 0)
        return torch.stack([term.conclude() for term in self.terms]).sum()

    def _see_all(self, room: int) -> None:
        """Show every tile to the terms; keep as many as fit in `room` bytes."""
        spare = self._spare()
        for block in self.transport.blocks():
            operand = self.products.operand(block.features)
            for rows, columns in self._places(block):
                tile = self._compute(rows, columns, operand, block, spare)
                for term in self.terms:
                    term.see(tile)
                if tile.values.nbytes <= room:
                    room -= tile.values.nbytes
                    self._kept[rows.start, columns.start] = tile.values
                del tile  # the next one may have its memory

    def backward(self) -> tuple[Tensor, Tensor]:
        """Return the gradient of the sum over all ranks in the rows and in own columns (b, d)."""
        row_grad = None

        def contribute(block: Block) -> Tensor:
            nonlocal row_grad
            of_rows, of_columns = self._gradients(block)
            row_grad = of_rows if row_grad is None else row_grad.add_(of_rows)
            return of_columns

        column_grad = self.transport.collect(contribute)
        assert row_grad is not None
        for term in self.terms:
            self.positives.add_own_gradient(term.own_pull, row_grad, column_grad)
        return row_grad, column_grad

    def _gradients(self, block: Block) -> tuple[Tensor, Tensor]:
        """Return the gradient of a block's pairs in the rows (b, d) and its columns (c, d)."""
        parts = []
        if self.dense is not None:
            parts.append(self._dense_gradients(self.dense, block))
        if self.sparse is not None:
            parts.append(self.sparse.gradients(block, self.rows))
        (row_grad, column_grad), *others = parts
        for of_rows, of_columns in others:
            row_grad += of_rows
            column_grad += of_columns
        for term in self.terms:
            self.positives.add_duplicates_gradient(
                block, term.row_pull, term.column_pull, row_grad, column_grad
            )
        return row_grad, column_grad

    def _dense_gradients(self, term: Dense, block: Block) -> tuple[Tensor, Tensor]:
        """Return a dense term's; a tile's columns' is summed up turned, in the memory it will fill.

        Kept tiles go as they are used up.
        """
        operand = self.products.operand(block.features)
        row_grad = torch.zeros_like(self.rows)
        column_grad = self.rows.new_zeros(block.features.shape)
        spare = self._spare()
        for rows in ranges(0, len(self.rows), self.height):
            turned = self.products.turned(rows)
            for columns in ranges(block.columns.start, block.columns.stop, self.width):
                kept = self._kept.pop((rows.start, columns.start), None)
                if kept is None:
                    tile = self._compute(rows, columns, operand, block, spare)
                else:
                    tile = self._tile(rows, columns, kept, spare)
                here = block.within(columns)
                self.products.add_gradients(
                    term.weigh(tile), turned, operand[here], row_grad[rows],
                    _turned(column_grad[here]),
                )  # fmt: skip
                del tile, kept
        for columns in ranges(0, len(column_grad), self.width):
            part = column_grad[columns]
            part.copy_(_turned(part).clone().T)
        return row_grad, column_grad

    def _compute(
        self, rows: slice, columns: slice, operand: Tensor, block: Block, spare: Tensor
    ) -> Tile:
        """Return a tile of what the terms work on."""
        here = block.within(columns)
        tile = self._tile(rows, columns, self.products.similarities(rows, operand[here]), spare)
        self._hide_own_entries(tile)
        if tile.duplicates is not None and not self.duplicates_are_candidates:
            tile.values[tile.duplicates] = float("-inf")
            tile.duplicates = None
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

    def _places(self, block: Block) -> Iterator[tuple[slice, slice]]:
        for columns in ranges(block.columns.start, block.columns.stop, self.width):
            for rows in ranges(0, len(self.rows), self.height):
                yield rows, columns

    def _spare(self) -> Tensor:
        """Return memory for the intermediate results of a dense term, as large as a tile."""
        height = min(self.height, len(self.rows)) if self.dense is not None else 0
        return self.rows.new_empty(height * min(self.width, self.positives.layout.total))

    def _tile(self, rows: slice, columns: slice, values: Tensor, spare: Tensor) -> Tile:
        duplicates = self.positives.duplicates
        return Tile(
            values,
            spare[: values.numel()].view(values.shape) if self.dense is not None else spare,
            rows,
            columns,
            duplicates.pairs(rows, columns) if duplicates is not None else None,
        )


def _turned(columns: Tensor) -> Tensor:
    """Return the memory of a tile's columns (c, d) as that of (d, c)."""
    return columns.view(columns.shape[1], columns.shape[0])
