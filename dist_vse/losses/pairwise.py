"""Terms that are sums over single pairs: SigLIP's sigmoid, and hinges (VSE0; the warm-up).

b rows on this rank, N columns on all ranks.
"""

import torch
from torch import Tensor
from torch.nn.functional import softplus

from dist_vse import distributed
from dist_vse.losses.positives import Positives
from dist_vse.losses.tiled import TermInputs, TermResult, Terms
from dist_vse.losses.tiles import EXACT, Tile


def sigmoid_terms(inputs: TermInputs) -> Terms:
    """Return SigLIP's."""
    sigmoid = Sigmoid(inputs.positives, inputs.bias)
    return Terms(dense=sigmoid, take_bias_grad=sigmoid.take_bias_grad)


def hinge_terms(inputs: TermInputs) -> Terms:
    """Return VSE0's."""
    return Terms(dense=Hinges(inputs.positives, inputs.margin, mean=False, weight=1.0))


class Sigmoid:
    """SigLIP: every pair is a yes or no. https://arxiv.org/abs/2303.15343

    With z a pair's logit plus the bias, a negative gives softplus(z) and a positive softplus(-z).
    The latter is softplus(z) - z: so duplicates that are positives are like negatives in the tiles,
    and weigh 1 outside of them.
    """

    def __init__(self, positives: Positives, bias: Tensor) -> None:
        self.positives = positives
        self.bias = bias
        self.row_sums = torch.zeros_like(positives.rows)
        self.largest = torch.full_like(self.row_sums, float("-inf"))
        self.own_weight = (-positives.own.similarities - bias).sigmoid()
        self.grad_sum = torch.zeros_like(bias)

    def prepare(self, tile: Tile) -> None:
        tile.values.add_(self.bias)

    def accumulate(self, tile: Tile) -> None:
        self.row_sums[tile.rows] += softplus(tile.values, threshold=EXACT).sum(1)
        largest = self.largest[tile.rows]
        torch.maximum(largest, tile.negative_maxima(float("-inf")), out=largest)

    def finalize(self) -> TermResult:
        own = self.positives.own.similarities
        # A mean over the positives times their number, less the own one: the sum of the duplicates.
        duplicates = (
            self.positives.rows / self.positives.row_share
            - own
            + self._num_duplicates() * self.bias
        )
        total = (self.row_sums + softplus(-own - self.bias, threshold=EXACT) - duplicates).sum()
        no_weight = own.new_zeros(()).expand(self.positives.layout.total)
        return TermResult(total, self.own_weight, torch.ones_like(own), no_weight)

    def grad_logits(self, tile: Tile) -> Tensor:
        weights = tile.values.sigmoid_()
        self.grad_sum += weights.sum()
        return weights

    def hardest(self) -> Tensor:
        return self.largest - self.bias

    def take_bias_grad(self) -> Tensor:
        """Return this rank's gradient in the bias (1,) after a backward pass."""
        grad = self.grad_sum - (self.own_weight + self._num_duplicates()).sum()
        self.grad_sum = torch.zeros_like(self.bias)
        return grad

    def _num_duplicates(self) -> Tensor:
        return 1 / self.positives.row_share - 1  # (b,)


class Hinges:
    """By how much negatives come within the margin of their row's (column's) positive.

    The sum of all (VSE0, https://arxiv.org/abs/1707.05612), or the mean of each row's (column's)
    violations, times `weight`.
    """

    def __init__(self, positives: Positives, margin: float, *, mean: bool, weight: float) -> None:
        self.layout = positives.layout
        self.mean = mean
        self.weight = weight
        # A negative above its row's (column's) threshold violates the margin.
        self.row_thresholds = positives.rows - margin
        self.column_thresholds = positives.with_negatives(positives.columns() - margin, torch.inf)
        self.row_stats = self.row_thresholds.new_zeros(2, len(self.row_thresholds))
        self.column_stats = self.row_stats.new_zeros(2, len(self.column_thresholds))
        self.largest = torch.full_like(self.row_thresholds, float("-inf"))
        self.positives = positives

    def prepare(self, tile: Tile) -> None:
        """The similarities themselves are what it works on."""

    def accumulate(self, tile: Tile) -> None:
        thresholds = self.row_thresholds[tile.rows].unsqueeze(1)
        _add_violations(self.row_stats[:, tile.rows], tile, thresholds, 1)
        thresholds = self.column_thresholds[tile.columns]
        _add_violations(self.column_stats[:, tile.columns], tile, thresholds, 0)
        largest = self.largest[tile.rows]
        torch.maximum(largest, tile.values.amax(1), out=largest)

    def finalize(self) -> TermResult:
        distributed.all_reduce_sum(self.column_stats)
        row_terms, self.row_weights = self._weigh_violations(*self.row_stats)
        column_terms, self.column_weights = self._weigh_violations(*self.column_stats)
        row_weight = self.row_stats[1] * self.row_weights * self.positives.row_share
        column_weight = (self.column_stats[1] * self.column_weights)[: self.layout.total]
        column_weight = column_weight * self.positives.column_share
        total = row_terms.sum() + column_terms[self.layout.own].sum()
        own_weight = row_weight + column_weight[self.layout.own]
        return TermResult(total, own_weight, row_weight, column_weight)

    def grad_logits(self, tile: Tile) -> Tensor:
        torch.gt(tile.values, self.column_thresholds[tile.columns], out=tile.workspace)
        tile.workspace.mul_(self.column_weights[tile.columns])
        tile.values.gt_(self.row_thresholds[tile.rows].unsqueeze(1))
        return tile.values.mul_(self.row_weights[tile.rows].unsqueeze(1)).add_(tile.workspace)

    def hardest(self) -> Tensor:
        return self.largest

    def _weigh_violations(self, sums: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Return the terms of rows (or columns), and what one violation of each weighs."""
        if not self.mean:
            return self.weight * sums, torch.full_like(sums, self.weight)
        weights = self.weight / counts.clamp(min=1)
        return sums * weights, weights


def _add_violations(stats: Tensor, tile: Tile, thresholds: Tensor, dim: int) -> None:
    """Add a tile's sums and counts of violations to `stats` (2, ...) along its dimension."""
    torch.sub(tile.values, thresholds, out=tile.workspace).clamp_(min=0)
    stats[0] += tile.workspace.sum(dim)
    stats[1] += tile.workspace.gt_(0).sum(dim)
