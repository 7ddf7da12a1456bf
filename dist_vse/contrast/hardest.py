"""The hardest negative of each row and each column: ConVSE++ and VSE++ (max hinge).

One product for the maxima, none for the gradient: each active row or column moves two features.
https://arxiv.org/abs/2110.08872, https://arxiv.org/abs/1707.05612

Among equals the lowest index of the global batch is the hardest. Similarities closer than a few
roundings are equal: the same two features give other last bits in another place of a product, and
the choice must not depend on tiles or ranks.
"""

import torch
from torch import Tensor

from dist_vse import distributed
from dist_vse.contrast.positives import Positives
from dist_vse.contrast.tiles import Tile, ranges
from dist_vse.contrast.transport import Block

ROUNDINGS = 16
CHUNK = 1024  # features moved together
BLOCK = 64  # columns of a tile that are searched together


class Hardest:
    """The hinge of the hardest negative, times `weight`; `bound` is the largest |similarity|."""

    def __init__(self, positives: Positives, margin: float, *, weight: float, bound: float) -> None:
        self.positives = positives
        self.layout = positives.layout
        self.margin = margin
        self.weight = weight
        self.tolerance = ROUNDINGS * torch.finfo(positives.rows.dtype).eps * bound
        self.rows = _Best(len(positives.rows), positives.rows)
        self.columns = _Best(self.layout.total, positives.rows)
        self.own_pull, self.row_pull, self.column_pull = (positives.rows,) * 3

    def see(self, tile: Tile) -> None:
        first = self.layout.own.start + tile.rows.start
        self.rows.update(tile.values, 1, tile.rows, tile.columns.start, self.tolerance)
        self.columns.update(tile.values, 0, tile.columns, first, self.tolerance)

    def conclude(self) -> Tensor:
        self.columns.join(self.tolerance)
        row_hinges = self.margin + self.rows.values - self.positives.rows
        column_hinges = self.margin + self.columns.values - self.positives.columns()
        self.row_pull = (row_hinges > 0) * self.positives.row_share * self.weight
        self.column_pull = (column_hinges > 0) * self.positives.column_share * self.weight
        self.own_pull = self.row_pull + self.column_pull[self.layout.own]
        total = row_hinges.clamp(min=0).sum() + column_hinges[self.layout.own].clamp(min=0).sum()
        return total * self.weight

    def add_gradient(
        self, block: Block, rows: Tensor, row_grad: Tensor, column_grad: Tensor
    ) -> None:
        start, stop = block.columns.start, block.columns.stop
        places = self.rows.places
        chosen = (places >= start) & (places < stop) & (self.row_pull > 0)
        i = chosen.nonzero().view(-1)
        self._push(block, i, places[i] - start, rows, row_grad, column_grad)
        places = self.columns.places[block.columns] - self.layout.own.start
        chosen = (places >= 0) & (places < len(rows)) & (self.column_pull[block.columns] > 0)
        j = chosen.nonzero().view(-1)
        self._push(block, places[j], j, rows, row_grad, column_grad)

    def hardest(self) -> Tensor:
        return self.rows.values

    def _push(
        self,
        block: Block,
        i: Tensor,
        j: Tensor,
        rows: Tensor,
        row_grad: Tensor,
        column_grad: Tensor,
    ) -> None:
        """Add the gradient of the similarities of rows i with the block's columns j."""
        for chunk in ranges(0, len(i), CHUNK):
            a, b = i[chunk], j[chunk]
            row_grad.index_add_(0, a, block.features.index_select(0, b), alpha=self.weight)
            column_grad.index_add_(0, b, rows.index_select(0, a), alpha=self.weight)


class _Best:
    """The largest value met so far and the lowest place it was met at, for each of `count`."""

    def __init__(self, count: int, like: Tensor) -> None:
        self.values = like.new_full((count,), float("-inf"))
        self.places = torch.full((count,), -1, device=like.device)

    def update(self, tile: Tensor, dim: int, where: slice, first: int, tolerance: float) -> None:
        """Take in a tile along `dim`: for the rows (columns) `where`; its entries start at `first`.

        Maxima come first and places after: few rows have a new maximum in most tiles, and for
        those only the block of entries is searched that has it.
        """
        values, places = self.values[where], self.places[where]
        size = BLOCK if tile.shape[dim] % BLOCK == 0 else tile.shape[dim]
        blocks = tile.unflatten(dim, (-1, size))
        block_maxima = blocks.amax(dim + 1)
        maxima = block_maxima.amax(dim)
        better = (maxima > values - tolerance).nonzero().view(-1)
        if not len(better):
            return
        old, new = values[better], maxima[better]
        largest = torch.maximum(old, new)
        threshold = (largest - tolerance).unsqueeze(1)
        block = _first(block_maxima[better] if dim else block_maxima[:, better].T, threshold)
        entries = blocks[better, block] if dim else blocks[block, :, better]
        place = _first(entries, threshold) + block * size + first
        lower = torch.minimum(place, places[better])
        places[better] = torch.where(old >= threshold.view(-1), lower, place)
        values[better] = largest

    def join(self, tolerance: float) -> None:
        """Agree over the ranks."""
        largest = distributed.all_reduce_max(self.values.clone())
        nowhere = torch.iinfo(torch.int64).max
        self.places[~((self.values >= largest - tolerance) & (self.places >= 0))] = nowhere
        distributed.all_reduce_min(self.places)
        self.values = largest


def _first(values: Tensor, threshold: Tensor) -> Tensor:
    """Return for each row of (rows, columns) the first that reaches its threshold (rows, 1)."""
    length = values.shape[1]
    steps = torch.arange(length, 0, -1, dtype=values.dtype, device=values.device)
    # The first one has the highest step. (None reaches a threshold that is not a number.)
    highest = (values >= threshold).to(values.dtype).mul_(steps).amax(1)
    return length - highest.clamp_(min=1).long()
