"""What a batch says about training, besides the loss: numbers that cost next to nothing."""

import torch
from torch import Tensor

from dist_vse import distributed
from dist_vse.losses.tiled import TiledLoss

SAMPLE = 128  # rows of a rank among which uniformity is measured


def summarize(
    local_total: Tensor,
    tiled: TiledLoss,
    image_features: Tensor,
    text_features: Tensor,
    *,
    unit: Tensor,
    margin: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Join the ranks' numbers by one all-reduce; return the global total and the statistics.

    The tiles' similarities are cosines times `unit` (1,).
    """
    layout, duplicates = tiled.positives.layout, tiled.positives.duplicates
    pairs = tiled.positives.own
    own = pairs.similarities / unit
    hardest = (tiled.terms[0].hardest() / unit).clamp(min=-1)  # without a negative: -1
    distances = pairs.row_squares / unit.view(()).square() + pairs.column_squares - 2 * own.sum()
    sums = [
        local_total,
        own.sum(),
        hardest.sum(),
        (hardest > own - margin).sum(),
        distances,
        (closeness(image_features) + closeness(text_features)) * (len(own) / 2),
    ]
    near_pairs = tiled.positives.near
    if near_pairs is not None:
        sums.append(near_pairs.count)
    joined = distributed.all_reduce_sum(torch.stack([x.double() for x in sums]))
    positive, hard, active, alignment, near = joined[1:6] / max(1, layout.total)
    masked = (duplicates.group_sizes - 1).sum() if duplicates is not None else joined.new_zeros(())
    all_pairs = layout.total * (tiled.positives.num_columns - 1)
    ignored = {} if near_pairs is None else {"ignored_share": joined[6] / max(1, all_pairs)}
    return joined[0], ignored | {
        "positive_similarity": positive,
        "hardest_similarity": hard,
        "active_share": active,
        "alignment": alignment,
        "uniformity": near.log(),
        "masked_pairs": masked,
        "masked_share": masked / max(1, layout.total * (layout.total - 1)),
    }


def closeness(features: Tensor) -> Tensor:
    """Return the mean of exp(-2 |x - y|^2) over pairs x != y of a sample of the rows.

    Its logarithm is the uniformity of https://arxiv.org/abs/2005.10242.
    """
    count = min(SAMPLE, len(features))
    if count < 2:
        return features.new_ones(())
    sample = features[:: len(features) // count][:count]
    norms = sample.square().sum(1)
    squares = norms.unsqueeze(1) + norms - 2 * sample @ sample.T
    near = squares.mul_(-2).exp_().fill_diagonal_(0)
    return near.sum() / (count * (count - 1))
