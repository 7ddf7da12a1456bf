"""A model that somebody else wrapped, as the train step sees an engine.

The wrapper reduces the gradients over the ranks: once a step, in the backward of the last chunk.
Optimizer and step stay with the training loop that the model belongs to.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from dist_vse.common.errors import UserError
from dist_vse.distributed import world_size
from dist_vse.engine.loss_scale import LossScale

Sync = Callable[[bool], AbstractContextManager[Any]]
"""Returns the block of one chunk's forward, and of its backward; True for the last chunk, whose
backward reduces the gradients of all."""


class WrappedModel:
    """Gives a model's gradients to the train step; they end up in `.grad`, as after a backward.

    `encode` takes tensors by name and returns features (c, d), (c, d), log_scale and bias (1,).
    """

    max_live_graphs: int | None = 1
    loss_scale: LossScale | None = None

    def __init__(
        self,
        module: nn.Module,
        encode: Callable[..., tuple[Tensor, ...]],
        *,
        num_chunks: int,
        backward: Callable[[Tensor], None] | None = None,
        sync: Sync | None = None,
    ) -> None:
        """Raises UserError for a model of several ranks whose gradients nothing would reduce."""
        self.module = module
        self._encode = encode
        self._deepspeed = hasattr(module, "set_gradient_accumulation_boundary")
        self._sync = sync or _find_sync(module)
        self._backward = backward or self._find_backward()
        self._graphs_to_come = num_chunks

    def __call__(self, **inputs: Tensor) -> tuple[Tensor, ...]:
        """Encode a chunk."""
        # In pass 1 autocast would keep weights in half precision that have no gradient.
        torch.clear_autocast_cache()
        if not torch.is_grad_enabled():
            return self._encode(**inputs)
        self._graphs_to_come -= 1
        with self._sync(self._graphs_to_come == 0):  # DDP prepares in forward what it reduces
            return self._encode(**inputs)

    @contextlib.contextmanager
    def accumulation(self) -> Iterator[None]:
        """Let DeepSpeed's ZeRO 1 to 3 reduce at the end of the block alone."""
        stage = self.module.zero_optimization_stage() if self._deepspeed else 0  # type: ignore[operator]
        if stage == 0:
            yield
            return
        with self.module.coalesce_grad_reduction():  # type: ignore[operator]
            yield

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of `loss`; the last call has them reduced."""
        with self._sync(last):
            self._backward(loss)

    def all_finite(self) -> Tensor:
        """Return 1.0: whether gradients are finite is for the loop (and its scaler) to see."""
        return torch.ones((), device=next(self.module.parameters()).device)

    def step(self) -> None:
        """Leave the step to the loop."""

    def skip(self) -> None:
        """Leave the step to the loop."""

    def set_learning_rate(self, rate: float) -> None:
        """Leave the rate to the loop."""

    def _find_backward(self) -> Callable[[Tensor], None]:
        if self._deepspeed:
            # A step is a step: DeepSpeed would divide by its accumulation steps.
            return lambda loss: self.module.backward(loss, scale_wrt_gas=False)  # type: ignore[operator]
        return lambda loss: loss.backward()


def _find_sync(module: nn.Module) -> Sync:
    """Return how the wrapper learns which backward reduces: by its methods, not by its type."""
    if hasattr(module, "set_gradient_accumulation_boundary"):  # DeepSpeed
        boundary: Any = module.set_gradient_accumulation_boundary
        if module.zero_optimization_stage() > 0:  # type: ignore[operator]
            return lambda last: contextlib.nullcontext()  # `accumulation` sees to it
        return lambda last: contextlib.nullcontext(boundary(last))
    sharded: list[Any] = [m for m in module.modules() if hasattr(m, "set_requires_gradient_sync")]
    if sharded:  # FSDP2

        def set_all(last: bool) -> AbstractContextManager[None]:
            for part in sharded:
                part.set_requires_gradient_sync(last, recurse=False)
            return contextlib.nullcontext()

        return set_all
    if hasattr(module, "no_sync"):  # DDP, the first FSDP
        no_sync: Any = module.no_sync
        return lambda last: contextlib.nullcontext() if last else no_sync()
    if world_size() > 1:
        raise UserError(
            f"nothing averages the gradients of {type(module).__name__} over the {world_size()} "
            "ranks; wrap it in DistributedDataParallel, fully_shard or DeepSpeed, or pass "
            "sync=lambda last: … and average them yourself"
        )
    return lambda last: contextlib.nullcontext()
