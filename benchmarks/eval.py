"""Time retrieval on random unit features: by tiles, and VSE++'s way.

The peer is written from the formulas of VSE++'s evaluation (https://arxiv.org/abs/1707.05612),
in NumPy as there: every query is multiplied with the gallery, sorted, and its right answers are
looked up in the order. A second peer multiplies once, keeps the matrix, and sorts its rows.
"""

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.result import Result
from benchmarks.support.memory import status_bytes
from dist_vse.evaluation.retrieval import own_pairs, rank_all
from dist_vse.tools.bench.table import Table

CAPTIONS = 5
MB = 1e6
Ranks = tuple[NDArray[np.int64], NDArray[np.int64]]
Way = Callable[[Tensor, Tensor], Ranks]


def tiles(images: Tensor, texts: Tensor) -> Ranks:
    """Rank as `dist-vse eval` does; ranks count from 0, and none is tied here."""
    i2t, t2i = rank_all(images, texts, own_pairs(torch.arange(len(texts)) // CAPTIONS))
    return i2t.better.numpy(), t2i.better.numpy()


def product_a_query(images: Tensor, texts: Tensor) -> Ranks:
    """Rank as VSE++ does: a product and a sort for each query."""
    x, y = images.numpy(), texts.numpy()
    i2t, t2i = [], []
    for i in range(len(x)):
        i2t.append(_first(x[i : i + 1] @ y.T, range(CAPTIONS * i, CAPTIONS * (i + 1))))
    for i in range(len(x)):
        scores = y[CAPTIONS * i : CAPTIONS * (i + 1)] @ x.T
        t2i += [_first(row, (i,)) for row in scores]
    return np.array(i2t), np.array(t2i)


def one_matrix(images: Tensor, texts: Tensor) -> Ranks:
    """Multiply once, keep the whole matrix, and sort each of its rows and columns."""
    scores = (images @ texts.T).numpy()
    i2t = [_first(row, range(CAPTIONS * i, CAPTIONS * (i + 1))) for i, row in enumerate(scores)]
    t2i = [_first(column, (j // CAPTIONS,)) for j, column in enumerate(scores.T)]
    return np.array(i2t), np.array(t2i)


def _first(scores: NDArray[np.float32], right: "range | tuple[int, ...]") -> int:
    order = np.argsort(scores.ravel())[::-1]
    return min(int(np.where(order == answer)[0][0]) for answer in right)


WAYS: dict[str, Way] = {
    "dist_vse, by tiles": tiles,
    "VSE++, a product a query": product_a_query,
    "one matrix, sorted": one_matrix,
}


def run(args: argparse.Namespace) -> Result:
    """Measure time and memory of every way, and check that they agree."""
    images, texts = _features(args.images, args.dim)
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    peaks = dict.fromkeys(WAYS, 0)
    agreed: Ranks | None = None
    for _ in range(args.repeats):
        for name, way in WAYS.items():
            ranks, took, peak = _measure(way, images, texts)
            seconds[name].append(took)
            peaks[name] = max(peaks[name], peak)
            _check(name, ranks, agreed)
            agreed = agreed or ranks
    median = {name: statistics.median(times) for name, times in seconds.items()}
    ours = median[next(iter(WAYS))]
    title = f"{len(images):,} images x {len(texts):,} captions, d = {args.dim}"
    columns = ("", "seconds", "times ours", "memory beyond the features, MB")
    table = Table(f"{title}, {torch.get_num_threads()} threads", columns)
    for name in WAYS:
        took, megabytes = median[name], peaks[name] / MB
        table.add_row(name, f"{took:.2f}", f"{took / ours:.1f}", f"{megabytes:,.0f}")
    figures = {"images": len(images), "texts": len(texts), "dim": args.dim}
    return Result(figures | {"seconds": seconds, "peak_bytes": peaks}, [table])


def _features(num_images: int, dim: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images, texts = (
        torch.nn.functional.normalize(torch.randn(rows, dim, generator=generator))
        for rows in (num_images, CAPTIONS * num_images)
    )
    return images, texts


def _measure(way: Way, images: Tensor, texts: Tensor) -> tuple[Ranks, float, int]:
    """Return the ranks, the seconds, and by how many bytes the resident memory rose at most."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = status_bytes("/proc/self/status", "VmRSS")
    started = time.perf_counter()
    ranks = way(images, texts)
    took = time.perf_counter() - started
    return ranks, took, status_bytes("/proc/self/status", "VmHWM") - before


def _check(name: str, ranks: Ranks, exact: Ranks | None) -> None:
    """Ranks from float32 may be off where two scores are closer than its rounding, no further."""
    for got, want in zip(ranks, exact or ranks, strict=True):
        off = np.abs(got - want)
        assert off.max() <= 3 and (off > 0).mean() < 0.02, f"{name}: its ranks are others"
