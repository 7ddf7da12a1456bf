"""What a loss cannot do without: its matrix products and its collectives, and nothing else.

Besides them, what telemetry adds. b rows on a rank, N on all, d embedding.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dist_vse import distributed
from dist_vse.losses.matmul import Matmul
from dist_vse.losses.statistics import closeness
from dist_vse.losses.tiles import CPU_TILE, ranges, tile_shape


def bare_steps(images: Tensor, texts: Tensor) -> dict[str, Callable[[], object]]:
    """Return steps on features (b, d) of this rank, each to be called on all ranks."""
    columns = distributed.gather_rows(texts)
    products = Matmul(images, bf16=False)
    height, width = tile_shape(CPU_TILE, dense=True)
    tile = products.similarities(slice(0, height), columns[:width]).flatten()
    column_grad = torch.zeros_like(columns)
    sums = products.gradient_sums(columns, strip=width)
    statistic = torch.zeros(len(columns))
    everything = torch.zeros(len(images), len(columns))  # there already: new memory costs time
    largest = torch.zeros(len(images))

    def places(*, dense: bool) -> Iterator[tuple[slice, slice]]:
        height, width = tile_shape(CPU_TILE, dense=dense)
        for r in ranges(0, len(images), height):
            for c in ranges(0, len(columns), width):
                yield r, c

    def dense_tiles() -> Iterator[tuple[slice, slice, Tensor]]:
        for r, c in places(dense=True):
            yield r, c, _shaped(tile, r.stop - r.start, c.stop - c.start)

    def multiply(*, keep: bool) -> None:
        kept = []
        for r, c, weights in dense_tiles():
            similarities = products.similarities(r, columns[c])
            if keep:
                kept.append(similarities)
            else:
                products.similarities(r, columns[c])  # again, for the backward
            del similarities
            sums.add(r, c, weights)

    def multiply_once() -> None:
        for r, c in places(dense=False):
            products.similarities(r, columns[c])

    def collectives() -> None:
        distributed.gather_rows(texts)
        distributed.reduce_scatter_rows(column_grad)
        distributed.all_reduce_sum(statistic)

    def telemetry() -> None:
        for r, _, values in dense_tiles():
            torch.maximum(largest[r], values.amax(1), out=largest[r])
        closeness(images), closeness(texts)
        largest.log2().sum(), torch.linalg.vecdot(images, texts).sum()
        distributed.all_reduce_sum(torch.zeros(6, dtype=torch.float64))

    return {
        "bare 4 products": lambda: multiply(keep=False),
        "bare 3 products, S kept": lambda: multiply(keep=True),
        "bare product": multiply_once,
        "bare product, torch.mm": lambda: torch.mm(images, columns.T, out=everything),
        "bare collectives": collectives,
        "bare telemetry": telemetry,
    }


def _shaped(memory: Tensor, height: int, width: int) -> Tensor:
    """Return memory's beginning as a matrix without gaps."""
    return memory[: height * width].view(height, width)
