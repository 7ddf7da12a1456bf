"""The losses as their papers write them: dense, on one process. The oracle of the tests.

These hold the whole matrix, so they are for reading, tests and `dist-vse verify`
(`dense_loss` finds them by name); training uses `global_loss`. N pairs: row i is image i, column j
caption j; column N + k is negative k of M, a text without an image.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


@dataclass(frozen=True)
class DensePairs:
    """All pairs of a batch: similarities, and which pairs belong together.

    `positive` are the pairs that belong together (the diagonal, and duplicates where they count
    as positives), `negative` those that do not. A pair may be neither. Rows choose among all
    columns; the columns that choose a row are the `captions`.
    """

    s: Tensor  # (N, N + M) cosines
    scale: Tensor  # (1,), 1/t
    bias: Tensor  # (1,)
    positive: Tensor  # (N, N + M)
    negative: Tensor  # (N, N + M)
    margin: float
    hard_negative_weight: float

    @property
    def logits(self) -> Tensor:
        """Similarities over the temperature (N, N + M)."""
        return self.s * self.scale

    @property
    def captions(self) -> "DensePairs":
        """The same without the negatives: (N, N)."""
        s, positive, negative = (x[:, : len(x)] for x in (self.s, self.positive, self.negative))
        return replace(self, s=s, positive=positive, negative=negative)

    def along(self, dim: int) -> "DensePairs":
        """Return what rows (dim 1) or columns (dim 0) choose among."""
        return self if dim == 1 else self.captions

    @property
    def count(self) -> int:
        """N, at least 1 so that it can divide."""
        return max(1, len(self.s))


def convse(pairs: DensePairs) -> Tensor:
    """Return ConVSE: cross-entropy of images to captions plus that of captions to images.

    The sum is not halved. Several positives a row are averaged outside the logarithm.
    https://arxiv.org/abs/2110.08872, https://arxiv.org/abs/2004.11362 (L_out)
    """
    total = pairs.s.sum() * 0
    for dim in (1, 0):
        logits, positive = pairs.along(dim).logits, pairs.along(dim).positive
        others = ~(positive | pairs.along(dim).negative)
        candidates = logits.masked_fill(others, float("-inf"))
        total = total + (candidates.logsumexp(dim) - masked_mean(logits, positive, dim)).sum()
    return total / pairs.count


def info_nce(pairs: DensePairs) -> Tensor:
    """Return CLIP's loss, half of ConVSE. https://arxiv.org/abs/2103.00020"""
    return convse(pairs) / 2


def dcl(pairs: DensePairs) -> Tensor:
    """Return decoupled contrastive learning: InfoNCE without positives in the denominators.

    The sum of both directions, halved as CLIP's is. A row (or column) without a negative gives
    nothing. https://arxiv.org/abs/2110.06848
    """
    rows = pairs.logits, pairs.positive, pairs.negative
    captions = pairs.captions
    columns = captions.logits.T, captions.positive.T, captions.negative.T
    total = pairs.s.sum() * 0
    for z, positive, negative in (rows, columns):
        some = negative.any(1)
        denominators = z.masked_fill(~negative, float("-inf"))[some].logsumexp(1)
        total = total + (denominators - masked_mean(z, positive, 1)[some]).sum()
    return total / (2 * pairs.count)


def siglip(pairs: DensePairs) -> Tensor:
    """Return SigLIP's sigmoid loss: every pair is a yes or no. https://arxiv.org/abs/2303.15343"""
    logits = pairs.logits + pairs.bias
    terms = pairs.positive * logsigmoid(logits) + pairs.negative * logsigmoid(-logits)
    return -terms.sum() / pairs.count


def vse0(pairs: DensePairs) -> Tensor:
    """Return the sum of all hinges (VSE0 of https://arxiv.org/abs/1707.05612)."""
    return sum((violations(pairs.along(dim), dim).sum() for dim in (1, 0)), pairs.s.sum() * 0)


def vse_plus_plus(pairs: DensePairs) -> Tensor:
    """Return the sum over rows and columns of the hardest hinge.

    Below a hard-negative weight of 1 the mean of the row's (column's) violations takes the rest.
    Among equals the lowest index is the hardest. https://arxiv.org/abs/1707.05612
    """
    total, weight = pairs.s.sum() * 0, pairs.hard_negative_weight
    for dim in (1, 0):
        among = pairs.along(dim)
        hinges = violations(among, dim)  # (N, N + M) or (N, N)
        if hinges.numel():
            negatives = among.s.masked_fill(~among.negative, float("-inf"))
            hardest = hinges.gather(dim, first_argmax(negatives, dim))
            total = total + weight * hardest.sum()
        mean = hinges.sum(dim) / (hinges > 0).sum(dim).clamp(min=1)
        total = total + (1 - weight) * mean.sum()
    return total


def convse_plus_plus(pairs: DensePairs) -> Tensor:
    """Return ConVSE++, which is VSE++ / (N t). https://arxiv.org/abs/2110.08872"""
    return (vse_plus_plus(pairs) * pairs.scale / pairs.count).view(())


def divergence(z: Tensor, y: Tensor) -> Tensor:
    """Return the divergence of a model's distributions from a teacher's, the mean of both ways.

    z and y (N, N) are their logits; rows are softmaxes over captions, columns over images.
    https://arxiv.org/abs/2307.12732
    """
    total = z.sum() * 0
    for dim in (1, 0):
        wanted = y.log_softmax(dim)
        total = total + (wanted.exp() * (wanted - z.log_softmax(dim))).sum()
    return total / (2 * max(1, len(z)))


def violations(pairs: DensePairs, dim: int) -> Tensor:
    """Return by how much each negative comes within the margin of its row's (column's) positive."""
    own = masked_mean(pairs.s, pairs.positive, dim).unsqueeze(dim)
    return (pairs.margin + pairs.s - own).clamp(min=0) * pairs.negative


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
