"""An engine in plain PyTorch: the reference that DeepSpeed's must equal, and easy to debug."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dist_vse.distributed import all_reduce_mean
from dist_vse.engine.finite import all_finite
from dist_vse.engine.optimizer import set_learning_rate
from dist_vse.models.dual_encoder import DualEncoder


class PlainEngine:
    """Replicates the model on every rank and reduces all gradients at once."""

    def __init__(
        self, module: DualEncoder, optimizer: torch.optim.Optimizer, clip_norm: float = 0.0
    ) -> None:
        self.module = module
        self.optimizer = optimizer
        self.clip_norm = clip_norm
        self.max_live_graphs: int | None = None

    def __call__(self, **inputs: Tensor) -> Any:
        """Run the model's forward."""
        return self.module(**inputs)

    @contextmanager
    def accumulation(self) -> Iterator[None]:
        """Let gradients add up in `.grad`; average them over the ranks at the end."""
        yield
        parameters = self._trainable()
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        grads = self._gradients()
        mean = all_reduce_mean(nn.utils.parameters_to_vector(grads))  # one message for all
        nn.utils.vector_to_parameters(mean, grads)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of `loss`."""
        loss.backward()

    def all_finite(self) -> Tensor:
        """Return 1.0 if all averages are finite, else 0.0: on the device, alike on all ranks."""
        return all_finite(self._gradients())

    def step(self) -> None:
        """Clip the averaged gradients, update, and clear them."""
        if self.clip_norm > 0:
            nn.utils.clip_grad_norm_(self._trainable(), self.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def set_learning_rate(self, rate: float) -> None:
        """Set the rate of the next step."""
        set_learning_rate(self.optimizer, rate)

    def _trainable(self) -> list[nn.Parameter]:
        return [p for p in self.module.parameters() if p.requires_grad]

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self._trainable() if p.grad is not None]
