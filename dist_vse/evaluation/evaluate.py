"""Evaluation: embed a split and score its retrieval, both on all ranks.

Shapes: b images of one batch, n images and m texts of the split, d embedding, l tokens.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from dist_vse import distributed
from dist_vse.common.errors import UserError
from dist_vse.common.log import logger
from dist_vse.data.eval_stream import EvalBatch
from dist_vse.data.index import image_id
from dist_vse.evaluation.retrieval import (
    RECALLS,
    Ranks,
    Task,
    chance,
    check_features,
    intervals,
    rank_all,
    summary,
    tasks_of,
)
from dist_vse.models.precision import evaluation_autocast


class Encoders(Protocol):
    """The two sides of a model; both return unit float32 features."""

    def encode_images(self, images: Tensor) -> Tensor: ...  # uint8 (b, 3, h, w) -> (b, d)
    def encode_texts(self, tokens: Tensor) -> Tensor: ...  # int64 (b, l) -> (b, d)
    def modules(self) -> Iterator[nn.Module]: ...
    def eval(self) -> nn.Module: ...


@dataclass(frozen=True)
class Embedded:
    """The whole split, the same on every rank; all of it is on the CPU."""

    keys: list[str]  # of the images
    captions: list[str]
    image_features: Tensor  # (n, d)
    text_features: Tensor  # (m, d)
    image_of_text: Tensor  # (m,)
    image_ids: Tensor  # int64 (n,), equal for equal image files
    text_ids: Tensor  # int64 (m,), equal for equal captions


@dataclass(frozen=True)
class Evaluation:
    """A split and how well it was retrieved, the same on every rank."""

    split: Embedded
    metrics: dict[str, float]  # of `retrieval.summary`, with num_images and num_texts
    chance: dict[str, float]  # the same of random ranks
    intervals: dict[str, list[float]]  # [low, high] of each metric; empty without bootstrap
    image_ranks: Tensor  # float64 (n,): expected rank of each image's best text
    text_ranks: Tensor  # float64 (m,); NaN for a text that the protocol leaves out
    tasks: list[Task]  # the galleries in which these ranks are


def evaluate(
    model: Encoders,
    batches: Iterable[EvalBatch],
    device: torch.device,
    *,
    protocol: str = "plain",
    recalls: Sequence[int] = RECALLS,
    bootstrap: int = 0,
    allow_collapse: bool = True,
    precision: str = "fp32",
) -> Evaluation:
    """Embed this rank's batches and score retrieval over the whole split; see `embed`, `score`."""
    split = embed(model, batches, device, precision=precision)
    return score(
        split,
        device,
        protocol=protocol,
        recalls=recalls,
        bootstrap=bootstrap,
        allow_collapse=allow_collapse,
    )


def embed(
    model: Encoders,
    batches: Iterable[EvalBatch],
    device: torch.device,
    *,
    precision: str = "fp32",
) -> Embedded:
    """Embed this rank's batches and gather all ranks'.

    `precision` is the run's `engine.precision`, which a GPU evaluates in. The model runs in eval
    mode and is left as it was. Every rank must call; a rank may have no batch. Raises UserError,
    on every rank, if there is no sample at all.
    """
    keys: list[str] = []
    captions: list[str] = []
    images: list[Tensor] = []
    texts: list[Tensor] = []
    rows: list[Tensor] = []
    ids: list[Tensor] = []
    with (
        distributed.raise_on_all_ranks(),
        torch.no_grad(),
        eval_mode(model),
        evaluation_autocast(device, precision),
    ):
        for batch in batches:
            images.append(model.encode_images(batch.images.to(device)))
            # In pieces: an image may have any number of captions.
            for tokens in torch.split(batch.tokens.to(device), len(batch.images)):
                texts.append(model.encode_texts(tokens))
            rows.append(batch.image_of_text.to(device) + len(keys))
            ids.append(batch.image_ids.to(device))
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
    no_rows = none.new_empty(0, dtype=torch.int64)
    image_of_text = distributed.all_gather_rows(torch.cat([no_rows, *rows]) + before)  # (m,)
    image_ids = distributed.all_gather_rows(torch.cat([no_rows, *ids]))  # (n,)
    all_captions = [caption for share in shares for caption in share[1]]
    return Embedded(
        [key for share in shares for key in share[0]],
        all_captions,
        image_features.cpu(),
        text_features.cpu(),
        image_of_text.cpu(),
        image_ids.cpu(),
        torch.tensor([image_id(caption) for caption in all_captions]),
    )


def score(
    split: Embedded,
    device: torch.device,
    *,
    protocol: str = "plain",
    recalls: Sequence[int] = RECALLS,
    bootstrap: int = 0,
    allow_collapse: bool = True,
) -> Evaluation:
    """Score retrieval over a split, each rank its share of the tiles; every rank must call.

    `bootstrap` is the number of resamples, 0 for no intervals. Raises UserError, on every rank,
    for features that are not finite and for a split that is not the protocol's; for features
    that are all alike too, unless a collapse is allowed, as in a training that may recover.
    """
    with distributed.raise_on_all_ranks():
        if distributed.is_main_process():
            for warning in check_features(split.image_features, split.text_features):
                if not allow_collapse:
                    raise UserError(f"{warning}; train it further, or take another checkpoint")
                logger.warning(warning)
    tasks = tasks_of(protocol, split.image_of_text, split.image_ids, split.text_ids)
    share = (distributed.rank(), distributed.world_size())
    found: list[tuple[Ranks, Ranks]] = []
    for task in tasks:
        images = split.image_features[task.images].to(device)
        texts = split.text_features[task.texts].to(device)
        found.append(
            rank_all(images, texts, task.pairs, share=share, add_up=distributed.all_reduce_sum)
        )
    image_ranks = torch.cat([i2t.expected() for i2t, _ in found])
    text_ranks = torch.full((len(split.captions),), torch.nan, dtype=torch.float64)
    for task, (_, t2i) in zip(tasks, found, strict=True):
        text_ranks[task.texts] = t2i.expected()
    # The rest on one rank, for ranks may share the cores.
    results: tuple[dict[str, float], dict[str, float], dict[str, list[float]]] = ({}, {}, {})
    if distributed.is_main_process():
        metrics = _mean([summary(*ranks, recalls) for ranks in found])
        metrics |= {"num_images": len(image_ranks), "num_texts": len(split.captions)}
        random = _mean(
            [chance(t.pairs, t.images.stop - t.images.start, len(t.texts), recalls) for t in tasks]
        )
        drawn = [(*r, t.image_of_text) for r, t in zip(found, tasks, strict=True)]
        bands = intervals(drawn, recalls=recalls, resamples=bootstrap) if bootstrap else {}
        results = (metrics, random, bands)
    metrics, random, bands = distributed.broadcast_object(results)
    return Evaluation(split, metrics, random, bands, image_ranks, text_ranks, tasks)


def _mean(values: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the mean of every entry."""
    return {key: sum(value[key] for value in values) / len(values) for key in values[0]}


@contextlib.contextmanager
def eval_mode(model: Encoders) -> Iterator[None]:
    """Put every module into eval mode; afterwards each is as it was."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training
