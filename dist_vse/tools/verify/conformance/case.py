"""The towers, the pairs and the formula that every peer is measured with."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dist_vse import distributed

WIDTH, HIDDEN = 8, 32
LOG_SCALE = 2.0
CHUNK = 4
EVEN, UNEVEN = (12, 12), (14, 10)  # of each two ranks


class Towers(nn.Module):
    """Two towers, or one for both sides, and log(1/t); alike on every rank."""

    def __init__(self, *, shared: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.image, self.text = (
                nn.Sequential(
                    nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Dropout(dropout), Unit(HIDDEN)
                )
                for _ in range(2)
            )
        if shared:
            self.text = self.image
        self.log_scale = nn.Parameter(torch.tensor([LOG_SCALE]))

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return features of unit length and 1/t."""
        return self.image(images), self.text(texts), self.log_scale.exp()


class Unit(nn.Linear):
    """A linear head whose outputs are of unit length."""

    def __init__(self, inputs: int) -> None:
        super().__init__(inputs, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Return features of unit length."""
        return functional.normalize(super().forward(x), dim=1)


class Pairs(NamedTuple):
    """Some rows of the global batch."""

    images: Tensor
    texts: Tensor


def all_pairs(total: int) -> Pairs:
    """Draw the global batch, alike on every rank."""
    generator = torch.Generator().manual_seed(1)
    made = torch.randn(2, total, WIDTH, generator=generator)
    return Pairs(made[0], made[1])


def counts(per_two: tuple[int, int]) -> list[int]:
    """Return every rank's number of pairs."""
    return [per_two[rank % 2] for rank in range(distributed.world_size())]


def own_pairs(per_two: tuple[int, int]) -> Pairs:
    """Return this rank's pairs."""
    numbers = counts(per_two)
    start = sum(numbers[: distributed.rank()])
    rows = slice(start, start + numbers[distributed.rank()])
    return Pairs(*(x[rows] for x in all_pairs(sum(numbers))))


def exact(per_two: tuple[int, int], *, symmetric: bool, shared: bool) -> dict[str, Tensor]:
    """Return one process's gradients of the whole batch, float64, by parameter."""
    towers = Towers(shared=shared).double()
    images, texts, scale = towers(*(x.double() for x in all_pairs(sum(counts(per_two)))))
    logits = scale * images @ texts.T
    right = torch.arange(len(logits))
    loss = functional.cross_entropy(logits, right)
    if symmetric:
        loss = (loss + functional.cross_entropy(logits.T, right)) / 2
    loss.backward()
    return {n: p.grad for n, p in towers.named_parameters() if p.grad is not None}


class Wrapper(Protocol):
    """Wraps a step's modules as users do, so that their gradients become the ranks' averages."""

    has_no_sync: bool
    """Whether a wrapped module can leave out the reduction, by `no_sync`."""

    def wrap(self, module: nn.Module) -> nn.Module:
        """Return the wrapped module."""

    def backward(self, loss: Tensor) -> None:
        """Run the backward of a step's loss as the wrapper wants it."""


class Replicas:
    """Wraps modules in DDP and counts the messages of gradients."""

    has_no_sync = True

    def __init__(self) -> None:
        self.messages = 0
        self._wrapped: list[nn.Module] = []  # it reduces nothing once it is gone

    def wrap(self, module: nn.Module) -> DistributedDataParallel:
        """Return the module as users wrap it."""
        replica = DistributedDataParallel(module)
        replica.register_comm_hook(None, lambda state, bucket: self._reduce(bucket))
        self._wrapped.append(replica)
        return replica

    def backward(self, loss: Tensor) -> None:
        """Run the backward; DDP reduces in it."""
        loss.backward()

    def _reduce(self, bucket: Any) -> Any:
        self.messages += 1
        total = distributed.all_reduce_mean(bucket.buffer())
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        future.set_result(total)
        return future


Step = Callable[[Towers, Pairs, Wrapper], None]
"""Runs forward and backward of a step, with this rank's pairs; under DDP the gradients are in the
towers' `.grad` then."""
