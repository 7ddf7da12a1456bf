"""Train visual-semantic embeddings with exact, very large batches.

What a training loop of your own needs has its name here, and is imported at first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dist_vse.common.errors import UserError
from dist_vse.common.version import __version__

if TYPE_CHECKING:
    from dist_vse.data.dataset import PairStream
    from dist_vse.evaluation.retrieval.metrics import retrieval_metrics
    from dist_vse.losses.module import GlobalContrastiveLoss
    from dist_vse.losses.options import LossOptions
    from dist_vse.tools.export.load import Embedder
    from dist_vse.training.cached_step import cached_step

__all__ = [
    "GlobalContrastiveLoss",
    "LossOptions",
    "PairStream",
    "UserError",
    "__version__",
    "cached_step",
    "load",
    "retrieval_metrics",
]

_HOMES = {
    "GlobalContrastiveLoss": "dist_vse.losses.module",
    "LossOptions": "dist_vse.losses.options",
    "PairStream": "dist_vse.data.dataset",
    "cached_step": "dist_vse.training.cached_step",
    "retrieval_metrics": "dist_vse.evaluation.retrieval.metrics",
}


def load(folder: str, device: str = "cpu") -> "Embedder":
    """Load a model that `dist-vse export` wrote; it has `encode_images` and `encode_texts`."""
    from dist_vse.common.extras import needs_train

    with needs_train("dist_vse.load"):
        from dist_vse.tools.export.load import load as load_export

        return load_export(folder, device)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dist_vse.common.extras import needs_train

    with needs_train(f"dist_vse.{name}"):
        return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
