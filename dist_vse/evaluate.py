"""Evaluation: embed a split on all ranks, score retrieval, and pick examples to look at.

Shapes: b images of one batch, n images and m texts of the split, d embedding, l tokens.
"""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from dist_vse import distributed
from dist_vse.errors import UserError
from dist_vse.log import logger
from dist_vse.retrieval import chance, check_features, retrieval_metrics, top_k
from dist_vse.stream import EvalBatch


class Encoders(Protocol):
    """The two sides of a model; both return unit float32 features."""

    def encode_images(self, images: Tensor) -> Tensor: ...  # uint8 (b, 3, h, w) -> (b, d)
    def encode_texts(self, tokens: Tensor) -> Tensor: ...  # int64 (b, l) -> (b, d)
    def modules(self) -> Iterator[nn.Module]: ...
    def eval(self) -> nn.Module: ...


@dataclass(frozen=True)
class Evaluation:
    """The whole split, the same on every rank; features and rows are on the CPU."""

    metrics: dict[str, float]  # of `retrieval_metrics`, with num_images and num_texts
    keys: list[str]  # of the images
    captions: list[str]
    image_features: Tensor  # (n, d)
    text_features: Tensor  # (m, d)
    image_of_text: Tensor  # (m,)


def evaluate(model: Encoders, batches: Iterable[EvalBatch], device: torch.device) -> Evaluation:
    """Embed this rank's batches, gather all ranks' and score retrieval over the whole split.

    The model runs in eval mode and is left as it was. Every rank must call; a rank may have no
    batch. Raises UserError, on every rank, if there is no sample at all or if features are not
    finite.
    """
    keys: list[str] = []
    captions: list[str] = []
    images: list[Tensor] = []
    texts: list[Tensor] = []
    rows: list[Tensor] = []
    with distributed.same_verdict(), torch.no_grad(), _eval_mode(model):
        for batch in batches:
            images.append(model.encode_images(batch.images.to(device)))
            # In pieces: an image may have any number of captions.
            for tokens in torch.split(batch.tokens.to(device), len(batch.images)):
                texts.append(model.encode_texts(tokens))
            rows.append(batch.image_of_text.to(device) + len(keys))
            keys += batch.keys
            captions += batch.captions

    shares = distributed.all_gather_object((keys, captions, images[0].shape[1] if images else 0))
    width = max(share[2] for share in shares)
    if width == 0:
        raise UserError("nothing to evaluate: no rank has a sample; look at the split's shards")
    before = sum(len(share[0]) for share in shares[: distributed.rank()])
    none = torch.empty(0, width, device=device)  # for a rank without a batch
    image_features = distributed.all_gather_rows(torch.cat([none, *images]))  # (n, d)
    text_features = distributed.all_gather_rows(torch.cat([none, *texts]))  # (m, d)
    local = torch.cat([none.new_empty(0, dtype=torch.int64), *rows])
    image_of_text = distributed.all_gather_rows(local + before)  # (m,)
    return Evaluation(
        _score(image_features, text_features, image_of_text),
        [key for share in shares for key in share[0]],
        [caption for share in shares for caption in share[1]],
        image_features.cpu(),
        text_features.cpu(),
        image_of_text.cpu(),
    )


def save_examples(
    evaluation: Evaluation,
    path: Path,
    *,
    split: str,
    num_queries: int = 12,
    k: int = 5,
    seed: int = 0,
) -> None:
    """Write JSON with some queries, their k best answers and the rank of the right one.

    Each direction has `num_queries` queries (or all images, if they are fewer), of different
    images, chosen by the seed. The file also holds the metrics and what chance would give.
    """
    keys, captions, image_of_text = evaluation.keys, evaluation.captions, evaluation.image_of_text
    order = torch.randperm(len(keys), generator=torch.Generator().manual_seed(seed)).tolist()
    text_to_image, image_to_text = [], []
    for image in order[:num_queries]:
        own = (image_of_text == image).nonzero().flatten()
        text = int(own[image % len(own)])  # any of its captions
        right = torch.arange(len(keys)) == image
        answers = _answers(evaluation.text_features[text], evaluation.image_features, right)
        shown = [{"key": keys[row], **answer} for row, answer in answers.best(k)]
        query = {"caption": captions[text], "key": keys[image], "rank": answers.rank}
        text_to_image.append({**query, "answers": shown})
    for image in order[-num_queries:]:  # others, where there are enough images
        right = image_of_text == image
        answers = _answers(evaluation.image_features[image], evaluation.text_features, right)
        shown = [{"caption": captions[row], **answer} for row, answer in answers.best(k)]
        image_to_text.append({"key": keys[image], "rank": answers.rank, "answers": shown})
    content = {
        "split": split,
        "seed": seed,
        "metrics": evaluation.metrics,
        "chance": chance(image_of_text, len(keys)),
        "text_to_image": text_to_image,
        "image_to_text": image_to_text,
    }
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _score(
    image_features: Tensor, text_features: Tensor, image_of_text: Tensor
) -> dict[str, float]:
    """Score on rank 0 alone, for ranks may share the cores, and tell all."""
    metrics: dict[str, float] = {}
    with distributed.same_verdict():
        if distributed.is_main_process():
            metrics = retrieval_metrics(image_features, text_features, image_of_text)
            metrics |= {"num_images": len(image_features), "num_texts": len(text_features)}
            for warning in check_features(image_features, text_features):
                logger.warning(warning)
    shared: dict[str, float] = distributed.broadcast_object(metrics)
    return shared


@dataclass(frozen=True)
class _Answers:
    """The whole gallery in its order for one query."""

    rows: list[int]
    scores: list[float]
    right: list[bool]

    @property
    def rank(self) -> int:
        return self.right.index(True) + 1

    def best(self, k: int) -> list[tuple[int, dict[str, float | bool]]]:
        """Return the row and what is written for each of the first k."""
        answers = zip(self.rows[:k], self.scores[:k], self.right[:k], strict=True)
        return [(row, {"score": round(score, 4), "right": right}) for row, score, right in answers]


def _answers(query: Tensor, gallery: Tensor, right: Tensor) -> _Answers:
    """Order the gallery for a query (d,); `right` (len(gallery),) marks its answers."""
    (scores,), (rows,) = top_k(query[None], gallery, len(gallery))
    return _Answers(rows.tolist(), scores.tolist(), right[rows].tolist())


@contextlib.contextmanager
def _eval_mode(model: Encoders) -> Iterator[None]:
    """Put every module into eval mode; afterwards each is as it was."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training
