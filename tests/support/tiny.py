"""Tiny real models and batches for tests of the train step."""

import torch
from torch import Tensor

from dist_vse.config import ImageConfig, LossConfig, ModelConfig, TextConfig
from dist_vse.models.build import build_model
from dist_vse.models.dual_encoder import DualEncoder
from dist_vse.models.tokenizer import AnyWords

VOCABULARY = 50


def tiny_model(
    *,
    dropout: float = 0.0,
    learn_temperature: bool = True,
    grad_checkpointing: bool = False,
    compiled: bool | str = False,
    image: str = "test_vit",
) -> DualEncoder:
    """Build an image trunk of 32 pixels and a text transformer; equal weights every time."""
    config = ModelConfig(
        image=ImageConfig(name=image, size=32),
        text=TextConfig(kind="transformer", width=64, depth=1, max_tokens=8, dropout=dropout),
        embed_dim=16,
        head_hidden=32,
        head_dropout=dropout,
        grad_checkpointing=grad_checkpointing,
        compile=compiled,
    )
    loss = LossConfig(learn_temperature=learn_temperature)
    return build_model(config, loss, AnyWords(VOCABULARY))


def tiny_batch(num_pairs: int, step: int) -> tuple[Tensor, Tensor]:
    """Draw images (B, 3, 32, 32) uint8 and tokens (B, 8) of a step; equal on every rank."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randint(0, 256, (num_pairs, 3, 32, 32), generator=generator, dtype=torch.uint8)
    tokens = torch.randint(1, VOCABULARY, (num_pairs, 8), generator=generator)
    return images, tokens
