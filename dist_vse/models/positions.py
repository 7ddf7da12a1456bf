"""Position embeddings of one size fitted to another: another image size, or longer captions."""

import math
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional

from dist_vse.common.errors import UserError
from dist_vse.models.layers import is_position

_IMAGES = ("image.", "vision_model.", "visual.")  # of ours, transformers and OpenCLIP


def fit_positions(weights: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return weights with their positions resampled to the model's; those of its size stay.

    Images have a grid of positions, ([1,] prefix + h w, d), which timm resamples bicubically.
    Texts have a row of them, (l, d): it is stretched to a longer one, and cut to a shorter one.
    """
    fitted = dict(weights)
    for name, own in model.named_parameters():
        theirs = weights.get(name)
        if theirs is None or theirs.shape == own.shape or not is_position(name):
            continue
        if own.ndim != theirs.ndim or own.shape[-1] != theirs.shape[-1]:
            continue
        if own.ndim == 3 or name.startswith(_IMAGES):
            from timm.layers import resample_abs_pos_embed  # slow to import, and rarely needed

            rows, grid = own.shape[-2], theirs.view(1, *theirs.shape[-2:])
            prefix = _prefix(rows, grid.shape[1])
            side = math.isqrt(rows - prefix)
            grid = resample_abs_pos_embed(grid, [side, side], num_prefix_tokens=prefix)
            fitted[name] = grid.view(own.shape)
        elif own.ndim == 2:
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


def check_grid(size: int, patch: int, place: Path) -> None:
    """Raise UserError for a side of images that is no number of whole patches."""
    if size % patch:
        near = [n for n in (size // patch * patch, (size // patch + 1) * patch) if n]
        raise UserError(
            f"model.image.size ({size}) must be a multiple of the patches of {place} ({patch}); "
            f"nearest: {', '.join(map(str, near))}"
        )


def _prefix(own: int, theirs: int) -> int:
    """Return how many positions stand before both square grids, as that of a class token does."""
    for prefix in range(min(own, theirs)):
        if all(math.isqrt(n) ** 2 == n for n in (own - prefix, theirs - prefix)):
            return prefix
    return 0
