"""The nearest neighbours of each query, exactly.

Scores are float64, so that equal features have equal scores in every tile.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dist_vse.common.errors import UserError


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


def neighbours(features: Tensor, rows: Sequence[int], k: int) -> list[list[tuple[int, float]]]:
    """Return for each of some rows its k nearest others of the features (n, d), with the scores.

    Features of unit length are compared by their cosine; a row is no neighbour of itself.
    """
    scores, found = top_k(features[list(rows)], features, k + 1)
    others = [
        [pair for pair in zip(near, similar, strict=True) if pair[0] != row]
        for row, near, similar in zip(rows, found.tolist(), scores.tolist(), strict=True)
    ]
    return [each[:k] for each in others]
