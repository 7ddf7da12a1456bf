"""Gradients on their way to other ranks while the last backward of a step still runs.

As PyTorch's DDP does it (Li et al., 2020, https://arxiv.org/abs/2006.15704): the gradients lie in
buckets, in the reverse of the model's order, which is about the order of the backward. A bucket is
sent once its gradients and those of all buckets before it are there; so every rank starts the same
reductions in the same order, whatever the order of its own backward. A parameter that the last
backward does not use holds back its bucket and those behind it, until the backward's end.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dist_vse.distributed import AsyncReduce, rank, world_size

BUCKET = 1 << 20  # elements; a larger share is a bucket of its own


@dataclass(frozen=True)
class Share:
    """Elements `start` to `start + length` of a flattened parameter, which go the same way."""

    parameter: nn.Parameter
    start: int
    length: int
    owner: int | None
    """The rank that needs their gradient; None for all."""
    wire: torch.dtype
    """The type that they are sent in."""

    def gradient(self) -> Tensor:
        """Return the view (length,) of the gradient; one that has none gets zeros."""
        if self.parameter.grad is None:
            self.parameter.grad = torch.zeros_like(self.parameter)
        return self.parameter.grad.view(-1)[self.start : self.start + self.length]


def find_shares(engine: Any, module: nn.Module, *, stage: int) -> list[Share]:
    """List what is reduced under ZeRO 0, 1 or 2, from the insides of a DeepSpeed engine.

    In the order of the model's parameters.
    """
    trainable = [p for p in module.parameters() if p.requires_grad]
    if stage == 0:
        return [Share(p, 0, p.numel(), None, p.dtype) for p in trainable]
    zero, shares = engine.optimizer, defaultdict[int, list[Share]](list)
    for number, group in enumerate(zero.bit16_groups):
        for parameter in group:
            key = zero.get_param_id(parameter)
            owners = zero.param_to_partition_ids[number][key]
            starts = sorted((zero.grad_start_offset[number][o][key], o) for o in owners)
            ends = [start for start, _ in starts[1:]] + [parameter.numel()]
            wire = getattr(parameter, "comm_dtype", parameter.dtype)  # lower under autocast
            for (start, owner), end in zip(starts, ends, strict=True):
                shares[id(parameter)].append(Share(parameter, start, end - start, owner, wire))
    return [share for parameter in trainable for share in shares[id(parameter)]]


class _Bucket:
    """Shares that are sent as one message."""

    def __init__(self, shares: Sequence[Share]) -> None:
        self._shares, self._owner = shares, shares[0].owner
        self._parameters = {id(share.parameter) for share in shares}
        self._message: Tensor | None = None
        self._reduction: AsyncReduce | None = None

    def is_complete(self, arrived: set[int]) -> bool:
        return self._parameters <= arrived

    def send(self) -> None:
        # A copy: a gradient may lie in memory that the backward goes on reading.
        gradients = [share.gradient().to(share.wire) for share in self._shares]
        self._message = torch.cat(gradients)
        self._reduction = AsyncReduce(self._message, self._owner)

    def receive(self) -> None:
        assert self._reduction is not None and self._message is not None, "not sent"
        self._reduction.wait()
        if self._owner in (None, rank()):
            parts = self._message.split([share.length for share in self._shares])
            for share, part in zip(self._shares, parts, strict=True):
                share.gradient().copy_(part)
        self._message = self._reduction = None


class GradientReduction:
    """Sums gradients over the ranks, each to its owner, beside a backward.

    Every rank calls `start`, runs the backward that completes the gradients, and calls `finish`.
    """

    def __init__(self, shares: Sequence[Share]) -> None:
        """Cut the shares, in the order of the model, into buckets."""
        self._buckets = [_Bucket(bucket) for bucket in _buckets(list(reversed(shares)))]
        self._arrived: set[int] = set()
        self._num_sent = 0
        self._started = False
        for parameter in {id(s.parameter): s.parameter for s in shares}.values():
            parameter.register_post_accumulate_grad_hook(self._arrive)

    def start(self) -> None:
        """Send gradients as they arrive, from here on."""
        self._arrived.clear()
        self._num_sent = 0
        self._started = world_size() > 1

    def finish(self) -> None:
        """Send what is left and wait for all: `.grad` is the sum over the ranks on its owner."""
        if not self._started:
            return
        self._started = False
        for bucket in self._buckets[self._num_sent :]:
            bucket.send()
        for bucket in self._buckets:
            bucket.receive()

    def _arrive(self, parameter: Tensor) -> None:
        if not self._started:
            return
        self._arrived.add(id(parameter))
        for bucket in self._buckets[self._num_sent :]:
            if not bucket.is_complete(self._arrived):
                return
            bucket.send()
            self._num_sent += 1


def _buckets(shares: Sequence[Share]) -> Iterator[list[Share]]:
    """Yield the shares in buckets of one owner and type, about in the order given."""
    open_buckets = defaultdict[tuple[int | None, torch.dtype], list[Share]](list)
    for share in shares:
        kind = share.owner, share.wire
        if share.length >= BUCKET:
            yield [share]
            continue
        open_buckets[kind].append(share)
        if sum(s.length for s in open_buckets[kind]) >= BUCKET:
            yield open_buckets.pop(kind)
    yield from open_buckets.values()
