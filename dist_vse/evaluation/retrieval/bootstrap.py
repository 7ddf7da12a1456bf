"""Bootstrap confidence intervals (Efron, https://doi.org/10.1214/aos/1176344552).

Images are drawn with replacement, and each brings all of its captions: the captions of one image
are no independent queries. The galleries stay as they are.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dist_vse.evaluation.retrieval.metrics import RECALLS
from dist_vse.evaluation.retrieval.ranks import Ranks

LEVEL = 0.95
DRAWN = 64  # resamples at a time


def intervals(
    tasks: Sequence[tuple[Ranks, Ranks, Tensor]],
    *,
    recalls: Sequence[int] = RECALLS,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, list[float]]:
    """Return the 95 % interval [low, high] of every metric that is a mean over queries.

    A task holds the ranks of its images and texts, and each text's image row; the metrics are
    means over the tasks. Medians have no interval: they are no means.
    """
    rng = np.random.default_rng(seed)
    drawn: dict[str, NDArray[np.float64]] = {}
    for i2t, t2i, image_of_text in tasks:
        for name, values in _resample(i2t, t2i, image_of_text.cpu(), recalls, resamples, rng):
            drawn[name] = drawn.get(name, 0.0) + values / len(tasks)
    drawn["rsum"] = np.sum([drawn[f"{way}_r{k}"] for way in ("i2t", "t2i") for k in RECALLS], 0)
    tail = (1 - LEVEL) / 2
    return {name: np.quantile(v, [tail, 1 - tail]).tolist() for name, v in drawn.items()}


def _resample(
    i2t: Ranks,
    t2i: Ranks,
    image_of_text: Tensor,
    recalls: Sequence[int],
    resamples: int,
    rng: np.random.Generator,
) -> list[tuple[str, NDArray[np.float64]]]:
    """Return every metric's values over the resamples of one task."""
    n = len(i2t.better)
    names, columns = [], []
    for way, ranks, scale in (("i2t", i2t, None), ("t2i", t2i, image_of_text.numpy())):
        values = {f"{way}_r{k}": 100 * ranks.hits(k) for k in sorted({*RECALLS, *recalls})}
        values |= {f"{way}_map": 100 * ranks.precision, f"{way}_meanr": ranks.expected()}
        for name, value in values.items():
            names.append(name)
            columns.append(np.bincount(scale, value, n) if scale is not None else value.numpy())
    sums = np.stack(columns, 1)  # (n, metrics), over each image's queries
    captions = np.bincount(image_of_text.numpy(), minlength=n)
    queries = np.stack([captions if name.startswith("t2i") else np.ones(n) for name in names], 1)
    parts = []
    for start in range(0, resamples, DRAWN):
        rows = rng.integers(0, n, (min(DRAWN, resamples - start), n))
        weights = np.stack([np.bincount(row, minlength=n) for row in rows]).astype(float)
        # einsum adds in one order, where BLAS depends on its threads.
        total = np.einsum("rn,nm->rm", weights, sums) / np.einsum("rn,nm->rm", weights, queries)
        parts.append(total)
    return list(zip(names, np.concatenate(parts).T, strict=True))
