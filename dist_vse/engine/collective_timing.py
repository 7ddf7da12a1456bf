"""DeepSpeed's collectives: timed apart from the computation around them, and left out where the
engine has reduced already (see `gradient_reduction`)."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from dist_vse.common.step_timer import collective

_NAMES = (
    "all_gather",
    "all_gather_coalesced",
    "all_gather_into_tensor",
    "all_reduce",
    "all_to_all_single",
    "allgather_fn",
    "broadcast",
    "reduce",
    "reduce_scatter_fn",
    "reduce_scatter_tensor",
)

_REDUCTIONS = ("all_reduce", "reduce")
_reduced_already = False


@contextmanager
def reduced_already() -> Iterator[None]:
    """Let DeepSpeed reduce nothing in the block: its gradients are sums over the ranks already."""
    global _reduced_already
    _reduced_already = True
    try:
        yield
    finally:
        _reduced_already = False


def tell_collectives(comm: Any) -> None:
    """Have the functions of `deepspeed.comm` say when they run; a second call changes nothing."""
    for name in _NAMES:
        function = getattr(comm, name, None)
        if function is not None and not hasattr(function, "tells"):
            setattr(comm, name, _telling(name, function))


def _telling(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def tell(*args: Any, **kwargs: Any) -> Any:
        if _reduced_already and name in _REDUCTIONS:
            return None
        with collective():
            work = function(*args, **kwargs)
        return _Pending(work) if kwargs.get("async_op") and work is not None else work

    tell.tells = True  # type: ignore[attr-defined]
    return tell


class _Pending:
    """A collective under way."""

    def __init__(self, work: Any) -> None:
        self._work = work

    @collective()
    def wait(self, *args: Any, **kwargs: Any) -> Any:
        return self._work.wait(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)
