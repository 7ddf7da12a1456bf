"""Counts what a rank sends, by looking at every collective that a step runs."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dist_vse import distributed
from dist_vse.common import step_timer

_SPREADING = (
    "reduce_scatter_",
    "_reduce_scatter_base_",
    "alltoall_",
    "alltoall_base_",
    "scatter_",  # the inputs are one rank's; elsewhere the list is empty
)
_ONE_WAY = ("reduce_", "broadcast_")  # between one rank and all others


class _Traffic(TorchDispatchMode):
    """Adds up the bytes that leave this rank, if each collective sends as little as it can."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sent: defaultdict[str, float] = defaultdict(float)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "c10d":
            sent = _bytes_sent(func.__name__, args, distributed.world_size())
            self.sent[step_timer.current()] += sent
        return func(*args, **(kwargs or {}))


def bytes_sent(step: Callable[[], Any]) -> float:
    """Run a step on every rank and return what one rank sends."""
    return sum(bytes_sent_by_part(step).values())


def bytes_sent_by_part(step: Callable[[], Any]) -> dict[str, float]:
    """Run a step on every rank and return what one rank sends in each of its parts."""
    traffic = _Traffic()
    with traffic:
        step()
    return {part: sent for part, sent in traffic.sent.items() if sent}


def _bytes_sent(name: str, args: Any, world_size: int) -> float:
    """Return the bytes of one collective: each part goes to the ranks that lack it, once."""
    operation = name.split(".")[0]
    others = world_size - 1
    if operation in ("allgather_", "_allgather_base_"):  # (outputs, inputs, ...)
        return float(_size(args[1]) * others)
    if operation in _SPREADING:  # (outputs, inputs, ...)
        return float(_size(args[1]) * others / world_size)
    if operation == "allreduce_":
        return float(_size(args[0]) * 2 * others / world_size)
    if operation in _ONE_WAY:
        return float(_size(args[0]) * others / world_size)  # on average over the ranks
    if operation == "send":
        return float(_size(args[0]))
    assert operation in ("recv_", "barrier"), operation
    return 0.0


def _size(tensors: Any) -> int:
    if isinstance(tensors, torch.Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(_size(tensor) for tensor in tensors)
