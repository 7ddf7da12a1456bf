"""Save and replay the random state, so that two forwards draw the same dropout.

Besides PyTorch's own generators, a module may draw from one that it holds itself: a
torch.Generator, a random.Random, or NumPy's. `own_generators` finds these.
"""

import contextlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Generator = torch.Generator | random.Random | np.random.Generator | np.random.RandomState


@dataclass(frozen=True)
class RandomState:
    """The state of the CPU's generator, of the current GPU's where there is one, and of others."""

    cpu: Tensor
    cuda: Tensor | None
    own: tuple[tuple[Generator, Any], ...] = ()
    """Generators that modules hold, each with its state."""


def own_generators(module: nn.Module) -> list[Generator]:
    """Return the generators that a module, or one inside it, holds as attributes."""
    held = (
        value
        for inner in module.modules()
        for value in vars(inner).values()
        if isinstance(value, Generator)
    )
    return list({id(generator): generator for generator in held}.values())


def random_state(own: Sequence[Generator] = ()) -> RandomState:
    """Return the current random state, with that of these generators."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    states = tuple((generator, _state(generator)) for generator in own)
    return RandomState(torch.get_rng_state(), cuda, states)


def restore(state: RandomState) -> None:
    """Set the random state to a saved one.

    This also makes cuDNN start its own generator, which draws the dropout between the layers of
    an RNN, again from PyTorch's. Without it that generator goes on from wherever it stands.
    """
    torch.set_rng_state(state.cpu)
    if state.cuda is not None:
        torch.cuda.set_rng_state(state.cuda)
    for generator, own in state.own:
        _set_state(generator, own)


@contextlib.contextmanager
def replay(state: RandomState) -> Iterator[None]:
    """Draw in the block what was drawn after `state`; then restore the state of before."""
    now = random_state([generator for generator, _ in state.own])
    restore(state)
    try:
        yield
    finally:
        restore(now)


def _state(generator: Generator) -> Any:
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.get_state()


def _set_state(generator: Generator, state: Any) -> None:
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    else:
        generator.set_state(state)
