"""What a CPU does better another way: oneDNN's matrix product, and messages between gloo's ranks.

Everything that is shaped by CPUs stands here; the callers read in plain terms. b rows on a rank,
B on all, W ranks, d embedding.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# The product that torch.compile uses on CPUs, if this torch was built with oneDNN. In float32
# torch.mm is MKL's, which is slower on AMD's processors.
_onednn: Callable[..., Any] | None = (
    getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if torch.backends.mkldnn.is_available()
    else None
)

# Below this an all-gather is a matter of the number of messages, not of their size.
_MANY_BYTES = 2**16


def has_inner_product(left: Tensor) -> bool:
    """Return whether `inner_product` is the faster way for such a factor."""
    return _onednn is not None and left.device.type == "cpu" and left.dtype == torch.float32


def inner_product(left: Tensor, right: Tensor) -> Tensor:
    """Return left (n, k) times right.T (k, m).

    Both without gaps in memory: with them oneDNN takes a hundred times as long. It is fast with
    rows of the left factor, not with its columns.
    """
    assert _onednn is not None
    product: Tensor = _onednn(left, right, None, "none", [], "")
    return product


def has_direct_gather(rows: Tensor) -> bool:
    """Return whether `start_gather` is faster than the backend's own all-gather.

    gloo passes all rows round and copies them once more.
    """
    return dist.get_backend() == "gloo" and rows.nbytes >= _MANY_BYTES


def has_direct_reduce() -> bool:
    """Return whether `reduce_scatter` is faster than the backend's own."""
    return dist.get_backend() == "gloo"


def start_gather(out: Tensor, rows: Tensor) -> list[Any]:
    """Start to fill `out` (B, ...) with the rows (b, ...) of all ranks; return the messages.

    Rows go straight to the rank that needs them.
    """
    parts = out.unflatten(0, (dist.get_world_size(), -1))
    messages = _start(dict.fromkeys(_others(), rows), {rank: parts[rank] for rank in _others()})
    parts[dist.get_rank()] = rows
    return messages


def reduce_scatter(x: Tensor) -> Tensor:
    """Sum (B, ...) over gloo's ranks and return this rank's rows (b, ...).

    gloo's own takes three times as long.
    """
    parts = x.unflatten(0, (dist.get_world_size(), -1))
    received = {rank: torch.empty_like(parts[rank]) for rank in _others()}
    for message in _start({rank: parts[rank] for rank in _others()}, received):
        message.wait()
    total, *others = received.values()
    total += parts[dist.get_rank()]
    for part in others:
        total += part
    return total


def _others() -> list[int]:
    """Return the other ranks, from the next one on, so that not all send to the same at first."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    return [(rank + step) % world_size for step in range(1, world_size)]


def _start(outgoing: dict[int, Tensor], incoming: dict[int, Tensor]) -> list[Any]:
    messages = [dist.P2POp(dist.isend, x, rank) for rank, x in outgoing.items() if x.numel()]
    messages += [dist.P2POp(dist.irecv, x, rank) for rank, x in incoming.items() if x.numel()]
    return dist.batch_isend_irecv(messages) if messages else []
