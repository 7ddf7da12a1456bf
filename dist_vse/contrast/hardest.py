"""The hardest negative of each row and each column: ConVSE++ and VSE++ (max hinge).

One product for the maxima; the gradient is sparse, each active row or column moves two features.
https://arxiv.org/abs/2110.08872, https://arxiv.org/abs/1707.05612

Maxima come first, places after: a tile is read once for the maxima of its blocks, and the place is
looked for only in the block that has the maximum.

Among equals the lowest index of the global batch is the hardest. Similarities closer than a few
roundings are equal: the same two features give other last bits in another place of a product, and
the choice must not depend on tiles or ranks. That holds for copies; a chain of negatives that are
each within a few roundings of the next, and are no copies, is decided in the order of the tiles.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from dist_vse import distributed
from dist_vse.contrast.positives import Positives
from dist_vse.contrast.tiles import Tile
from dist_vse.contrast.transport import Block

ROUNDINGS = 16
BLOCKS = {1: 64, 0: 16}  # entries along a row, along a column: strided, so fewer
CHUNK = 1024  # features moved together


class Hardest:
    """The hinge of the hardest negative, times `weight`; `bound` is the largest |similarity|."""

    def __init__(self, positives: Positives, margin: float, *, weight: float, bound: float) -> None:
        self.positives = positives
        self.layout = positives.layout
        self.margin = margin
        self.weight = weight
        tolerance = ROUNDINGS * torch.finfo(positives.rows.dtype).eps * bound
        self.rows = _Best(len(positives.rows), positives.rows, tolerance)
        self.columns = _Best(self.layout.total, positives.rows, tolerance)
        self.own_pull, self.row_pull, self.column_pull = (positives.rows,) * 3

    def see(self, tile: Tile) -> None:
        first_row = self.layout.own.start + tile.rows.start
        self.rows.update(tile.values, 1, tile.rows, tile.columns.start)
        self.columns.update(tile.values, 0, tile.columns, first_row)

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
        self, block: Block, rows: Tensor, row_grad: Tensor, column_grad: Tensor
    ) -> None:
        columns = block.columns
        here = _Side(rows, row_grad, self.layout.own.start, self.rows.places, self.row_pull)
        there = _Side(
            block.features,
            column_grad,
            columns.start,
            self.columns.places[columns],
            self.column_pull[columns],
        )
        self._push(here, there)
        self._push(there, here)

    def hardest(self) -> Tensor:
        return self.rows.values

    def _push(self, these: "_Side", those: "_Side") -> None:
        """Add the gradient of these features' hardest negatives, as far as they are those."""
        places = these.places - those.start
        chosen = (places >= 0) & (places < len(those.features)) & (these.pull > 0)
        for i in chosen.nonzero().view(-1).split(CHUNK):
            j = places[i]
            these.grad.index_add_(0, i, those.features.index_select(0, j), alpha=self.weight)
            those.grad.index_add_(0, j, these.features.index_select(0, i), alpha=self.weight)


class _Side(NamedTuple):
    """Features that lie together in the global batch, from `start` on, and what they look for."""

    features: Tensor  # (n, d)
    grad: Tensor  # (n, d)
    start: int
    places: Tensor  # (n,) of the hardest negative, in the global batch
    pull: Tensor  # (n,) above 0 if it is within the margin


class _Best:
    """The largest value met so far, for each of `count`, and the first place that has it (or is
    closer to it than the tolerance)."""

    def __init__(self, count: int, like: Tensor, tolerance: float) -> None:
        self.values = like.new_full((count,), float("-inf"))
        nowhere = torch.iinfo(torch.int32).max
        self.places = torch.full((count,), nowhere, dtype=torch.int32, device=like.device)
        self.tolerance = tolerance

    def update(self, tile: Tensor, dim: int, where: slice, start: int) -> None:
        """Take in for all `where` what lies along a tile's dimension, from place `start` on."""
        values, places = self.values[where], self.places[where]
        largest, first = _first_largest(tile, dim, self.tolerance)
        place = (first + start).to(places.dtype)
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


def _first_largest(values: Tensor, dim: int, tolerance: float) -> tuple[Tensor, Tensor]:
    """Return the maxima along `dim` of a tile, and the first places that reach them."""
    size = BLOCKS[dim]
    short = -values.shape[dim] % size
    if short:
        values = pad(values, (0, short) if dim == 1 else (0, 0, 0, short), value=float("-inf"))
    blocks = values.unflatten(dim, (-1, size))
    maxima = blocks.amax(dim + 1)
    largest = maxima.amax(dim)
    thresholds = (largest - tolerance).unsqueeze(1)
    chosen = _first(maxima if dim == 1 else maxima.T, thresholds)
    each = torch.arange(len(chosen), device=chosen.device)
    entries = blocks[each, chosen] if dim == 1 else blocks[chosen, :, each]  # (n, size)
    return largest, chosen * size + _first(entries, thresholds)


def _first(values: Tensor, thresholds: Tensor) -> Tensor:
    """Return for each row of (n, m) the first entry that reaches its threshold; overwrites values.

    In floating point throughout: CPUs have no fast code for truth values. NaN reaches nothing, and
    any entry will do: the loss is NaN as well, and the run ends.
    """
    width = values.shape[1]
    falling = torch.arange(width, 0, -1, dtype=values.dtype, device=values.device)
    left = values.ge_(thresholds).mul_(falling).amax(1)
    return (width - left.long()).clamp_(max=width - 1)
