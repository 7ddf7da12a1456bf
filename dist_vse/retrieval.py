"""Image-text retrieval: ranks, recalls, their chance level, and the nearest neighbours.

Scores are computed tile by tile and never held as a whole. They are float64, so that equal
features have equal scores in every tile: what is closer than rounding is a tie, and a tie is
counted as the mean over its random orders. A model that has collapsed therefore scores chance.

Shapes: n images, m texts, d embedding, q queries.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dist_vse.errors import UserError

RECALLS = (1, 5, 10)
TIE = 1e-12
"""Scores of unit features this close are equal: float64 sums them to about d * 1e-16."""
COLLAPSED = 1e-5
"""Total variance of unit features (1 at most) below which they carry no direction."""


@dataclass(frozen=True)
class Ranks:
    """Where the right answers of every query stand; int64 (q,) each.

    Wrong answers that score `better` than the best right one, wrong ones `tied` with it, and
    the `right` ones at that same score (itself included). The rank is 1 + better + the wrong
    ones that come first in a random order of the tie.
    """

    better: Tensor
    tied: Tensor
    right: Tensor

    def reached(self, k: int) -> float:
        """Return the expected share of queries with a right answer among the first k."""
        places = k - self.better  # left for the tie
        missed = torch.ones_like(places, dtype=torch.float64)
        for i in range(int(self.right.max())):  # all right ones come after the places
            total = (self.tied + self.right - i).double()
            after = (total - places.clamp_min(0)).clamp_min(0) / total.clamp_min(1)
            missed = torch.where(i < self.right, missed * after, missed)
        return float((1 - missed).mean())

    def mean(self) -> float:
        """Return the expected mean rank."""
        return float((1 + self.better + self.tied.double() / (self.right + 1)).mean())

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
        return float(worst.double().mean()), float(best.double().mean())

    def _first(self, share: float) -> int:
        low, high = 1, int((self.better + self.tied).max()) + 1
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.reached(middle) >= share else (middle + 1, high)
        return low


def retrieval_metrics(
    image_features: Tensor, text_features: Tensor, image_of_text: Tensor
) -> dict[str, float]:
    """Score both directions: (n, d) images, (m, d) texts, each text's image row (m,).

    An image may have any number of texts; its rank is that of its best-placed one, as in VSE++
    (https://arxiv.org/abs/1707.05612). Returns, for `i2t` and `t2i`, `_r1 _r5 _r10` in percent
    and `_medr _meanr` (1 is best); `rsum`, the six recalls' sum, with `rsum_min` and `rsum_max`
    if every tie went against or for the model; and `tied`, the percentage of queries whose rank
    a tie leaves open. Raises UserError for features that are not finite and for shapes or
    rows that do not fit.
    """
    return _summary(*rank_all(image_features, text_features, image_of_text))


def chance(image_of_text: Tensor, num_images: int) -> dict[str, float]:
    """Return what `retrieval_metrics` is expected to be for random ranks; exact.

    A random ranker is one that ties everything.
    """
    _check_rows(image_of_text, num_images)
    captions = image_of_text.bincount()  # (n,)
    one = torch.ones_like(image_of_text)
    i2t = Ranks(torch.zeros_like(captions), len(image_of_text) - captions, captions)
    t2i = Ranks(torch.zeros_like(one), one * (len(captions) - 1), one)
    metrics = _summary(i2t, t2i)
    return {key: metrics[key] for key in metrics if key not in ("rsum_min", "rsum_max", "tied")}


@torch.no_grad()
def rank_all(
    image_features: Tensor, text_features: Tensor, image_of_text: Tensor, *, tile: int = 1024
) -> tuple[Ranks, Ranks]:
    """Rank every image's texts (n,) and every text's images (m,) in one pass over the tiles.

    Needs memory for a few (tile, tile) and (tile, d) blocks. Raises UserError as
    `retrieval_metrics` does.
    """
    _check_features(image_features, text_features)
    _check_rows(image_of_text, len(image_features))
    if len(image_of_text) != len(text_features):
        raise UserError(
            f"image_of_text has {len(image_of_text)} rows for {len(text_features)} texts; "
            "give the row of its image for each text"
        )
    image_of_text = image_of_text.to(image_features.device)
    n, m = len(image_features), len(text_features)
    tie = TIE * float(_longest(image_features) * _longest(text_features))
    own = _own_scores(image_features, text_features, image_of_text, tile)  # (m,)
    best = torch.full((n,), -torch.inf, dtype=torch.float64, device=own.device)
    best = best.scatter_reduce(0, image_of_text, own, "amax")  # (n,)
    right = torch.zeros(n, dtype=torch.int64, device=own.device)
    right.index_add_(0, image_of_text, (own >= best[image_of_text] - tie).long())

    counts_i = torch.zeros(2, n, dtype=torch.int64, device=own.device)  # better; better or tied
    counts_t = torch.zeros(2, m, dtype=torch.int64, device=own.device)
    for j in range(0, m, tile):
        texts = text_features[j : j + tile].double().T  # (d, tile)
        column = torch.arange(texts.shape[1], device=own.device)
        for i in range(0, n, tile):
            scores = image_features[i : i + tile].double() @ texts  # (tile, tile)
            row = image_of_text[j : j + tile] - i
            inside = (row >= 0) & (row < len(scores))
            scores[row[inside], column[inside]] = -torch.inf  # right answers beat nobody
            rows, columns = slice(i, i + tile), slice(j, j + tile)
            counts_i[:, rows] += _count(scores, best[rows, None], tie, dim=1)
            counts_t[:, columns] += _count(scores, own[columns], tie, dim=0)
    i2t = Ranks(counts_i[0], counts_i[1] - counts_i[0], right)
    t2i = Ranks(counts_t[0], counts_t[1] - counts_t[0], torch.ones_like(image_of_text))
    return i2t, t2i


@torch.no_grad()
def top_k(queries: Tensor, gallery: Tensor, k: int, *, tile: int = 1024) -> tuple[Tensor, Tensor]:
    """Return the k best scores, float64, and rows of the gallery for every query: (q, k) each.

    Best first, equal scores by lowest row; fewer than k where the gallery is smaller.
    """
    if k < 1:
        raise UserError(f"k ({k}) must be at least 1")
    k = min(k, len(gallery))
    scores = torch.empty(len(queries), k, dtype=torch.float64, device=queries.device)
    rows = torch.empty(len(queries), k, dtype=torch.int64, device=queries.device)
    for i in range(0, len(queries), tile):
        block = queries[i : i + tile].double()
        best = block.new_empty(len(block), 0)
        where = rows.new_empty(len(block), 0)
        for j in range(0, len(gallery), tile):
            found = block @ gallery[j : j + tile].double().T  # (tile, tile)
            place = torch.arange(j, j + found.shape[1], device=rows.device).expand_as(found)
            best, order = torch.cat([best, found], 1).sort(dim=1, descending=True, stable=True)
            best, where = best[:, :k], torch.cat([where, place], 1).gather(1, order[:, :k])
        scores[i : i + tile], rows[i : i + tile] = best, where
    return scores, rows


def check_features(image_features: Tensor, text_features: Tensor) -> list[str]:
    """Return a warning for each side whose unit features have collapsed to one direction."""
    warnings = []
    for name, features in (("image", image_features), ("text", text_features)):
        variance = 1 - float(features.double().mean(0).square().sum())
        if len(features) > 1 and variance < COLLAPSED:
            warnings.append(
                f"the {name} features have collapsed (variance {max(variance, 0):.1e} of 1): every "
                f"{name} looks the same to the model; start from a smaller learning rate, a "
                "warm-up, or a loss that is not the hardest negative's"
            )
    return warnings


def _summary(i2t: Ranks, t2i: Ranks) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for name, ranks in (("i2t", i2t), ("t2i", t2i)):
        metrics |= {f"{name}_r{k}": 100 * ranks.reached(k) for k in RECALLS}
        metrics |= {f"{name}_medr": ranks.median(), f"{name}_meanr": ranks.mean()}
    bounds = [ranks.bounds(k) for ranks in (i2t, t2i) for k in RECALLS]
    open_ranks = torch.cat([i2t.tied, t2i.tied]) > 0
    return metrics | {
        "rsum": sum(metrics[f"{name}_r{k}"] for name in ("i2t", "t2i") for k in RECALLS),
        "rsum_min": 100 * sum(low for low, _ in bounds),
        "rsum_max": 100 * sum(high for _, high in bounds),
        "tied": 100 * float(open_ranks.double().mean()),
    }


def _own_scores(
    image_features: Tensor, text_features: Tensor, image_of_text: Tensor, tile: int
) -> Tensor:
    """Return every text's score with its own image, float64 (m,)."""
    parts = []
    for j in range(0, len(text_features), tile):
        images = image_features[image_of_text[j : j + tile]].double()
        parts.append((images * text_features[j : j + tile].double()).sum(1))
    return torch.cat(parts)


def _count(scores: Tensor, bar: Tensor, tie: float, dim: int) -> Tensor:
    """Count the scores better than the bar, and those better than it or tied: (2, queries)."""
    better, reaching = scores > bar + tie, scores >= bar - tie
    return torch.stack([better.count_nonzero(dim), reaching.count_nonzero(dim)])


def _longest(features: Tensor) -> Tensor:
    longest: Tensor = torch.linalg.vector_norm(features, dim=1, dtype=torch.float64).max()
    return longest


def _check_features(image_features: Tensor, text_features: Tensor) -> None:
    shapes = tuple(image_features.shape), tuple(text_features.shape)
    if image_features.ndim != 2 or text_features.ndim != 2 or shapes[0][1] != shapes[1][1]:
        raise UserError(
            f"image and text features are {shapes[0]} and {shapes[1]}; give (n, d) and (m, d)"
        )
    for name, features in (("image", image_features), ("text", text_features)):
        bad = (~features.isfinite()).any(1).nonzero()
        if len(bad):
            raise UserError(
                f"{name} features are not finite: {len(bad)} of {len(features)} rows, the first is "
                f"row {int(bad[0])}; the model diverged: take an earlier checkpoint or a lower "
                "learning rate"
            )


def _check_rows(image_of_text: Tensor, num_images: int) -> None:
    """Check that every image has a text and every text an image."""
    if len(image_of_text) == 0:
        raise UserError("nothing to retrieve: there is no text; evaluate a split with samples")
    if int(image_of_text.min()) < 0:
        raise UserError(f"image_of_text holds {int(image_of_text.min())}; rows start at 0")
    captions = image_of_text.bincount(minlength=num_images)
    if len(captions) > num_images:
        raise UserError(
            f"image_of_text holds {len(captions) - 1}, but there are {num_images} images"
        )
    bare = (captions == 0).nonzero()
    if len(bare):
        raise UserError(
            f"{len(bare)} of {len(captions)} images have no text, the first is row {int(bare[0])}; "
            "leave them out or caption them"
        )
