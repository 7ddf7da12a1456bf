"""Many rows between ranks on CPUs: sent straight to the rank that needs them.

gloo's own all-gather passes all rows round and copies them once more, its reduce-scatter takes
three times as long. b rows on a rank, B on all, W ranks.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Below this an all-gather is a matter of the number of messages, not of their size.
_MANY_BYTES = 2**16


def suits(rows: Tensor) -> bool:
    """Return whether this module gathers these rows faster than the backend."""
    return dist.get_backend() == "gloo" and rows.nbytes >= _MANY_BYTES


def start_gather(out: Tensor, rows: Tensor) -> list[Any]:
    """Start to fill `out` (B, ...) with the rows (b, ...) of all ranks; return the messages."""
    parts = out.unflatten(0, (dist.get_world_size(), -1))
    messages = _start(dict.fromkeys(_others(), rows), {rank: parts[rank] for rank in _others()})
    parts[dist.get_rank()] = rows
    return messages


def reduce_scatter(x: Tensor) -> Tensor:
    """Sum (B, ...) over the ranks and return this rank's rows (b, ...)."""
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
