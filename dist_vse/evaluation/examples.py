"""Queries with their best answers, to look at: drawn at random, and the best and worst found."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_vse import distributed
from dist_vse.common.files import write_text
from dist_vse.evaluation.evaluate import Evaluation
from dist_vse.evaluation.retrieval import Task, neighbours, top_k

NEIGHBOURS = 4  # of each image that is shown
Query = dict[str, Any]


@distributed.main_process_only
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
    """Write JSON with some queries, their k best answers and the rank of the right one, on rank 0.

    Each direction has `num_queries` queries (or all images, if they are fewer), of different
    images, drawn with the seed; and `num_extremes` of those that are found first (drawn as well)
    and of those found last. The file also holds the metrics and what chance would give. Ranks,
    galleries and what is right are those of the evaluation, so a rank that ties leave open is
    their mean and may be broken. Each image that is shown has its nearest others of the split, by
    its features.
    """
    found, generator = evaluation.split, torch.Generator().manual_seed(seed)
    images = torch.randperm(len(found.keys), generator=generator)
    ranked = ~evaluation.text_ranks.isnan()  # a protocol may leave some out
    texts = [
        int(own[image % len(own)])  # any of its captions
        for image in images[:num_queries].tolist()
        for own in [(ranked & (found.image_of_text == image)).nonzero().flatten()]
    ]
    content = {
        "split": split,
        "seed": seed,
        "metrics": evaluation.metrics,
        "chance": evaluation.chance,
        "text_to_image": [_text_query(evaluation, text, k) for text in texts],
        "image_to_text": [  # others than for the texts, where there are enough images
            _image_query(evaluation, image, k) for image in images[-num_queries:].tolist()
        ],
    }
    for name, ranks, query in (
        ("text_to_image", evaluation.text_ranks, _text_query),
        ("image_to_text", evaluation.image_ranks, _image_query),
    ):
        best, worst = _extremes(ranks, num_extremes, generator)
        content[f"{name}_best"] = [query(evaluation, row, k) for row in best]
        content[f"{name}_worst"] = [query(evaluation, row, k) for row in worst]
    content["neighbours"] = _neighbours(evaluation, shown_keys(content))
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def shown_keys(content: Mapping[str, Any]) -> set[str]:
    """Return the keys of all images that are queries or answers."""
    found: set[str] = set()
    for name, queries in content.items():
        if name.startswith(("text_to_image", "image_to_text")):
            found |= {query["key"] for query in queries}
            found |= {
                answer["key"] for query in queries for answer in query["answers"] if "key" in answer
            }
    return found


def _neighbours(evaluation: Evaluation, shown: set[str]) -> dict[str, list[dict[str, Any]]]:
    keys = evaluation.split.keys
    rows = [row for row, key in enumerate(keys) if key in shown]
    found = neighbours(evaluation.split.image_features, rows, NEIGHBOURS)
    return {
        keys[row]: [{"key": keys[other], "score": round(score, 4)} for other, score in near]
        for row, near in zip(rows, found, strict=True)
    }


def _extremes(ranks: Tensor, count: int, generator: torch.Generator) -> tuple[list[int], list[int]]:
    """Return some rows of rank 1, and those of the largest ranks above 1 (NaN is no rank)."""
    first = (ranks == 1).nonzero().flatten()
    best = first[torch.randperm(len(first), generator=generator)[:count]]
    late = (ranks > 1).nonzero().flatten()
    worst = late[ranks[late].argsort(descending=True, stable=True)[:count]]
    return best.tolist(), worst.tolist()


def _text_query(evaluation: Evaluation, text: int, k: int) -> Query:
    """Ask for a caption's image."""
    found = evaluation.split
    task = _task_of(evaluation, int(found.image_of_text[text]))
    own = task.texts[task.pairs[1]] == text
    gallery = found.image_features[task.images]
    answers = _answers(found.text_features[text], gallery, task.pairs[0, own], k)
    return {
        "caption": found.captions[text],
        "key": found.keys[int(found.image_of_text[text])],
        "rank": _rank(evaluation.text_ranks[text]),
        "answers": [{"key": found.keys[task.images][row], **answer} for row, answer in answers],
    }


def _image_query(evaluation: Evaluation, image: int, k: int) -> Query:
    """Ask for an image's captions."""
    found, task = evaluation.split, _task_of(evaluation, image)
    own = task.pairs[0] == image - task.images.start
    gallery = found.text_features[task.texts]
    answers = _answers(found.image_features[image], gallery, task.pairs[1, own], k)
    return {
        "key": found.keys[image],
        "rank": _rank(evaluation.image_ranks[image]),
        "answers": [
            {"caption": found.captions[int(task.texts[row])], **answer} for row, answer in answers
        ],
    }


def _task_of(evaluation: Evaluation, image: int) -> Task:
    """Return the gallery that an image stands in."""
    return next(task for task in evaluation.tasks if image < task.images.stop)


def _rank(expected: Tensor) -> int | float:
    rank = round(float(expected), 2)
    return int(rank) if rank.is_integer() else rank


def _answers(
    query: Tensor, gallery: Tensor, right: Tensor, k: int
) -> list[tuple[int, dict[str, float | bool]]]:
    """Return the first k rows for a query (d,), and of each whether it is among the right ones."""
    (scores,), (rows,) = top_k(query[None], gallery, k)
    among = torch.isin(rows, right).tolist()
    best = zip(rows.tolist(), scores.tolist(), among, strict=True)
    return [(row, {"score": round(score, 4), "right": is_right}) for row, score, is_right in best]
