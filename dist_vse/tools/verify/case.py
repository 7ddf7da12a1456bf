"""A small batch and small towers for a config: everything but the encoders stays the user's.

The checks are of the loss, the ranks, the chunks and the engine. Encoders of any size behave alike
in them, so small ones show an error within seconds.
"""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dist_vse import distributed
from dist_vse.config import ImageConfig, ModelConfig, OptimConfig, TextConfig, TrainConfig
from dist_vse.data.samples import Batch
from dist_vse.models.build import build_model
from dist_vse.models.dual_encoder import DualEncoder, Tower
from dist_vse.models.tokenizer import AnyWords

ROWS = 3  # pairs a chunk
MAX_CHUNKS = 8
MAX_PAIRS = 1024  # beyond it the number of chunks shrinks, to no less than two
WIDTH = 32  # of the features that the loss alone is given
VOCABULARY, PAD = 50, 0
SIZE, TOKENS = 32, 8


def num_chunks(config: TrainConfig, world_size: int) -> int:
    """Return how many chunks a rank has in a step; two where they would be found by trying."""
    chunk = config.asked_chunk_size(on_gpu=distributed.device().type == "cuda")
    if chunk is None:
        return 2
    return max(1, config.global_batch_size // world_size // chunk)


def kept_graphs(config: TrainConfig) -> int:
    """Return how many chunks keep their graphs between the passes; one for `auto`."""
    kept = config.cache.keep_graphs
    return 1 if isinstance(kept, str) else kept


def shrink(config: TrainConfig, world_size: int) -> TrainConfig:
    """Return the config with small towers and a small batch in as many chunks (or fewer).

    Dropout is off, since one process cannot draw what several drew; SGD takes one step, since
    Adam would hide a wrong scale.
    """
    max_chunks = min(MAX_CHUNKS, max(2, MAX_PAIRS // (world_size * ROWS)))
    chunks = min(num_chunks(config, world_size), max_chunks)
    model = ModelConfig(
        image=ImageConfig(name="test_vit", size=SIZE),
        text=TextConfig(width=64, depth=1, max_tokens=TOKENS),
        embed_dim=16,
        head_hidden=min(32, config.model.head_hidden),
        grad_checkpointing=config.model.grad_checkpointing,
    )
    return replace(
        config,
        model=model,
        loss=replace(config.loss, widths=small_widths(config, 16)),
        optim=OptimConfig(name="sgd", weight_decay=0.0, clip_norm=config.optim.clip_norm),
        global_batch_size=world_size * chunks * ROWS,
        chunk_size=ROWS,
    )


def small_widths(config: TrainConfig, embed_dim: int) -> list[int]:
    """Return as many nested widths as the config's, at most four, each half of the one before."""
    return [embed_dim >> k for k in range(1, 1 + min(4, len(config.loss.widths)))]


def small_model(config: TrainConfig, *, frozen: tuple[bool, bool]) -> DualEncoder:
    """Build the towers, alike on every rank; `frozen` says which trunks (image, text) are."""
    model = build_model(config.model, config.loss, AnyWords(VOCABULARY, PAD))
    model.image, model.text = (
        Tower(tower.trunk, tower.head, frozen=is_frozen)
        for tower, is_frozen in zip((model.image, model.text), frozen, strict=True)
    )
    return model.to(distributed.device())


def make_batch(
    total: int, *, duplicates: bool = True, negatives: int = 0, teacher: bool = False
) -> Batch:
    """Draw a global batch of `total` pairs; `duplicates` repeats its first rows at its end.

    Each brings so many negatives, of which the first is another pair's caption. With a `teacher`
    there are features of another model.
    """
    generator = torch.Generator().manual_seed(0)
    # A coarse pattern of its own for each image, so that features differ.
    coarse = torch.rand(total, 3, 4, 4, generator=generator).mul_(255)
    images = functional.interpolate(coarse, size=(SIZE, SIZE)).to(torch.uint8)
    tokens = torch.randint(1, VOCABULARY, (total, TOKENS), generator=generator)
    tokens[::3, TOKENS // 2 :] = PAD
    image_ids, text_ids = (torch.arange(total) for _ in range(2))
    if duplicates and total >= 4:
        image_ids[-1] = image_ids[0]
        text_ids[-2] = text_ids[1]
    batch = Batch(
        images=images,
        tokens=tokens,
        image_ids=image_ids,
        text_ids=text_ids,
        origin=torch.zeros(total, 2, dtype=torch.int64),
        state=np.zeros((0, 2), dtype=np.int64),
        skipped=(),
    )
    if teacher:
        made = torch.randn(2, total, WIDTH // 2, generator=generator)
        of_images, of_texts = functional.normalize(made, dim=2).unbind()
        batch = replace(batch, teacher=(of_images, of_texts))
    if not negatives:
        return batch
    false = torch.randint(1, VOCABULARY, (total * negatives, TOKENS), generator=generator)
    false_ids = total + torch.arange(total * negatives)
    false[0], false_ids[0] = tokens[-1], text_ids[-1]
    return replace(batch, negatives=false, negative_ids=false_ids)


def make_features(total: int, *, negatives: int = 0) -> list[Tensor]:
    """Draw unit features (total, d) in float64; a caption resembles its image a little.

    Those of images, of captions and, if there are some, of so many `negatives` a pair.

    Not much: where a softmax is nearly certain, the dense loss itself has few digits.
    """
    generator = torch.Generator().manual_seed(0)
    made = torch.randn(2, total, WIDTH, generator=generator, dtype=torch.float64)
    made[1] += 0.2 * made[0]
    features = list(functional.normalize(made, dim=2).to(distributed.device()).unbind())
    if negatives:  # each resembles an image as a caption does
        false = torch.randn(total * negatives, WIDTH, generator=generator, dtype=torch.float64)
        false = functional.normalize(false + 0.2 * made[0].repeat(negatives, 1), dim=1)
        features.append(false.to(distributed.device()))
    return features


def part_of(batch: Batch, rows: slice) -> Batch:
    """Return some rows of a batch, with the negatives that they bring."""
    if batch.negatives is not None and batch.negative_ids is not None:
        of_rows = negatives_of(rows, len(batch.negatives) // max(1, len(batch.tokens)))
        false, false_ids = batch.negatives[of_rows], batch.negative_ids[of_rows]
        batch = replace(batch, negatives=false, negative_ids=false_ids)
    return replace(
        batch,
        images=batch.images[rows],
        tokens=batch.tokens[rows],
        image_ids=batch.image_ids[rows],
        text_ids=batch.text_ids[rows],
        origin=batch.origin[rows],
        teacher=None if batch.teacher is None else (batch.teacher[0][rows], batch.teacher[1][rows]),
    )


def negatives_of(rows: slice, negatives: int) -> slice:
    """Return which negatives some rows bring, if each brings so many."""
    return slice(rows.start * negatives, rows.stop * negatives)
