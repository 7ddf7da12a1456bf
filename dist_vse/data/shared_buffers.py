"""Room for whole batches of images that workers fill and the trainer looks at, without a copy.

A slot is used again once nobody holds the tensors that were made of it. While all are held, a
batch goes the slow way: its images come from the workers as tensors and are joined.
"""

import weakref
from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor

from dist_vse.common.errors import UserError, first_line


class Slots:
    """Shared memory for the images of some batches, and which of it is free."""

    def __init__(self, number: int, rows: int, side: int) -> None:
        """Make `number` slots of `rows` images.

        Raises UserError where /dev/shm is too small.
        """
        shape = (number, rows, side, side, 3)
        num_bytes = number * rows * side * side * 3
        try:
            storage = torch.UntypedStorage._new_shared(num_bytes)
        except RuntimeError as error:
            raise UserError(
                f"no {num_bytes:,} bytes of shared memory for batches ({first_line(error)}); make "
                "/dev/shm larger, or set data.num_workers=0, which needs none"
            ) from error
        self.images: Tensor = torch.empty(0, dtype=torch.uint8).set_(storage, 0, shape)  # type: ignore[call-overload]
        self._arrays = self.images.numpy()
        self._free = deque(range(number))
        self._given: deque[int | None] = deque()  # of the batches that are under way, in order

    def tasks(self, num_workers: int) -> Iterator[int | None]:
        """Yield each batch's slot to each worker in turn; None where it has none.

        The first batch has none: a worker that has not begun cannot take one.
        """
        slot = None
        while True:
            self._given.append(slot)
            for _ in range(num_workers):
                yield slot
            slot = self._free.popleft() if self._free else None

    def take(self) -> Tensor | None:
        """Return the images of the next batch, uint8 (b, 3, h, w); None if they lie in no slot."""
        slot = self._given.popleft()
        if slot is None:
            return None
        array = self._arrays[slot]
        weakref.finalize(array, self._free.append, slot)  # the tensor holds on to the array
        return torch.from_numpy(array).permute(0, 3, 1, 2)
