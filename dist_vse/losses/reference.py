"""The losses as their papers write them: dense, on one process. The oracle of the tests.

These hold the whole N x N matrix, so they are for reading, tests and `dist-vse verify`; training
uses `global_loss`. N pairs: row i is image i, column j caption j; s = image_features @
text_features.T. A `positive` mask tells the pairs that belong together (the diagonal, and
duplicates where they count as positives), `negative` those that do not; a pair may be neither.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def dense_loss(
    name: str,
    image_features: Tensor,
    text_features: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    *,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    margin: float = 0.2,
    hardness: float = 1.0,
    duplicates: str = "mask",
) -> Tensor:
    """Return the loss called `name` of N pairs: features (N, d), log_scale and bias (1,), ids (N,).

    Arguments as for `dist_vse.losses.global_loss`, which equals it on any number of ranks.
    """
    s = image_features @ text_features.T  # (N, N)
    positive, negative = pair_masks(len(s), image_ids, text_ids, duplicates, s.device)
    scale = log_scale.exp()
    if name == "convse":
        return convse(s * scale, positive, negative)
    if name == "info_nce":
        return convse(s * scale, positive, negative) / 2  # CLIP, https://arxiv.org/abs/2103.00020
    if name == "siglip":
        return siglip(s * scale + bias, positive, negative)
    if name == "vse0":
        return vse0(s, positive, negative, margin)
    assert name in ("vse++", "convse++"), name
    total = vse_max(s, positive, negative, margin, hardness)
    return total if name == "vse++" else (total * scale / max(1, len(s))).view(())


def pair_masks(
    count: int, image_ids: Tensor | None, text_ids: Tensor | None, duplicates: str, on: torch.device
) -> tuple[Tensor, Tensor]:
    """Return which pairs (N, N) are positives and which are negatives.

    Duplicates are pairs i != j of equal image or caption id: `mask` makes them neither.
    """
    own = torch.eye(count, dtype=torch.bool, device=on)
    same = own.clone()
    for ids in (image_ids, text_ids):
        if ids is not None:
            same |= ids.view(-1, 1) == ids.view(1, -1)
    return (same if duplicates == "positive" else own), ~same


def convse(logits: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """Return ConVSE: cross-entropy of images to captions plus that of captions to images.

    The sum is not halved. Several positives a row are averaged outside the logarithm.
    https://arxiv.org/abs/2110.08872, https://arxiv.org/abs/2004.11362 (L_out)
    """
    candidates = logits.masked_fill(~(positive | negative), float("-inf"))
    rows = candidates.logsumexp(1) - masked_mean(logits, positive, 1)
    columns = candidates.logsumexp(0) - masked_mean(logits, positive, 0)
    return (rows + columns).sum() / max(1, len(logits))


def siglip(logits: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """Return SigLIP's sigmoid loss: every pair is a yes or no. https://arxiv.org/abs/2303.15343"""
    terms = positive * logsigmoid(logits) + negative * logsigmoid(-logits)
    return -terms.sum() / max(1, len(logits))


def vse0(s: Tensor, positive: Tensor, negative: Tensor, margin: float) -> Tensor:
    """Return the sum of all hinges (VSE0 of https://arxiv.org/abs/1707.05612)."""
    return sum(
        (violations(s, positive, negative, margin, dim).sum() for dim in (1, 0)), s.sum() * 0
    )


def vse_max(
    s: Tensor, positive: Tensor, negative: Tensor, margin: float, hardness: float = 1.0
) -> Tensor:
    """Return the sum over rows and columns of the hardest hinge: VSE++; ConVSE++ is it / (N t).

    Below a hardness of 1 the mean of the row's (column's) violations takes the rest of the weight.
    Among equals the lowest index is the hardest. https://arxiv.org/abs/1707.05612
    """
    total = s.sum() * 0
    for dim in (1, 0):
        hinges = violations(s, positive, negative, margin, dim)  # (N, N)
        if hinges.numel():
            hardest = hinges.gather(dim, first_argmax(s.masked_fill(~negative, float("-inf")), dim))
            total = total + hardness * hardest.sum()
        mean = hinges.sum(dim) / (hinges > 0).sum(dim).clamp(min=1)
        total = total + (1 - hardness) * mean.sum()
    return total


def violations(s: Tensor, positive: Tensor, negative: Tensor, margin: float, dim: int) -> Tensor:
    """Return by how much each negative comes within the margin of its row's (column's) positive."""
    own = masked_mean(s, positive, dim).unsqueeze(dim)
    return (margin + s - own).clamp(min=0) * negative


def masked_mean(s: Tensor, mask: Tensor, dim: int) -> Tensor:
    """Return the mean over the masked entries of each row (dim 1) or column (dim 0)."""
    return (s * mask).sum(dim) / mask.sum(dim)


def first_argmax(s: Tensor, dim: int) -> Tensor:
    """Return the lowest index of the maximum, kept as a dimension of one.

    Similarities closer than 16 roundings are equal: the same pair of features gives different
    last bits in different places of a product.
    """
    best = s.detach().amax(dim, keepdim=True)
    tolerance = 16 * torch.finfo(s.dtype).eps
    return (s.detach() >= best - tolerance).to(torch.uint8).argmax(dim, keepdim=True)
