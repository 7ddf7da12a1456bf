"""Queries with their best answers, to look at: drawn at random, and the best and worst found."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_vse.evaluate import Embedded, Evaluation
from dist_vse.retrieval import content_pairs, top_k

Query = dict[str, Any]


def save_examples(
    evaluation: Evaluation,
    path: Path,
    *,
    split: str,
    num_queries: int = 12,
    num_extremes: int = 4,
    k: int = 5,
    seed: int = 0,
) -> None:
    """Write JSON with some queries, their k best answers and the rank of the right one.

    Each direction has `num_queries` queries (or all images, if they are fewer), of different
    images, drawn with the seed; and `num_extremes` of those that are found first (drawn as well)
    and of those found last. The file also holds the metrics and what chance would give. What is
    right is decided by content, as in the protocol `plain`.
    """
    found, generator = evaluation.split, torch.Generator().manual_seed(seed)
    pairs = content_pairs(found.image_of_text, found.image_ids, found.text_ids)
    images = torch.randperm(len(found.keys), generator=generator)
    texts = [
        int(own[image % len(own)])  # any of its captions
        for image in images[:num_queries].tolist()
        for own in [(found.image_of_text == image).nonzero().flatten()]
    ]
    content = {
        "split": split,
        "seed": seed,
        "metrics": evaluation.metrics,
        "chance": evaluation.chance,
        "text_to_image": [_text_query(found, pairs, text, k) for text in texts],
        "image_to_text": [  # others than for the texts, where there are enough images
            _image_query(found, pairs, image, k) for image in images[-num_queries:].tolist()
        ],
    }
    for name, ranks, query in (
        ("text_to_image", evaluation.text_ranks, _text_query),
        ("image_to_text", evaluation.image_ranks, _image_query),
    ):
        best, worst = _extremes(ranks, num_extremes, generator)
        content[f"{name}_best"] = [query(found, pairs, row, k) for row in best]
        content[f"{name}_worst"] = [query(found, pairs, row, k) for row in worst]
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _extremes(ranks: Tensor, count: int, generator: torch.Generator) -> tuple[list[int], list[int]]:
    """Return some rows of rank 1, and those of the largest ranks above 1 (NaN is no rank)."""
    first = (ranks == 1).nonzero().flatten()
    best = first[torch.randperm(len(first), generator=generator)[:count]]
    late = (ranks > 1).nonzero().flatten()
    worst = late[ranks[late].argsort(descending=True, stable=True)[:count]]
    return best.tolist(), worst.tolist()


def _text_query(found: Embedded, pairs: Tensor, text: int, k: int) -> Query:
    """Ask for a caption's image."""
    right = torch.zeros(len(found.keys), dtype=torch.bool)
    right[pairs[0, pairs[1] == text]] = True
    rank, best = _answers(found.text_features[text], found.image_features, right, k)
    answers = [{"key": found.keys[row], **answer} for row, answer in best]
    key = found.keys[int(found.image_of_text[text])]
    return {"caption": found.captions[text], "key": key, "rank": rank, "answers": answers}


def _image_query(found: Embedded, pairs: Tensor, image: int, k: int) -> Query:
    """Ask for an image's captions."""
    right = torch.zeros(len(found.captions), dtype=torch.bool)
    right[pairs[1, pairs[0] == image]] = True
    rank, best = _answers(found.image_features[image], found.text_features, right, k)
    answers = [{"caption": found.captions[row], **answer} for row, answer in best]
    return {"key": found.keys[image], "rank": rank, "answers": answers}


def _answers(
    query: Tensor, gallery: Tensor, right: Tensor, k: int
) -> tuple[int, list[tuple[int, dict[str, float | bool]]]]:
    """Order the gallery for a query (d,): the first right answer's rank, and the first k rows."""
    (scores,), (rows,) = top_k(query[None], gallery, len(gallery))
    rank = int(right[rows].nonzero()[0]) + 1
    best = zip(rows[:k].tolist(), scores[:k].tolist(), strict=True)
    return rank, [(row, {"score": round(s, 4), "right": bool(right[row])}) for row, s in best]
