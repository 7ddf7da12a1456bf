"""Evaluation protocols: what is queried against what, and with which right answers.

`plain` takes all images and captions, and counts by content: an equal caption or an equal image
file is as right as the own one. The published ones take each image's first five captions and
count its own alone, as VSE++ does (https://arxiv.org/abs/1707.05612): `coco-5k` on 5,000 images,
`coco-1k` as the mean over consecutive fifths of them, `flickr-1k` on 1,000.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dist_vse.common.errors import UserError
from dist_vse.evaluation.retrieval.checks import check_pairs
from dist_vse.evaluation.retrieval.pairs import content_pairs, own_pairs

CAPTIONS = 5
PROTOCOLS: dict[str, tuple[int, int]] = {  # images, folds
    "plain": (0, 1),
    "coco-5k": (5000, 1),
    "coco-1k": (5000, 5),
    "flickr-1k": (1000, 1),
}


@dataclass(frozen=True)
class Task:
    """One gallery: rows of the whole split, and the right pairs among them."""

    images: slice
    texts: Tensor  # (m,): rows of the split
    pairs: Tensor  # (2, p): rows of this task
    image_of_text: Tensor  # (m,): row of this task


def check_protocol(protocol: str, num_images: int) -> None:
    """Raise UserError for an unknown protocol, and for a split that is not the protocol's."""
    if protocol not in PROTOCOLS:
        raise UserError(f"protocol {protocol!r} is unknown; choose from {', '.join(PROTOCOLS)}")
    expected, _ = PROTOCOLS[protocol]
    if expected and num_images != expected:
        raise UserError(
            f"protocol {protocol} is defined on {expected:,} images, this split has "
            f"{num_images:,}; take the split of the paper, or protocol plain"
        )


def tasks_of(
    protocol: str, image_of_text: Tensor, image_ids: Tensor, text_ids: Tensor
) -> list[Task]:
    """Return the galleries of a protocol, whose metrics are averaged.

    Raises UserError for an unknown protocol, and for a split that is not the protocol's.
    """
    check_protocol(protocol, len(image_ids))
    check_pairs(own_pairs(image_of_text), len(image_ids), len(text_ids))
    if protocol == "plain":
        pairs = content_pairs(image_of_text, image_ids, text_ids)
        everything = torch.arange(len(text_ids), device=pairs.device)
        return [Task(slice(0, len(image_ids)), everything, pairs, image_of_text)]
    num_images, folds = PROTOCOLS[protocol]
    texts = _first_captions(image_of_text, protocol)
    per_fold = num_images // folds
    tasks = []
    for start in range(0, num_images, per_fold):
        inside = texts[image_of_text[texts] // per_fold == start // per_fold]
        rows = image_of_text[inside] - start
        tasks.append(Task(slice(start, start + per_fold), inside, own_pairs(rows), rows))
    return tasks


def _first_captions(image_of_text: Tensor, protocol: str) -> Tensor:
    """Return the rows of every image's first five captions, in the order of the split."""
    counts = image_of_text.bincount()
    few = (counts < CAPTIONS).nonzero()
    if len(few):
        raise UserError(
            f"protocol {protocol} needs {CAPTIONS} captions an image; {len(few)} images have "
            f"fewer, the first is row {int(few[0])}; shard all captions, or take protocol plain"
        )
    order = image_of_text.argsort(stable=True)
    place = torch.arange(len(order), device=order.device)
    place -= (counts.cumsum(0) - counts)[image_of_text[order]]
    first: Tensor = order[place < CAPTIONS].sort().values
    return first
