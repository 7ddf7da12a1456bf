"""Stored vectors in the place of a trunk: what frozen encoders put out before.

Images come as vectors from the shards (`data.vectors`). Captions are looked up in a folder that
holds `captions.txt`, one caption a line, and `vectors.npy`, float32 (n, d), a row for each.

Shape letters: b rows of a batch, n captions of the folder, d numbers of a vector.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dist_vse.common.errors import UserError
from dist_vse.common.reading import BadFileError, read_array, read_text
from dist_vse.config import ImageConfig, TextConfig
from dist_vse.models.tokenizer import Vocabulary

CAPTIONS, VECTORS = "captions.txt", "vectors.npy"
_MAX_BYTES = 1 << 37  # of all captions: a billion of a hundred letters


class StoredVectors(nn.Module):
    """The trunk of images that come as vectors."""

    def __init__(self, dim: int) -> None:
        """Take vectors of `dim` numbers."""
        super().__init__()
        self.dim = dim

    def forward(self, vectors: Tensor) -> Tensor:
        """Return float32 (b, dim) as it is."""
        return vectors


class CaptionVectors(nn.Module):
    """The trunk of captions that are looked up."""

    table: Tensor

    def __init__(self, table: Tensor, pad_id: int) -> None:
        """Keep the vectors float32 (n, d); they are no part of a checkpoint."""
        super().__init__()
        self.dim, self.pad_id = table.shape[1], pad_id
        self.register_buffer("table", table, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return float32 (b, d) for the captions' rows, int64 (b, 1)."""
        return self.table[tokens[:, 0]]


class CaptionTokenizer:
    """Captions to their row in a folder of vectors."""

    vocabulary: list[str] | None = None
    pad_id = 0  # no row is ever filled up: each caption has one token

    def __init__(self, folder: str | Path, max_tokens: int) -> None:
        """Read the captions.

        Raises UserError if the folder holds none.
        """
        self.folder = Path(folder)
        self._rows = {caption: row for row, caption in enumerate(read_captions(self.folder))}
        self.vocab_size = len(self._rows)

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """Return int64 (b, 1).

        Raises UserError for a caption without a vector.
        """
        try:
            rows = [[self._rows[caption]] for caption in captions]
        except KeyError as error:
            raise UserError(
                f"{self.folder / CAPTIONS}: has no caption {error.args[0]!r}; write the vectors of "
                "all captions, or use another model.text.kind"
            ) from error
        return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), 1)


def read_captions(folder: Path) -> list[str]:
    """Return the captions of a folder. Raises UserError if it holds none."""
    try:
        text = read_text(folder / CAPTIONS, max_bytes=_MAX_BYTES)
    except BadFileError as error:
        raise UserError(
            f"{folder / CAPTIONS}: can't be read ({error}); model.text.weights is a "
            f"folder with {CAPTIONS} and {VECTORS} where model.text.kind=vectors"
        ) from error
    return text.removesuffix("\n").split("\n")


def build_stored_vectors(config: ImageConfig, grad_checkpointing: bool) -> StoredVectors:
    """Build the trunk of stored vectors of `model.image.size` numbers."""
    return StoredVectors(config.size)


def build_caption_vectors(
    config: TextConfig, vocabulary: Vocabulary, grad_checkpointing: bool
) -> CaptionVectors:
    """Load the vectors of captions.

    Raises UserError if they can't be read, or are not one row a caption.
    """
    path = Path(str(config.weights)) / VECTORS
    try:
        table = read_array(path)
    except BadFileError as error:
        raise UserError(f"{path}: can't be read ({error}); write it again") from error
    with np.errstate(over="ignore"):  # a number too large for float32 is not finite, either
        table = table.astype(np.float32)
    if (
        table.ndim != 2
        or not table.size
        or len(table) != vocabulary.vocab_size
        or not np.isfinite(table).all()
    ):
        raise UserError(
            f"{path}: holds an array of shape {table.shape}, and must hold {vocabulary.vocab_size} "
            f"rows of finite numbers, one for each line of {CAPTIONS}; write both again"
        )
    return CaptionVectors(torch.from_numpy(table), vocabulary.pad_id)
