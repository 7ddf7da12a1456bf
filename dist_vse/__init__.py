"""Train visual-semantic embeddings with exact, very large batches."""

from typing import TYPE_CHECKING

from dist_vse.common.version import __version__

if TYPE_CHECKING:
    from dist_vse.tools.export.load import Embedder

__all__ = ["__version__", "load"]


def load(folder: str, device: str = "cpu") -> "Embedder":
    """Load a model that `dist-vse export` wrote; it has `encode_images` and `encode_texts`."""
    from dist_vse.common.extras import needs_train

    with needs_train("dist_vse.load"):
        from dist_vse.tools.export.load import load as load_export

        return load_export(folder, device)
