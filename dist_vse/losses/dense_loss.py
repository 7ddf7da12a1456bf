"""A loss of one process by its name: what `global_loss` must equal on any number of ranks."""

import math

import torch
from torch import Tensor

from dist_vse.losses.near_pairs import ROUNDINGS
from dist_vse.losses.options import LossOptions
from dist_vse.losses.reference import DensePairs
from dist_vse.losses.registry import find_loss


# More than eight parameters: a batch's features and ids, each of which may be left out.
def dense_loss(
    name: str,
    image_features: Tensor,
    text_features: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    options: LossOptions | None = None,
    *,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    negatives: Tensor | None = None,
    negative_ids: Tensor | None = None,
    teacher: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Return the loss called `name` of N pairs: features (N, d), log_scale and bias (1,), ids (N,).

    Negatives are features (M, d) of texts without an image, with ids (M,). A teacher's features of
    images and captions (N, d') judge which pairs `ignore_above` leaves out.

    Arguments as for `global_loss`, which equals it on any number of ranks.
    """
    options = options or LossOptions()
    if options.temperature is not None:
        log_scale = torch.full_like(log_scale, -math.log(options.temperature))
    s = image_features @ text_features.T  # (N, N)
    positive, negative = pair_masks(len(s), image_ids, text_ids, options.duplicates, s.device)
    if negatives is not None:
        s = torch.cat([s, image_features @ negatives.T], 1)  # (N, N + M)
        false = torch.ones(len(s), len(negatives), dtype=torch.bool, device=s.device)
        positive = torch.cat([positive, ~false], 1)
        if text_ids is not None and negative_ids is not None:
            false = text_ids.view(-1, 1) != negative_ids.view(1, -1)
        negative = torch.cat([negative, false], 1)
    if options.ignore_above is not None:
        judged = s.detach() if teacher is None else teacher[0] @ teacher[1].T
        near = near_pairs(judged, options.ignore_above)
        near = torch.nn.functional.pad(near, (0, s.shape[1] - near.shape[1]))
        negative = negative & ~(near & ~positive)
    pairs = DensePairs(
        s, log_scale.exp(), bias, positive, negative, options.margin, options.hard_negative_weight
    )
    loss: Tensor = find_loss(name).dense_loss(pairs)
    return loss


def near_pairs(s: Tensor, margin: float) -> Tensor:
    """Return which pairs are closer than a margin to the image's or the caption's own pair.

    Or above it. s are the cosines (N, N), or (N, N + M) with texts that have no own pair.
    """
    limits = s.diagonal() - margin - ROUNDINGS * torch.finfo(s.dtype).eps  # (N,)
    of_columns = torch.nn.functional.pad(limits, (0, s.shape[1] - len(s)), value=torch.inf)
    return s > torch.minimum(limits.unsqueeze(1), of_columns)


def pair_masks(
    count: int, image_ids: Tensor | None, text_ids: Tensor | None, duplicates: str, on: torch.device
) -> tuple[Tensor, Tensor]:
    """Return which pairs (N, N) are positives and which are negatives.

    Duplicates are pairs i != j of equal image or caption id: `mask` makes them neither, and `keep`
    leaves them negatives.
    """
    own = torch.eye(count, dtype=torch.bool, device=on)
    if duplicates == "keep":
        return own, ~own
    same = own.clone()
    for ids in (image_ids, text_ids):
        if ids is not None:
            same |= ids.view(-1, 1) == ids.view(1, -1)
    return (same if duplicates == "positive" else own), ~same
