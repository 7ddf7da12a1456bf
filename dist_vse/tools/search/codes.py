"""Embeddings in fewer bits: int8 with a range a dimension, and one bit a dimension.

n rows, q queries, d embedding. Queries stay float32; only what is searched in is coded.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dist_vse.evaluation.evaluate import Embedded
from dist_vse.evaluation.retrieval import top_k

LEVELS = 255  # of an int8 number, from -128 to 127
OVERSAMPLED = 10  # candidates by bits for each answer
ASKED, ANSWERS = 1000, 10  # captions, and images for each, to measure the recall
TILE = 4096  # rows that are decoded at a time


@dataclass(frozen=True)
class Int8Codes:
    """Rows in int8: number k of dimension i stands for low[i] + (k + 128) * step[i]."""

    numbers: Tensor  # int8 (n, d)
    low: Tensor  # float32 (d,)
    step: Tensor  # float32 (d,)

    @staticmethod
    def of(features: Tensor) -> "Int8Codes":
        """Code features (n, d); the range of a dimension is that of these rows (calibration)."""
        low, high = features.aminmax(dim=0)
        step = ((high - low) / LEVELS).clamp(min=torch.finfo(torch.float32).tiny)
        numbers = ((features - low) / step).round_().clamp_(0, LEVELS) - 128
        return Int8Codes(numbers.to(torch.int8), low, step)

    def rows(self, which: slice | Tensor) -> Tensor:
        """Return float32 rows; off by at most half a step in each dimension."""
        return self.low + (self.numbers[which].float() + 128) * self.step


@dataclass(frozen=True)
class Bits:
    """Rows in one bit a dimension: whether it is above the mean of all rows."""

    packed: Tensor  # uint8 (n, d / 8 rounded up)
    center: Tensor  # float32 (d,)

    @staticmethod
    def of(features: Tensor) -> "Bits":
        """Code features (n, d)."""
        center = features.mean(0)
        above = (features > center).numpy()
        return Bits(torch.from_numpy(np.packbits(above, axis=1)), center)

    def signs(self, rows: slice) -> Tensor:
        """Return rows as 1 and -1, float32 (rows, d)."""
        bits = np.unpackbits(self.packed[rows].numpy(), axis=1, count=len(self.center))
        return torch.from_numpy(bits).float().mul_(2).sub_(1)


def int8_top_k(queries: Tensor, codes: Int8Codes, k: int) -> tuple[Tensor, Tensor]:
    """Return the k best cosines, float64, and rows of the codes: (q, k) each, best first.

    Every row is looked at. Equal scores come by lowest row.
    """
    scores = torch.empty(len(queries), 0, dtype=torch.float64)
    rows = torch.empty(len(queries), 0, dtype=torch.int64)
    for start in range(0, len(codes.numbers), TILE):
        tile = slice(start, min(start + TILE, len(codes.numbers)))
        found = queries.double() @ codes.rows(tile).double().T
        scores, rows = _best(scores, rows, found, tile.start, k)
    return scores, rows


def binary_top_k(
    queries: Tensor, centers: Tensor, bits: Bits, codes: Int8Codes, k: int
) -> tuple[Tensor, Tensor]:
    """Return the same from the rows that differ from a query in the fewest bits.

    Ten candidates for each answer (equal distances by lowest row) are scored again by the int8
    codes. Query i's bits say what is above `centers` (q, d): means of its kind, images or texts.
    """
    wanted = (queries > centers).float().mul_(2).sub_(1)  # (q, d)
    agreement = torch.empty(len(queries), 0, dtype=torch.float64)
    rows = torch.empty(len(queries), 0, dtype=torch.int64)
    for start in range(0, len(bits.packed), TILE):
        tile = slice(start, min(start + TILE, len(bits.packed)))
        # d - 2 times the Hamming distance: whole numbers, exact in float32.
        found = (wanted @ bits.signs(tile).T).double()
        agreement, rows = _best(agreement, rows, found, tile.start, OVERSAMPLED * k)
    rows = rows.sort(dim=1).values  # so that equal scores come by lowest row
    scores = torch.stack(
        [codes.rows(of).double() @ query for of, query in zip(rows, queries.double(), strict=True)]
    )
    best, order = scores.sort(dim=1, descending=True, stable=True)
    return best[:, :k], rows.gather(1, order[:, :k])


def coded(found: Embedded, precision: str) -> dict[str, Tensor]:
    """Return a split's features as they are stored, by name.

    float32: `image_features` and `text_features`. int8: the same as numbers of `Int8Codes`, with
    `image_low`, `image_step` and so on. binary: these, and `image_bits` and `image_center` and so
    on, of `Bits`.
    """
    tensors = {}
    for kind, features in (("image", found.image_features), ("text", found.text_features)):
        if precision == "float32":
            tensors[f"{kind}_features"] = features
            continue
        codes = Int8Codes.of(features)
        tensors[f"{kind}_features"] = codes.numbers
        tensors |= {f"{kind}_low": codes.low, f"{kind}_step": codes.step}
        if precision == "binary":
            bits = Bits.of(features)
            tensors |= {f"{kind}_bits": bits.packed, f"{kind}_center": bits.center}
    return tensors


def measured_recall(found: Embedded, precision: str) -> str:
    """Say how many of the float32 answers to some of the split's captions the codes find."""
    number = min(ASKED, len(found.captions))
    chosen = torch.arange(number) * len(found.captions) // number
    queries = found.text_features[chosen]
    codes, exact = Int8Codes.of(found.image_features), top_k(queries, found.image_features, ANSWERS)
    if precision == "int8":
        _, rows = int8_top_k(queries, codes, ANSWERS)
    else:
        centers = found.text_features.mean(0).expand_as(queries)
        _, rows = binary_top_k(queries, centers, Bits.of(found.image_features), codes, ANSWERS)
    share = (rows.unsqueeze(2) == exact[1].unsqueeze(1)).any(1).double().mean()
    images = len(found.keys)
    return (
        f"{100 * float(share):.1f} % of the first {exact[1].shape[1]} images in float32 are found "
        f"({number:,} captions, {images:,} images)"
    )


def _best(scores: Tensor, rows: Tensor, more: Tensor, start: int, k: int) -> tuple[Tensor, Tensor]:
    """Return the k best of those there are and of a tile's (q, tile), which begins at `start`."""
    where = torch.arange(start, start + more.shape[1]).expand(more.shape)
    best, order = torch.cat([scores, more], 1).sort(dim=1, descending=True, stable=True)
    return best[:, :k], torch.cat([rows, where], 1).gather(1, order[:, :k])
