"""Two small towers and their pairs, for loops that are not ours."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

IMAGE, TEXT, WIDTH = 12, 10, 8


class Towers(nn.Module):
    """Returns two features of unit length; with `scale`, CLIP's logit_scale as well."""

    def __init__(self, *, dropout: float = 0.0, scale: bool = False) -> None:
        super().__init__()
        self.image = _tower(IMAGE, dropout)
        self.text = _tower(TEXT, dropout)
        self.scale = nn.Parameter(torch.tensor([2.0])) if scale else None
        self.seen: list[Tensor] = []

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, ...]:
        features = [
            functional.normalize(self.image(images), dim=1),
            functional.normalize(self.text(texts), dim=1),
        ]
        self.seen.append(features[0].detach())
        return (*features, self.scale.exp()) if self.scale is not None else tuple(features)


def _tower(width: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Dropout(dropout), nn.Linear(32, WIDTH))


def make_towers(*, dropout: float = 0.0, scale: bool = False) -> Towers:
    """Build them, alike on every rank."""
    torch.manual_seed(0)
    return Towers(dropout=dropout, scale=scale)


def make_pairs(count: int) -> dict[str, Tensor]:
    """Draw pairs, alike on every rank."""
    generator = torch.Generator().manual_seed(1)
    return {
        "images": torch.randn(count, IMAGE, generator=generator),
        "texts": torch.randn(count, TEXT, generator=generator),
    }


def rows_of_rank(pairs: dict[str, Tensor], counts: list[int], rank: int) -> dict[str, Tensor]:
    """Return a rank's rows; the ranks hold `counts` of them."""
    start = sum(counts[:rank])
    return {name: x[start : start + counts[rank]] for name, x in pairs.items()}


def gradients(*modules: nn.Module) -> dict[str, Tensor]:
    """Return the whole gradients by name."""
    return dict(_gradients(modules))


def _gradients(modules: tuple[nn.Module, ...]) -> Iterator[tuple[str, Tensor]]:
    for module in modules:
        for name, parameter in module.named_parameters():
            grad = parameter.grad
            assert grad is not None, name
            whole = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
            yield name.removeprefix("module."), whole.detach().clone()
