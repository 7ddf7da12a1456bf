"""The loss scale of a float16 run: as large as the gradients allow, and alike on every rank.

Micikevicius et al., Mixed Precision Training, 2018, https://arxiv.org/abs/1710.03740: a backward
in float16 loses gradients below 6e-8, so it runs on a loss that is larger by a factor. The factor
is a power of two, which rounds nothing. PyTorch's GradScaler looks at one rank's gradients only,
and under ZeRO each rank has others.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dist_vse.common.errors import UserError
from dist_vse.common.log import logger

KEY = "loss_scale"
_START = 2.0**16  # as in PyTorch's GradScaler
_GROWTH_STEPS = 2000
_LARGEST = 2.0**60  # float32's gradients must hold it too


@dataclass
class LossScale:
    """The factor, and what decides the next one."""

    value: float = _START
    steps: int = 0
    """Updates since the factor last changed."""
    skipped: int = 0
    """Steps of the run without an update."""

    def grow(self) -> None:
        """Note an update; after enough of them the factor doubles."""
        self.steps += 1
        if self.steps >= _GROWTH_STEPS:
            self.value, self.steps = min(_LARGEST, 2 * self.value), 0

    def back_off(self) -> None:
        """Note a step that was skipped, and halve the factor. Raises UserError below 1."""
        used = self.value
        self.value, self.steps, self.skipped = used / 2, 0, self.skipped + 1
        if self.value < 1:
            raise UserError(
                f"after {self.skipped} skipped steps a gradient is infinite or NaN without loss "
                "scaling: set engine.precision=bf16 or fp32, or lower optim.lr"
            )
        logger.info(
            "a gradient overflowed at loss scale %g: the step updates nothing, the scale is now %g",
            *(used, self.value),
        )

    def dump(self) -> dict[str, Tensor]:
        """Return the state for a checkpoint, by name."""
        numbers = [self.value, self.steps, self.skipped]
        return {KEY: torch.tensor(numbers, dtype=torch.float64)}

    def load(self, state: Tensor) -> None:
        """Take the state of a checkpoint. Raises UserError if these are not three such numbers."""
        if (
            state.shape != (3,)
            or not bool(state.double().isfinite().all())
            or bool((state < 0).any())
        ):
            raise UserError(
                "the checkpoint's loss scale is no loss scale of ours; continue from an older one"
            )
        value, steps, skipped = state.tolist()
        self.value, self.steps, self.skipped = value, int(steps), int(skipped)


def load_loss_scale(scale: LossScale, files: Sequence[Path]) -> None:
    """Take the loss scale out of a checkpoint's files, if it has one: rank 0's has it."""
    from safetensors import safe_open  # the library without the system does without it

    for path in files[:1]:
        with safe_open(path, "pt") as first:
            if KEY in first.keys():  # noqa: SIM118 - a safetensors file is no dict
                scale.load(first.get_tensor(KEY))
