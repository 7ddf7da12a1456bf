"""Where every rank's rows lie in the global batch, and which pairs of it are duplicates."""

from bisect import bisect_left
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_vse import distributed


@dataclass(frozen=True)
class Layout:
    """The global batch: every rank's number of rows, in rank order; this rank's number."""

    counts: tuple[int, ...]
    rank: int

    @property
    def total(self) -> int:
        """Rows on all ranks (N)."""
        return sum(self.counts)

    @property
    def own(self) -> slice:
        """This rank's rows within the global batch."""
        return self.block(self.rank)

    def block(self, rank: int) -> slice:
        """Rows of a rank within the global batch."""
        start = sum(self.counts[:rank])
        return slice(start, start + self.counts[rank])

    def gather(self, rows: Tensor) -> Tensor:
        """Concatenate the rows of all ranks, (b, ...) -> (N, ...)."""
        return distributed.gather_ragged_rows(rows, self.counts)

    def scatter_sum(self, rows: Tensor) -> Tensor:
        """Sum over the ranks and keep this rank's rows, (N, ...) -> (b, ...)."""
        longest = max(self.counts)
        if min(self.counts) == longest:
            return distributed.reduce_scatter_rows(rows)
        padded = rows.new_zeros((len(self.counts), longest, *rows.shape[1:]))
        for rank, count in enumerate(self.counts):
            padded[rank, :count] = rows[self.block(rank)]
        return distributed.reduce_scatter_rows(padded.flatten(0, 1))[: self.counts[self.rank]]


class DuplicatePairs:
    """Pairs i != j of the global batch that share an image or a caption.

    Few rows have duplicates in an ordinary batch, so only those are ever compared. `ids` is int64
    (N, k): what a row shares in any of the k columns makes a duplicate. They lie in host memory,
    and all is found there: how many duplicates a tile has would else be read back from `device`,
    where the indices are used.
    """

    def __init__(self, ids: Tensor, layout: Layout, device: torch.device) -> None:
        self.ids = ids
        self.device = device
        self.offset = layout.own.start
        self.group_sizes = _group_sizes(ids)  # (N,): a row, and all of its duplicates
        self.flagged = (self.group_sizes > 1).nonzero().view(-1)
        self._sorted: list[int] = self.flagged.tolist()

    def __bool__(self) -> bool:
        return bool(self._sorted)

    def pairs(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor] | None:
        """Return where the duplicates lie in a tile: rows of this rank times columns of all.

        The indices are on the device.
        """
        left = self._within(rows.start + self.offset, rows.stop + self.offset)
        right = self._within(columns.start, columns.stop)
        if not len(left) or not len(right):
            return None
        same = left.view(-1, 1) != right.view(1, -1)
        same &= (self.ids[left].unsqueeze(1) == self.ids[right].unsqueeze(0)).any(2)
        i, j = same.nonzero(as_tuple=True)
        if not len(i):
            return None
        of_rows, of_columns = left[i] - (rows.start + self.offset), right[j] - columns.start
        return sent(of_rows, self.device), sent(of_columns, self.device)

    def shares(self, dtype: torch.dtype) -> Tensor:
        """Return one over each row's group size (N,), on the device."""
        return sent(1 / self.group_sizes.to(dtype), self.device)

    def _within(self, start: int, stop: int) -> Tensor:
        return self.flagged[bisect_left(self._sorted, start) : bisect_left(self._sorted, stop)]


def sent(x: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of host memory on the device; the host waits for nothing."""
    return x if device.type == "cpu" else x.pin_memory().to(device, non_blocking=True)


def _group_sizes(ids: Tensor) -> Tensor:
    """Count for each row the rows that share any id with it, itself included."""
    codes, sizes = [], torch.zeros(len(ids), dtype=torch.long, device=ids.device)
    for column in ids.unbind(1):
        _, code, count = column.unique(return_inverse=True, return_counts=True)
        codes.append(code)
        sizes += count[code]
    if len(codes) == 2:  # those that share both were counted twice
        _, both, count = (codes[0] * len(ids) + codes[1]).unique(
            return_inverse=True, return_counts=True
        )
        sizes -= count[both]
    return sizes
