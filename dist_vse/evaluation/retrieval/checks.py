"""What must hold before anything is ranked: finite features, rows that fit, no collapse."""

import torch
from torch import Tensor

from dist_vse.common.errors import UserError

COLLAPSED = 1e-5
"""Total variance of unit features (1 at most) below which they carry no direction."""


def check_features(image_features: Tensor, text_features: Tensor) -> list[str]:
    """Return a line for each side whose unit features are all of one direction.

    So are those of a model that has collapsed, and of some that have not begun to learn.
    """
    warnings = []
    for name, features in (("image", image_features), ("text", text_features)):
        variance = 1 - float(features.mean(0, dtype=torch.float64).square().sum())
        if len(features) > 1 and variance < COLLAPSED:
            warnings.append(
                f"the {name} features are all alike (variance {max(variance, 0):.1e} of 1): every "
                f"{name} looks the same to the model"
            )
    return warnings


def check_finite(image_features: Tensor, text_features: Tensor) -> None:
    """Raise UserError for features that are not finite or whose widths differ."""
    shapes = tuple(image_features.shape), tuple(text_features.shape)
    if image_features.ndim != 2 or text_features.ndim != 2 or shapes[0][1] != shapes[1][1]:
        raise UserError(
            f"image and text features are {shapes[0]} and {shapes[1]}; give (n, d) and (m, d)"
        )
    for name, features in (("image", image_features), ("text", text_features)):
        finite = torch.cat([rows.isfinite().all(1) for rows in features.split(1024)])  # less memory
        bad = (~finite).nonzero()
        if len(bad):
            raise UserError(
                f"{name} features are not finite: {len(bad)} of {len(features)} rows, the first is "
                f"row {int(bad[0])}; the model diverged: take an earlier checkpoint or a lower "
                "learning rate"
            )


def check_pairs(pairs: Tensor, num_images: int, num_texts: int) -> None:
    """Raise UserError unless every image has a text, and every text an image, among the pairs."""
    if num_texts == 0:
        raise UserError("nothing to retrieve: there is no text; evaluate a split with samples")
    for name, other, rows, count in (
        ("image", "text", pairs[0], num_images),
        ("text", "image", pairs[1], num_texts),
    ):
        first, last = (int(rows.min()), int(rows.max())) if len(rows) else (0, -1)
        if first < 0:
            raise UserError(f"the pairs hold {name} row {first}; rows start at 0")
        if last >= count:
            raise UserError(f"the pairs hold {name} row {last}, but there are {count} {name}s")
        bare = (rows.bincount(minlength=count) == 0).nonzero()
        if len(bare):
            remedy = "caption them" if name == "image" else "name their image"
            raise UserError(
                f"{len(bare)} of {count} {name}s have no {other}, the first is row "
                f"{int(bare[0])}; leave them out or {remedy}"
            )
