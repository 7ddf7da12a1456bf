"""What a whole checkpoint is taken apart into.

Shape letters: b captions, l tokens, w features.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from dist_vse.models.image import ImageTrunk
from dist_vse.models.text import TextTrunk
from dist_vse.models.vectors import StoredVectors


@dataclass(frozen=True)
class Start:
    """What a checkpoint decides besides its weights."""

    kind: str  # such as CLIPModel
    image_size: int
    squash: bool
    resampling: str
    max_tokens: int
    embed_dim: int
    temperature: float
    bias: float | None  # of SigLIP


class PooledTrunk(nn.Module):
    """A text encoder that pools by itself."""

    def __init__(self, encoder: nn.Module) -> None:
        """Wrap a module that maps tokens (b, l) to (b, w)."""
        super().__init__()
        self.encoder = encoder

    def forward(self, tokens: Tensor) -> Tensor:
        """Return (b, w) for int64 tokens (b, l), padded as the checkpoint's tokenizer does."""
        features: Tensor = self.encoder(tokens)
        return features


@dataclass(frozen=True)
class Parts:
    """The modules of both towers."""

    image_trunk: ImageTrunk | StoredVectors
    text_trunk: TextTrunk | PooledTrunk
    image_head: nn.Module
    text_head: nn.Module
