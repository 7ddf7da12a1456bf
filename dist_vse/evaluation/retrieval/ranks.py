"""Where the right answers of every query stand, and what follows from that."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

FACTORS = 16  # of the longest product that is multiplied out


@dataclass(frozen=True)
class Ranks:
    """Where the right answers of every query stand; (q,) each.

    Wrong answers that score `better` than the best right one, wrong ones `tied` with it, and
    the `right` ones at that same score (itself included). The rank is 1 + better + the wrong
    ones that come first in a random order of the tie.
    """

    better: Tensor  # int64
    tied: Tensor  # int64
    right: Tensor  # int64
    precision: Tensor
    """float64: the expected mAP@R of each query (https://arxiv.org/abs/2003.08505): the mean over
    its first R places, R being its number of right answers, of the precision up to each place
    that holds a right one."""

    def hits(self, k: int) -> Tensor:
        """Return each query's chance to have a right answer among the first k, float64 (q,)."""
        return 1 - _all_missed(k - self.better, self.tied, self.right)

    def expected(self) -> Tensor:
        """Return each query's expected rank, float64 (q,)."""
        return 1 + self.better + self.tied.double() / (self.right + 1)

    def reached(self, k: int) -> float:
        """Return the expected share of queries with a right answer among the first k."""
        return mean(self.hits(k))

    def median(self) -> float:
        """Return the median of the ranks over all orders of the ties, rounded down.

        Down as VSE++ and CLIP do where the two middle ranks differ.
        """
        rounding = 1e-9
        lower, upper = self._first(0.5 - rounding), self._first(0.5 + rounding)
        return float((lower + upper) // 2)

    def bounds(self, k: int) -> tuple[float, float]:
        """Return the least and the largest share of `reached(k)` over the orders of the ties."""
        worst, best = self.better + self.tied < k, self.better < k
        return mean(worst), mean(best)

    def _first(self, share: float) -> int:
        low, high = 1, int((self.better + self.tied).max()) + 1
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.reached(middle) >= share else (middle + 1, high)
        return low


def _all_missed(places: Tensor, wrong: Tensor, right: Tensor) -> Tensor:
    """Return the chance that no right answer comes among the first places of a tie, float64.

    The wrong ones fill the places, or the right ones stand after them: a product of as many
    factors as the smaller number. A long one is taken by logarithms of factorials, to about 1e-11.
    """
    few, many = torch.minimum(places, right), torch.maximum(places, right)
    total = wrong + right
    missed = (few <= 0).double()  # certain without places, impossible with more than the wrong ones
    short = ((few > 0) & (places <= wrong) & (few <= FACTORS)).nonzero().flatten()
    factor = torch.arange(int(few[short].max()) if len(short) else 0, device=few.device)
    after = (total - many)[short][:, None] - factor
    factors = after.double() / (total[short][:, None] - factor)
    missed[short] = torch.where(factor < few[short][:, None], factors, 1.0).prod(1)
    long = ((places <= wrong) & (few > FACTORS)).nonzero().flatten()
    logs = [
        (number[long] + 1).double().lgamma()
        for number in (total - places, wrong, wrong - places, total)
    ]
    missed[long] = (logs[0] + logs[1] - logs[2] - logs[3]).exp()
    return missed


def mean(values: Tensor) -> float:
    """Return the mean, the same to the bit for any number of threads (numpy adds with one)."""
    return float(values.double().cpu().numpy().mean())


def precision_at_r(
    query: Tensor, wrong: Tensor, wrong_tied: Tensor, right: Tensor, right_tied: Tensor
) -> Tensor:
    """Return mAP@R, expected over the orders of the ties, of every query: float64 (q,).

    One row a right pair (p,): its query, the wrong answers that score better and those that tie,
    the right ones better, and those tied (itself included). In a tie of G with a right ones
    after B others, of which b are right, place B + t holds a right one with chance a / G, and
    then b + 1 + (t - 1)(a - 1) / (G - 1) are right up to there, as in
    https://doi.org/10.1007/978-3-540-78646-7_38.
    """
    counts = query.bincount()  # (q,): R
    limit = counts[query]  # (p,)
    before = wrong + right
    alive = (before < limit).nonzero().flatten()
    query, limit, before = query[alive], limit[alive], before[alive]
    right, tied = right[alive].double(), right_tied[alive]
    group = tied + wrong_tied[alive]
    slope = (tied - 1).double() / (group - 1).clamp_min(1)
    last = torch.minimum(group, limit - before)  # t of the last place
    # t - 1 = (before + t) - (before + 1), so that what is left over t is a harmonic sum.
    harmonic = torch.from_numpy((1 / np.arange(1, int(counts.max()) + 1)).cumsum())
    rest = harmonic[before + last - 1] - harmonic[before]
    gain = (right + 1) / (before + 1) + slope * (last - 1)
    gain += (right + 1 - slope * (before + 1)) * rest
    total = torch.zeros(len(counts), dtype=torch.float64, device=query.device)
    # Sorted by query, and added one by one on the CPU: the same bits for any number of threads.
    total.index_add_(0, query, gain / group)
    return total / counts
