"""Which texts are right for which images: int64 (2, p), a column (image row, text row) a pair."""

import torch
from torch import Tensor

from dist_vse.common.errors import UserError

MAX_PAIRS = 2**26


def own_pairs(image_of_text: Tensor) -> Tensor:
    """Pair every text with its own image alone, as the published protocols do."""
    texts = torch.arange(len(image_of_text), device=image_of_text.device)
    return torch.stack([image_of_text, texts])


def content_pairs(image_of_text: Tensor, image_ids: Tensor, text_ids: Tensor) -> Tensor:
    """Pair by content: what is right for an image or text is right for its equals.

    `image_ids` (n,) and `text_ids` (m,) are equal for equal files and captions. So a caption that
    stands at two images has both as right answers, and an image stored twice has all of its
    captions. Raises UserError for more than 2**26 pairs.
    """
    _, image_group, images = image_ids.unique(return_inverse=True, return_counts=True)
    _, text_group, texts = text_ids.unique(return_inverse=True, return_counts=True)
    if len(images) == len(image_ids) and len(texts) == len(text_ids):
        return own_pairs(image_of_text)
    keys = (image_group[image_of_text] * len(texts) + text_group).unique()
    image_key, text_key = keys // len(texts), keys % len(texts)
    sizes = images[image_key] * texts[text_key]  # pairs that each pair of groups stands for
    total = int(sizes.sum())
    if total > MAX_PAIRS:
        raise UserError(
            f"{total:,} pairs are right by equal captions or images, more than {MAX_PAIRS:,}: "
            "such captions are classes; evaluate a smaller split or one of others (in training "
            "data.eval_split), and a trained model with `dist-vse zeroshot`"
        )
    which = torch.repeat_interleave(torch.arange(len(keys), device=keys.device), sizes)
    place = torch.arange(total, device=keys.device) - (sizes.cumsum(0) - sizes)[which]
    columns = texts[text_key[which]]
    image_rows = _members(image_group, images, image_key[which], place // columns)
    text_rows = _members(text_group, texts, text_key[which], place % columns)
    return torch.stack([image_rows, text_rows])


def _members(group: Tensor, counts: Tensor, wanted: Tensor, place: Tensor) -> Tensor:
    """Return the row of the `place`-th member of each wanted group."""
    order = group.argsort(stable=True)
    first = counts.cumsum(0) - counts
    return order[first[wanted] + place]
