"""What applies gradients: DeepSpeed's ZeRO, or plain PyTorch for tests and debugging.

Convention of the gradients: every rank's loss is the global one, and the gradient in its own rows
is W times theirs; the engine averages parameter gradients over the ranks. So the update equals
one process with the whole batch.
"""

from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor, nn

from dist_vse.engine.loss_scale import LossScale


class Engine(Protocol):
    """The model with its optimizer, as the train step sees them."""

    max_live_graphs: int | None
    """Largest number of forwards that may wait for their backward; None is no bound."""
    loss_scale: LossScale | None
    """By what `backward` multiplies in a float16 run, until `step` divides; the caller sets it."""

    @property
    def module(self) -> nn.Module:
        """The model itself."""

    def __call__(self, **inputs: Tensor) -> Any:
        """Run the model's forward."""

    def accumulation(self) -> AbstractContextManager[None]:
        """Return the block of a step's backward calls; at its end, gradients are averages."""

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of `loss`; `last` marks the step's last call."""

    def all_finite(self) -> Tensor:
        """Return 1.0 if all averages are finite, else 0.0: on the device, alike on all ranks."""

    def step(self) -> None:
        """Clip the averaged gradients, update, and clear them."""

    def skip(self) -> None:
        """Clear the gradients, of which one is not finite, without an update."""

    def set_learning_rate(self, rate: float) -> None:
        """Set the rate of the next step."""
