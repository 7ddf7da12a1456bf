"""An engine in plain PyTorch: the reference that DeepSpeed's must equal, and easy to debug."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dist_vse.distributed import all_reduce_mean, device
from dist_vse.engine.finite import all_finite
from dist_vse.engine.loss_scale import LossScale
from dist_vse.engine.optimizer import set_learning_rate
from dist_vse.models.dual_encoder import DualEncoder
from dist_vse.models.precision import autocast


class PlainEngine:
    """Replicates the model on every rank and reduces all gradients at once."""

    def __init__(
        self,
        module: DualEncoder,
        optimizer: torch.optim.Optimizer,
        clip_norm: float = 0.0,
        precision: str = "fp32",
    ) -> None:
        self.module = module
        self.optimizer = optimizer
        self.clip_norm = clip_norm
        self.precision = precision
        self.max_live_graphs: int | None = None
        self.loss_scale = LossScale() if precision == "fp16" else None

    def __call__(self, **inputs: Tensor) -> Any:
        """Run the model's forward."""
        with autocast(device(), self.precision):
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
        (loss if self.loss_scale is None else loss * self.loss_scale.value).backward()

    def all_finite(self) -> Tensor:
        """Return 1.0 if all averages are finite, else 0.0: on the device, alike on all ranks."""
        return all_finite(self._gradients())

    def step(self) -> None:
        """Clip the averaged gradients, update, and clear them."""
        if self.loss_scale is not None:
            torch._foreach_div_(self._gradients(), self.loss_scale.value)
        if self.clip_norm > 0:
            nn.utils.clip_grad_norm_(self._trainable(), self.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def skip(self) -> None:
        """Clear the gradients without an update."""
        self.optimizer.zero_grad()

    def set_learning_rate(self, rate: float) -> None:
        """Set the rate of the next step."""
        set_learning_rate(self.optimizer, rate)

    def _trainable(self) -> list[nn.Parameter]:
        return [p for p in self.module.parameters() if p.requires_grad]

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self._trainable() if p.grad is not None]
