"""Position embeddings of one size fitted to another: another image size, or longer captions."""

import math
from collections.abc import Mapping

from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn
from torch.nn import functional

from dist_vse.models.layers import is_position


def fit_positions(weights: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return weights with their positions resampled to the model's; those of its size stay.

    Images have a grid of positions, (1, prefix + h w, d), which timm resamples bicubically. Texts
    have a row of them, (l, d): it is stretched to a longer one, and cut to a shorter one.
    """
    fitted = dict(weights)
    for name, own in model.named_parameters():
        theirs = weights.get(name)
        if theirs is None or theirs.shape == own.shape or not is_position(name):
            continue
        if own.ndim == 3 == theirs.ndim and own.shape[::2] == theirs.shape[::2]:
            prefix = _prefix(own, theirs)
            side = math.isqrt(own.shape[1] - prefix)
            fitted[name] = resample_abs_pos_embed(theirs, [side, side], num_prefix_tokens=prefix)
        elif own.ndim == 2 == theirs.ndim and own.shape[1] == theirs.shape[1]:
            rows = len(own)
            if rows < len(theirs):
                fitted[name] = theirs[:rows].clone()
            else:
                row = theirs.t()[None]  # (1, d, l)
                fitted[name] = (
                    functional.interpolate(row, size=rows, mode="linear", align_corners=True)[0]
                    .t()
                    .contiguous()
                )
    return fitted


def _prefix(own: Tensor, theirs: Tensor) -> int:
    """Return how many positions stand before both square grids, as that of a class token does."""
    for prefix in range(min(own.shape[1], theirs.shape[1])):
        grids = own.shape[1] - prefix, theirs.shape[1] - prefix
        if all(math.isqrt(n) ** 2 == n for n in grids):
            return prefix
    return 0
