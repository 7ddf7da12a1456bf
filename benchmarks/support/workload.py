"""The model, batches and optimizer on which gradient caching is measured, for all peers alike."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dist_vse import distributed
from dist_vse.config import ImageConfig, LossConfig, ModelConfig, OptimConfig, TextConfig
from dist_vse.engine.optimizer import build_optimizer
from dist_vse.models.build import build_model
from dist_vse.models.dual_encoder import DualEncoder
from dist_vse.models.tokenizer import AnyWords
from dist_vse.tools.bench.scale_harness import VOCABULARY


@dataclass(frozen=True)
class Workload:
    """A timm image trunk and a text transformer, on pairs that cost nothing to make."""

    image: str
    image_size: int
    text_width: int
    text_depth: int
    num_tokens: int
    embedding: int


def make_model(load: Workload, *, frozen_image: bool = False) -> DualEncoder:
    """Build the model with the same weights every time; a frozen trunk has random ones here."""
    config = ModelConfig(
        image=ImageConfig(name=load.image, size=load.image_size, frozen=frozen_image),
        text=TextConfig(
            kind="transformer",
            width=load.text_width,
            depth=load.text_depth,
            max_tokens=load.num_tokens,
        ),
        embed_dim=load.embedding,
    )
    return build_model(config, LossConfig(learn_temperature=True), AnyWords(VOCABULARY))


def make_optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    """Build AdamW, as every peer here uses it."""
    return build_optimizer(model, OptimConfig(name="adamw", lr=1e-4))


def make_pairs(load: Workload, rows: int) -> tuple[Tensor, Tensor]:
    """Draw this rank's images uint8 (b, 3, h, w) and tokens int64 (b, l)."""
    generator = torch.Generator().manual_seed(distributed.rank())
    shape = (rows, 3, load.image_size, load.image_size)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    tokens = torch.randint(1, VOCABULARY, (rows, load.num_tokens), generator=generator)
    return images, tokens
