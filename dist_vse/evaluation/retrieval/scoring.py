"""Exact ranks from tiles of scores, shared by the ranks.

A tile is computed in float32, with a bound on its rounding. What is further from the bar than
the bound is decided; the few scores within it are computed again in float64. So the ranks are
those of float64 at the price of float32, and no tile size or number of processes changes them.

Shapes: n images, m texts, p right pairs, d embedding, a by b scores of one tile.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_vse.evaluation.retrieval.checks import check_finite, check_pairs
from dist_vse.evaluation.retrieval.ranks import Ranks, precision_at_r

TIE = 1e-12
"""Scores of unit features this close are equal: float64 sums them to about d * 1e-16."""
ROUNDOFF = 2.0**-24  # of float32
IMAGES, TEXTS = 1024, 1024  # of a tile
SUMMED = 256  # products that are added at a time: short sums round less
SEARCHED = 2**18  # scores that are looked through at a time for bars after the best
GATHERED = 1024  # pairs whose features are gathered at a time
CROWDED = 1 / 64  # of a tile's scores: with more to decide, all of it is computed in float64


@dataclass(frozen=True)
class _Bars:
    """The right pairs of one direction, sorted by query, the best pair of each first.

    What is counted for a pair are the wrong answers to its query that reach its score, the bar.
    """

    query: Tensor  # (p,)
    bar: Tensor  # (p,) float64
    first: Tensor  # (q + 1,): where each query's pairs start
    better: Tensor  # (p,): right answers of a better score
    tied: Tensor  # (p,): right answers of the same score, itself included
    counts: Tensor  # (2, p): wrong answers better; better or tied

    def others(self, start: int, stop: int) -> Tensor:
        """Return the rows in [start, stop) whose pairs after the best still matter.

        They matter to mAP@R only, until R answers stand before the second.
        """
        rows = torch.arange(start, stop, device=self.query.device)
        best, limit = self.first[rows], self.first[rows + 1] - self.first[rows]
        second = (best + 1).clamp_max(len(self.query) - 1)
        # What beats the best beats the second too, and may be counted for the best alone so far.
        wrong = torch.maximum(self.counts[0, best], self.counts[0, second])
        return rows[(limit > 1) & (wrong + self.better[second] < limit)] - start

    def ranks(self) -> Ranks:
        """Read the ranks off the counts."""
        best = self.first[:-1]
        wrong, reaching = self.counts
        wrong = torch.maximum(wrong, wrong[best[self.query]])  # where the others were left out
        precision = precision_at_r(
            self.query.cpu(),
            wrong.cpu(),
            (reaching - wrong).cpu(),
            self.better.cpu(),
            self.tied.cpu(),
        )
        return Ranks(
            wrong[best].cpu(), (reaching - wrong)[best].cpu(), self.tied[best].cpu(), precision
        )


@torch.no_grad()
def rank_all(
    image_features: Tensor,
    text_features: Tensor,
    pairs: Tensor,
    *,
    tile: tuple[int, int] = (IMAGES, TEXTS),
    share: tuple[int, int] = (0, 1),
    add_up: Callable[[Tensor], Tensor] = lambda counts: counts,
) -> tuple[Ranks, Ranks]:
    """Rank every image's texts (n,) and every text's images (m,) in one pass over the tiles.

    `pairs` (2, p) holds the image row and the text row of each right pair, each pair once. Rank
    r of W gives `share=(r, W)` and as `add_up` the sum over the ranks. Needs memory for a few
    tiles. Raises UserError for features that are not finite and for pairs that do not fit.
    """
    check_finite(image_features, text_features)
    check_pairs(pairs, len(image_features), len(text_features))
    pairs = pairs.to(image_features.device)
    longest = _longest(image_features) * _longest(text_features)
    tie, doubt = TIE * longest, _rounding(image_features.shape[1]) * longest
    own = _scores_of(image_features, text_features, *pairs)  # (p,)
    of_images = _bars(pairs[0], own, len(image_features), tie)
    of_texts = _bars(pairs[1], own, len(text_features), tie)
    order = pairs[1].argsort(stable=True)
    image_of, text_of = pairs[0][order], pairs[1][order].contiguous()

    rank, world_size = share
    with _whole_precision():
        for i in range(rank * tile[0], len(image_features), world_size * tile[0]):
            images = image_features[i : i + tile[0]]
            for j in range(0, len(text_features), tile[1]):
                texts = text_features[j : j + tile[1]]
                scores = _about(images, texts)  # (a, b)
                edges = torch.tensor([j, j + len(texts)], device=text_of.device)
                inside = slice(*torch.searchsorted(text_of, edges).tolist())
                rows, columns = image_of[inside] - i, text_of[inside] - j
                here = (rows >= 0) & (rows < len(images))
                scores[rows[here], columns[here]] = -torch.inf  # right answers beat nobody
                exact = _Exact(images, texts)
                _count(of_images, scores, i, exact.at, tie, doubt)
                _count(of_texts, scores.T, j, exact.flipped, tie, doubt)
    for bars in (of_images, of_texts):
        add_up(bars.counts)
    return of_images.ranks(), of_texts.ranks()


def _count(
    bars: _Bars,
    scores: Tensor,
    start: int,
    exact: Callable[[Tensor, Tensor], Tensor],
    tie: float,
    doubt: float,
) -> None:
    """Count what reaches the bars of the queries [start, start + len(scores))."""
    best = bars.first[start : start + len(scores)]
    bar = bars.bar[best]
    above = scores > (bar + doubt).float()[:, None]
    open_ = (scores >= (bar - doubt).float()[:, None]) ^ above
    bars.counts[:, best] += above.sum(1)
    row, item = open_.nonzero(as_tuple=True)
    if len(row):
        score = exact(row, item)
        reach = torch.stack([score > bar[row] + tie, score >= bar[row] - tie])
        bars.counts.index_add_(1, best[row], reach.long())
    del above, open_  # before the next need their memory
    for rows in bars.others(start, start + len(scores)).split(SEARCHED // scores.shape[1] + 1):
        _count_others(bars, scores, start, rows, exact, tie, doubt)


def _count_others(
    bars: _Bars,
    scores: Tensor,
    start: int,
    rows: Tensor,
    exact: Callable[[Tensor, Tensor], Tensor],
    tie: float,
    doubt: float,
) -> None:
    """Count what reaches the bars after the best of some rows: a search for each score.

    Equal captions make as many bars a query as there are captions, so there is no pass a bar.
    """
    first, stop = bars.first[start + rows] + 1, bars.first[start + rows + 1]
    some = scores[rows]
    row, item = (some >= (bars.bar[stop - 1] - doubt).float()[:, None]).nonzero(as_tuple=True)
    if len(row) == 0:
        return
    score, base, end = some[row, item].double(), int(first[0]), int(stop[-1])
    first, stop = first[row], stop[row]
    above, reached = _places(bars.bar, first, stop, score, doubt)
    at = (reached < above).nonzero().flatten()
    if len(at):
        score = exact(rows[row[at]], item[at])
        above[at], reached[at] = _places(bars.bar, first[at], stop[at], score, tie)
    for counts, place in zip(bars.counts, (above, reached), strict=True):
        steps = (place - base).bincount(minlength=end - base + 1)
        steps -= (stop - base).bincount(minlength=end - base + 1)
        counts[base:end] += steps[:-1].cumsum(0)  # each score counts from its place to its stop


def _places(
    bar: Tensor, first: Tensor, stop: Tensor, score: Tensor, margin: float
) -> tuple[Tensor, Tensor]:
    """Return the first pairs in [first, stop) whose bars each score is above, and reaches."""
    last = len(bar) - 1
    above = _first_where(lambda at: score > bar[at.clamp_max(last)] + margin, first, stop)
    return above, _first_where(lambda at: score >= bar[at.clamp_max(last)] - margin, first, above)


def _first_where(holds: Callable[[Tensor], Tensor], low: Tensor, high: Tensor) -> Tensor:
    """Return the first places in [low, high) where it holds, as it then does up to high."""
    while bool((low < high).any()):
        middle = (low + high) // 2
        found = holds(middle) | (low >= high)
        low, high = torch.where(found, low, middle + 1), torch.where(found, middle, high)
    return low


class _Exact:
    """The float64 scores of one tile: a few of them, or all where many are asked for."""

    def __init__(self, images: Tensor, texts: Tensor) -> None:
        self._images, self._texts = images, texts
        self._all: Tensor | None = None

    def at(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Return the scores at these places, float64."""
        many = len(rows) > CROWDED * len(self._images) * len(self._texts)
        if many and self._all is None:
            self._all = self._images.double() @ self._texts.double().T
        if self._all is not None:
            return self._all[rows, columns]
        return _scores_of(self._images, self._texts, rows, columns)

    def flipped(self, columns: Tensor, rows: Tensor) -> Tensor:
        """Return the scores at these places of the transposed tile."""
        return self.at(rows, columns)


def _scores_of(images: Tensor, texts: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return the float64 scores of some pairs of rows."""
    out = torch.empty(len(rows), dtype=torch.float64, device=images.device)
    for k in range(0, len(rows), GATHERED):
        chosen = slice(k, k + GATHERED)
        out[chosen] = (images[rows[chosen]].double() * texts[columns[chosen]].double()).sum(1)
    return out


def _bars(query: Tensor, score: Tensor, num_queries: int, tie: float) -> _Bars:
    """Sort one direction's right pairs by query and score, and compare them among themselves."""
    order = score.argsort(descending=True, stable=True)
    order = order[query[order].argsort(stable=True)]
    query, bar = query[order], score[order]
    counts = query.bincount(minlength=num_queries)
    first = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    own = torch.arange(len(query), device=query.device)
    start = _first_where(lambda at: bar[at] - bar <= tie, first[query], own)
    stop = start.bincount(minlength=len(query)).cumsum(0)  # ties are mutual
    zeros = torch.zeros(2, len(query), dtype=torch.int64, device=query.device)
    return _Bars(query, bar, first, start - first[query], stop - start, zeros)


def _longest(features: Tensor) -> float:
    return max(float(rows.double().norm(dim=1).max()) for rows in features.split(GATHERED))


def _about(images: Tensor, texts: Tensor) -> Tensor:
    """Return the float32 scores (a, b), off by at most `_rounding` for unit features."""
    parts = zip(images.float().split(SUMMED, 1), texts.float().split(SUMMED, 1), strict=True)
    first, *others = parts
    scores: Tensor = first[0] @ first[1].T
    for image_part, text_part in others:
        scores += image_part @ text_part.T
    return scores


def _rounding(width: int) -> float:
    """Bound the error of `_about` for unit features, whatever the order of its sums.

    Each product passes at most SUMMED additions within its part and one a part after it, each off
    by a factor of at most 1 + 2**-24; by Cauchy and Schwarz the sizes of the products add up to 1
    at most. The rest is for rounding features and bars to float32.
    """
    return 1.1 * (min(width, SUMMED) + width // SUMMED + 8) * ROUNDOFF


@contextlib.contextmanager
def _whole_precision() -> Iterator[None]:
    """Multiply float32 as float32, whatever the process has allowed (TF32, bfloat16)."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
