"""The hardest negative of each row and each column: ConVSE++ and VSE++ (max hinge).

One product for the maxima; the gradient is sparse, each active row or column moves two features.
https://arxiv.org/abs/2110.08872, https://arxiv.org/abs/1707.05612

Maxima come first, the argmax after: a tile is read once for the maxima of its blocks, and the
index is searched only in the block that has the maximum.

Among equals the lowest index of the global batch is the hardest. Similarities closer than a few
roundings are equal: the same two features give other last bits in another place of a product, and
the choice must not depend on tiles or ranks. That holds for copies; a chain of negatives that are
each within a few roundings of the next, and are no copies, is decided in the order of the tiles.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, pad

from dist_vse import distributed
from dist_vse.losses.pairwise import Hinges
from dist_vse.losses.positives import Positives
from dist_vse.losses.tiled import TermInputs, TermResult, Terms
from dist_vse.losses.tiles import Tile
from dist_vse.losses.transport import Block

ROUNDINGS = 16
BLOCKS = {1: 64, 0: 16}  # entries along a row, along a column: strided, so fewer


def hardest_terms(inputs: TermInputs) -> Terms:
    """Return the hardest negative's hinge, the mean of all violations, or a share of each."""
    positives, margin, weight = inputs.positives, inputs.margin, inputs.hard_negative_weight
    return Terms(
        dense=Hinges(positives, margin, mean=True, weight=1 - weight) if weight < 1 else None,
        sparse=Hardest(positives, margin, weight=weight, bound=inputs.largest)
        if weight > 0
        else None,
    )


class Hardest:
    """The hinge of the hardest negative, times `weight`; `bound` is the largest |similarity|."""

    def __init__(self, positives: Positives, margin: float, *, weight: float, bound: float) -> None:
        self.positives = positives
        self.layout = positives.layout
        self.margin = margin
        self.weight = weight
        tolerance = ROUNDINGS * torch.finfo(positives.rows.dtype).eps * bound
        self.rows = Best(len(positives.rows), positives.rows, tolerance)
        self.columns = Best(positives.num_columns, positives.rows, tolerance)

    def accumulate(self, tile: Tile) -> None:
        first_row = self.layout.own.start + tile.rows.start
        self.rows.update(tile.values, 1, tile.rows, tile.columns.start)
        self.columns.update(tile.values, 0, tile.columns, first_row)

    def finalize(self) -> TermResult:
        self.columns.join()
        row_hinges = self.margin + self.rows.values - self.positives.rows
        largest = self.columns.values[: self.layout.total]
        column_hinges = self.margin + largest - self.positives.columns()
        self.row_weight = (row_hinges > 0) * self.positives.row_share * self.weight
        column_weight = (column_hinges > 0) * self.positives.column_share * self.weight
        self.column_weight = self.positives.with_negatives(column_weight, 0)
        total = row_hinges.clamp(min=0).sum() + column_hinges[self.layout.own].clamp(min=0).sum()
        own_weight = self.row_weight + column_weight[self.layout.own]
        return TermResult(total * self.weight, own_weight, self.row_weight, column_weight)

    def gradients(self, block: Block, rows: Tensor) -> tuple[Tensor, Tensor]:
        own, there = self.layout.own, block.columns
        of_rows = _pairs(self.rows.indices, self.row_weight, there)
        of_columns = _pairs(self.columns.indices[there], self.column_weight[there], own)
        i = torch.cat([of_rows.each, of_columns.hardest])
        j = torch.cat([of_rows.hardest, of_columns.each])
        active = torch.cat([of_rows.active, of_columns.active])
        return (
            _sums(block.features, j, i, active, len(rows), self.weight),
            _sums(rows, i, j, active, len(block.features), self.weight),
        )

    def hardest(self) -> Tensor:
        return self.rows.values


class Best:
    """The largest value met so far, for each of `count`, and the first index that has it (or is
    closer to it than the tolerance)."""

    def __init__(self, count: int, like: Tensor, tolerance: float) -> None:
        self.values = like.new_full((count,), float("-inf"))
        nowhere = torch.iinfo(torch.int32).max
        self.indices = torch.full((count,), nowhere, dtype=torch.int32, device=like.device)
        self.tolerance = tolerance

    def update(self, tile: Tensor, dim: int, where: slice, start: int) -> None:
        """Take in for all `where` what lies along a tile's dimension, from index `start` on."""
        values, indices = self.values[where], self.indices[where]
        largest, first = _first_largest(tile, dim, self.tolerance)
        index = (first + start).to(indices.dtype)
        lower = torch.where(largest < values - self.tolerance, indices, indices.minimum(index))
        indices.copy_(torch.where(largest > values + self.tolerance, index, lower))
        torch.maximum(values, largest, out=values)

    def join(self) -> None:
        """Agree over the ranks."""
        largest = distributed.all_reduce_max(self.values.clone())
        nowhere = torch.iinfo(torch.int32).max
        self.indices.masked_fill_(self.values < largest - self.tolerance, nowhere)
        distributed.all_reduce_min(self.indices)
        self.values = largest


def _first_largest(values: Tensor, dim: int, tolerance: float) -> tuple[Tensor, Tensor]:
    """Return the maxima along `dim` of a tile, and the first indices that reach them."""
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
    if dim == 1:
        entries = values.view(-1, size).index_select(0, each * blocks.shape[1] + chosen)
    else:
        entries = blocks[chosen, :, each]  # (n, size)
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


class _Pairs(NamedTuple):
    """For each of (n,) its hardest negative, and whether that pair counts."""

    each: Tensor
    hardest: Tensor
    active: Tensor


def _pairs(indices: Tensor, weight: Tensor, among: slice) -> _Pairs:
    """Return the pairs; those count that have a weight and their hardest negative `among` indices.

    All (n,) are returned: how many count would be read back from the device.
    """
    inside = (indices >= among.start) & (indices < among.stop)
    each = torch.arange(len(indices), device=indices.device)
    return _Pairs(each, (indices - among.start).long(), inside & (weight > 0))


def _sums(
    features: Tensor, sources: Tensor, targets: Tensor, active: Tensor, count: int, weight: float
) -> Tensor:
    """Return for each of `count` targets the sum of its sources' features, times a weight.

    `sources` and `targets` (p,) name pairs, of which the active ones count. A target's are added
    in the order given, on CUDA too, where adding them pair by pair would not be reproducible.
    """
    if active.device.type == "cpu":  # a GPU would have to be waited for
        sources, targets, active = sources[active], targets[active], active[active]
    if not len(targets) or not count or not len(features):
        return features.new_zeros(count, features.shape[1])
    # The others weigh nothing, wherever they go: as even as may be.
    even = torch.arange(len(targets), device=targets.device)
    targets, order = torch.where(active, targets, even % count).sort(stable=True)
    sources = torch.where(active, sources, even % len(features))
    first = torch.searchsorted(targets, torch.arange(count, device=targets.device))
    weights = features.new_full((len(active),), weight).masked_fill_(~active, 0)
    return embedding_bag(
        sources[order], features, first, mode="sum", per_sample_weights=weights[order]
    )
