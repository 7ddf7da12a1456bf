"""Train visual-semantic embeddings with exact, very large batches."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dist_vse.export.load import Embedder

__all__ = ["load"]
__version__ = "0.1.0"


def load(folder: str, device: str = "cpu") -> "Embedder":
    """Load a model that `dist-vse export` wrote; it has `encode_images` and `encode_texts`."""
    from dist_vse.export.load import load as load_export  # torch comes with it

    return load_export(folder, device)
