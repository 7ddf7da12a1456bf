"""The metrics of both directions, as one flat dict, and their chance level."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dist_vse.common.errors import UserError
from dist_vse.evaluation.retrieval.checks import check_pairs
from dist_vse.evaluation.retrieval.pairs import own_pairs
from dist_vse.evaluation.retrieval.ranks import Ranks, mean
from dist_vse.evaluation.retrieval.scoring import rank_all

RECALLS = (1, 5, 10)
"""The recalls of rsum; they are always measured."""
_OF_CHANCE = ("rsum_min", "rsum_max", "tied")  # say nothing of a random ranker


def retrieval_metrics(
    image_features: Tensor, text_features: Tensor, image_of_text: Tensor
) -> dict[str, float]:
    """Score both directions: (n, d) images, (m, d) texts, each text's image row (m,).

    `summary` says what is returned. Raises UserError for features that are not finite and for
    shapes or rows that do not fit.
    """
    if len(image_of_text) != len(text_features):
        raise UserError(
            f"image_of_text has {len(image_of_text)} rows for {len(text_features)} texts; "
            "give the row of its image for each text"
        )
    return summary(*rank_all(image_features, text_features, own_pairs(image_of_text)))


def summary(i2t: Ranks, t2i: Ranks, recalls: Sequence[int] = RECALLS) -> dict[str, float]:
    """Summarise the ranks of both directions.

    An image's rank is that of its best-placed text, as in VSE++
    (https://arxiv.org/abs/1707.05612). Returns, for `i2t` and `t2i`, `_rK` of each recall and of
    `RECALLS` and `_map` (mAP@R) in percent, `_medr _meanr` (1 is best); `rsum`, the sum of the
    six recalls at 1, 5 and 10, with `rsum_min` and `rsum_max` if every tie went against or for
    the model; and `tied`, the percentage of queries whose rank a tie leaves open.
    """
    metrics: dict[str, float] = {}
    for name, ranks in (("i2t", i2t), ("t2i", t2i)):
        for k in sorted({*RECALLS, *recalls}):
            metrics[f"{name}_r{k}"] = 100 * ranks.reached(k)
        metrics[f"{name}_map"] = 100 * mean(ranks.precision)
        metrics |= {f"{name}_medr": ranks.median(), f"{name}_meanr": mean(ranks.expected())}
    bounds = [ranks.bounds(k) for ranks in (i2t, t2i) for k in RECALLS]
    return metrics | {
        "rsum": sum(metrics[f"{name}_r{k}"] for name in ("i2t", "t2i") for k in RECALLS),
        "rsum_min": 100 * sum(low for low, _ in bounds),
        "rsum_max": 100 * sum(high for _, high in bounds),
        "tied": 100 * mean(torch.cat([i2t.tied, t2i.tied]) > 0),
    }


def chance(
    pairs: Tensor, num_images: int, num_texts: int, recalls: Sequence[int] = RECALLS
) -> dict[str, float]:
    """Return what `summary` is expected to be for random ranks of these pairs (2, p); exact.

    A random ranker is one that ties everything.
    """
    check_pairs(pairs, num_images, num_texts)
    i2t = _all_tied(pairs[0].bincount(), num_texts)
    t2i = _all_tied(pairs[1].bincount(), num_images)
    metrics = summary(i2t, t2i, recalls)
    return {key: value for key, value in metrics.items() if key not in _OF_CHANCE}


def _all_tied(right: Tensor, gallery: int) -> Ranks:
    """Tie the whole gallery; of a place, `right / gallery` queries expect a right answer."""
    values, where = right.unique(return_inverse=True)
    of_values = [_precision_of_chance(int(r), gallery) for r in values]
    precision = torch.tensor(of_values, dtype=torch.float64)[where]
    return Ranks(torch.zeros_like(right), gallery - right, right, precision)


def _precision_of_chance(right: int, gallery: int) -> float:
    places = torch.arange(1, right + 1, dtype=torch.float64)
    slope = (right - 1) / max(gallery - 1, 1)
    return float(((1 + (places - 1) * slope) / places).sum() / gallery)
