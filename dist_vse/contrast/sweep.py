"""The sweep over all tiles: once forward for a term's statistics, once more for its gradient.

b rows (images) on this rank, N columns (captions) on all ranks, d embedding.
"""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from dist_vse.contrast.positives import Positives
from dist_vse.contrast.tiles import Products, Tile, ranges
from dist_vse.contrast.transport import Block, Transport


class Term(Protocol):
    """A part of a loss: a sum over rows and columns of what their candidates give."""

    own_pull: Tensor  # (b,) minus the gradient in the similarities of own pairs
    row_pull: Tensor  # (b,) and
    column_pull: Tensor  # (N,): their sum is the same for a pair of twins that are positives

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

    def add_gradient(
        self, block: Block, rows: Tensor, row_grad: Tensor, column_grad: Tensor
    ) -> None:
        """Add the gradient of a block's pairs to those of the rows and of the block's columns."""


class Sweep:
    """Runs one or two terms over all pairs of this rank's rows with the global batch's columns.

    Own pairs are -inf in the tiles: what they give is a matter of b numbers, not of b x N. Twins
    are -inf as well, unless they are positives and the terms count those as candidates. Up to
    `budget` bytes of prepared tiles are kept from the forward sweep for the backward one.
    """

    def __init__(
        self,
        rows: Tensor,
        transport: Transport,
        positives: Positives,
        *,
        dense: Dense | None,
        sparse: Sparse | None,
        twins_are_candidates: bool,
        tile: int,
        budget: int,
        bf16: bool,
    ) -> None:
        self.rows = rows
        self.transport = transport
        self.positives = positives
        self.dense = dense
        self.sparse = sparse
        self.twins_are_candidates = twins_are_candidates
        self.side = tile
        # Without a dense term there are no intermediate results: their memory is the tile's.
        self.height = tile if dense is not None else 2 * tile
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
        values, spare = self._buffers()
        for block in self.transport.blocks():
            operand = self.products.operand(block.features)
            for rows, columns in self._places(block):
                shape = _shape(rows, columns)
                size = shape.numel() * values.element_size()
                fits = size <= room
                tile = self._tile(rows, columns, values.new_empty(shape) if fits else values, spare)
                self._compute(tile, operand, block)
                for term in self.terms:
                    term.see(tile)
                if fits:
                    room -= size
                    self._kept[rows.start, columns.start] = tile.values

    def backward(self) -> tuple[Tensor, Tensor]:
        """Return the gradient of the sum over all ranks in the rows and in own columns (b, d)."""
        row_grad = torch.zeros_like(self.rows)

        def contribute(block: Block, column_grad: Tensor) -> None:
            if self.dense is not None:
                self._add_dense(self.dense, block, row_grad, column_grad)
            if self.sparse is not None:
                self.sparse.add_gradient(block, self.rows, row_grad, column_grad)
            for term in self.terms:
                self.positives.add_twins_gradient(
                    block, term.row_pull, term.column_pull, row_grad, column_grad
                )

        column_grad = self.transport.collect(contribute)
        for term in self.terms:
            self.positives.add_own_gradient(term.own_pull, row_grad, column_grad)
        return row_grad, column_grad

    def _add_dense(self, term: Dense, block: Block, row_grad: Tensor, column_grad: Tensor) -> None:
        operand = self.products.operand(block.features)
        buffer, spare = self._buffers()
        for rows, columns in self._places(block):
            kept = self._kept.pop((rows.start, columns.start), None)
            tile = self._tile(rows, columns, buffer if kept is None else kept, spare)
            if kept is None:
                self._compute(tile, operand, block)
            here = slice(columns.start - block.columns.start, columns.stop - block.columns.start)
            self.products.add_gradients(
                term.weigh(tile), rows, operand[here], row_grad, column_grad[here]
            )

    def _compute(self, tile: Tile, operand: Tensor, block: Block) -> None:
        """Fill a tile with what the terms work on."""
        start = block.columns.start
        here = slice(tile.columns.start - start, tile.columns.stop - start)
        self.products.similarities(tile.rows, operand[here], tile.values)
        self._hide_own_entries(tile)
        if tile.twins is not None and not self.twins_are_candidates:
            tile.values[tile.twins] = float("-inf")
            tile.twins = None
        if self.dense is not None:
            self.dense.prepare(tile)

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
        for columns in ranges(block.columns.start, block.columns.stop, self.side):
            for rows in ranges(0, len(self.rows), self.height):
                yield rows, columns

    def _buffers(self) -> tuple[Tensor, Tensor]:
        """Return memory for a tile, and for the intermediate results of a dense term."""
        height = min(self.height, len(self.rows))
        width = min(self.side, self.positives.layout.total)
        spare = height if self.dense is not None else 0
        return self.rows.new_empty(height, width), self.rows.new_empty(spare, width)

    def _tile(self, rows: slice, columns: slice, values: Tensor, spare: Tensor) -> Tile:
        shape = _shape(rows, columns)
        twins = self.positives.twins
        return Tile(
            _fit(values, shape),
            _fit(spare, shape) if self.dense is not None else spare,
            rows,
            columns,
            twins.pairs(rows, columns) if twins is not None else None,
        )


def _shape(rows: slice, columns: slice) -> torch.Size:
    return torch.Size((rows.stop - rows.start, columns.stop - columns.start))


def _fit(buffer: Tensor, shape: torch.Size) -> Tensor:
    """Return a tensor of a shape in the buffer's memory."""
    return buffer if buffer.shape == shape else buffer.view(-1)[: shape.numel()].view(shape)
