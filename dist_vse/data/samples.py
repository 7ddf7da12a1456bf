"""The batches that the stream yields, and how the samples of a stream become tensors.

Shapes: k samples of one stream, b on this rank, m negatives, h = w pixels, l tokens, L streams,
W ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Tokenizer(Protocol):
    """Captions to token ids. Must be picklable, because workers call it."""

    @property
    def pad_id(self) -> int:
        """The token that fills short rows."""

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """Return int64 (n, l), padded to the longest caption."""


class Placement(NamedTuple):
    """Which of the processes that share the data this one is."""

    rank: int = 0
    world_size: int = 1


ONE_PROCESS = Placement()


@dataclass(frozen=True)
class Skipped:
    """A sample that could not be used."""

    key: str
    shard: str
    reason: str
    epoch: int

    def __str__(self) -> str:
        return f"{self.key} in {self.shard}: {self.reason}"


@dataclass(frozen=True)
class Part:
    """One stream's share of a batch."""

    images: Tensor | None  # uint8 (k, 3, h, w) or float32 (k, n); None in a shared buffer
    tokens: NDArray[np.int64]  # (k, l)
    image_ids: NDArray[np.int64]  # (k,)
    text_ids: NDArray[np.int64]  # (k,)
    origin: NDArray[np.int64]  # (k, 2)
    state: NDArray[np.int64]  # (2,)
    skipped: tuple[Skipped, ...]
    negatives: NDArray[np.int64] | None  # tokens (m, l)
    negative_ids: NDArray[np.int64]  # (m,)


@dataclass(frozen=True)
class Batch:
    """This rank's rows of a global batch, in stream order."""

    images: Tensor
    """uint8 (b, 3, h, w), RGB; or float32 (b, n), stored vectors."""
    tokens: Tensor
    """int64 (b, l), padded to the longest row."""
    image_ids: Tensor
    """int64 (b,): equal for equal image files."""
    text_ids: Tensor
    """int64 (b,): equal for equal captions."""
    origin: Tensor
    """int64 (b, 2): how often the data set was read before (its epoch if the weight is 1), and the
    sample's number, counted over all data sets."""
    state: NDArray[np.int64]
    """(L/W, 2): epoch and next position of this rank's streams after this batch."""
    skipped: tuple[Skipped, ...]
    """Bad samples skipped before this batch was full."""
    negatives: Tensor | None = None
    """int64 (m, l): texts that belong to no image, where `data.negatives` asks for some."""
    negative_ids: Tensor | None = None
    """int64 (m,): equal for equal texts, captions too."""
    teacher: tuple[Tensor, Tensor] | None = None
    """float32 (b, d') each: what `loss.teacher` made of the images and of the captions."""

    @property
    def num_negatives(self) -> int:
        """Texts of this rank that belong to no image (m)."""
        return 0 if self.negatives is None else len(self.negatives)


def join_parts(parts: Sequence[Part], images: Tensor | None, pad_id: int) -> Batch:
    """Join the parts of the rank's streams; tokens are padded to the longest of all.

    `images` holds those of the whole batch, uint8 (b, 3, h, w), if the parts hold none.
    """
    if images is None:
        images = torch.cat([part.images for part in parts if part.images is not None])
    false = [part.negatives for part in parts if part.negatives is not None]
    texts = torch.from_numpy(_pad([*(part.tokens for part in parts), *false], pad_id))
    rows = sum(len(part.tokens) for part in parts)
    ids = torch.from_numpy(np.concatenate([part.negative_ids for part in parts]))
    return Batch(
        images=images,
        tokens=texts[:rows],
        image_ids=torch.from_numpy(np.concatenate([part.image_ids for part in parts])),
        text_ids=torch.from_numpy(np.concatenate([part.text_ids for part in parts])),
        origin=torch.from_numpy(np.concatenate([part.origin for part in parts])),
        state=np.stack([part.state for part in parts]),
        skipped=tuple(skipped for part in parts for skipped in part.skipped),
        negatives=texts[rows:] if false else None,
        negative_ids=ids if false else None,
    )


def _pad(rows: Sequence[NDArray[np.int64]], pad_id: int) -> NDArray[np.int64]:
    length = max(array.shape[1] for array in rows)
    fill = [np.pad(a, ((0, 0), (0, length - a.shape[1])), constant_values=pad_id) for a in rows]
    return np.concatenate(fill)
