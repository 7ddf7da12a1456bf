"""Texts without an image: further columns, which are negatives of all images.

Hard negatives as NegCLIP's (https://arxiv.org/abs/2210.01936): the rows' candidates are the N
captions and the M negatives of all ranks; the columns that choose an image are the captions alone.
So column N + k is negative k. b rows and m negatives on this rank.
"""

from bisect import bisect_left
from collections.abc import Iterator

import torch
from torch import Tensor

from dist_vse.losses.layout import sent
from dist_vse.losses.transport import Block, Contribute, Transport


class WithNegatives:
    """The captions of all ranks, and then their negatives, each by a transport of its own."""

    def __init__(self, captions: Transport, negatives: Transport, num_captions: int) -> None:
        self.captions, self.negatives = captions, negatives
        self.offset = num_captions  # N

    def blocks(self) -> Iterator[Block]:
        yield from self.captions.blocks()
        for block in self.negatives.blocks():
            yield self._behind(block)

    def collect(self, contribute: Contribute) -> Tensor:
        """Return the gradients of this rank's captions and of its negatives (b + m, d)."""
        of_captions = self.captions.collect(contribute)
        of_negatives = self.negatives.collect(lambda block: contribute(self._behind(block)))
        return torch.cat([of_captions, of_negatives])

    def _behind(self, block: Block) -> Block:
        columns = slice(block.columns.start + self.offset, block.columns.stop + self.offset)
        return Block(columns, block.features)


class Negatives:
    """How many negatives there are, and which of them are the caption of a row here.

    Such a text is true of the row's image, so that pair counts as nothing. The ids, int64 (b,) and
    (M,), are compared on the host.
    """

    def __init__(
        self,
        total: int,
        num_captions: int,
        device: torch.device,
        text_ids: Tensor | None = None,
        negative_ids: Tensor | None = None,
    ) -> None:
        self.total = total  # M
        self.offset = num_captions  # N
        self.device = device
        none = torch.empty(0, dtype=torch.long)
        self.text_ids = none if text_ids is None else text_ids
        self.negative_ids = none if negative_ids is None else negative_ids
        here = torch.isin(self.text_ids, self.negative_ids)
        there = torch.isin(self.negative_ids, self.text_ids)
        self._rows: list[int] = here.nonzero().view(-1).tolist()
        self._columns: list[int] = there.nonzero().view(-1).tolist()

    def true_pairs(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor] | None:
        """Return where a tile's negatives are their row's caption: indices on the device."""
        start, stop = columns.start - self.offset, columns.stop - self.offset
        left = _within(self._rows, rows.start, rows.stop)
        right = _within(self._columns, start, stop)
        if stop <= 0 or not len(left) or not len(right):
            return None
        same = self.text_ids[left].unsqueeze(1) == self.negative_ids[right].unsqueeze(0)
        i, j = same.nonzero(as_tuple=True)
        if not len(i):
            return None
        return sent(left[i] - rows.start, self.device), sent(right[j] - start, self.device)


def _within(numbers: list[int], start: int, stop: int) -> Tensor:
    """Return those of a sorted list that lie in [start, stop)."""
    first, last = bisect_left(numbers, start), bisect_left(numbers, stop)
    return torch.tensor(numbers[first:last], dtype=torch.long)
