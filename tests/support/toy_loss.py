"""A loss from outside the package: the squared error of similarities to 1 and to 0.

The mean over all N x N pairs, named as `loss.name=tests.support.toy_loss:TOY`.
"""

import torch
from torch import Tensor

from dist_vse.losses.positives import Positives
from dist_vse.losses.reference import DensePairs
from dist_vse.losses.registry import LossCost, LossSpec
from dist_vse.losses.tiled import TermInputs, TermResult, Terms
from dist_vse.losses.tiles import Tile


def dense(pairs: DensePairs) -> Tensor:
    """Return the loss of one process with the whole batch."""
    s = pairs.s
    total = ((1 - s).square() * torch.eye(len(s))).sum() + (s.square() * pairs.negative).sum()
    return total / pairs.count**2


class SquaredError:
    """The same, tile by tile."""

    def __init__(self, positives: Positives) -> None:
        self.own = positives.own.similarities
        self.positives = positives
        self.total = self.own.new_zeros(())
        self.largest = torch.full_like(self.own, -torch.inf)

    def prepare(self, tile: Tile) -> None:
        """Own pairs, and masked ones, are -inf in a tile: here they are zeros."""
        largest = self.largest[tile.rows]
        torch.maximum(largest, tile.values.amax(1), out=largest)
        tile.values.nan_to_num_(neginf=0.0)

    def accumulate(self, tile: Tile) -> None:
        self.total = self.total + tile.values.square().sum()

    def finalize(self) -> TermResult:
        total = self.total + (1 - self.own).square().sum()
        nothing = self.own.new_zeros(()).expand(self.positives.layout.total)
        return TermResult(total, 2 * (1 - self.own), torch.zeros_like(self.own), nothing)

    def grad_logits(self, tile: Tile) -> Tensor:
        return tile.values.mul_(2)

    def hardest(self) -> Tensor:
        return self.largest


def build_terms(inputs: TermInputs) -> Terms:
    return Terms(dense=SquaredError(inputs.positives))


TOY = LossSpec(
    name="toy",
    label="Squared error",
    paper="",
    dense=dense,
    terms=build_terms,
    loss_unit=lambda scale, n: 1 / n**2,
    cost=LossCost(gathers=0, reduces=()),
)
