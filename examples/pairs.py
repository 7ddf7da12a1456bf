"""What the examples share: toy pairs, two small towers, and where the weights go at the end."""

import os
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional

STEPS, BATCH, RATE = 3, 16, 0.5
IMAGE, TEXT, WIDTH = 12, 10, 8


class Towers(nn.Module):
    """Any model that returns two features of unit length."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image = nn.Sequential(nn.Linear(IMAGE, 32), nn.GELU(), nn.Linear(32, WIDTH))
        self.text = nn.Sequential(nn.Linear(TEXT, 32), nn.GELU(), nn.Linear(32, WIDTH))

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        image_features = functional.normalize(self.image(images), dim=1)
        return image_features, functional.normalize(self.text(texts), dim=1)


def make_pairs() -> tuple[Tensor, Tensor]:
    """Draw the pairs of all steps, images and texts; alike on every rank."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(STEPS * BATCH, IMAGE, generator=generator)
    return images, torch.randn(STEPS * BATCH, TEXT, generator=generator)


def rank_batches(rank: int, world_size: int) -> list[dict[str, Tensor]]:
    """Return this rank's part of each step's batch."""
    images, texts = make_pairs()
    rows = BATCH // world_size
    starts = [step * BATCH + rank * rows for step in range(STEPS)]
    return [{"images": images[s : s + rows], "texts": texts[s : s + rows]} for s in starts]


def save_weights(*modules: nn.Module) -> None:
    """Write the weights for `python -m examples`, which compares them; every rank calls this."""
    weights = torch.cat([_whole(p).reshape(-1) for p in _parameters(modules)])
    if os.environ.get("RANK", "0") == "0" and "EXAMPLE_OUT" in os.environ:
        torch.save(weights, os.environ["EXAMPLE_OUT"])


def _parameters(modules: Iterable[nn.Module]) -> Iterable[Tensor]:
    return [p for module in modules for p in module.parameters()]


def _whole(parameter: Tensor) -> Tensor:
    """Return an ordinary copy of a parameter that FSDP2 may hold in parts."""
    full = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    copy: Tensor = full.detach().cpu().clone()
    return copy
