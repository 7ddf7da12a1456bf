"""Process identity and collectives: with `gloo`, the sole owner of torch.distributed.

Everything here also works in one process without a process group. Shape letters: b rows on
this rank, B rows on all ranks, W ranks.
"""

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_vse.common.errors import UserError
from dist_vse.common.step_timer import collective
from dist_vse.distributed import gloo, launcher_env, watchdog

# The newer names first: the older ones are deprecated since torch 2.14.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def rank() -> int:
    """Return this process's number, 0 to W - 1."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return W, the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main_process() -> bool:
    """Tell whether this is rank 0, which writes and prints."""
    return rank() == 0


def device() -> torch.device:
    """Return the device of this process: its own GPU where there is one, else the CPU."""
    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu":
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


@contextlib.contextmanager
def process_group(timeout_s: float | None = None) -> Iterator[None]:
    """Join the group that the launcher describes (or a group of one), and leave it at the end.

    A rank that waits for another one longer than `timeout_s` seconds fails; the default is in
    the environment's DIST_VSE_HANG_S, else half an hour. Raises UserError if the launcher's
    description is not complete, or promises a GPU that is not there.
    """
    launcher_env.check_accelerator()
    place: dict[str, Any] = {}  # in the environment
    if "RANK" in os.environ:
        launcher_env.check_described()
    else:
        launcher_env.check_alone()
        store = dist.HashStore()  # type: ignore[attr-defined]  # needs no port
        place = {"store": store, "rank": 0, "world_size": 1}
    os.environ.setdefault("LOCAL_RANK", "0")
    if device().type == "cuda":
        launcher_env.check_gpus()
        torch.cuda.set_device(device())
    backend = "nccl" if device().type == "cuda" else "gloo"
    if timeout_s is None:
        timeout_s = watchdog.limit_s()
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout_s), **place)
    try:
        yield
    finally:
        # Without it gloo's threads may abort the process after all work was done.
        dist.destroy_process_group()


class _AllGather(torch.autograd.Function):
    """Concatenate every rank's rows; the gradient of a row is the sum of all ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # (b, ...) -> (B, ...)
        return gather_rows(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # (B, ...) -> (b, ...)
        return reduce_scatter_rows(grad)


def all_gather(x: Tensor) -> Tensor:
    """Gather the rows of all ranks, (b, ...) -> (B, ...), in rank order; differentiable.

    Every rank must hold the same number of rows. The backward is a reduce-scatter: it sums over
    the ranks, so each rank gets the gradient of the sum of all ranks' losses in its own rows.
    """
    if world_size() == 1:
        return x
    gathered: Tensor = _AllGather.apply(x)
    return gathered


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
    if gloo.suits(rows):
        return out, gloo.start_gather(out, rows)
    return out, [_all_gather_single(out, rows, async_op=True)]


@collective()
def reduce_scatter_rows(x: Tensor) -> Tensor:
    """Sum over the ranks and keep this rank's rows, (B, ...) -> (b, ...)."""
    if world_size() == 1:
        return x
    if dist.get_backend() == "gloo":
        return gloo.reduce_scatter(x.contiguous())
    out = x.new_empty((x.shape[0] // world_size(), *x.shape[1:]))
    _reduce_scatter_single(out, x.contiguous())
    return out


def all_gather_rows(x: Tensor) -> Tensor:
    """Gather rows of all ranks where the ranks may hold different numbers of them."""
    if world_size() == 1:
        return x
    counts: list[int] = gather_rows(torch.tensor([len(x)], device=x.device)).tolist()
    padded = x.new_zeros((max(counts), *x.shape[1:]))
    padded[: len(x)] = x
    parts = gather_rows(padded).split(max(counts))
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
        self._work: Any = start(x, async_op=True)

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
    dist.all_gather_object(values, value)
    return values


@collective()
def broadcast_object(value: Any) -> Any:
    """Return rank 0's object on every rank."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


@collective()
def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum over the ranks, in place; return the tensor."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


@collective()
def all_reduce_max(x: Tensor) -> Tensor:
    """Take the maximum over the ranks, in place; return the tensor."""
    if world_size() > 1:
        dist.all_reduce(x, dist.ReduceOp.MAX)
    return x


@collective()
def all_reduce_min(x: Tensor) -> Tensor:
    """Take the minimum over the ranks, in place; return the tensor."""
    if world_size() > 1:
        dist.all_reduce(x, dist.ReduceOp.MIN)
    return x


def all_reduce_mean(x: Tensor) -> Tensor:
    """Take the mean over the ranks, in place; return the tensor."""
    return all_reduce_sum(x).div_(world_size())


def any_rank(flag: bool) -> bool:
    """Tell on every rank alike whether the flag is set on any of them."""
    return any_rank_each([flag])[0]


def any_rank_each(flags: Sequence[bool]) -> list[bool]:
    """Tell of several flags, in one reduction, whether each is set on any rank."""
    if world_size() == 1:
        return list(flags)
    numbers = torch.tensor([float(flag) for flag in flags], device=device())
    return [number > 0 for number in all_reduce_max(numbers).tolist()]


@collective()
def barrier() -> None:
    """Wait for all ranks."""
    if world_size() > 1:
        dist.barrier()


@contextlib.contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """End the block alike on every rank: a UserError on one rank is raised on all of them.

    Costs one number's reduction where nothing is wrong, and every rank must run the same block.
    Other exceptions are faults of ours: they end this rank, and the launcher ends the others.
    """
    failure = None
    try:
        yield
    except UserError as error:
        failure = error
    if world_size() == 1:
        if failure is not None:
            raise failure
        return
    if not any_rank(failure is not None):
        return
    failures = all_gather_object(failure)
    number, first = next((n, f) for n, f in enumerate(failures) if f is not None)
    on = f" (on rank {number})" if [str(f) for f in failures].count(str(first)) == 1 else ""
    raise type(first)(f"{first}{on}")
