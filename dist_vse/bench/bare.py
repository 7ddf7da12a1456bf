"""What a loss cannot do without: its matrix products and its collectives, and nothing else.

Beside them, what telemetry adds. b rows on a rank, N on all, d embedding.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from dist_vse import distributed
from dist_vse.contrast.telemetry import closeness
from dist_vse.contrast.tiles import CPU_TILE, ranges


def bare_steps(images: Tensor, texts: Tensor) -> dict[str, Callable[[], object]]:
    """Return steps on features (b, d) of this rank, each to be called on all ranks."""
    columns = distributed.gather_rows(texts)
    tile = torch.empty(CPU_TILE, CPU_TILE)
    row_grad, column_grad = torch.zeros_like(images), torch.zeros_like(columns)
    statistic = torch.zeros(len(columns))
    everything = torch.empty(len(images), len(columns))
    largest = torch.zeros(len(images))

    def products(similarities: int, gradients: int) -> None:
        for c in ranges(0, len(columns), CPU_TILE):
            for r in ranges(0, len(images), CPU_TILE):
                out = tile[: r.stop - r.start, : c.stop - c.start]
                for _ in range(similarities):
                    torch.mm(images[r], columns[c].T, out=out)
                for _ in range(gradients):
                    row_grad[r].addmm_(out, columns[c])
                    column_grad[c].addmm_(out.T, images[r])

    def collectives() -> None:
        distributed.gather_rows(texts)
        distributed.reduce_scatter_rows(column_grad)
        distributed.all_reduce_sum(statistic)

    def telemetry() -> None:
        for c in ranges(0, len(columns), CPU_TILE):
            for r in ranges(0, len(images), CPU_TILE):
                maxima = tile[: r.stop - r.start, : c.stop - c.start].amax(1)
                torch.maximum(largest[r], maxima, out=largest[r])
        closeness(images), closeness(texts)
        largest.log2().sum(), torch.linalg.vecdot(images, texts).sum()
        distributed.all_reduce_sum(torch.zeros(6, dtype=torch.float64))

    return {
        "bare 4 products": lambda: products(2, 1),
        "bare 3 products": lambda: products(1, 1),
        "bare product": lambda: products(1, 0),
        "bare product, untiled": lambda: torch.mm(images, columns.T, out=everything),
        "bare collectives": collectives,
        "bare telemetry": telemetry,
    }
