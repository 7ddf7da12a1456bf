"""What applies gradients: DeepSpeed's ZeRO, PyTorch's FSDP2, or plain PyTorch for tests.

Convention of the gradients: every rank's loss is the global one, and the gradient in its own rows
is W times theirs; the engine averages parameter gradients over the ranks. So the update equals
one process with the whole batch.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from dist_vse.engine.loss_scale import LossScale
from dist_vse.engine.step_norms import StepNorms
from dist_vse.models.dual_encoder import DualEncoder


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


class RunEngine(Engine, Protocol):
    """An engine that a run can save, load and evaluate, whatever each rank holds."""

    stage: int
    """ZeRO's stage by what is spread: 1 optimizer states, 2 gradients too, 3 parameters too."""
    norms: StepNorms

    @property
    def module(self) -> DualEncoder:
        """The model itself, of whose parameters a rank may hold a part."""

    def step_norms(self) -> dict[str, float]:
        """Return what `norms` measured of a step; every rank calls this."""

    def gathered_parameters(self) -> AbstractContextManager[DualEncoder]:
        """Return a model with all parameters whole; every rank calls this.

        The ranks may run different numbers of forwards in the block.
        """

    def update_average(self, samples_seen: int, batch: int) -> None:
        """Average the weights after a step, if the engine keeps an average."""

    def evaluation_weights(self) -> AbstractContextManager[DualEncoder]:
        """Return a whole model of the averages, or else of the weights; every rank calls this."""

    def dump_optimizer(self) -> dict[str, Tensor]:
        """Copy this rank's share of the optimizer's state to host memory, by name."""

    def load(self, weights: Mapping[str, Tensor], files: Sequence[Path]) -> None:
        """Take whole weights, and the optimizer's state out of all former ranks' `files`."""
