"""What a loss cannot do without: its matrix products and its collectives, and nothing else.

Beside them, what telemetry adds. b rows on a rank, N on all, d embedding.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dist_vse import distributed
from dist_vse.contrast.products import Products
from dist_vse.contrast.telemetry import closeness
from dist_vse.contrast.tiles import CPU_TILE, ranges


def bare_steps(images: Tensor, texts: Tensor) -> dict[str, Callable[[], object]]:
    """Return steps on features (b, d) of this rank, each to be called on all ranks."""
    columns = distributed.gather_rows(texts)
    products = Products(images, bf16=False)
    width = images.shape[1]
    tile = products.similarities(slice(0, CPU_TILE), columns[:CPU_TILE]).flatten()
    row_grad, column_grad = torch.zeros_like(images), torch.zeros_like(columns)
    turned, turned_grad = images[:CPU_TILE].flatten(), torch.zeros(CPU_TILE * width)
    statistic = torch.zeros(len(columns))
    largest = torch.zeros(len(images))

    def tiles() -> Iterator[tuple[slice, slice, Tensor]]:
        for c in ranges(0, len(columns), CPU_TILE):
            for r in ranges(0, len(images), CPU_TILE):
                yield r, c, _shaped(tile, r.stop - r.start, c.stop - c.start)

    def multiply(similarities: int, gradients: int) -> None:
        for r, c, weights in tiles():
            for _ in range(similarities):
                products.similarities(r, columns[c])
            for _ in range(gradients):
                products.add_gradients(
                    weights, _shaped(turned, width, len(weights)), columns[c],
                    row_grad[r], _shaped(turned_grad, width, weights.shape[1]),
                )  # fmt: skip

    def collectives() -> None:
        distributed.gather_rows(texts)
        distributed.reduce_scatter_rows(column_grad)
        distributed.all_reduce_sum(statistic)

    def telemetry() -> None:
        for r, _, values in tiles():
            torch.maximum(largest[r], values.amax(1), out=largest[r])
        closeness(images), closeness(texts)
        largest.log2().sum(), torch.linalg.vecdot(images, texts).sum()
        distributed.all_reduce_sum(torch.zeros(6, dtype=torch.float64))

    return {
        "bare 4 products": lambda: multiply(2, 1),
        "bare 3 products": lambda: multiply(1, 1),
        "bare product": lambda: multiply(1, 0),
        "bare product, untiled": lambda: products.similarities(slice(None), columns),
        "bare collectives": collectives,
        "bare telemetry": telemetry,
    }


def _shaped(memory: Tensor, height: int, width: int) -> Tensor:
    """Return memory's beginning as a matrix without gaps."""
    return memory[: height * width].view(height, width)
