"""How the captions of all ranks meet the images of this one: gathered once, or passed round.

Images stay where they are. Only one side travels: its features on the way forward, its
gradients on the way back. b rows on this rank, N on all, W ranks, d embedding.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

from torch import Tensor

from dist_vse import distributed
from dist_vse.losses.layout import Layout


class Block(NamedTuple):
    """Consecutive captions of the global batch."""

    columns: slice
    features: Tensor  # (columns, d)
    teacher: Tensor | None = None  # (columns, d'): what another model makes of the captions

    def within(self, columns: slice) -> slice:
        """Return where columns of the global batch lie in this block."""
        return slice(columns.start - self.columns.start, columns.stop - self.columns.start)


Contribute = Callable[[Block], Tensor]
"""Return this rank's gradient of a block's features (columns, d)."""


class Transport(Protocol):
    """Shows all captions to this rank, and brings their gradients home."""

    def blocks(self) -> Iterator[Block]:
        """Yield the captions of all ranks; every rank must exhaust it."""

    def collect(self, contribute: Contribute) -> Tensor:
        """Return the sum over the ranks of this rank's captions' gradients (b, d)."""


class Gather:
    """One all-gather of the captions, one reduce-scatter of their gradients: memory O(N d).

    `gathered` are the captions of all ranks (N, d), where they have come already.
    """

    def __init__(self, features: Tensor, layout: Layout, gathered: Tensor | None = None) -> None:
        self.layout = layout
        captions = layout.gather(features) if gathered is None else gathered.to(features.dtype)
        self.block = Block(slice(0, layout.total), captions)

    def blocks(self) -> Iterator[Block]:
        yield self.block

    def collect(self, contribute: Contribute) -> Tensor:
        return self.layout.scatter_sum(contribute(self.block))


class WithTeacher:
    """The captions of all ranks, each block with what a teacher made of them.

    Both transports are of one kind, and show the same columns in the same order.
    """

    def __init__(self, captions: Transport, teacher: Transport) -> None:
        self.captions, self.teacher = captions, teacher

    def blocks(self) -> Iterator[Block]:
        for block, of_teacher in zip(self.captions.blocks(), self.teacher.blocks(), strict=True):
            yield block._replace(teacher=of_teacher.features)

    def collect(self, contribute: Contribute) -> Tensor:
        """Return the gradients of this rank's captions (b, d); a teacher has none."""
        of_teacher = self.teacher.blocks()
        return self.captions.collect(
            lambda block: contribute(block._replace(teacher=next(of_teacher).features))
        )


class Ring:
    """The captions travel from neighbour to neighbour, their gradients after them: O(b d).

    In turn k this rank holds the captions of rank + k. What travels overlaps with the work on
    the block at hand.
    """

    def __init__(self, features: Tensor, layout: Layout) -> None:
        self.layout = layout
        self.features = features.contiguous()

    def blocks(self) -> Iterator[Block]:
        world_size = len(self.layout.counts)
        held = self.features
        for turn in range(world_size):
            pending = self._pass_on(held, turn + 1) if turn + 1 < world_size else None
            yield Block(self.layout.block(self._owner(turn)), held)
            if pending is not None:
                held = pending.wait()

    def collect(self, contribute: Contribute) -> Tensor:
        travelling: distributed.AsyncSendRecv | None = None
        for turn, block in enumerate(self.blocks()):
            gradient = contribute(block)
            if travelling is not None:
                gradient += travelling.wait()
            # It goes to the neighbour that holds this block next; after the last turn, home.
            travelling = self._pass_on(gradient, turn + 1)
        assert travelling is not None
        return travelling.wait()

    def _owner(self, turn: int) -> int:
        return (self.layout.rank + turn) % len(self.layout.counts)

    def _pass_on(self, held: Tensor, next_turn: int) -> distributed.AsyncSendRecv:
        """Send to the rank before this one; receive what this rank holds in its next turn."""
        rows = self.layout.counts[self._owner(next_turn)]
        return distributed.AsyncSendRecv(
            held,
            held.new_empty((rows, held.shape[1])),
            destination=self._owner(-1),
            source=self._owner(1),
        )
