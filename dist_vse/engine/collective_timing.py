"""Functions that run a collective, wrapped so that the step timer counts them for themselves."""

import functools
from collections.abc import Callable
from typing import Any

from dist_vse.common.step_timer import collective


def timed(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function that runs a collective; one that is wrapped already stays as it is."""
    if hasattr(function, "is_timed"):
        return function

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with collective():
            work = function(*args, **kwargs)
        return _Pending(work) if kwargs.get("async_op") and work is not None else work

    run.is_timed = True  # type: ignore[attr-defined]
    return run


class _Pending:
    """The handle of an asynchronous collective, whose wait is timed as well."""

    def __init__(self, work: Any) -> None:
        self._work = work

    @collective()
    def wait(self, *args: Any, **kwargs: Any) -> Any:
        return self._work.wait(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)
