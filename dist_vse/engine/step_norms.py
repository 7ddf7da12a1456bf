"""The norm of a step's gradient, and how far the step moves the weights.

Taken inside the optimizer's own step, where each engine hands it the gradients of what it updates.
"""

import torch
from torch import Tensor

from dist_vse.distributed import all_reduce_sum, device

MOST = 1 << 24
"""Elements of a tensor that are compared before and after; of a larger one, evenly spread ones."""


class StepNorms:
    """Measures the steps that it is asked to; the others cost nothing."""

    def __init__(self, optimizer: torch.optim.Optimizer, *, split: bool) -> None:
        """Watch an optimizer; `split` says that each rank updates a part of the parameters."""
        self._split, self.active = split, False
        self._before: list[tuple[Tensor, Tensor]] = []
        self._sums = torch.zeros(0)
        optimizer.register_step_pre_hook(self._look)
        optimizer.register_step_post_hook(self._compare)

    def start(self) -> None:
        """Measure the next step."""
        self.active = True
        self._sums = torch.zeros(3, dtype=torch.float64, device=device())

    def read(self) -> dict[str, float]:
        """Return `grad_norm`, after clipping, and `update_ratio` of the step; all ranks call it.

        The ratio is the update's norm over that of the weights before it.
        """
        self.active = False
        sums = all_reduce_sum(self._sums) if self._split else self._sums
        gradient, update, weight = sums.sqrt().tolist()
        return {"grad_norm": gradient, "update_ratio": update / weight if weight else 0.0}

    @torch.no_grad()
    def _look(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        """Add the gradients' squares; an engine may step group by group."""
        if not self.active:
            return
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._sums[0] += _square(_local(parameter.grad))
                    own = _local(parameter)
                    self._before.append((own, _some(own).clone()))

    @torch.no_grad()
    def _compare(self, *_: object) -> None:
        for after, before in self._before:
            share = after.numel() / max(1, before.numel())
            self._sums[1] += _square(_some(after) - before) * share
            self._sums[2] += _square(before) * share
        self._before.clear()


def _local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this rank holds."""
    to_local = getattr(tensor.detach(), "to_local", None)  # of a DTensor
    return to_local() if to_local is not None else tensor.detach()


def _some(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1)[:: -(-tensor.numel() // MOST) or 1]


def _square(tensor: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(tensor, dtype=torch.float64)
    return norm.square()
