"""What torch.compile must leave as it is: collectives, and code that reads numbers on the host."""

from collections.abc import Callable
from typing import ParamSpec, TypeVar

from torch._compile import _disable_dynamo

P = ParamSpec("P")
R = TypeVar("R")


def uncompiled(fn: Callable[P, R]) -> Callable[P, R]:
    """Have torch.compile end its graph before a function, run it as it stands, and go on after it.

    `torch.compiler.disable` says the same, but imports the compiler (seconds) where it is written,
    and not at the first call. PyTorch's optimizers use this one, so that a training loop has
    imported it anyway.
    """
    return _disable_dynamo(fn)
