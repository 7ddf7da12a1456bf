"""Gradients averaged over the ranks while the last backward of a step still runs.

As PyTorch's DDP does it (Li et al., 2020, https://arxiv.org/abs/2006.15704): the gradients lie in
buckets, in the reverse of the model's order, which is about the order of the backward. A bucket is
sent once its gradients and those of all buckets before it are there; so every rank starts the same
reductions in the same order, whatever the order of its own backward. A parameter that the last
backward does not use holds back its bucket and those behind it, until the backward's end.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dist_vse.distributed import AsyncReduce, rank, world_size

BUCKET = 1 << 20  # elements; a larger slice is a bucket of its own
CUDA_BUCKET = 1 << 23  # 32 MB, about DDP's: NCCL takes as long for a small message as for a larger


@dataclass(frozen=True)
class GradientSlice:
    """Elements `start` to `start + length` of a flattened parameter's gradient."""

    parameter: nn.Parameter
    start: int
    length: int
    owner: int | None
    """The rank that needs their average; None for all."""
    wire_dtype: torch.dtype
    """The type that they are sent in."""

    def gradient(self) -> Tensor:
        """Return the view (length,) of the gradient; one that has none gets zeros."""
        if self.parameter.grad is None:
            self.parameter.grad = torch.zeros_like(self.parameter)
        return self.parameter.grad.view(-1)[self.start : self.start + self.length]


class _Bucket:
    """Slices that are sent as one message."""

    def __init__(self, slices: Sequence[GradientSlice]) -> None:
        self._slices, self._owner = slices, slices[0].owner
        self._parameters = {id(item.parameter) for item in slices}
        self._message: Tensor | None = None
        self._reduction: AsyncReduce | None = None

    def is_complete(self, arrived: set[int]) -> bool:
        return self._parameters <= arrived

    def send(self) -> None:
        # A copy: a gradient may lie in memory that the backward goes on reading.
        gradients = [item.gradient().to(item.wire_dtype) for item in self._slices]
        self._message = torch.cat(gradients)
        self._reduction = AsyncReduce(self._message, self._owner)

    def receive(self) -> None:
        assert self._reduction is not None and self._message is not None, "not sent"
        self._reduction.wait()
        if self._owner in (None, rank()):
            # To the bit as DeepSpeed averages under ZeRO 0 (all own all), and under 1 and 2.
            if self._owner is None:
                self._message.mul_(1 / world_size())
            else:
                self._message.div_(world_size())
            parts = self._message.split([item.length for item in self._slices])
            for item, part in zip(self._slices, parts, strict=True):
                item.gradient().copy_(part)
        self._message = self._reduction = None


class GradientReduction:
    """Averages gradients over the ranks, each for its owner, during a backward.

    Every rank calls `start`, runs the backward that completes the gradients, and calls `finish`.
    """

    def __init__(self, slices: Sequence[GradientSlice]) -> None:
        """Put the slices, given in the order of the model, into buckets."""
        self._slices = slices
        on_gpu = any(item.parameter.is_cuda for item in slices)
        buckets = _buckets(list(reversed(slices)), CUDA_BUCKET if on_gpu else BUCKET)
        self._buckets = [_Bucket(bucket) for bucket in buckets]
        self._arrived: set[int] = set()
        self._num_sent = 0
        self._started = False
        for parameter in {id(item.parameter): item.parameter for item in slices}.values():
            parameter.register_post_accumulate_grad_hook(self._arrive)

    def start(self) -> None:
        """Send gradients as they arrive, from here on."""
        self._arrived.clear()
        self._num_sent = 0
        self._started = world_size() > 1

    def finish(self) -> None:
        """Send what is left and wait for all: `.grad` is the average on its owner.

        A parameter that took no part in the backward gets zeros.
        """
        if world_size() == 1:  # nothing is sent, but rounded as if it were
            for item in self._slices:
                gradient = item.gradient()
                gradient.copy_(gradient.to(item.wire_dtype))
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


def _buckets(slices: Sequence[GradientSlice], size: int) -> Iterator[list[GradientSlice]]:
    """Yield the slices in buckets of one owner and type, about in the order given."""
    open_buckets = defaultdict[tuple[int | None, torch.dtype], list[GradientSlice]](list)
    for item in slices:
        kind = item.owner, item.wire_dtype
        if item.length >= size:
            yield [item]
            continue
        open_buckets[kind].append(item)
        if sum(s.length for s in open_buckets[kind]) >= size:
            yield open_buckets.pop(kind)
    yield from open_buckets.values()
