"""The same search with faiss (https://arxiv.org/abs/2401.08281): a flat index, in float32."""

from torch import Tensor, from_numpy

from dist_vse.common.errors import UserError


def check_faiss() -> None:
    """Raise UserError if faiss is not installed."""
    try:
        import faiss  # noqa: F401
    except ImportError:
        raise UserError("--faiss needs the package faiss; pip install 'dist_vse[faiss]'") from None


def faiss_top_k(queries: Tensor, gallery: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k best inner products (q, k) and their rows in the gallery, best first.

    The whole gallery is looked at; unlike the default, scores that differ by less than float32's
    rounding may change places.
    """
    import faiss

    index = faiss.IndexFlatIP(gallery.shape[1])
    index.add(gallery.float().cpu().numpy())
    scores, rows = index.search(queries.float().cpu().numpy(), min(k, len(gallery)))
    return from_numpy(scores), from_numpy(rows)
