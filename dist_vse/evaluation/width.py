"""A model at a smaller width: the first numbers of its features, of unit length again.

For models that `loss.widths` has trained (https://arxiv.org/abs/2205.13147).
"""

from collections.abc import Iterator

from torch import Tensor, nn

from dist_vse.common.errors import UserError
from dist_vse.evaluation.evaluate import Encoders
from dist_vse.losses.nested import first_features


class AtWidth:
    """Encoders whose features end after `width` numbers; None changes nothing."""

    def __init__(self, model: Encoders, width: int | None) -> None:
        self._model, self._width = model, width

    def encode_images(self, images: Tensor) -> Tensor:
        """Return unit features (b, width)."""
        return first_features(self._model.encode_images(images), self._width)

    def encode_texts(self, tokens: Tensor) -> Tensor:
        """Return unit features (b, width)."""
        return first_features(self._model.encode_texts(tokens), self._width)

    def modules(self) -> Iterator[nn.Module]:
        """Yield the model's modules."""
        return self._model.modules()

    def eval(self) -> nn.Module:
        """Put the model into eval mode."""
        return self._model.eval()


def check_width(width: int | None, embed_dim: int) -> None:
    """Raise UserError for a width that features of `embed_dim` numbers do not have."""
    if width is not None and not 1 <= width <= embed_dim:
        raise UserError(
            f"--width ({width}) must be from 1 to {embed_dim}, the size of the embeddings"
        )
