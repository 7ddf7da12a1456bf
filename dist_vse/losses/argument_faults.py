"""What is wrong with a rank's arguments to a loss, if anything is: one sentence.

Shapes: b rows (pairs) of this rank, m negatives, d embedding, d' the teacher's.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dist_vse.common.errors import UserError
from dist_vse.losses.registry import find_loss

Features = tuple[Tensor, Tensor, Tensor | None]
"""Of images and texts (b, d), and of negatives (m, d) if there are any."""


def fault_of_name(name: str) -> str | None:
    """Say why there is no such loss."""
    try:
        find_loss(name)
    except UserError as error:
        return str(error)
    return None


def fault_of_features(
    name: str,
    features: Features,
    *,
    ids: Sequence[Tensor],
    negative_ids: Tensor | None,
    teacher: tuple[Tensor, Tensor] | None,
    prefetched: int,
) -> str | None:
    """Say what is wrong with features, or with what belongs to them, for the loss of that name.

    ids (b,) each, negative_ids (m,), the teacher's features (b, d') each; so many rows of texts
    were `prefetched`.
    """
    images, texts, negatives = features
    if images.ndim != 2 or images.shape != texts.shape:
        return (
            f"image_features {tuple(images.shape)} and text_features {tuple(texts.shape)} must "
            "have one shape (rows, embedding)"
        )
    if not (images.is_floating_point() and texts.is_floating_point()):
        return (
            f"image_features ({images.dtype}) and text_features ({texts.dtype}) must be of a "
            "floating type"
        )
    rows = len(images)
    if any(x.shape != (rows,) or x.dtype != torch.int64 for x in ids):
        shapes = ", ".join(f"{x.dtype} {tuple(x.shape)}" for x in ids)
        return f"ids ({shapes}) must be int64, one a row ({rows} rows)"
    if negatives is not None:
        if not find_loss(name).takes_negatives:
            return f"loss.name={name} takes no negatives; choose another, or leave them out"
        if negatives.ndim != 2 or negatives.shape[1] != images.shape[1]:
            return f"negatives {tuple(negatives.shape)} must be (number, embedding)"
        own = negative_ids
        if own is not None and (own.shape != negatives.shape[:1] or own.dtype != torch.int64):
            return f"negative_ids {own.dtype} {tuple(own.shape)} must be int64, one a negative"
    if teacher is not None and (fault := _fault_of_teacher(teacher, rows)):
        return fault
    if prefetched not in (0, rows):
        return f"{prefetched} rows were prefetched, but the loss is given {rows}"
    return None


def _fault_of_teacher(teacher: tuple[Tensor, Tensor], rows: int) -> str | None:
    """Say why features are no teacher's of so many pairs."""
    images, captions = teacher
    if images.ndim == 2 and images.shape == captions.shape and len(images) == rows:
        return None
    shapes = f"{tuple(images.shape)} and {tuple(captions.shape)}"
    return f"the teacher's features {shapes} must have one shape ({rows}, its embedding)"
