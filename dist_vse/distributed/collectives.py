"""Collectives: what the ranks send each other.

Every rank starts its collectives in the same order. All of them also work in one process without a
process group. A tensor in host memory goes over the host's group, with no GPU in between.
Shape letters: b rows on this rank, B rows on all ranks, W ranks.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_vse.common import cpu
from dist_vse.common.step_timer import collective
from dist_vse.distributed.group import host_group, world_size

# The newer names first: the older ones are deprecated since torch 2.14.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def _group_of(x: Tensor) -> dist.ProcessGroup | None:
    """Return the group that sends such a tensor; None is the default group."""
    return None if x.is_cuda else host_group()


@collective()
def gather_rows(x: Tensor) -> Tensor:
    """Gather equally many rows of all ranks, (b, ...) -> (B, ...), without a gradient."""
    if world_size() == 1:
        return x
    out, works = _start_gather(x.contiguous())
    for work in works:
        work.wait()
    return out


def _start_gather(rows: Tensor) -> tuple[Tensor, list[Any]]:
    """Return memory for the rows of all ranks, (b, ...) -> (B, ...), and the work that fills it."""
    out = rows.new_empty((world_size() * rows.shape[0], *rows.shape[1:]))
    if cpu.has_direct_gather(rows):
        return out, cpu.start_gather(out, rows)
    return out, [_all_gather_single(out, rows, group=_group_of(rows), async_op=True)]


@collective()
def reduce_scatter_rows(x: Tensor) -> Tensor:
    """Sum over the ranks and keep this rank's rows, (B, ...) -> (b, ...)."""
    if world_size() == 1:
        return x
    if cpu.has_direct_reduce():
        return cpu.reduce_scatter(x.contiguous())
    out = x.new_empty((x.shape[0] // world_size(), *x.shape[1:]))
    _reduce_scatter_single(out, x.contiguous(), group=_group_of(x))
    return out


def all_gather_rows(x: Tensor) -> Tensor:
    """Gather rows of all ranks where the ranks may hold different numbers of them."""
    if world_size() == 1:
        return x
    counts: list[int] = gather_rows(torch.tensor([len(x)], device=x.device)).tolist()
    return gather_ragged_rows(x, counts)


def gather_ragged_rows(x: Tensor, counts: Sequence[int]) -> Tensor:
    """Gather rows of all ranks, of which each holds so many: (b, ...) -> (B, ...)."""
    longest = max(counts)
    if min(counts) == longest:
        return gather_rows(x)
    padded = x.new_zeros((longest, *x.shape[1:]))
    padded[: len(x)] = x
    parts = gather_rows(padded).split(longest)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


class AsyncAllGather:
    """Equally many rows of all ranks, under way to all ranks while this rank works on.

    Every rank starts its collectives in the same order.
    """

    @collective("gather")
    def __init__(self, rows: Tensor) -> None:
        self._rows = rows.contiguous()  # must live until the end
        self._gathered, self._works = _start_gather(self._rows)

    @collective()
    def wait(self) -> Tensor:
        """Wait for the rows of all ranks and return them, (W, b, ...)."""
        while self._works:  # a message can't be waited for twice
            self._works.pop().wait()
        gathered: Tensor = self._gathered.unflatten(0, (world_size(), -1))
        return gathered


class AsyncReduce:
    """A tensor on its way to its sum over the ranks, in place, while this rank works on.

    With an `owner` only that rank gets the sum, for fewer bytes; what the others are left with is
    of no use. Every rank starts its collectives in the same order.
    """

    @collective()
    def __init__(self, x: Tensor, owner: int | None = None) -> None:
        start: Callable[..., Any] = (
            dist.all_reduce if owner is None else partial(dist.reduce, dst=owner)
        )
        self._work: Any = start(x, group=_group_of(x), async_op=True)

    @collective()
    def wait(self) -> None:
        """Wait for the sum."""
        self._work.wait()


class AsyncSendRecv:
    """A message to one rank and another from one rank, under way while this rank works on.

    Every rank starts its exchanges in the same order. An empty message is not sent.
    """

    @collective()
    def __init__(
        self, outgoing: Tensor, incoming: Tensor, *, destination: int, source: int
    ) -> None:
        self._buffers = outgoing, incoming  # both must live until the end
        messages = ((dist.isend, outgoing, destination), (dist.irecv, incoming, source))
        started = [dist.P2POp(*message) for message in messages if message[1].numel()]
        self._works = dist.batch_isend_irecv(started) if started else []

    @collective()
    def wait(self) -> Tensor:
        """Wait for both messages and return the one that came in."""
        for work in self._works:
            work.wait()
        return self._buffers[1]


@collective()
def all_gather_object(value: Any) -> list[Any]:
    """Return every rank's object, in rank order; for small things between steps."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=host_group())
    return values


@collective()
def broadcast_object(value: Any) -> Any:
    """Return rank 0's object on every rank."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, group=host_group())
    return values[0]


@collective()
def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum over the ranks, in place; return the tensor."""
    if world_size() > 1:
        dist.all_reduce(x, group=_group_of(x))
    return x


@collective()
def all_reduce_max(x: Tensor) -> Tensor:
    """Take the maximum over the ranks, in place; return the tensor."""
    if world_size() > 1:
        dist.all_reduce(x, dist.ReduceOp.MAX, group=_group_of(x))
    return x


@collective()
def all_reduce_min(x: Tensor) -> Tensor:
    """Take the minimum over the ranks, in place; return the tensor."""
    if world_size() > 1:
        dist.all_reduce(x, dist.ReduceOp.MIN, group=_group_of(x))
    return x


def all_reduce_mean(x: Tensor) -> Tensor:
    """Take the mean over the ranks, in place; return the tensor."""
    return all_reduce_sum(x).div_(world_size())


@collective()
def barrier() -> None:
    """Wait for all ranks."""
    if world_size() > 1:
        dist.barrier(group=host_group())
