"""Save and replay the random state, so that two forwards draw the same dropout."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RandomState:
    """The state of the CPU's generator, and of the current GPU's where there is one."""

    cpu: Tensor
    cuda: Tensor | None


def random_state() -> RandomState:
    """Return the current random state."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    return RandomState(torch.get_rng_state(), cuda)


def restore(state: RandomState) -> None:
    """Set the random state to a saved one."""
    torch.set_rng_state(state.cpu)
    if state.cuda is not None:
        torch.cuda.set_rng_state(state.cuda)


@contextlib.contextmanager
def replay(state: RandomState) -> Iterator[None]:
    """Draw in the block what was drawn after `state`; then restore the state of before."""
    now = random_state()
    restore(state)
    try:
        yield
    finally:
        restore(now)
