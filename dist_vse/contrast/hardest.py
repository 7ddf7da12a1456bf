"""The hardest negative of each row and each column: ConVSE++ and VSE++ (max hinge).

One product for the maxima; the gradient is sparse, each active row or column moves two features.
https://arxiv.org/abs/2110.08872, https://arxiv.org/abs/1707.05612

Maxima come first, places after: the sweep over the tiles notes only which block of entries has a
row's (column's) maximum, and that block alone is computed again for the place.

Among equals the lowest index of the global batch is the hardest. Similarities closer than a few
roundings are equal: the same two features give other last bits in another place of a product, and
the choice must not depend on tiles or ranks.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dist_vse import distributed
from dist_vse.contrast.positives import Positives
from dist_vse.contrast.tiles import Products, Tile, ranges
from dist_vse.contrast.transport import Block

ROUNDINGS = 16
BLOCKS = 16  # along the side of a tile
SEARCHED = 8192  # rows (columns) whose places are found together
CHUNK = 1024  # features moved together


class Hardest:
    """The hinge of the hardest negative, times `weight`; `bound` is the largest |similarity|."""

    def __init__(
        self, positives: Positives, margin: float, *, weight: float, bound: float, tile: int
    ) -> None:
        self.positives = positives
        self.layout = positives.layout
        self.margin = margin
        self.weight = weight
        self.block = max(1, tile // BLOCKS)
        tolerance = ROUNDINGS * torch.finfo(positives.rows.dtype).eps * bound
        self.rows = _Best(len(positives.rows), positives.rows, tolerance)
        self.columns = _Best(self.layout.total, positives.rows, tolerance)
        self.own_pull, self.row_pull, self.column_pull = (positives.rows,) * 3

    def see(self, tile: Tile) -> None:
        rows = slice(*(self.layout.own.start + end for end in (tile.rows.start, tile.rows.stop)))
        by_row, by_column = (_block_maxima(tile.values, dim, self.block) for dim in (1, 0))
        self.rows.update(by_row, tile.rows, self._starts(tile.columns))
        self.columns.update(by_column.T, tile.columns, self._starts(rows))

    def _starts(self, part: slice) -> Tensor:
        """Return where the blocks of a part of the global batch begin."""
        places = self.rows.places
        return torch.arange(
            part.start, part.stop, self.block, dtype=places.dtype, device=places.device
        )

    def conclude(self) -> Tensor:
        self.columns.join()
        row_hinges = self.margin + self.rows.values - self.positives.rows
        column_hinges = self.margin + self.columns.values - self.positives.columns()
        self.row_pull = (row_hinges > 0) * self.positives.row_share * self.weight
        self.column_pull = (column_hinges > 0) * self.positives.column_share * self.weight
        self.own_pull = self.row_pull + self.column_pull[self.layout.own]
        total = row_hinges.clamp(min=0).sum() + column_hinges[self.layout.own].clamp(min=0).sum()
        return total * self.weight

    def add_gradient(
        self,
        block: Block,
        rows: Tensor,
        products: Products,
        row_grad: Tensor,
        column_grad: Tensor,
    ) -> None:
        own, tolerance = self.layout.own, self.rows.tolerance
        here = _Side(
            rows, row_grad, own.start, self.rows.values - tolerance, self.rows.places, self.row_pull
        )
        columns = block.columns
        there = _Side(
            block.features,
            column_grad,
            columns.start,
            self.columns.values[columns] - tolerance,
            self.columns.places[columns],
            self.column_pull[columns],
        )
        self._push(here, there, products)
        self._push(there, here, products)

    def hardest(self) -> Tensor:
        return self.rows.values

    def _push(self, these: "_Side", those: "_Side", products: Products) -> None:
        """Add the gradient of these features' hardest negatives, as far as they are those."""
        first, last = those.start, those.start + len(those.features)
        for part in ranges(0, len(these.features), SEARCHED):
            places = these.places[part]
            chosen = (places >= first) & (places < last) & (these.pull[part] > 0)
            indices = chosen.nonzero().view(-1)
            for start, i in _groups(places[indices], indices + part.start):
                block = slice(start, min(start + self.block, last))
                local = slice(block.start - first, block.stop - first)
                left, right = these.features.index_select(0, i), those.features[local]
                similarities = products.between(left, right)
                self._hide_no_negatives(similarities, i, these, block)
                j = _first(similarities, these.thresholds[i])
                these.grad.index_add_(0, i, right.index_select(0, j), alpha=self.weight)
                those.grad[local].index_add_(0, j, left, alpha=self.weight)

    def _hide_no_negatives(
        self, similarities: Tensor, i: Tensor, these: "_Side", block: slice
    ) -> None:
        """Make what is no negative -inf in the similarities of rows i with a block."""
        twins = self.positives.twins
        apart = block.stop <= these.start or block.start >= these.start + len(these.features)
        if apart and not twins:
            return
        columns = torch.arange(block.start, block.stop, device=i.device)
        if twins:
            hidden = twins.related(i + these.start, columns)
        else:
            hidden = (i + these.start).unsqueeze(1) == columns
        similarities.masked_fill_(hidden, float("-inf"))


class _Side(NamedTuple):
    """Features that lie together in the global batch, from `start` on, and what they look for."""

    features: Tensor  # (n, d)
    grad: Tensor  # (n, d)
    start: int
    thresholds: Tensor  # (n,) the hardest negative reaches it
    places: Tensor  # (n,) where the block begins that has it
    pull: Tensor  # (n,) above 0 if it is within the margin


class _Best:
    """The largest value met so far, for each of `count`, and where the first block begins that has
    it (or is closer to it than the tolerance)."""

    def __init__(self, count: int, like: Tensor, tolerance: float) -> None:
        self.values = like.new_full((count,), float("-inf"))
        nowhere = torch.iinfo(torch.int32).max
        self.places = torch.full((count,), nowhere, dtype=torch.int32, device=like.device)
        self.tolerance = tolerance

    def update(self, maxima: Tensor, where: slice, starts: Tensor) -> None:
        """Take in for all `where` the maxima (where, blocks) of blocks that begin at `starts`."""
        values, places = self.values[where], self.places[where]
        largest = maxima.amax(1)
        place = starts[_first(maxima, largest - self.tolerance)]
        lower = torch.where(largest < values - self.tolerance, places, places.minimum(place))
        places.copy_(torch.where(largest > values + self.tolerance, place, lower))
        torch.maximum(values, largest, out=values)

    def join(self) -> None:
        """Agree over the ranks."""
        largest = distributed.all_reduce_max(self.values.clone())
        nowhere = torch.iinfo(torch.int32).max
        self.places[self.values < largest - self.tolerance] = nowhere
        distributed.all_reduce_min(self.places)
        self.values = largest


def _block_maxima(values: Tensor, dim: int, size: int) -> Tensor:
    """Return the maxima along `dim` of blocks of `size`; the last one may be shorter."""
    whole = values.shape[dim] // size * size
    rest = values.shape[dim] - whole
    parts = []
    if whole:
        parts.append(values.narrow(dim, 0, whole).unflatten(dim, (-1, size)).amax(dim + 1))
    if rest:
        parts.append(values.narrow(dim, whole, rest).amax(dim, keepdim=True))
    return torch.cat(parts, dim) if len(parts) > 1 else parts[0]


def _first(values: Tensor, thresholds: Tensor) -> Tensor:
    """Return for each row of (rows, columns) the first entry that reaches the row's threshold.

    Where rounding leaves none that does, the first of the largest.
    """
    reached = torch.minimum(thresholds, values.amax(1)).unsqueeze(1)
    return (values >= reached).to(torch.uint8).argmax(1)


def _groups(places: Tensor, indices: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield every place that occurs, with the indices that have it, at most CHUNK together."""
    ordered, order = places.sort(stable=True)
    found, counts = ordered.unique_consecutive(return_counts=True)
    groups = indices[order].split(counts.tolist())
    for place, group in zip(found.tolist(), groups, strict=True):
        for part in ranges(0, len(group), CHUNK):
            yield place, group[part]
